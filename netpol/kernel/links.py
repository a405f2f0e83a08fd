"""Addresses of the node's own interfaces, and being told when they change.

rtnetlink through pyroute2 for the dump; the monitor is a bare socket, since all that matters of an event
is that there was one.
"""

from __future__ import annotations

import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor

from pyroute2 import IPRoute

#: linux/rtnetlink.h: multicast groups as bits (RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR).
_GROUPS = 0x10 | 0x100
_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


def own_addresses() -> tuple[bytes, ...]:
    """All addresses of this network namespace's interfaces but loopback and link-local, sorted."""
    # pyroute2 refuses to work in a thread that runs an event loop.
    with ThreadPoolExecutor(1) as pool:
        texts = pool.submit(_dump).result()
    out = set()
    for text in texts:
        address = ipaddress.ip_address(text)
        if not address.is_link_local and not any(address in net for net in _LOOPBACK):
            out.add(address.packed)
    return tuple(sorted(out))


def _dump() -> list[str]:
    with IPRoute() as route:
        found = [m.get("IFA_LOCAL") or m.get("IFA_ADDRESS") for m in route.get_addr()]
    return [str(a) for a in found if a]


class AddressMonitor:
    """A socket that becomes readable when an address comes or goes."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Take all pending events; an overrun counts as one."""
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                continue  # ENOBUFS: events were lost, and the caller looks anyway

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
