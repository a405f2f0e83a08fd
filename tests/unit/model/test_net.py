"""Addresses and prefixes: the forms that people write, one by one."""

from __future__ import annotations

import pytest

from netpol.model.net import (
    Family,
    Prefix,
    family_of,
    format_address,
    host_prefix,
    masked,
    parse_address,
    parse_prefix,
    subtract,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("010.001.002.003/8", "10.0.0.0/8"),
        ("10.0.0.1/32", "10.0.0.1/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("255.255.255.255/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("fd00::1/64", "fd00::/64"),
        ("FD00::1/128", "fd00::1/128"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:a00:1/128", "10.0.0.1/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:10.0.0.0/95", "::fffe:0:0/95"),
        ("::ffff:0:0/64", "::/64"),
    ],
)
def test_parse_prefix(text: str, wanted: str):
    assert str(parse_prefix(text)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/33",
        "10.0.0.0/-1",
        "10.0.0.0/+8",
        "10.0.0.0/8 ",
        " 10.0.0.0/8",
        "10.0.0/8",
        "10.0.0.0.0/8",
        "256.0.0.0/8",
        "10..0.0/8",
        "0x0a.0.0.0/8",
        "10.0.0.0/255.0.0.0",
        "10.0.0.0/8/8",
        "::/129",
        "fe80::1%eth0/64",
        ":::/0",
        "\u0661\u0660.0.0.0/8",
        "10.0.0.0/\u0668",
        "localhost/8",
    ],
)
def test_not_a_prefix(text: str):
    with pytest.raises(ValueError, match="is not a CIDR"):
        parse_prefix(text)


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "10.0.0.256", "1.2.3.4.5", "fe80::1%lo", "::g", "1.2.3.-4"]
)
def test_not_an_address(text: str):
    with pytest.raises(ValueError, match="is not an IP address"):
        parse_address(text)


def test_addresses():
    assert parse_address("010.0.0.09") == bytes((10, 0, 0, 9))
    assert parse_address("::ffff:10.0.0.1") == bytes((10, 0, 0, 1))
    assert format_address(parse_address("2001:DB8::0:1")) == "2001:db8::1"
    assert family_of(parse_address("::1")) is Family.V6


def test_contains_never_crosses_families():
    everything = parse_prefix("0.0.0.0/0")
    assert everything.contains(parse_address("255.255.255.255"))
    assert not everything.contains(parse_address("::1"))
    assert not parse_prefix("::/0").contains(parse_address("10.0.0.1"))


def test_covers_counts_equal_blocks():
    block = parse_prefix("10.0.0.0/24")
    assert block.covers(block)
    assert block.covers(host_prefix(parse_address("10.0.0.255")))
    assert not block.covers(parse_prefix("10.0.0.0/23"))


def test_subtract_writes_out_the_rest():
    rest = subtract(parse_prefix("10.0.0.0/24"), [parse_prefix("10.0.0.0/26")])
    assert [str(p) for p in rest] == ["10.0.0.64/26", "10.0.0.128/25"]
    assert subtract(parse_prefix("10.0.0.0/24"), [parse_prefix("10.0.0.0/23")]) == ()
    whole = parse_prefix("0.0.0.0/0")
    assert len(subtract(whole, [parse_prefix("10.0.0.1/32")])) == 32
    assert subtract(whole, [parse_prefix("::/1")]) == (whole,)


def test_masked_drops_host_bits():
    assert masked(parse_address("10.1.2.3"), 12) == Prefix(parse_address("10.0.0.0"), 12)
    assert masked(parse_address("10.1.2.3"), 0) == Prefix(bytes(4), 0)
