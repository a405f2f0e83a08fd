"""Single values of BGP settings as people write them, read or refused: pure.

Messages say what was needed and never what was given: an annotation may hold passwords.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from netpol.model.net import Family, Prefix, family_of, parse_address, parse_prefix
from routes.options import ASN_MAX, NO_ASNS, Community

_WELL_KNOWN = {
    # RFC 1997, RFC 3765, RFC 7999, RFC 8326
    "no-export": Community(65535, 65281),
    "no-advertise": Community(65535, 65282),
    "no-export-subconfed": Community(65535, 65283),
    "no-peer": Community(65535, 65284),
    "blackhole": Community(65535, 666),
    "graceful-shutdown": Community(65535, 0),
}


class BadValueError(ValueError):
    """A value that cannot be read; the text says why and never what it was."""


def community(text: str) -> Community:
    """A community as people write it: 64512:100, 64512:1:2, or a well-known name.

    Raises:
        ValueError: it is none.
    """
    known = _WELL_KNOWN.get(text.lower().replace("_", "-"))
    if known is not None:
        return known
    parts = text.split(":")
    if not all(p.isascii() and p.isdigit() for p in parts) or len(parts) not in (1, 2, 3):
        raise BadValueError("needed a community such as 64512:100")
    numbers = [int(p) for p in parts]
    if len(numbers) == 1 and numbers[0] <= ASN_MAX:
        return Community(numbers[0] >> 16, numbers[0] & 0xFFFF)
    if max(numbers) > (0xFFFF if len(numbers) == 2 else ASN_MAX) or len(numbers) == 1:
        raise BadValueError("needed a community such as 64512:100")
    return Community(*numbers)


def words(text: str) -> Iterator[str]:
    """The items of a list with commas or line ends between."""
    for word in text.replace("\n", ",").split(","):
        if word.strip():
            yield word.strip()


def number(value: Any, low: int, high: int) -> int:
    """A whole number of a span."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 10:
        raise BadValueError(f"needed a number of {low}..{high}")
    if not low <= int(text) <= high:
        raise BadValueError(f"needed a number of {low}..{high}")
    return int(text)


def asn(value: Any) -> int:
    """A number, or two with a dot between (RFC 5396): 1.10 is 65546."""
    high, dot, low = str(value).strip().partition(".")
    found = (
        number(high, 0, 0xFFFF) << 16 | number(low, 0, 0xFFFF)
        if dot
        else number(value, 1, ASN_MAX - 1)
    )
    if found in NO_ASNS:
        raise BadValueError(f"needed an AS, and {found} is none")
    return found


def times(value: Any) -> int:
    """How often an AS is put before a path."""
    return number(value, 1, 32)


def port(value: Any) -> int:
    """A TCP port."""
    return number(value, 1, 65535)


def ttl(value: Any) -> int:
    """Routers on the way; 0 for none."""
    return number(value, 0, 255)


def seconds(value: Any) -> int:
    """A hold time."""
    return number(value, 3, 65535)


def keepalive(value: Any) -> int:
    """A keepalive time: a third of the longest hold time at most."""
    return number(value, 1, 21845)


def u32(value: Any) -> int:
    """A number of 32 bits."""
    return number(value, 0, ASN_MAX)


def boolean(value: Any) -> bool:
    """A truth value, as YAML 1.1 has them."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if str(value).lower() not in known:
        raise BadValueError("needed true or false")
    return known[str(value).lower()]


def ip(value: Any) -> bytes:
    """Any address."""
    try:
        return parse_address(str(value).strip())
    except ValueError:
        raise BadValueError("needed an IP address") from None


def prefix(value: Any) -> Prefix:
    """Any CIDR."""
    try:
        return parse_prefix(str(value).strip())
    except ValueError:
        raise BadValueError("needed a CIDR (ADDRESS/LENGTH)") from None


def router_address(value: Any) -> bytes:
    """An address that a router can have."""
    address = ip(value)
    what = ipaddress.ip_address(address)
    # BIRD takes a link-local neighbour only with its link, which nobody says here.
    if what.is_multicast or what.is_unspecified or what.is_loopback or what.is_link_local:
        raise BadValueError("needed the address of a router")
    if len(address) == 4 and not 0 < address[0] < 240:  # "this network", and what is reserved
        raise BadValueError("needed the address of a router")
    return address


def router_id(value: Any) -> bytes:
    """A BGP identifier (RFC 6286)."""
    address = ip(value)
    if family_of(address) is not Family.V4 or address == bytes(4):
        raise BadValueError("needed an IPv4 address other than 0.0.0.0")
    return address


def cluster_id(value: Any) -> bytes:
    """RFC 4456 section 7: four bytes, written as a number or an IPv4 address."""
    text = str(value)
    if text.isascii() and text.isdigit():
        return number(text, 1, ASN_MAX).to_bytes(4, "big")
    return router_id(text)


def prefixes(value: Any) -> tuple[Prefix, ...]:
    """CIDRs, as a list or one text."""
    return tuple(prefix(v) for v in listed(value))


def communities(value: Any) -> tuple[Community, ...]:
    """Communities, as a list or one text."""
    return tuple(community(str(v).strip()) for v in listed(value))


def listed(value: Any) -> Sequence[Any]:
    """A list; a text is one with commas."""
    if isinstance(value, str):
        return tuple(words(value))
    if not isinstance(value, list):
        raise BadValueError(f"needed a list, got {type(value).__name__}")
    return value


def prepended(value: Any) -> tuple[int, int]:
    """An AS and how often it is put before a path: a mapping of `asn` and `times`."""
    if not isinstance(value, Mapping) or set(value) != {"asn", "times"}:
        raise BadValueError("needed asn and times")
    return asn(value["asn"]), times(value["times"])
