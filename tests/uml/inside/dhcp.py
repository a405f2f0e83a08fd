"""A DHCP server with one address to give (RFC 2131): as much as a client's lease and release need."""

from __future__ import annotations

import ipaddress
import socket
import struct

_COOKIE = b"\x63\x82\x53\x63"
_FIXED_BYTES = 236
#: RFC 2132: pad, subnet mask, router, lease time, message type, server identifier, end.
_PAD, _MASK, _ROUTER, _LEASE_TIME, _TYPE, _SERVER, _END = 0, 1, 3, 51, 53, 54, 255
_TYPES = {1: "discover", 2: "offer", 3: "request", 5: "ack", 7: "release"}
_ANSWERS = {1: 2, 3: 5}
_LEASE_S = 3600


class DhcpServer:
    """Gives everybody the same address; `heard` has what it was told."""

    def __init__(self, link: str, own: str, lease: str) -> None:
        self._own = ipaddress.IPv4Address(own).packed
        self._lease = ipaddress.IPv4Address(lease).packed
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link.encode())
        self._socket.bind(("", 67))

    def serve(self) -> None:
        """Answer for as long as the process lives."""
        while True:
            message = self._socket.recv(2000)
            kind = _kind(message)
            self.heard.append(_TYPES.get(kind, str(kind)))
            if kind in _ANSWERS:
                self._socket.sendto(self._answer(message, _ANSWERS[kind]), ("255.255.255.255", 68))

    def _answer(self, message: bytes, kind: int) -> bytes:
        xid_to_flags, client = message[4:12], message[28:44]
        head = bytes((2, 1, 6, 0)) + xid_to_flags + bytes(4) + self._lease + self._own + bytes(4)
        options = (
            (_TYPE, bytes((kind,))),
            (_SERVER, self._own),
            (_LEASE_TIME, struct.pack("!I", _LEASE_S)),
            (_MASK, b"\xff\xff\xff\x00"),
            (_ROUTER, self._own),
        )
        body = b"".join(bytes((code, len(value))) + value for code, value in options)
        return (head + client).ljust(_FIXED_BYTES, b"\0") + _COOKIE + body + bytes((_END,))


def _kind(message: bytes) -> int:
    at = _FIXED_BYTES + len(_COOKIE)
    while at + 2 < len(message) and message[at] != _END:
        if message[at] == _PAD:
            at += 1
            continue
        if message[at] == _TYPE:
            return message[at + 2]
        at += 2 + message[at + 1]
    return 0
