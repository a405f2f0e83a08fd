"""What the kernel routes by BIRD, and the link that leads to the other nodes: rtnetlink.

BIRD writes the routes; this reads the truth back, and takes away what a BIRD left that is gone. In the
calling thread's network namespace.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from typing import Any, NamedTuple

from pyroute2 import IPRoute, NetlinkError

from netpol.kernel.links import link_addresses
from netpol.lib.errors import KernelError
from netpol.model.net import Prefix, masked

#: linux/rtnetlink.h: who made a route (RTPROT_BIRD), the main table, what a route does (RTN_*).
_RTPROT_BIRD = 12
_RT_TABLE_MAIN = 254
_RTN_UNICAST = 1


class KernelRoute(NamedTuple):
    """A route of BIRD's: `reachable` is false for one that only refuses."""

    prefix: Prefix
    reachable: bool
    gateways: tuple[bytes, ...]
    link: int


class Underlay(NamedTuple):
    """The link that has the node's address.

    Attributes:
        name: of the link.
        mtu: bytes that it takes.
        subnets: what it is connected to, of both families; link-local is no subnet.
        connected: what other links are connected to: loopback and single addresses are no network.
        addresses: the link's own.
        number: index of the link.
    """

    name: str
    mtu: int
    subnets: tuple[Prefix, ...]
    connected: tuple[Prefix, ...] = ()
    addresses: tuple[bytes, ...] = ()
    number: int = 0


def bird_routes() -> tuple[KernelRoute, ...]:
    """All routes of BIRD's in the main table, both families.

    Raises:
        KernelError: the kernel does not answer.
    """
    out: list[KernelRoute] = []
    try:
        with IPRoute() as route:
            for family in (socket.AF_INET, socket.AF_INET6):
                found = route.get_routes(family=family, table=_RT_TABLE_MAIN, proto=_RTPROT_BIRD)
                out += [_route(m, family) for m in found]
    except NetlinkError as e:
        raise KernelError("reading routes", got=str(e)) from e
    return tuple(out)


def remove_bird_routes() -> int:
    """Delete all routes of BIRD's from the main table; returns how many there were.

    Raises:
        KernelError: the kernel refuses, or somebody adds them again.
    """
    count = len(bird_routes())
    try:
        with IPRoute() as route:
            for family in (socket.AF_INET, socket.AF_INET6):
                route.flush_routes(family=family, table=_RT_TABLE_MAIN, proto=_RTPROT_BIRD)
    except NetlinkError as e:
        raise KernelError("removing routes", got=str(e)) from e
    rest = len(bird_routes())
    if rest:
        raise KernelError("removing routes of BIRD", needed="none", got=f"{rest} left")
    return count


def _route(message: Any, family: int) -> KernelRoute:
    text = message.get("RTA_DST")
    bits = 4 if family == socket.AF_INET else 16
    address = ipaddress.ip_address(text).packed if text else bytes(bits)
    hops = message.get("RTA_MULTIPATH") or [message]
    gateways = tuple(
        ipaddress.ip_address(g).packed for h in hops if (g := h.get("RTA_GATEWAY")) is not None
    )
    return KernelRoute(
        Prefix(address, message["dst_len"]),
        message["type"] == _RTN_UNICAST,
        gateways,
        message.get("RTA_OIF") or 0,
    )


def underlay(addresses: Collection[bytes]) -> Underlay | None:
    """The link with one of these addresses; None where there is none.

    Raises:
        KernelError: the kernel does not answer.
    """
    try:
        found = list(link_addresses())
        index = next((i for i, a, _ in found if a in addresses), None)
        if index is None:
            return None
        with IPRoute() as route:
            (link,) = route.get_links(index)
    except (NetlinkError, OSError) as e:
        raise KernelError("reading addresses", got=str(e)) from e
    networks: dict[bool, set[Prefix]] = {True: set(), False: set()}
    for i, a, length in found:
        ip = ipaddress.ip_address(a)
        # Of other links a single address may come with every pod (ptp) or Service.
        if not ip.is_link_local and not ip.is_loopback and (i == index or length < len(a) * 8):
            networks[i == index].add(masked(a, length))
    return Underlay(
        str(link.get("IFLA_IFNAME")),
        int(link.get("IFLA_MTU")),
        tuple(sorted(networks[True])),
        tuple(sorted(networks[False])),
        tuple(sorted(a for i, a, _ in found if i == index)),
        index,
    )
