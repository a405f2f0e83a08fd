"""What the kernel does with packets to an address, as it says itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from netpol.kernel import netns
from netpol.kernel.fib import Way, way_to
from netpol.model.net import format_address, parse_address

pytestmark = pytest.mark.kernel

ROUTES = """\
link set lo up
link add d0 type bridge
link set d0 up
address add 10.0.0.1/24 dev d0
address add fd00::1/64 dev d0 nodad
route add 10.1.0.0/16 via 10.0.0.2 proto bird metric 32
route add 10.1.5.0/24 via 10.0.0.3 proto static
route add unreachable 10.2.0.0/24 proto bird metric 32
route add blackhole 10.3.0.0/24
route add prohibit 10.4.0.0/24
route add 10.5.0.0/24 proto bird nexthop via 10.0.0.2 nexthop via 10.0.0.3
route add 10.6.0.0/24 via inet6 fd00::2 proto bird
route add fd01::/64 via fd00::2 proto bird metric 32
route add unreachable fd02::/64 proto bird metric 32
"""


@pytest.fixture(scope="module")
def space() -> Iterator[str]:
    name = f"knpt-fib{os.getpid()}"
    netns.create(name)
    try:
        subprocess.run(["ip", "-n", name, "-batch", "-"], input=ROUTES, text=True, check=True)
        yield name
    finally:
        netns.delete(name)


def way(space: str, address: str) -> Way:
    return netns.in_netns(space, lambda: way_to(parse_address(address)))


@pytest.mark.parametrize(
    ("address", "prefix", "maker", "gateways"),
    [
        ("10.1.1.1", "10.1.0.0/16", "bird", ["10.0.0.2"]),
        ("10.1.5.1", "10.1.5.0/24", "static", ["10.0.0.3"]),
        ("10.0.0.9", "10.0.0.0/24", "kernel", []),
        ("10.5.0.1", "10.5.0.0/24", "bird", ["10.0.0.2", "10.0.0.3"]),
        ("10.6.0.1", "10.6.0.0/24", "bird", ["fd00::2"]),
        ("fd01::1", "fd01::/64", "bird", ["fd00::2"]),
        ("fd00::9", "fd00::/64", "kernel", []),
    ],
)
def test_the_route_that_is_taken(
    space: str, address: str, prefix: str, maker: str, gateways: list[str]
) -> None:
    found = way(space, address)
    assert (str(found.prefix), found.maker, found.reachable) == (prefix, maker, True)
    assert [format_address(g) for g in found.gateways] == gateways
    assert found.links == ("d0",)


@pytest.mark.parametrize("address", ["10.2.0.1", "10.3.0.1", "10.4.0.1", "fd02::1"])
def test_a_route_that_refuses(space: str, address: str) -> None:
    assert way(space, address) == Way(refused=True)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_no_route(space: str, address: str) -> None:
    assert way(space, address) == Way()


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1", "127.0.0.1"])
def test_the_nodes_own_address(space: str, address: str) -> None:
    assert way(space, address).local
