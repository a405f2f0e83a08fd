"""Set members as netlink bytes, both ways. No sockets, no policy: constants from linux/netfilter/ipset.

One struct.pack per member keeps 50,000 of them at tens of milliseconds. Every member carries its
number in the frame (IPSET_ATTR_LINENO), which is how a refusal names the member.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from socket import AF_INET, AF_INET6
from typing import NamedTuple, cast

from netpol.kernel.netlink import (
    NLA_F_NESTED,
    NLA_F_NET_BYTEORDER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    attributes,
    message,
    nla,
)
from netpol.model.ids import PROTOCOL_NUMBERS, Protocol
from netpol.model.net import Family, Prefix
from netpol.model.ruleset import AddressPort, AddressPortNet, Member, NetPair, SetKind

NFNL_SUBSYS_IPSET = 6
#: The protocol version spoken; every kernel since 2.6.39 takes 6.
IPSET_PROTOCOL = 6
CMD_FLUSH = 4
CMD_LIST = 7
CMD_ADD = 9
CMD_DEL = 10
FLAG_LIST_HEADER = 1 << 2
CADT_NOMATCH = 1 << 2
CADT_SKBINFO = 1 << 6

# Attributes of a message.
_PROTOCOL, _SETNAME, _TYPENAME, _FAMILY, _FLAGS, _DATA, _ADT, _LINENO = 1, 2, 3, 5, 6, 7, 8, 9
# Attributes of an entry; IP holds one of ADDR4 and ADDR6.
_IP, _CIDR, _PORT, _PROTO, _CADT_FLAGS, _CADT_LINENO, _IP2, _CIDR2, _SKBMARK = (
    *(1, 3, 4, 7, 8, 9),
    *(20, 21, 27),
)
# Attributes of a header.
_TIMEOUT, _NETMASK, _MAXELEM, _ELEMENTS, _REFERENCES = 6, 20, 19, 24, 25
_ADDR4, _ADDR6 = 1, 2

#: What one frame's members may take together; below NLA_PAYLOAD_MAX with room to spare.
ADT_BYTES_MAX = 60_000
#: The mark of a member whose mask or flags are not ours, so that it equals no wanted value.
FOREIGN_MARK = -1

_PROTOCOLS_BY_NUMBER = {number: protocol for protocol, number in PROTOCOL_NUMBERS.items()}
_AF: dict[Family, int] = {Family.V4: AF_INET, Family.V6: AF_INET6}
FAMILIES_BY_AF: dict[int, Family] = {AF_INET: Family.V4, AF_INET6: Family.V6}

_ADDRESS = {size: struct.Struct(f"=HHHH{size}s") for size in (4, 16)}
_BYTE = struct.Struct("=HHBxxx")
_SHORT = struct.Struct("=HH2sxx")
_LONG = struct.Struct("=HH4s")
_MARK = struct.Struct("=HH8s")
_BE32 = struct.Struct(">I")
_MARK_VALUE = struct.Struct(">II")


def address_family(family: Family) -> int:
    """AF_INET or AF_INET6."""
    return _AF[family]


def _address(kind: int, packed: bytes) -> bytes:
    size = len(packed)
    inner = (_ADDR4 if size == 4 else _ADDR6) | NLA_F_NET_BYTEORDER
    return _ADDRESS[size].pack(8 + size, kind | NLA_F_NESTED, 4 + size, inner, packed)


def _cidr(kind: int, length: int) -> bytes:
    return _BYTE.pack(5, kind, length)


def _encode_member(member: Member) -> bytes:
    if isinstance(member, bytes):
        return _address(_IP, member)
    if isinstance(member, Prefix):
        return _address(_IP, member.address) + _cidr(_CIDR, member.length)
    if isinstance(member, AddressPort | AddressPortNet):
        number = PROTOCOL_NUMBERS.get(member.protocol)
        head = (
            _address(_IP, member.address)
            + _SHORT.pack(6, _PORT | NLA_F_NET_BYTEORDER, member.port.to_bytes(2, "big"))
            + _BYTE.pack(5, _PROTO, int(member.protocol) if number is None else number)
        )
        if isinstance(member, AddressPort):
            return head
        return head + _address(_IP2, member.net.address) + _cidr(_CIDR2, member.net.length)
    return (
        _address(_IP, member.first.address)
        + _address(_IP2, member.second.address)
        + _cidr(_CIDR, member.first.length)
        + _cidr(_CIDR2, member.second.length)
    )


def frames(
    members: Iterable[tuple[Member, int | None]], *, mark_mask: int
) -> Iterator[tuple[bytes, list[Member]]]:
    """Pack members into payloads of at most ADT_BYTES_MAX, each with the members it holds in order."""
    entries: list[bytes] = []
    held: list[Member] = []
    size = 0
    for member, mark in members:
        body = _encode_member(member)
        if mark is not None:
            body += _MARK.pack(
                12, _SKBMARK | NLA_F_NET_BYTEORDER, _MARK_VALUE.pack(mark, mark_mask)
            )
        # Line numbers start at 1: 0 reads as "no line" in the kernel.
        line = _LONG.pack(8, _CADT_LINENO | NLA_F_NET_BYTEORDER, _BE32.pack(len(held) + 1))
        entry = nla(_DATA | NLA_F_NESTED, body + line)
        if size + len(entry) > ADT_BYTES_MAX:
            yield b"".join(entries), held
            entries, held, size = [], [], 0
            line = _LONG.pack(8, _CADT_LINENO | NLA_F_NET_BYTEORDER, _BE32.pack(1))
            entry = nla(_DATA | NLA_F_NESTED, body + line)
        entries.append(entry)
        held.append(member)
        size += len(entry)
    if held:
        yield b"".join(entries), held


def _command(command: int, flags: int, seq: int, body: bytes) -> bytes:
    head = nla(_PROTOCOL, bytes([IPSET_PROTOCOL]))
    return message(NFNL_SUBSYS_IPSET << 8 | command, NLM_F_REQUEST | flags, seq, head + body)


def _name(name: str) -> bytes:
    return nla(_SETNAME, name.encode() + b"\0")


def bulk_message(command: int, *, name: str, payload: bytes, seq: int) -> bytes:
    """One ADD or DEL of many entries.

    Without NLM_F_EXCL: what is there already, or gone already, is no error, and an entry that is
    there takes the new mark.
    """
    body = (
        _name(name)
        + nla(_LINENO | NLA_F_NET_BYTEORDER, _BE32.pack(0))
        + nla(_ADT | NLA_F_NESTED, payload)
    )
    return _command(command, NLM_F_ACK, seq, body)


def flush_message(name: str, *, seq: int) -> bytes:
    """Take all members out of one set."""
    return _command(CMD_FLUSH, NLM_F_ACK, seq, _name(name))


def list_message(name: str | None, *, headers_only: bool, seq: int) -> bytes:
    """Ask for one set or all, with or without members."""
    body = b"" if name is None else _name(name)
    if headers_only:
        body += nla(_FLAGS | NLA_F_NET_BYTEORDER, _BE32.pack(FLAG_LIST_HEADER))
    return _command(CMD_LIST, NLM_F_DUMP, seq, body)


def refused_line(attrs: Iterable[tuple[int, memoryview]]) -> int:
    """The entry's number that the kernel wrote into the echoed request; 0 where there is none."""
    return next((_BE32.unpack(value)[0] for kind, value in attrs if kind == _LINENO), 0)


