"""Rules of the legacy tables as the kernel's structures, read into the model. Pure.

python-iptables reads an extension's parameters by letting libxtables print them while file descriptor 1
of the process points into a pipe: in a process with other threads their output would go there too.
So the structures are read here; their layouts are kernel ABI (linux/netfilter/x_tables.h, xt_*.h,
linux/netfilter_ipv{4,6}/ip{,6}_tables.h). What is not exactly a form of the model is None.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from netpol.kernel.xt_matches import MATCHES, ForeignError, multiport, require
from netpol.model.ids import OWN_PREFIX, PROTOCOL_NUMBERS, ChainName, Protocol, SetName
from netpol.model.net import Family, Prefix
from netpol.model.ruleset import (
    Accept,
    Action,
    Drop,
    Goto,
    InInterface,
    IpProtocol,
    Jump,
    Log,
    MapMark,
    Masquerade,
    Match,
    NetMatch,
    Reject,
    Return,
    Rule,
    SetMark,
    SetMatch,
    Side,
)

_IFNAMSIZ = 16
#: Where matches start: sizeof(struct ipt_entry), sizeof(struct ip6t_entry).
ENTRY_SIZES = {Family.V4: 112, Family.V6: 168}
#: Where target_offset is in them.
_TARGET_OFFSETS = {Family.V4: 88, Family.V6: 140}
_FLAG_GOTO = {Family.V4: 0x02, Family.V6: 0x04}
#: IP6T_F_PROTO: the tool sets it with `-p`; it says nothing more.
_FLAG_PROTO6 = 0x01
_INVERT_SRC, _INVERT_DST = 0x08, 0x10

_PROTOCOLS = {number: protocol for protocol, number in PROTOCOL_NUMBERS.items()}
#: ipt_reject_with, ip6t_reject_with.
_REJECTS = {
    Family.V4: {
        0: "icmp-net-unreachable",
        1: "icmp-host-unreachable",
        2: "icmp-proto-unreachable",
        3: "icmp-port-unreachable",
        5: "icmp-net-prohibited",
        6: "icmp-host-prohibited",
        7: "tcp-reset",
        8: "icmp-admin-prohibited",
    },
    Family.V6: {
        0: "icmp6-no-route",
        1: "icmp6-adm-prohibited",
        3: "icmp6-addr-unreachable",
        4: "icmp6-port-unreachable",
        6: "tcp-reset",
        7: "icmp6-policy-fail",
        8: "icmp6-reject-route",
    },
}
#: IPSET_INVALID_ID, IPSET_INV_MATCH, IPSET_FLAG_MAP_SKBMARK.
_NO_SET, _SET_INVERT, _SET_MAP_MARK = 0xFFFF, 0x01, 1 << 8


class _Base(NamedTuple):
    """The part of a rule that every rule has."""

    matches: tuple[Match, ...]
    protocol: Protocol | None
    goto: bool


def decode_rule(
    entry: bytes, *, family: Family, target: str, set_names: Callable[[int], SetName]
) -> Rule | None:
    """Read one entry.

    Args:
        entry: the whole struct ipt_entry or ip6t_entry with its matches and target.
        family: which of the two.
        target: libiptc's name for the target: of a standard one, the chain or the verdict.
        set_names: the name of a set by its index in the kernel.
    """
    try:
        return _decode(entry, family, target, set_names)
    except (ForeignError, struct.error, UnicodeDecodeError):
        return None


def _decode(entry: bytes, family: Family, target: str, set_names: Callable[[int], SetName]) -> Rule:
    base = _base(entry, family)
    matches = list(base.matches)
    comment = ""
    at = ENTRY_SIZES[family]
    target_at = struct.unpack_from("=H", entry, _TARGET_OFFSETS[family])[0]
    while at < target_at:
        name, revision, data, size = _extension(entry, at)
        at += size
        if (name, revision) == ("comment", 0):
            require(not comment)
            comment = data.split(b"\0", 1)[0].decode()
        elif name == "set":
            matches.append(_set_match(data, revision, set_names))
        elif name == "multiport":
            require(revision == 1 and base.protocol)
            matches.append(multiport(data, base.protocol or Protocol.TCP))
        else:
            decode = MATCHES.get((name, revision))
            if decode is None:
                raise ForeignError
            matches.append(decode(data))
    name, revision, data, _ = _extension(entry, target_at)
    if name:
        action = _extended((name, revision), data, family, set_names)
    else:  # XT_STANDARD_TARGET
        action = _standard(target, goto=base.goto)
    return Rule(action, tuple(matches), comment)


def _extension(entry: bytes, at: int) -> tuple[str, int, bytes, int]:
    """Name, revision, data and size of the match or target that starts here."""
    size, name, revision = struct.unpack_from("=H29sB", entry, at)
    require(size >= 32)
    return name.split(b"\0", 1)[0].decode(), revision, entry[at + 32 : at + size], size


def _base(entry: bytes, family: Family) -> _Base:
    n = family.bits // 8
    src, dst, src_mask, dst_mask = (entry[i * n : (i + 1) * n] for i in range(4))
    at = 4 * n
    in_name, out_name, in_mask, out_mask = (
        entry[at + i * _IFNAMSIZ : at + (i + 1) * _IFNAMSIZ] for i in range(4)
    )
    at += 4 * _IFNAMSIZ
    if family is Family.V4:
        number, flags, inverted = struct.unpack_from("=HBB", entry, at)
    else:
        number, tos, flags, inverted = struct.unpack_from("=HBBB", entry, at)
        require(tos == 0)
        flags &= ~_FLAG_PROTO6
    goto = bool(flags & _FLAG_GOTO[family])
    require(flags & ~_FLAG_GOTO[family] == 0)
    require(inverted & ~(_INVERT_SRC | _INVERT_DST) == 0)
    require(not any(out_mask) and not any(out_name))
    matches: list[Match] = []
    for side, address, mask, bit in (
        (Side.SRC, src, src_mask, _INVERT_SRC),
        (Side.DST, dst, dst_mask, _INVERT_DST),
    ):
        negate = bool(inverted & bit)
        if any(mask) or negate:
            matches.append(NetMatch(side, Prefix(address, _length(mask)), negate))
    if any(in_mask):
        matches.append(InInterface(_interface(in_name, in_mask)))
    protocol = None
    if number:
        protocol = _PROTOCOLS.get(number)
        require(protocol)
        matches.append(IpProtocol(protocol or Protocol.TCP))
    return _Base(tuple(matches), protocol, goto)


def _length(mask: bytes) -> int:
    bits = len(mask) * 8
    inverse = int.from_bytes(mask, "big") ^ ((1 << bits) - 1)
    require(inverse & (inverse + 1) == 0)
    return bits - inverse.bit_length()


def _interface(name: bytes, mask: bytes) -> str:
    text = name.split(b"\0", 1)[0].decode()
    # A mask over the NUL too is the whole name; without it, a prefix, behind which some tools leave the +.
    length = len(mask.rstrip(b"\0"))
    return text if length > len(text) else f"{text[:length]}+"


def _set_info(data: bytes, at: int) -> tuple[int, tuple[Side, ...], int]:
    """Struct xt_set_info: index, a side for each dimension, flags without those."""
    index, dimensions, flags = struct.unpack_from("=HBB", data, at)
    sides = tuple(Side.SRC if flags & 2 << n else Side.DST for n in range(dimensions))
    return index, sides, flags & ~(((1 << dimensions) - 1) << 1)


def _set_match(data: bytes, revision: int, set_names: Callable[[int], SetName]) -> Match:
    require(1 <= revision <= 4)
    index, sides, flags = _set_info(data, 0)
    require(flags & ~_SET_INVERT == 0 and sides and not any(data[4:]))
    return SetMatch(set_names(index), sides, bool(flags & _SET_INVERT))


def _standard(target: str, *, goto: bool) -> Action:
    if target.startswith(OWN_PREFIX):
        chain = ChainName(target)
        return Goto(chain) if goto else Jump(chain)
    if target == "RETURN":
        return Return()
    require(target in ("ACCEPT", "DROP"))
    return Accept() if target == "ACCEPT" else Drop()


def _extended(
    kind: tuple[str, int], data: bytes, family: Family, set_names: Callable[[int], SetName]
) -> Action:
    match kind:
        case "MARK", 2:
            value, mask = struct.unpack_from("=II", data)
            return SetMark(value, mask)
        case "SET", 3:
            return _map_mark(data, set_names)
        case "NFLOG", 0:
            length, group, threshold, flags = struct.unpack_from("=IHHH", data)
            require(length == 0 and threshold <= 1 and flags & ~1 == 0)
            return Log(group, data[12:76].split(b"\0", 1)[0].decode())
        case "REJECT", 0:
            reason = _REJECTS[family].get(struct.unpack_from("=I", data)[0])
            require(reason)
            return Reject(reason or "")
        case "MASQUERADE", 0:
            return _masquerade(data, family)
    raise ForeignError


def _masquerade(data: bytes, family: Family) -> Action:
    # struct nf_nat_ipv4_multi_range_compat: how many ranges, then one; nf_nat_range. Flags first.
    if family is Family.V4:
        require(struct.unpack_from("=I", data)[0] == 1)
        data = data[4:]
    flags = struct.unpack_from("=I", data)[0]
    # NF_NAT_RANGE_PROTO_RANDOM_FULLY alone: no addresses and no ports.
    require(flags == 1 << 4)
    return Masquerade()


def _map_mark(data: bytes, set_names: Callable[[int], SetName]) -> Action:
    added, deleted = (struct.unpack_from("=H", data, at)[0] for at in (0, 4))
    index, sides, flags = _set_info(data, 8)
    operation = struct.unpack_from("=I", data, 12)[0]
    require(added == deleted == _NO_SET and operation == _SET_MAP_MARK)
    require(1 <= len(sides) <= 2 and flags == 0)
    return MapMark(set_names(index), *sides)
