"""Addresses of Services on the kernel, beyond the contract: routes, and what the node speaks with.

Each check gets a namespace of its own with the node's addresses, and a driver in it.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable

from netpol.kernel import netns
from netpol.kernel.netns import in_netns
from netpol.kernel.sysctl import keep_sysctl
from netpol.kernel.vips import LINK, DummyVips
from netpol.model.net import Family, format_address
from tests.uml.inside.contract_vips import NODE4, NODE6, SECOND4, SECOND6, SOURCES, V4, V6

Check = Callable[[str, DummyVips], None]


def ip(space: str, *args: str) -> str:
    done = subprocess.run(["ip", "-n", space, *args], capture_output=True, text=True, check=True)
    return done.stdout


def in_a_node(check: Check) -> None:
    """Run a check in a namespace with the node's addresses."""
    space = "vips-node"
    netns.create(space)
    try:
        ip(space, "link", "add", "eth0", "type", "dummy")
        ip(space, "link", "set", "eth0", "up")
        for address in (NODE4, SECOND4):
            ip(space, "addr", "add", f"{format_address(address)}/32", "dev", "eth0")
        for address in (NODE6, SECOND6):
            ip(space, "addr", "add", f"{format_address(address)}/128", "dev", "eth0", "nodad")
        vips = in_netns(space, DummyVips)
        try:
            check(space, vips)
        finally:
            vips.close()
    finally:
        netns.delete(space)


def seen_by_itself(space: str, address: bytes) -> str:
    """What the node's own listener at an address sees when the node speaks to it."""

    def ask() -> str:
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        with (
            socket.socket(family, socket.SOCK_DGRAM) as ear,
            socket.socket(family, socket.SOCK_DGRAM) as mouth,
        ):
            ear.settimeout(2)
            ear.bind(("", 5300))
            mouth.sendto(b"?", (format_address(address), 5300))
            return str(ear.recvfrom(16)[1][0])

    return in_netns(space, ask)


def check_the_node_speaks_with_its_own_address(node: str, vips: DummyVips) -> None:
    for address, source in ((V4, NODE4), (V6, NODE6)):
        vips.apply(add=[address], remove=[])
        assert seen_by_itself(node, address) == format_address(address)
        vips.apply(add=[address], remove=[], sources=SOURCES)
        assert seen_by_itself(node, address) == format_address(source)


def check_what_is_removed_is_not_local_any_more(node: str, vips: DummyVips) -> None:
    for address, flag in ((V4, "-4"), (V6, "-6")):
        vips.apply(add=[address], remove=[], sources=SOURCES)
        local = ip(node, flag, "route", "show", "table", "local")
        assert local.count(format_address(address)) == 1
        vips.apply(add=[], remove=[address])
        local = ip(node, flag, "route", "show", "table", "local")
        assert format_address(address) not in local


def check_a_source_that_leaves_the_node(node: str, vips: DummyVips) -> None:
    """The kernel drops the routes that have it; they are told, and put right with another one."""
    vips.apply(add=[V4, V6], remove=[], sources=SOURCES)
    for address, length in ((NODE4, 32), (NODE6, 128)):
        ip(node, "addr", "del", f"{format_address(address)}/{length}", "dev", "eth0")
    second = {Family.V4: SECOND4, Family.V6: SECOND6}
    assert vips.misrouted(second) == {V4, V6}
    assert vips.apply(add=[V4, V6], remove=[], sources=second) == ()
    assert vips.misrouted(second) == frozenset()
    assert seen_by_itself(node, V4) == format_address(SECOND4)
    assert seen_by_itself(node, V6) == format_address(SECOND6)


def check_a_link_that_goes_down(node: str, vips: DummyVips) -> None:
    """IPv6 loses its addresses with that, and gets them back with the next change."""
    vips.apply(add=[V4, V6], remove=[], sources=SOURCES)
    ip(node, "link", "set", LINK, "down")
    assert vips.dump() == {V4}
    vips.apply(add=[V4, V6], remove=[], sources=SOURCES)
    assert vips.dump() == {V4, V6}
    assert vips.misrouted(SOURCES) == frozenset()
    assert seen_by_itself(node, V6) == format_address(NODE6)


def check_ipv6_where_new_links_have_it_off(node: str, vips: DummyVips) -> None:
    key = "net/ipv6/conf/default/disable_ipv6"
    assert in_netns(node, lambda: keep_sysctl(key, "1")) is None
    assert vips.apply(add=[V4], remove=[], sources=SOURCES) == ()
    assert vips.apply(add=[V6], remove=[], sources=SOURCES) == ()
    assert vips.dump() == {V4, V6}
    assert seen_by_itself(node, V6) == format_address(NODE6)


def check_addresses_of_other_links_are_not_seen(node: str, vips: DummyVips) -> None:
    ip(node, "link", "add", "kube-ipvs0", "type", "dummy")
    ip(node, "addr", "add", "10.96.0.9/32", "dev", "kube-ipvs0")
    vips.apply(add=[V4], remove=[])
    assert vips.dump() == {V4}
    vips.apply(add=[], remove=[bytes([10, 96, 0, 9])])
    vips.remove_link()
    assert "10.96.0.9" in ip(node, "addr", "show", "dev", "kube-ipvs0")


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
