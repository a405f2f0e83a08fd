"""Being told when somebody changes what the routes room keeps: its links, their entries, BIRD's routes.

Owns a socket that only tells that it is time to look; what is wrong is found by looking. rtnetlink by bytes
of our own, since every pod's interface and every route of BIRD's is an event too.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from netpol.kernel.netlink import HEADER_SIZE, attributes

#: linux/rtnetlink.h: RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE.
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400
_LINK = (16, 17)
_ADDRESS = (20, 21)
_NEWROUTE, _DELROUTE = 24, 25
_NEIGHBOUR = (28, 29)
_RTPROT_BIRD, _TABLE_MAIN = 12, 254
_IFLA_IFNAME, _RTA_PRIORITY = 3, 6
#: linux/rtnetlink.h: RT_SCOPE_LINK
_SCOPE_LINK = 253
_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BBHiII")
_IFADDR = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_NDMSG = struct.Struct("=BBHiHBB")
_U32 = struct.Struct("=I")
_BITS = {socket.AF_INET: 32, socket.AF_INET6: 128}
_RECEIVE_BYTES = 1 << 16
#: Of a whole table of routes that comes at once some are lost, which is noticed too.
_BUFFER_BYTES = 1 << 20
#: Datagrams that are read before the loop turns to others.
_AT_ONCE = 64


class Stirred(NamedTuple):
    """What there is a reason to look at."""

    overlay: bool = False
    underlay: bool = False
    routes: bool = False


class RouteMonitor:
    """A socket that becomes readable when links, addresses, neighbours or routes change.

    In the network namespace of the thread that constructs this.

    Args:
        prefixes: names of the overlay's links start so.
        metric: of BIRD's routes.
    """

    def __init__(self, prefixes: tuple[str, ...], *, metric: int) -> None:
        self._metric = metric
        self._prefixes = tuple(p.encode() for p in prefixes)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))
        self._ours = {i for i, name in socket.if_nameindex() if self._is_ours(name.encode())}
        #: The node's own link; 0 for none, then any link may become it.
        self.underlay = 0
        #: Who adds routes as BIRD does is BIRD, and may take them away.
        self._birds: set[int] = set()

    def _is_ours(self, name: bytes) -> bool:
        return name.startswith(self._prefixes)

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def drain(self) -> Stirred:
        """Take pending events. Lost ones count as all of them."""
        overlay = underlay = routes = False
        for _ in range(_AT_ONCE):
            try:
                datagram = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: events were lost
                return Stirred(overlay=True, underlay=True, routes=True)
            for kind, port, payload in _messages(datagram):
                if kind in _LINK:
                    ours, own = self._link(kind, payload)
                    overlay, underlay = overlay or ours, underlay or own
                elif kind in _ADDRESS:
                    ours, own = self._address(payload)
                    overlay, underlay = overlay or ours, underlay or own
                elif kind in (_NEWROUTE, _DELROUTE):
                    routes = self._route(kind, port, payload) or routes
                elif kind in _NEIGHBOUR:
                    overlay = overlay or _NDMSG.unpack_from(payload)[3] in self._ours
        return Stirred(overlay, underlay, routes)

    def _link(self, kind: int, payload: memoryview) -> tuple[bool, bool]:
        index = _IFINFO.unpack_from(payload)[3]
        values = dict(attributes(payload[_IFINFO.size :]))
        name = bytes(values.get(_IFLA_IFNAME, b"")).rstrip(b"\0")
        ours = self._is_ours(name) or index in self._ours
        if kind == _LINK[1] or not self._is_ours(name):
            self._ours.discard(index)
        else:
            self._ours.add(index)
        return ours, index == self.underlay or not self.underlay

    def _address(self, payload: memoryview) -> tuple[bool, bool]:
        """Of other links only networks count: single and link-local addresses come with every pod."""
        family, length, _, scope, index = _IFADDR.unpack_from(payload)
        network = scope != _SCOPE_LINK and length < _BITS.get(family, 0)
        if index in self._ours:
            return True, False
        return False, index == self.underlay or not self.underlay or network

    def _route(self, kind: int, port: int, payload: memoryview) -> bool:
        """Whether somebody else took a route of BIRD's away, or put another one in its place."""
        message = _RTMSG.unpack_from(payload)
        table, protocol = message[4], message[5]
        if table != _TABLE_MAIN:
            return False
        if protocol == _RTPROT_BIRD:
            if kind == _NEWROUTE:
                self._birds.add(port)
            return kind == _DELROUTE and port not in self._birds
        values = dict(attributes(payload[_RTMSG.size :]))
        metric = values.get(_RTA_PRIORITY)
        return metric is not None and metric == _U32.pack(self._metric)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _messages(datagram: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """Type, who asked for it, and payload of each message."""
    view, at = memoryview(datagram), 0
    while at + HEADER_SIZE <= len(view):
        size, kind, _flags, _seq, port = _HEADER.unpack_from(view, at)
        if size < HEADER_SIZE:
            return
        yield kind, port, view[at + HEADER_SIZE : at + size]
        at += (size + 3) & ~3
