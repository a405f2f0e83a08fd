"""Matches of the legacy tables as the kernel's structures, read into the model. Pure.

The layouts are linux/netfilter/xt_*.h; `xt_decode` reads the rules that they stand in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from netpol.kernel.rule_parse import parse_bytecode
from netpol.kernel.rule_text import CT_STATES, LIMIT_SCALE, TCP_FLAGS
from netpol.model.ids import Protocol
from netpol.model.ruleset import (
    AddrType,
    ConnmarkMatch,
    CtState,
    DstPorts,
    HopLimit,
    IcmpType,
    Icmpv6Type,
    InPort,
    IpvsSends,
    Limit,
    MarkMatch,
    Match,
    PortSpan,
    Side,
    TcpFlags,
)

_ANY_PORTS = (0, 0xFFFF)
_DIRECTION = 1 << 12
#: XT_CONNTRACK_STATE_*, bit by bit.
_STATE_BITS = {
    "INVALID": 0,
    "ESTABLISHED": 1,
    "RELATED": 2,
    "NEW": 3,
    "SNAT": 6,
    "DNAT": 7,
    "UNTRACKED": 8,
}
#: RTN_* by bit of xt_addrtype_info_v1.
_ADDRESS_TYPES = {1: "UNICAST", 2: "LOCAL", 3: "BROADCAST", 4: "ANYCAST", 5: "MULTICAST"}


class ForeignError(Exception):
    """Something that the model cannot say."""


def require(condition: object) -> None:
    """Raise ForeignError where something is otherwise than in the model."""
    if not condition:
        raise ForeignError


def _dst_ports(protocol: Protocol, first: int, last: int) -> DstPorts:
    return DstPorts(protocol, (PortSpan(first, last),))


def _tcp(data: bytes) -> Match:
    *ports, option, flag_mask, flag_compare, inverted = struct.unpack_from("=4H4B", data)
    require((ports[0], ports[1]) == _ANY_PORTS)
    require(not (option or inverted))
    if flag_mask:
        require((ports[2], ports[3]) == _ANY_PORTS and flag_compare)
        return TcpFlags(_flags(flag_mask), _flags(flag_compare))
    require(not flag_compare)
    return _dst_ports(Protocol.TCP, ports[2], ports[3])


def _flags(bits: int) -> tuple[str, ...]:
    require(bits < 1 << len(TCP_FLAGS))
    return tuple(flag for n, flag in enumerate(TCP_FLAGS) if bits & 1 << n)


def _udp(data: bytes) -> Match:
    *ports, inverted = struct.unpack_from("=4HB", data)
    require((ports[0], ports[1]) == _ANY_PORTS and not inverted)
    return _dst_ports(Protocol.UDP, ports[2], ports[3])


def _sctp(data: bytes) -> Match:
    first, last = struct.unpack_from("=HH", data)
    flags, inverted = struct.unpack_from("=II", data, 284)
    require(flags == 2 and not inverted)  # XT_SCTP_DEST_PORTS alone
    return _dst_ports(Protocol.SCTP, first, last)


def multiport(data: bytes, protocol: Protocol) -> Match:
    """Struct xt_multiport_v1, under a match of the protocol."""
    kind, count, *rest = struct.unpack_from("=BB15H15BB", data)
    ports, starts, inverted = rest[:15], rest[15:30], rest[30]
    require(kind == 1 and not inverted and 1 < count <= 15)  # XT_MULTIPORT_DESTINATION
    spans: list[PortSpan] = []
    at = 0
    while at < count:
        width = 2 if starts[at] else 1
        spans.append(PortSpan(ports[at], ports[at + width - 1]))
        at += width
    require(len(spans) > 1)
    return DstPorts(protocol, tuple(spans))


def _conntrack(data: bytes) -> Match:
    match_flags, invert_flags, mask = struct.unpack_from("=HHH", data, 146)
    # XT_CONNTRACK_STATE, and XT_CONNTRACK_DIRECTION, which inverted is that of replies.
    replies = (match_flags, invert_flags) == (1 | _DIRECTION, _DIRECTION)
    require(replies or (match_flags, invert_flags) == (1, 0))
    states = tuple(state for state in CT_STATES if mask & 1 << _STATE_BITS[state])
    require(sum(1 << _STATE_BITS[state] for state in states) == mask)
    return CtState(states, replies)


def _icmp6(data: bytes) -> Match:
    kind, low, high, inverted = struct.unpack_from("=4B", data)
    require((low, high) == (0, 0xFF) and not inverted)
    return Icmpv6Type(kind)


def _icmp(data: bytes) -> Match:
    kind, low, high, inverted = struct.unpack_from("=4B", data)
    # 255 is every type, which the tool calls "any".
    require((low, high) == (0, 0xFF) and not inverted and kind != 0xFF)
    return IcmpType(kind)


def _ipvs(data: bytes) -> Match:
    # struct xt_ipvs_mtinfo: addresses, port, protocol and ways to compare first, which say nothing here.
    inverted, compared = struct.unpack_from("=BB", data, 38)
    require(not any(data[:38]) and compared == 1 and not inverted)  # XT_IPVS_IPVS_PROPERTY
    return IpvsSends()


def _hop_limit(data: bytes) -> Match:
    mode, value = struct.unpack_from("=BB", data)
    require(mode == 0)  # IP6T_HL_EQ
    return HopLimit(value)


def _physdev(data: bytes) -> Match:
    name, mask, others, inverted, which = struct.unpack_from("=16s16s32sBB", data)
    text = name.rstrip(b"\0")
    whole = mask == (b"\xff" * (len(text) + 1)).ljust(16, b"\0")
    require(which == 1 and not inverted and not any(others) and whole)  # XT_PHYSDEV_OP_IN
    return InPort(text.decode())


def _mark(data: bytes) -> Match:
    return MarkMatch(*_masked(data))


def _connmark(data: bytes) -> Match:
    return ConnmarkMatch(*_masked(data))


def _masked(data: bytes) -> tuple[int, int, bool]:
    value, mask, inverted = struct.unpack_from("=IIB", data)
    return value, mask, bool(inverted)


def _addrtype(data: bytes) -> Match:
    source, destination, flags = struct.unpack_from("=HHI", data)
    require(flags == 0 and bool(source) != bool(destination))
    side, mask = (Side.SRC, source) if source else (Side.DST, destination)
    kind = _ADDRESS_TYPES.get(mask.bit_length() - 1)
    require(mask & (mask - 1) == 0 and kind)
    return AddrType(side, kind or "")


def _limit(data: bytes) -> Match:
    period, burst = struct.unpack_from("=II", data)
    require(1 <= period <= LIMIT_SCALE)
    return Limit(LIMIT_SCALE // period, burst)


def _bpf(data: bytes) -> Match:
    mode, count = struct.unpack_from("=HH", data)
    require(mode == 0 and count <= 64)  # XT_BPF_MODE_BYTECODE, XT_BPF_MAX_NUM_INSTR
    steps = [struct.unpack_from("=HBBI", data, 8 + 8 * n) for n in range(count)]
    text = ",".join([str(count), *(" ".join(str(word) for word in step) for step in steps)])
    found = parse_bytecode(text)
    if found is None:
        raise ForeignError
    return found


#: By name and revision; those that need more than their bytes are the caller's.
MATCHES: Mapping[tuple[str, int], Callable[[bytes], Match]] = {
    ("tcp", 0): _tcp,
    ("udp", 0): _udp,
    ("sctp", 0): _sctp,
    ("conntrack", 2): _conntrack,
    ("conntrack", 3): _conntrack,
    ("icmp", 0): _icmp,
    ("icmp6", 0): _icmp6,
    ("ipvs", 0): _ipvs,
    ("hl", 0): _hop_limit,
    ("physdev", 0): _physdev,
    ("mark", 1): _mark,
    ("connmark", 1): _connmark,
    ("addrtype", 1): _addrtype,
    ("limit", 0): _limit,
    ("bpf", 1): _bpf,
}
