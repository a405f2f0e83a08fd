"""Addresses and prefixes: parsing as the Kubernetes API reads them, and prefix arithmetic.

An address is its packed bytes (4 or 16), which is what netlink wants and what hashes fastest; the
family is the length. Parsing happens once, at the wall.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple


class Family(IntEnum):
    """IP version; the value is what people type (`--family 4`)."""

    V4 = 4
    V6 = 6

    @property
    def bits(self) -> int:
        """Length of an address in bits."""
        return 32 if self is Family.V4 else 128


FAMILIES = (Family.V4, Family.V6)

#: ::ffff:0:0/96, the prefix under which IPv6 writes IPv4 (RFC 4291 section 2.5.5.2).
_V4_MAPPED = bytes(10) + b"\xff\xff"


def family_of(address: bytes) -> Family:
    """Tell the family of a packed address."""
    return Family.V4 if len(address) == 4 else Family.V6


class Prefix(NamedTuple):
    """A CIDR block: packed network address (host bits zero) and prefix length in bits."""

    address: bytes
    length: int

    @property
    def family(self) -> Family:
        """The family of the block."""
        return family_of(self.address)

    def contains(self, address: bytes) -> bool:
        """Whether a packed address lies inside; never across families."""
        if len(address) != len(self.address):
            return False
        shift = len(self.address) * 8 - self.length
        return int.from_bytes(address, "big") >> shift == (
            int.from_bytes(self.address, "big") >> shift
        )

    def covers(self, other: Prefix) -> bool:
        """Whether the other block lies inside this one (equal counts)."""
        return self.length <= other.length and self.contains(other.address)

    @property
    def is_host(self) -> bool:
        """Whether the block is a single address."""
        return self.length == len(self.address) * 8

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self.length}"


def host_prefix(address: bytes) -> Prefix:
    """The block that holds just this address."""
    return Prefix(address, len(address) * 8)


@lru_cache(maxsize=65536)
def format_address(address: bytes) -> str:
    """Write a packed address as people read it."""
    return str(ipaddress.ip_address(address))


def parse_address(text: str) -> bytes:
    """Parse an address as the API server's lenient parser does.

    Leading zeros in IPv4 octets are read as decimal; an IPv4-mapped IPv6 address is the IPv4 address.

    Raises:
        ValueError: not an address.
    """
    if ":" not in text:
        octets = text.split(".")
        if len(octets) != 4 or not all(o.isascii() and o.isdigit() and len(o) <= 4 for o in octets):
            raise ValueError(f"{text!r} is not an IP address")
        values = [int(o) for o in octets]
        if max(values) > 255:
            raise ValueError(f"{text!r} is not an IP address")
        return bytes(values)
    try:
        if "%" in text:
            raise ValueError("zones have no place in a policy")
        packed = ipaddress.IPv6Address(text).packed
    except ValueError as e:
        raise ValueError(f"{text!r} is not an IP address") from e
    return packed[12:] if packed.startswith(_V4_MAPPED) else packed


def parse_prefix(text: str) -> Prefix:
    """Parse a CIDR as the API server's lenient parser does: host bits are masked off.

    A block inside ::ffff:0:0/96 is the IPv4 block.

    Raises:
        ValueError: not a CIDR.
    """
    head, slash, tail = text.partition("/")
    if not slash or not tail.isascii() or not tail.isdigit() or len(tail) > 3:
        raise ValueError(f"{text!r} is not a CIDR (ADDRESS/LENGTH)")
    length = int(tail)
    try:
        packed = (
            ipaddress.IPv6Address(head).packed
            if ":" in head and "%" not in head
            else parse_address(head)
        )
    except ValueError as e:
        raise ValueError(f"{text!r} is not a CIDR (ADDRESS/LENGTH)") from e
    if length > len(packed) * 8:
        raise ValueError(f"{text!r} is not a CIDR (length over {len(packed) * 8})")
    if packed.startswith(_V4_MAPPED) and length >= 96:
        packed, length = packed[12:], length - 96
    return masked(packed, length)


def masked(address: bytes, length: int) -> Prefix:
    """The block of the given length that an address lies in."""
    size = len(address)
    shift = size * 8 - length
    value = int.from_bytes(address, "big") >> shift << shift
    return Prefix(value.to_bytes(size, "big"), length)


def subtract(cidr: Prefix, excepts: Iterable[Prefix]) -> tuple[Prefix, ...]:
    """What remains of a block without others, as disjoint sorted prefixes.

    Excepts of the other family, or outside the block, take nothing away.
    """
    rest = [cidr]
    for hole in excepts:
        kept: list[Prefix] = []
        for block in rest:
            if hole.covers(block):
                continue
            if block.covers(hole):
                kept.extend(_halves_without(block, hole))
            else:
                kept.append(block)
        rest = kept
    return collapse(rest)


def _halves_without(block: Prefix, hole: Prefix) -> Iterable[Prefix]:
    """Split a block towards a hole strictly inside it; yield the halves that miss the hole."""
    size = len(block.address)
    bits = size * 8
    value = int.from_bytes(hole.address, "big")
    for length in range(block.length + 1, hole.length + 1):
        shift = bits - length
        sibling = (value >> shift ^ 1) << shift
        yield Prefix(sibling.to_bytes(size, "big"), length)


def collapse(prefixes: Iterable[Prefix]) -> tuple[Prefix, ...]:
    """The same addresses in as few disjoint prefixes as possible, sorted; families apart."""
    out: list[Prefix] = []
    distinct = set(prefixes)
    for family in FAMILIES:
        size = family.bits // 8
        stack: list[tuple[int, int]] = []  # (network as int, length)
        mine = sorted(prefixes_of(distinct, family))
        for p in mine:
            value, length = int.from_bytes(p.address, "big"), p.length
            if stack:
                top, top_length = stack[-1]
                if value >> (family.bits - top_length) == top >> (family.bits - top_length):
                    continue
            while stack:
                top, top_length = stack[-1]
                shift = family.bits - length
                if top_length == length and top >> shift ^ 1 == value >> shift:
                    stack.pop()
                    value, length = top, length - 1
                else:
                    break
            stack.append((value, length))
        out.extend(Prefix(v.to_bytes(size, "big"), length) for v, length in stack)
    return tuple(out)


def prefixes_of(prefixes: Iterable[Prefix], family: Family) -> list[Prefix]:
    """Those of one family."""
    return [p for p in prefixes if p.family is family]
