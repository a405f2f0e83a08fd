"""Addresses of interfaces, which of them are the node's own, and being told when they change.

rtnetlink by bytes of our own: there may be thousands of addresses of Services on the node, and then an
object for each message takes seconds. Those of our own dummy link are Services', not the node's: they are
left out, and nobody is woken for them.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from netpol.kernel.netlink import (
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attributes,
    error_code,
    messages,
)
from netpol.kernel.vips import LINK
from netpol.lib.errors import KernelError
from netpol.model.net import parse_prefix

#: linux/rtnetlink.h: multicast groups as bits (RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR).
_GROUPS = 0x10 | 0x100
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
#: linux/if_addr.h: struct ifaddrmsg and its attributes.
_IFADDR = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HEADER = struct.Struct("=IHHII")
_RECEIVE_BYTES = 1 << 17
_TIMEOUT_S = 10.0

_NOT_OURS = tuple(map(parse_prefix, ("127.0.0.0/8", "::1/128", "169.254.0.0/16", "fe80::/10")))


class LinkAddress(NamedTuple):
    """An address, the index of the link that has it, and the length of the network that it is in."""

    link: int
    address: bytes
    length: int


def own_addresses() -> tuple[bytes, ...]:
    """All addresses of this network namespace's interfaces but loopback and link-local, sorted.

    Addresses of Services on our own link are left out.
    """
    link = _index_of(LINK)
    found = {a.address for a in link_addresses() if a.link != link}
    return tuple(sorted(a for a in found if not any(net.contains(a) for net in _NOT_OURS)))


def link_addresses() -> Iterator[LinkAddress]:
    """All addresses in this network namespace.

    Raises:
        KernelError: the kernel refuses.
        OSError: it cannot be asked.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(_TIMEOUT_S)
        body = _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        size = _HEADER.size + len(body)
        sock.send(_HEADER.pack(size, _GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body)
        while True:
            for message in messages(sock.recv(_RECEIVE_BYTES)):
                if message.type == NLMSG_DONE:
                    return
                if message.type == NLMSG_ERROR:
                    raise KernelError("addresses of the node", got=str(error_code(message.payload)))
                if message.type != _NEWADDR:
                    continue
                # With a peer, IFA_ADDRESS is the far end and IFA_LOCAL is ours.
                values = dict(attributes(message.payload[_IFADDR.size :]))
                address = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS)
                if address:
                    _, length, _, _, index = _IFADDR.unpack_from(message.payload)
                    yield LinkAddress(index, bytes(address), length)


def _index_of(link: str) -> int:
    """The index of a link, 0 where there is none."""
    try:
        return socket.if_nametoindex(link)
    except OSError:
        return 0


class AddressMonitor:
    """A socket that becomes readable when an address comes or goes."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Take all pending events; whether any was of another link than our own for Services.

        An overrun counts as one that was.
        """
        link, others = _index_of(LINK), False
        while True:
            try:
                datagram = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return others
            except OSError:
                others = True  # ENOBUFS: events were lost, and the caller looks
                continue
            others = others or any(
                _IFADDR.unpack_from(m.payload)[4] != link
                for m in messages(datagram)
                if m.type in (_NEWADDR, _DELADDR)
            )

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
