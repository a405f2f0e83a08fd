"""Where the kernel sends packets to an address: asked of the kernel itself (RTM_GETROUTE).

Its answer knows all rules, tables and routes, whoever made them. In the calling thread's network namespace.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from netpol.kernel.netlink import HEADER_SIZE, NLM_F_REQUEST, NLMSG_ERROR, attributes, messages, nla
from netpol.lib.errors import KernelError
from netpol.model.net import Prefix, masked

#: linux/rtnetlink.h
_NEWROUTE, _GETROUTE = 24, 26
_RTM_F_FIB_MATCH = 0x2000
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA = 1, 4, 5, 9, 18
_RTN_LOCAL = 2
#: RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT: routes that refuse.
_REFUSING = (6, 7, 8)
_RTPROT_BIRD = 12
#: RTPROT_*: who makes routes, by the names that `ip route` has for them.
_MAKERS = {2: "kernel", 3: "boot", 4: "static", 9: "ra", 16: "dhcp", 186: "bgp", 188: "ospf"}
#: struct nlmsghdr, rtmsg, nlmsgerr, rtnexthop.
_HEADER = struct.Struct("=IHHII")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ERROR = struct.Struct("=i")
_NEXTHOP = struct.Struct("=HBBi")
_TIMEOUT_S = 5.0
#: What the kernel says of an address that it has no route to, or one that only refuses.
_NONE = errno.ENETUNREACH
_REFUSED = (errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES)


class Way(NamedTuple):
    """What the kernel does with packets to an address.

    Attributes:
        prefix: of the route that it takes; None where it has none, or does not say which one refuses.
        maker: who made that route: bird, kernel, static, ...; "" where that is not told.
        reachable: false where packets are refused (`refused`), or there is no route.
        local: the address is the node's own.
        gateways: next hops; none for what is on a link.
        links: names of the links that packets leave by.
    """

    prefix: Prefix | None = None
    maker: str = ""
    reachable: bool = False
    local: bool = False
    gateways: tuple[bytes, ...] = ()
    links: tuple[str, ...] = ()
    refused: bool = False


def way_to(address: bytes) -> Way:
    """Ask the kernel.

    Raises:
        KernelError: it does not answer.
    """
    size = len(address)
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, size * 8, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
    body += nla(_RTA_DST, address)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.settimeout(_TIMEOUT_S)
            header = _HEADER.pack(HEADER_SIZE + len(body), _GETROUTE, NLM_F_REQUEST, 1, 0)
            sock.send(header + body)
            answer = next(messages(sock.recv(1 << 16)))
    except OSError as e:
        raise KernelError("asking for a route", got=e.strerror or str(e)) from e
    if answer.type == NLMSG_ERROR:
        (code,) = _ERROR.unpack_from(answer.payload)
        if -code in _REFUSED:
            return Way(refused=True)
        if -code != _NONE:
            raise KernelError("asking for a route", got=os.strerror(-code))
        return Way()
    if answer.type != _NEWROUTE:
        raise KernelError("asking for a route", got=f"a message of type {answer.type}")
    return _way(address, answer.payload)


def _way(address: bytes, payload: memoryview) -> Way:
    _, length, _, _, _, maker, _, kind, _ = _RTMSG.unpack_from(payload)
    values = dict(attributes(payload[_RTMSG.size :]))
    hops = list(_hops(values))
    reachable = kind not in _REFUSING
    if not reachable and length == 0 and maker != _RTPROT_BIRD and _RTA_GATEWAY not in values:
        return Way()  # IPv6 says "no route" by one that refuses everything
    return Way(
        masked(address, length),
        "bird" if maker == _RTPROT_BIRD else _MAKERS.get(maker, str(maker)),
        reachable,
        kind == _RTN_LOCAL,
        tuple(g for g, _ in hops if g),
        tuple(dict.fromkeys(name for _, i in hops if (name := _link(i)))) if reachable else (),
        refused=not reachable,
    )


def _hops(values: Mapping[int, memoryview]) -> Iterator[tuple[bytes, int]]:
    """Gateways (b"" for none) and links, of a route with one way or several."""
    several = values.get(_RTA_MULTIPATH)
    if several is None:
        link = values.get(_RTA_OIF)
        yield _gateway(values), int.from_bytes(link, sys.byteorder) if link is not None else 0
        return
    while len(several) >= _NEXTHOP.size:
        size, _, _, index = _NEXTHOP.unpack_from(several)
        yield _gateway(dict(attributes(several[_NEXTHOP.size : size]))), index
        several = several[(size + 3) // 4 * 4 :]


def _gateway(values: Mapping[int, memoryview]) -> bytes:
    """A gateway of the route's own family, or (RTA_VIA, behind two bytes of it) of the other one."""
    return bytes(values.get(_RTA_GATEWAY) or b"") or bytes(values.get(_RTA_VIA) or b"")[2:]


def _link(index: int) -> str:
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return ""
