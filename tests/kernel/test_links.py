"""The node's own addresses, and the socket that tells of a change."""

from __future__ import annotations

import asyncio
import select
import subprocess
from collections.abc import Iterator

import pytest

from netpol.kernel.links import AddressMonitor, own_addresses
from netpol.kernel.netns import in_netns
from netpol.kernel.sysctl import keep_sysctl, read_sysctl
from netpol.kernel.vips import LINK
from netpol.model.net import parse_address

pytestmark = pytest.mark.kernel


def ip(space: str, *args: str) -> None:
    subprocess.run(["ip", "-n", space, *args], check=True)


@pytest.fixture
def monitor(space: str) -> Iterator[AddressMonitor]:
    found = in_netns(space, AddressMonitor)
    yield found
    found.close()


def test_addresses_of_all_interfaces_but_loopback_and_link_local(space: str) -> None:
    assert in_netns(space, own_addresses) == ()
    ip(space, "link", "add", "br0", "type", "bridge")
    ip(space, "addr", "add", "10.244.1.1/24", "dev", "br0")
    ip(space, "addr", "add", "fd00:244::1/64", "dev", "br0", "nodad")
    ip(space, "addr", "add", "fe80::7/64", "dev", "br0", "nodad")
    ip(space, "addr", "add", "10.96.0.1/32", "dev", "lo")  # a VIP on the loopback interface counts
    wanted = sorted(parse_address(a) for a in ("10.244.1.1", "fd00:244::1", "10.96.0.1"))
    assert list(in_netns(space, own_addresses)) == wanted


def test_the_far_end_of_a_point_to_point_link_is_not_ours(space: str) -> None:
    ip(space, "link", "add", "d0", "type", "bridge")
    ip(space, "addr", "add", "10.1.1.1", "peer", "10.1.1.2/32", "dev", "d0")
    assert in_netns(space, own_addresses) == (parse_address("10.1.1.1"),)


async def test_a_change_wakes_the_loop_once_drained(space: str, monitor: AddressMonitor) -> None:
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()

    def readable() -> None:
        monitor.drain()
        woken.set()

    ip(space, "link", "add", "d0", "type", "bridge")
    loop.add_reader(monitor.fileno(), readable)
    try:
        for verb in ("add", "del"):
            woken.clear()
            ip(space, "addr", verb, "10.1.1.1/24", "dev", "d0")
            await asyncio.wait_for(woken.wait(), 2)
    finally:
        loop.remove_reader(monitor.fileno())


def test_a_burst_that_overruns_the_socket_is_still_an_event(
    space: str, monitor: AddressMonitor
) -> None:
    ip(space, "link", "add", "d0", "type", "bridge")
    lines = "".join(f"addr add 10.{n // 200}.{n % 200}.1/32 dev d0\n" for n in range(2000))
    subprocess.run(["ip", "-n", space, "-b", "-"], input=lines, text=True, check=True)
    assert select.select([monitor.fileno()], [], [], 1)[0]
    assert monitor.drain()
    assert not select.select([monitor.fileno()], [], [], 0)[0]


def test_addresses_of_services_are_not_the_nodes_and_wake_nobody(
    space: str, monitor: AddressMonitor
) -> None:
    for link, address in ((LINK, "10.96.0.10/32"), ("d0", "10.1.1.1/32")):
        ip(space, "link", "add", link, "type", "bridge")
        ip(space, "addr", "add", address, "dev", link)
        assert in_netns(space, monitor.drain) is (link != LINK)
    assert in_netns(space, own_addresses) == (parse_address("10.1.1.1"),)


def test_a_sysctl_of_a_namespace_is_read_and_kept(space: str) -> None:
    # /proc/sys/net is the namespace of the thread that opens it.
    key = "net/ipv4/ip_forward"
    assert in_netns(space, lambda: read_sysctl(key)) == "0"
    assert in_netns(space, lambda: keep_sysctl(key, "1")) is None
    assert in_netns(space, lambda: read_sysctl(key)) == "1"
    assert in_netns(space, lambda: read_sysctl("net/none/such")) is None
    refused = in_netns(space, lambda: keep_sysctl(key, "not a number"))
    assert refused is not None
    assert refused.startswith("sysctl net.ipv4.ip_forward: needed not a number, got 1")
