"""SCTP packets as far as the first exchange of an association goes: INIT, INIT ACK and ABORT.

Owns the bytes and the CRC32c; sends nothing. The lab needs it because kernels without SCTP sockets
still track and filter SCTP packets, so a pod answers from a raw socket. Layouts are those of RFC 9260
section 3; conntrack calls a packet with a wrong checksum or verification tag INVALID.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from enum import IntEnum
from typing import NamedTuple

#: Source port, destination port, verification tag, checksum (RFC 9260 section 3.1).
_HEADER = struct.Struct("!HHII")
#: Type, flags, length of a chunk (section 3.2).
_CHUNK = struct.Struct("!BBH")
#: Initiate tag, receiver window, outbound streams, inbound streams, initial TSN (section 3.3.2).
_INIT = struct.Struct("!IIHHI")

HEADER_BYTES = _HEADER.size
_CHECKSUM_AT = 8
_CHUNK_END = HEADER_BYTES + _CHUNK.size
_INIT_END = _CHUNK_END + _INIT.size

#: Receiver window that we claim; section 3.3.2 forbids less than 1500.
_WINDOW_BYTES = 65536
_STREAMS = 1
#: Parameter type of the State Cookie, which an INIT ACK must carry (section 3.3.3).
_STATE_COOKIE = 7
_COOKIE = b"netpol-lab-pod.."

#: Castagnoli polynomial, bit-reversed (RFC 9260 appendix A).
_POLYNOMIAL = 0x82F63B78


class ChunkType(IntEnum):
    """The chunk types that the first exchange can show."""

    INIT = 1
    INIT_ACK = 2
    ABORT = 6


class SctpPacket(NamedTuple):
    """The header and first chunk of a packet; `initiate_tag` is 0 unless it is an INIT or INIT ACK."""

    sport: int
    dport: int
    tag: int
    chunk: int
    initiate_tag: int = 0


def _table() -> tuple[int, ...]:
    out = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        out.append(crc)
    return tuple(out)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """The CRC32c of some bytes; a packet carries it little-endian, computed over a zeroed field."""
    crc = 0xFFFFFFFF
    table = _TABLE
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _sealed(packet: bytes) -> bytes:
    """Put the checksum into a packet whose checksum field is zero."""
    return packet[:_CHECKSUM_AT] + crc32c(packet).to_bytes(4, "little") + packet[_CHECKSUM_AT + 4 :]


def build_init(*, sport: int, dport: int, initiate_tag: int) -> bytes:
    """Build the INIT that opens an association; its own verification tag is 0 (section 8.5.1)."""
    return _sealed(
        _HEADER.pack(sport, dport, 0, 0)
        + _CHUNK.pack(ChunkType.INIT, 0, _CHUNK.size + _INIT.size)
        + _INIT.pack(initiate_tag, _WINDOW_BYTES, _STREAMS, _STREAMS, initiate_tag)
    )


def build_init_ack(init: SctpPacket, *, initiate_tag: int) -> bytes:
    """Build the answer of a port that takes associations."""
    cookie = struct.pack("!HH", _STATE_COOKIE, 4 + len(_COOKIE)) + _COOKIE
    return _sealed(
        _HEADER.pack(init.dport, init.sport, init.initiate_tag, 0)
        + _CHUNK.pack(ChunkType.INIT_ACK, 0, _CHUNK.size + _INIT.size + len(cookie))
        + _INIT.pack(initiate_tag, _WINDOW_BYTES, _STREAMS, _STREAMS, initiate_tag)
        + cookie
    )


def build_abort(init: SctpPacket) -> bytes:
    """Build the answer of a closed port: the tag is the peer's own, hence no T bit (section 8.5.1)."""
    return _sealed(
        _HEADER.pack(init.dport, init.sport, init.initiate_tag, 0)
        + _CHUNK.pack(ChunkType.ABORT, 0, _CHUNK.size)
    )


def answer(packet: SctpPacket, *, open_ports: Container[int], initiate_tag: int) -> bytes | None:
    """What an endpoint sends back: INIT ACK or ABORT for an INIT, nothing for all else."""
    if packet.chunk != ChunkType.INIT:
        return None
    if packet.dport in open_ports:
        return build_init_ack(packet, initiate_tag=initiate_tag)
    return build_abort(packet)


def parse(packet: bytes) -> SctpPacket:
    """Read the header and the first chunk.

    Raises:
        ValueError: too short for what it claims to hold, or the checksum is wrong.
    """
    if len(packet) < _CHUNK_END:
        raise ValueError(f"SCTP packet of {len(packet)} bytes; needed {_CHUNK_END}")
    sport, dport, tag, _ = _HEADER.unpack_from(packet)
    claimed = int.from_bytes(packet[_CHECKSUM_AT : _CHECKSUM_AT + 4], "little")
    zeroed = packet[:_CHECKSUM_AT] + bytes(4) + packet[_CHECKSUM_AT + 4 :]
    if crc32c(zeroed) != claimed:
        raise ValueError(f"SCTP checksum {claimed:#010x} does not fit the packet")
    kind, _flags, length = _CHUNK.unpack_from(packet, HEADER_BYTES)
    if length < _CHUNK.size or HEADER_BYTES + length > len(packet):
        raise ValueError(f"SCTP chunk claims {length} bytes of {len(packet) - HEADER_BYTES}")
    initiate_tag = 0
    if kind in (ChunkType.INIT, ChunkType.INIT_ACK):
        if HEADER_BYTES + length < _INIT_END:
            raise ValueError(f"SCTP INIT of {length} bytes; needed {_INIT_END - HEADER_BYTES}")
        initiate_tag = int.from_bytes(packet[_CHUNK_END : _CHUNK_END + 4], "big")
    return SctpPacket(sport, dport, tag, kind, initiate_tag)


def ports_of(start: bytes) -> tuple[int, int] | None:
    """Source and destination port out of the first bytes, as an ICMP error quotes them."""
    if len(start) < 4:
        return None
    return int.from_bytes(start[:2], "big"), int.from_bytes(start[2:4], "big")


def strip_ipv4(datagram: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Source, destination and payload of an IPv4 datagram, which is what a raw IPv4 socket delivers.

    A raw IPv6 socket delivers the payload alone, so there is no twin for IPv6.
    """
    if len(datagram) < 20 or datagram[0] >> 4 != 4:
        return None
    header = (datagram[0] & 15) * 4
    if header < 20 or len(datagram) < header:
        return None
    return datagram[12:16], datagram[16:20], datagram[header:]
