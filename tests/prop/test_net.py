"""Prefix arithmetic against counting addresses one by one, in spaces small enough to count."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from netpol.model.net import (
    Family,
    Prefix,
    collapse,
    format_address,
    host_prefix,
    masked,
    parse_address,
    parse_prefix,
    prefixes_of,
    subtract,
)

#: The lowest bits that vary: 64 addresses in either family.
BITS = 6
BASES = {
    Family.V4: bytes((10, 0, 0, 0)),
    Family.V6: bytes((0xFD,)) + bytes(15),
}


@st.composite
def prefixes(draw: st.DrawFn, family: Family | None = None) -> Prefix:
    family = family or draw(st.sampled_from(list(Family)))
    host = draw(st.integers(0, 2**BITS - 1))
    length = draw(st.integers(family.bits - BITS, family.bits))
    base = int.from_bytes(BASES[family], "big") + host
    return masked(base.to_bytes(family.bits // 8, "big"), length)


def members(*blocks: Prefix) -> set[bytes]:
    """All addresses of some blocks of the small spaces."""
    out = set()
    for family, base in BASES.items():
        for host in range(2**BITS):
            value = int.from_bytes(base, "big") + host
            address = value.to_bytes(family.bits // 8, "big")
            if any(b.contains(address) for b in blocks):
                out.add(address)
    return out


def disjoint(blocks: tuple[Prefix, ...]) -> bool:
    return sum(len(members(b)) for b in blocks) == len(members(*blocks))


@given(prefixes(), st.lists(prefixes(), max_size=4))
def test_subtract_is_set_difference(block: Prefix, holes: list[Prefix]):
    rest = subtract(block, holes)
    assert members(*rest) == members(block) - members(*holes)
    assert disjoint(rest)
    assert all(p.family is block.family for p in rest)


@given(st.lists(prefixes(), max_size=8))
def test_collapse_is_the_union_in_the_fewest_blocks(blocks: list[Prefix]):
    merged = collapse(blocks)
    assert collapse(iter(blocks)) == merged  # what can be walked once only, too
    assert members(*merged) == members(*blocks)
    assert disjoint(merged)
    reference: list[str] = []
    for family in Family:
        mine = [ipaddress.ip_network(str(p)) for p in prefixes_of(blocks, family)]
        reference += [str(n) for n in ipaddress.collapse_addresses(mine)]
    assert [str(p) for p in merged] == reference


@given(prefixes(), prefixes())
def test_covers_is_inclusion(one: Prefix, other: Prefix):
    assert one.covers(other) == (members(other) <= members(one))


@given(st.ip_addresses())
def test_addresses_round_trip(address: ipaddress.IPv4Address | ipaddress.IPv6Address):
    packed = parse_address(str(address))
    mapped = getattr(address, "ipv4_mapped", None)
    assert packed == (mapped or address).packed
    assert parse_address(format_address(packed)) == packed
    assert host_prefix(packed).contains(packed)
    assert host_prefix(packed).is_host


@given(st.ip_addresses(v=4), st.integers(0, 32), st.integers(0, 3))
def test_tolerant_v4_blocks(address: ipaddress.IPv4Address, length: int, zeros: int):
    """Host bits are dropped, leading zeros are decimal (row 50), v4-mapped is v4 (row 51)."""
    wanted = ipaddress.ip_network((int(address), length), strict=False)
    padded = ".".join(o.rjust(min(3, len(o) + zeros), "0") for o in str(address).split("."))
    assert str(parse_prefix(f"{padded}/{length}")) == str(wanted)
    assert str(parse_prefix(f"::ffff:{address}/{length + 96}")) == str(wanted)


@given(st.ip_addresses(v=6), st.integers(0, 95))
def test_wide_v6_blocks_stay_v6(address: ipaddress.IPv6Address, length: int):
    wanted = ipaddress.IPv6Network((int(address), length), strict=False)
    assert str(parse_prefix(f"{address}/{length}")) == str(wanted)


@given(st.text(alphabet="0123456789./:abcdefxX -+_%eth\u0661", max_size=24))
def test_junk_is_a_value_error_or_means_what_ipaddress_says(text: str):
    try:
        got = parse_prefix(text)
    except ValueError:
        return
    if ":" not in text:
        head, _, tail = text.partition("/")
        head = ".".join(str(int(o)) for o in head.split("."))
        text = f"{head}/{int(tail)}"
        assert str(got) == str(ipaddress.ip_network(text, strict=False))
    else:
        head, _, tail = text.partition("/")
        network = ipaddress.ip_network(f"{head}/{int(tail)}", strict=False)
        assert got.family is Family.V4 or str(got) == str(network)