@dataclass(slots=True)
class RawSet:
    """A set as it arrives, in one or several messages."""

    name: str
    type_name: str = ""
    family: Family | None = None
    marks: bool = False
    #: A timeout or netmask: no set of ours has one, and members would leave or change by themselves.
    strange: bool = False
    elements: int = 0
    references: int = 0
    maxelem: int = 0
    members: dict[Member, int | None] = field(default_factory=dict)


def decode_list(payload: memoryview, sets: dict[str, RawSet], *, mark_mask: int) -> None:
    """Add what one message of a listing says to the sets seen so far."""
    fields = {kind: value for kind, value in attributes(payload) if kind != _PROTOCOL}
    name = bytes(fields[_SETNAME]).rstrip(b"\0").decode()
    raw = sets.setdefault(name, RawSet(name))
    if _TYPENAME in fields:
        raw.type_name = bytes(fields[_TYPENAME]).rstrip(b"\0").decode()
        raw.family = FAMILIES_BY_AF.get(fields[_FAMILY][0])
    if _DATA in fields:
        _decode_header(fields[_DATA], raw)
    decode = _DECODERS.get(raw.type_name)
    if _ADT not in fields or decode is None or _decode_alike(fields[_ADT], raw, mark_mask):
        return
    for _, entry in attributes(fields[_ADT]):
        values = dict(attributes(entry))
        raw.members[decode(values)] = _mark(values, marks=raw.marks, mark_mask=mark_mask)


def _decode_alike(entries: memoryview, raw: RawSet, mark_mask: int) -> bool:
    """Read entries that all have the one usual layout, several times as fast; False where one has not.

    The bytes between the values are the attributes' headers, which say what the values are: an entry
    counts as usual only where they equal those that the kernel writes.
    """
    sample = _SAMPLES.get((raw.type_name, raw.family, raw.marks))
    if sample is None or len(entries) % sample.layout.size:
        return False
    found: list[tuple[Member, int | None]] = []
    head, tail = sample.head, sample.tail
    for row in sample.layout.iter_unpack(entries):
        if row[0] != head or (tail and row[3] != tail):
            return False
        if sample.is_address:
            found.append((row[1], None))
            continue
        if row[2][:4] != _CIDR_HEAD:
            return False
        member = Prefix(row[1], row[2][4])
        mark = None
        if tail:
            mark = row[4] if row[5] == mark_mask else FOREIGN_MARK
        found.append((member, mark))
    raw.members.update(found)
    return True


