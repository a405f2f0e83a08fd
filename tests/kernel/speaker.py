"""A BGP speaker of a few lines: opens a session, says what it is told to, counts what it hears.

RFC 4271 with four-byte AS numbers (RFC 6793), IPv4 unicast alone. Only for tests: it decides nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections.abc import Iterable, Iterator

_MARKER = b"\xff" * 16
_OPEN, _UPDATE, _NOTIFICATION, _KEEPALIVE = 1, 2, 3, 4
#: RFC 4271 section 4.1: no message is longer.
_MESSAGE_MAX = 4096


def message(kind: int, body: bytes = b"") -> bytes:
    """One message with its header."""
    return _MARKER + struct.pack(">HB", 19 + len(body), kind) + body


def open_message(asn: int, router_id: str, hold_s: int = 90) -> bytes:
    """OPEN with the capabilities IPv4 unicast and four-byte AS numbers."""
    capabilities = struct.pack(">BBHBB", 1, 4, 1, 0, 1) + struct.pack(">BBI", 65, 4, asn)
    option = struct.pack(">BB", 2, len(capabilities)) + capabilities
    short = asn if asn < 65536 else 23456
    identity = ipaddress.IPv4Address(router_id).packed
    body = struct.pack(">BHH4sB", 4, short, hold_s, identity, len(option)) + option
    return message(_OPEN, body)


def nlri(prefix: str) -> bytes:
    """A prefix as it stands in an UPDATE."""
    net = ipaddress.IPv4Network(prefix)
    return bytes([net.prefixlen]) + net.network_address.packed[: (net.prefixlen + 7) // 8]


def attributes(asn: int | None, next_hop: str) -> bytes:
    """ORIGIN, AS_PATH of one AS or (inside an AS) empty with LOCAL_PREF, NEXT_HOP."""
    path = b"" if asn is None else struct.pack(">BBI", 2, 1, asn)
    preference = struct.pack(">BBBI", 0x40, 5, 4, 100) if asn is None else b""
    return (
        b"\x40\x01\x01\x00"
        + struct.pack(">BBB", 0x40, 2, len(path))
        + path
        + b"\x40\x03\x04"
        + ipaddress.IPv4Address(next_hop).packed
        + preference
    )


def updates(prefixes: Iterable[bytes], *, asn: int | None, next_hop: str) -> Iterator[bytes]:
    """UPDATE messages that announce all prefixes, as full as can be."""
    head = attributes(asn, next_hop)
    room = _MESSAGE_MAX - 19 - 4 - len(head)
    body = b""
    for prefix in prefixes:
        if len(body) + len(prefix) > room:
            yield message(_UPDATE, struct.pack(">HH", 0, len(head)) + head + body)
            body = b""
        body += prefix
    if body:
        yield message(_UPDATE, struct.pack(">HH", 0, len(head)) + head + body)


class Speaker:
    """One session, over a connection that is made or accepted elsewhere."""

    def __init__(self, *, asn: int, router_id: str) -> None:
        self.asn, self.router_id = asn, router_id
        self.established = asyncio.Event()
        self.heard: set[str] = set()
        self.notified = 0
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, address: str, port: int = 179, *, source: str) -> None:
        """Dial, and serve the session until it ends."""
        reader, writer = await asyncio.open_connection(address, port, local_addr=(source, 0))
        await self.serve(reader, writer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Speak until the other end closes."""
        self._writer = writer
        writer.write(open_message(self.asn, self.router_id))
        try:
            while True:
                head = await reader.readexactly(19)
                size, kind = struct.unpack(">HB", head[16:])
                body = await reader.readexactly(size - 19)
                if kind == _OPEN:
                    writer.write(message(_KEEPALIVE))
                elif kind == _KEEPALIVE:
                    self.established.set()
                    writer.write(message(_KEEPALIVE))
                elif kind == _UPDATE:
                    self._hear(body)
                elif kind == _NOTIFICATION:
                    self.notified += 1
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def announce(
        self, prefixes: Iterable[bytes], *, next_hop: str, internal: bool = False
    ) -> None:
        """Announce prefixes; `internal` to a peer of the same AS."""
        if self._writer is None:
            raise ConnectionError("no session")
        asn = None if internal else self.asn
        for update in updates(prefixes, asn=asn, next_hop=next_hop):
            self._writer.write(update)
            await self._writer.drain()

    def _hear(self, body: bytes) -> None:
        (gone,) = struct.unpack_from(">H", body)
        withdrawn = body[2 : 2 + gone]
        (size,) = struct.unpack_from(">H", body, 2 + gone)
        self.heard -= set(_prefixes(withdrawn))
        self.heard |= set(_prefixes(body[4 + gone + size :]))


def _prefixes(data: bytes) -> Iterator[str]:
    at = 0
    while at < len(data):
        length = data[at]
        size = (length + 7) // 8
        address = ipaddress.IPv4Address(data[at + 1 : at + 1 + size].ljust(4, b"\0"))
        yield f"{address}/{length}"
        at += 1 + size
