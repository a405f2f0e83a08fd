"""What the first bytes of a logged packet say: addresses, protocol, ports.

Pure. Reads no further than NFLOG copied. A packet whose addresses are missing is a `PacketError`; one that
has addresses but whose transport header is missing, cut or a later fragment's is still a record, with
`fault` saying why there are no ports.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from netpol.model.ids import PROTOCOL_NUMBERS, Protocol

_PORTS = struct.Struct("!HH")

TCP, UDP, SCTP = (PROTOCOL_NUMBERS[p] for p in (Protocol.TCP, Protocol.UDP, Protocol.SCTP))
ICMP, ICMPV6 = PROTOCOL_NUMBERS[Protocol.ICMP], PROTOCOL_NUMBERS[Protocol.ICMPV6]
#: Protocols whose first four bytes are source and destination port (33 is DCCP, 136 UDP-Lite).
_WITH_PORTS = frozenset({TCP, UDP, SCTP, 33, 136})

#: IPv6 extension headers (RFC 8200 section 4 and the IANA registry).
_FRAGMENT, _AUTHENTICATION = 44, 51
_CHAINED = frozenset({0, 43, 60, 135, 139, 140, _FRAGMENT, _AUTHENTICATION})
#: A chain longer than this is not a packet that anybody sends in earnest.
_EXTENSIONS_MAX = 16

LATER_FRAGMENT = "a later fragment has no ports"
SHORT_TRANSPORT = "the transport header is cut off"
SHORT_EXTENSIONS = "the IPv6 extension headers are cut off"


class PacketError(ValueError):
    """Bytes that are no IP packet with addresses; the text says which part was short or wrong."""


class Packet(NamedTuple):
    """A packet's addresses (packed), protocol number, ports or ICMP type and code.

    `fault` is "" or the reason why ports (or the ICMP type) are missing.
    """

    src: bytes
    dst: bytes
    protocol: int
    sport: int | None = None
    dport: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    fault: str = ""


def parse(data: bytes) -> Packet:
    """Read a packet from its network header on.

    Raises:
        PacketError: shorter than the fixed IP header, or neither IPv4 nor IPv6.
    """
    if not data:
        raise PacketError("empty packet")
    version = data[0] >> 4
    if version == 4:
        return _parse_v4(data)
    if version == 6:
        return _parse_v6(data)
    raise PacketError(f"IP version {version}")


def _parse_v4(data: bytes) -> Packet:
    size = len(data)
    if size < 20:
        raise PacketError(f"short IPv4 header: {size} of 20 bytes")
    header = (data[0] & 15) * 4
    if header < 20:
        raise PacketError(f"IPv4 header length {header}")
    src, dst, protocol = data[12:16], data[16:20], data[9]
    if (data[6] & 0x1F) << 8 | data[7]:
        return Packet(src, dst, protocol, fault=LATER_FRAGMENT)
    return _transport(data, header, src=src, dst=dst, protocol=protocol)


def _parse_v6(data: bytes) -> Packet:
    size = len(data)
    if size < 40:
        raise PacketError(f"short IPv6 header: {size} of 40 bytes")
    src, dst, protocol = data[8:24], data[24:40], data[6]
    at = 40
    for _ in range(_EXTENSIONS_MAX):
        if protocol not in _CHAINED:
            return _transport(data, at, src=src, dst=dst, protocol=protocol)
        if at + 8 > size:  # none is shorter than 8 bytes
            return Packet(src, dst, protocol, fault=SHORT_EXTENSIONS)
        if protocol == _FRAGMENT:
            if data[at + 2] << 8 | data[at + 3] & 0xF8:
                return Packet(src, dst, data[at], fault=LATER_FRAGMENT)
            length = 8
        elif protocol == _AUTHENTICATION:
            length = (data[at + 1] + 2) * 4  # RFC 4302 section 2.2: counted in 4 bytes, minus 2
        else:
            length = (data[at + 1] + 1) * 8
        protocol = data[at]
        at += length
    return Packet(src, dst, protocol, fault=f"over {_EXTENSIONS_MAX} IPv6 extension headers")


def _transport(data: bytes, at: int, *, src: bytes, dst: bytes, protocol: int) -> Packet:
    if protocol in _WITH_PORTS:
        if at + 4 > len(data):
            return Packet(src, dst, protocol, fault=SHORT_TRANSPORT)
        sport, dport = _PORTS.unpack_from(data, at)
        return Packet(src, dst, protocol, sport, dport)
    if protocol in (ICMP, ICMPV6):
        if at + 2 > len(data):
            return Packet(src, dst, protocol, fault=SHORT_TRANSPORT)
        return Packet(src, dst, protocol, icmp_type=data[at], icmp_code=data[at + 1])
    return Packet(src, dst, protocol)
