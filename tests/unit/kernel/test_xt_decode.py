"""Entries of the legacy tables that no kernel of every machine makes, put together by hand."""

from __future__ import annotations

import struct

import pytest

from netpol.kernel.xt_decode import ENTRY_SIZES, decode_rule
from netpol.model.ids import ChainName, SetName
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import IpvsSends, Jump, Rule

CHAIN = ChainName("KNP-SVC-MASQ")


def extension(name: str, revision: int, data: bytes) -> bytes:
    """Struct xt_entry_match, or xt_entry_target."""
    return struct.pack("=H29sB", 32 + len(data), name.encode(), revision) + data


def entry(family: Family, matches: bytes) -> bytes:
    """A rule without addresses and interfaces that jumps to a chain."""
    size = ENTRY_SIZES[family]
    base = bytearray(size)
    at = 88 if family is Family.V4 else 140
    struct.pack_into("=HH", base, at, size + len(matches), size + len(matches) + 40)
    return bytes(base) + matches + extension("", 0, bytes(8))


def ipvs(*, compared: int = 1, inverted: int = 0, port: int = 0) -> bytes:
    """Struct xt_ipvs_mtinfo: address, mask, port, protocol, method, control port, inverted, compared."""
    return bytes(32) + struct.pack("=HBBHBB", port, 0, 0, 0, inverted, compared)


def decoded(family: Family, data: bytes) -> Rule | None:
    return decode_rule(
        entry(family, extension("ipvs", 0, data)),
        family=family,
        target=CHAIN,
        set_names=lambda _: SetName("KNP-S"),
    )


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
def test_what_ipvs_sends_on(family: Family) -> None:
    assert decoded(family, ipvs()) == Rule(Jump(CHAIN), (IpvsSends(),))


@pytest.mark.parametrize(
    "data",
    [ipvs(inverted=1), ipvs(compared=2), ipvs(compared=3), ipvs(port=80)],
    ids=["inverted", "protocol", "more", "port"],
)
def test_anything_else_of_ipvs_is_foreign(data: bytes) -> None:
    assert decoded(Family.V4, data) is None