def _decode_header(data: memoryview, raw: RawSet) -> None:
    values = dict(attributes(data))
    flags = _be32(values.get(_CADT_FLAGS))
    raw.marks = bool(flags & CADT_SKBINFO)
    raw.strange = _TIMEOUT in values or _NETMASK in values
    raw.elements = _be32(values.get(_ELEMENTS))
    raw.references = _be32(values.get(_REFERENCES))
    raw.maxelem = _be32(values.get(_MAXELEM))


def _be32(value: memoryview | None) -> int:
    return 0 if value is None else int.from_bytes(value, "big")


def _mark(values: dict[int, memoryview], *, marks: bool, mark_mask: int) -> int | None:
    if _CADT_FLAGS in values and _be32(values[_CADT_FLAGS]) & CADT_NOMATCH:
        return FOREIGN_MARK
    if not marks:
        return None
    stored = values.get(_SKBMARK)
    if stored is None:  # the kernel leaves out a value of 0 with a mask of 0
        return FOREIGN_MARK
    value, mask = _MARK_VALUE.unpack(stored)
    return value if mask == mark_mask else FOREIGN_MARK


def _packed(value: memoryview) -> bytes:
    return bytes(value[4:])  # a nested attribute that holds just the address


def _prefix(address: memoryview, length: memoryview | None) -> Prefix:
    packed = _packed(address)
    return Prefix(packed, len(packed) * 8 if length is None else length[0])


def _decode_ip(values: dict[int, memoryview]) -> Member:
    return _packed(values[_IP])


def _decode_net(values: dict[int, memoryview]) -> Member:
    return _prefix(values[_IP], values.get(_CIDR))


def _decode_ip_port(values: dict[int, memoryview]) -> AddressPort:
    # A foreign entry may have a protocol that the model does not name: its bare number equals no
    # wanted member, and _encode_member can still delete it.
    number = values[_PROTO][0]
    protocol = _PROTOCOLS_BY_NUMBER.get(number) or cast("Protocol", number)
    return AddressPort(_packed(values[_IP]), protocol, int.from_bytes(values[_PORT], "big"))


def _decode_ip_port_net(values: dict[int, memoryview]) -> Member:
    return AddressPortNet(*_decode_ip_port(values), _prefix(values[_IP2], values.get(_CIDR2)))


def _decode_net_net(values: dict[int, memoryview]) -> Member:
    return NetPair(
        _prefix(values[_IP], values.get(_CIDR)), _prefix(values[_IP2], values.get(_CIDR2))
    )


class _Sample(NamedTuple):
    """The usual layout of a set's entries: headers, values, headers, values."""

    layout: struct.Struct
    head: bytes
    tail: bytes
    is_address: bool


_CIDR_HEAD = _BYTE.pack(5, _CIDR, 0)[:4]


def _samples() -> Iterator[tuple[tuple[str, Family | None, bool], _Sample]]:
    for family in Family:
        size = family.bits // 8
        # The kernel sends addresses without the byte order flag that it wants to receive.
        inner = _ADDR4 if family is Family.V4 else _ADDR6
        address = struct.pack("=HHHH", 8 + size, _IP | NLA_F_NESTED, 4 + size, inner)
        for kind, rest, values in (
            (SetKind.HASH_IP, 0, ""),
            (SetKind.HASH_NET, 8, "5s3x"),
        ):
            for marks in (False, True) if kind is SetKind.HASH_NET else (False,):
                total = 4 + len(address) + size + rest + (12 if marks else 0)
                head = struct.pack("=HH", total, _DATA | NLA_F_NESTED) + address
                tail = struct.pack("=HH", 12, _SKBMARK | NLA_F_NET_BYTEORDER) if marks else b""
                text = f">{len(head)}s{size}s{values}{'4sII' if marks else ''}"
                sample = _Sample(struct.Struct(text), head, tail, not values)
                yield (str(kind), family, marks), sample


_SAMPLES = dict(_samples())

_DECODERS: dict[str, Callable[[dict[int, memoryview]], Member]] = {
    SetKind.HASH_IP: _decode_ip,
    SetKind.HASH_NET: _decode_net,
    SetKind.HASH_IP_PORT: _decode_ip_port,
    SetKind.HASH_NET_NET: _decode_net_net,
    SetKind.HASH_IP_PORT_NET: _decode_ip_port_net,
}
