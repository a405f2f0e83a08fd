"""Ranges of addresses that need not be prefixes: what addresses are handed out from."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any, NamedTuple

from netpol.model.net import (
    Family,
    Prefix,
    family_of,
    format_address,
    parse_address,
    parse_prefix,
)


class AddressRange(NamedTuple):
    """The addresses from `first` to `last`, both included."""

    first: bytes
    last: bytes

    @property
    def family(self) -> Family:
        """The family of its addresses."""
        return family_of(self.first)

    @property
    def size(self) -> int:
        """How many addresses there are."""
        return int.from_bytes(self.last, "big") - int.from_bytes(self.first, "big") + 1

    def contains(self, address: bytes) -> bool:
        """Whether an address lies within."""
        return len(address) == len(self.first) and self.first <= address <= self.last

    def blocks(self) -> tuple[Prefix, ...]:
        """The fewest prefixes that hold exactly these addresses.

        Raises:
            TypeError, ValueError: the ends are of two families, or the wrong way round.
        """
        first, last = ipaddress.ip_address(self.first), ipaddress.ip_address(self.last)
        found: Iterable[Any] = ipaddress.summarize_address_range(first, last)
        return tuple(Prefix(b.network_address.packed, b.prefixlen) for b in found)

    def __str__(self) -> str:
        return f"{format_address(self.first)}-{format_address(self.last)}"


def parse_range(text: str) -> AddressRange:
    """Parse FIRST-LAST or a CIDR.

    Of an IPv4 prefix shorter than /31 the network's own address and its broadcast address are left out,
    since routers and hosts do not take those; whoever wants them writes FIRST-LAST.

    Raises:
        ValueError: it is neither, or its ends are of two families or the wrong way round.
    """
    first_text, dash, last_text = text.partition("-")
    if dash:
        first, last = parse_address(first_text.strip()), parse_address(last_text.strip())
        if len(first) != len(last):
            raise ValueError(f"needed two addresses of one family, got {text!r}")
        if first > last:
            raise ValueError(f"needed the lower address first, got {text!r}")
        return AddressRange(first, last)
    prefix = parse_prefix(text)
    bits = len(prefix.address) * 8
    begin = int.from_bytes(prefix.address, "big")
    end = begin + (1 << (bits - prefix.length)) - 1
    if prefix.family is Family.V4 and prefix.length < bits - 1:
        begin, end = begin + 1, end - 1
    width = len(prefix.address)
    return AddressRange(begin.to_bytes(width, "big"), end.to_bytes(width, "big"))
