"""ICMP echo from an address of a namespace: whether a reply comes.

Owns what the probe's engine does not send, since policies name no ICMP.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
import time

from netpol.kernel.netns import open_socket

#: Echo request and reply of each family (RFC 792, RFC 4443).
TYPES = {4: (8, 0), 6: (128, 129)}
#: Requests, and how long each waits.
TRIES, WAIT_S = 2, 0.25


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Echoes:
    """Sends echo requests; no two share an identifier, so that conntrack calls each one new."""

    def __init__(self) -> None:
        self._identifiers = itertools.count(0x1000)

    def answered(self, netns: str, src: bytes, dst: bytes) -> bool:
        """Ask, and once more if nothing comes."""
        v6 = len(dst) > 4
        family, protocol = (
            (socket.AF_INET6, socket.IPPROTO_ICMPV6)
            if v6
            else (socket.AF_INET, socket.IPPROTO_ICMP)
        )
        sock = open_socket(netns, family, socket.SOCK_RAW, protocol)
        with sock:
            sock.bind((socket.inet_ntop(family, src), 0))
            for _ in range(TRIES):
                identifier = next(self._identifiers)
                request, reply = TYPES[6 if v6 else 4]
                body = struct.pack("!BBHHH", request, 0, 0, identifier, 1)
                if not v6:  # the kernel fills it in for ICMPv6 alone
                    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
                sock.sendto(body, (socket.inet_ntop(family, dst), 0))
                if self._wait(sock, reply, identifier, v6=v6):
                    return True
        return False

    @staticmethod
    def _wait(sock: socket.socket, reply: int, identifier: int, *, v6: bool) -> bool:
        deadline = time.monotonic() + WAIT_S
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([sock], [], [], left)[0]:
                continue
            data = sock.recv(2048)
            if not v6:
                data = data[(data[0] & 0xF) * 4 :]
            if data[0] == reply and struct.unpack_from("!H", data, 4)[0] == identifier:
                return True
        return False
