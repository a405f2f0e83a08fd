"""Rules that drivers write mean to packets what the model says of them: by counters, both variants."""

from __future__ import annotations

import subprocess

import pytest

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    SetTransaction,
    TableTransaction,
    Variant,
)
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.net import Family, parse_prefix
from netpol.model.ruleset import (
    Hook,
    MapMark,
    MarkMatch,
    Return,
    Rule,
    SameAddress,
    SetMark,
    Side,
)
from tests.kernel.forms import CHAIN_A, FIELD, set_specs

pytestmark = [pytest.mark.kernel, pytest.mark.parametrize("variant", Variant)]

ADDRESSES = {Family.V4: ("127.0.0.1", "127.0.0.2"), Family.V6: ("::1", "fd00::7")}


def ping(space: str, source: str, destination: str) -> None:
    args = ["ping", "-c", "3", "-i", "0.002", "-W", "1", "-I", source, destination]
    in_netns(space, lambda: subprocess.run(args, check=True, capture_output=True))


@pytest.mark.parametrize("family", Family)
def test_same_address_counts_packets_from_an_address_to_itself(
    space: str, variant: Variant, family: Family
) -> None:
    own, other = ADDRESSES[family]
    if family is Family.V6:
        subprocess.run(["ip", "-n", space, "addr", "add", other, "dev", "lo", "nodad"], check=True)
    tables = RestoreTables(variant, netns=space)
    rules = (Rule(Return(), (SameAddress(family),)), Rule(Return()))
    tables.apply(TableTransaction("mangle", family, {CHAIN_A: rules}, hooks={Hook.OUTPUT: CHAIN_A}))
    ping(space, own, own)
    assert [packets for packets, _ in tables.counters("mangle", family)[CHAIN_A]] == [6, 0]
    ping(space, own, other)
    assert [packets for packets, _ in tables.counters("mangle", family)[CHAIN_A]] == [6, 6]


def test_a_map_gives_the_longest_prefixs_mark_and_leaves_other_bits(
    space: str, sets: NetlinkSets, variant: Variant
) -> None:
    spec = set_specs(Family.V4)[2]
    members = {parse_prefix("127.0.0.0/8"): 1 << 20, parse_prefix("127.0.0.2/32"): 7 << 20}
    sets.apply(SetTransaction((CreateSet(spec), AddMembers(spec, members))))
    tables = RestoreTables(variant, netns=space)
    seven_and_low_bits = MarkMatch(7 << 20 | 0x4000, 0xFFFFFFFF)
    rules = (
        Rule(SetMark(0x4000, 0xFFFFFFFF)),
        Rule(MapMark(spec.name, Side.DST)),
        Rule(Return(), (seven_and_low_bits,)),
        Rule(Return(), (MarkMatch(1 << 20, FIELD),)),
    )
    tables.apply(
        TableTransaction("mangle", Family.V4, {CHAIN_A: rules}, hooks={Hook.OUTPUT: CHAIN_A})
    )
    ping(space, "127.0.0.1", "127.0.0.2")
    counted = tables.counters("mangle", Family.V4)[CHAIN_A]
    assert [packets for packets, _ in counted] == [6, 6, 3, 3]
