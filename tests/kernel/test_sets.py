"""NetlinkSets on the real kernel, against the contract and against ipset(8)."""

from __future__ import annotations

import asyncio
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    SetError,
    SetTransaction,
)
from netpol.kernel.netns import in_netns
from netpol.kernel.set_text import restore_text
from netpol.kernel.set_wire import FOREIGN_MARK
from netpol.kernel.sets import NetlinkSets
from netpol.lib.errors import KernelMissingError
from netpol.model.ids import Protocol, SetName
from netpol.model.net import Family, Prefix, parse_address, parse_prefix
from netpol.model.ruleset import AddressPort, Member, NetPair, SetKind, SetSpec
from tests.kernel.contract_sets import M4, MEMBERS, N4, P4, S4, SetContract

pytestmark = pytest.mark.kernel


def ipset(space: str, *args: str, text: str = "") -> str:
    done = in_netns(
        space,
        lambda: subprocess.run(
            ["ipset", *args], input=text, text=True, capture_output=True, check=False
        ),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestNetlinkSets(SetContract):
    pass


def test_ipset_applies_the_text_to_the_same_effect(space: str, sets: NetlinkSets) -> None:
    tx = SetTransaction(
        (
            *tuple(
                op
                for spec, members in MEMBERS.items()
                for op in (
                    CreateSet(spec, 10),
                    AddMembers(spec, members),
                    DeleteMembers(spec, [next(iter(members))]),
                )
            ),
            CreateSet(SetSpec(SetName("KNP-GONE"), SetKind.HASH_IP, Family.V4)),
            DestroySet(SetName("KNP-GONE")),
            DestroySet(SetName("KNP-GONE")),
        )
    )
    ipset(space, "-exist", "restore", text=restore_text(tx))
    by_tool, saved_by_tool = sets.dump(), ipset(space, "save")
    sets.apply(SetTransaction(tuple(DestroySet(name) for name in by_tool)))
    sets.apply(tx)
    assert sets.dump() == by_tool

    def comparable(saved: str) -> list[str]:  # initval is random
        return sorted(line.split(" initval")[0] for line in saved.splitlines())

    assert comparable(ipset(space, "save")) == comparable(saved_by_tool)


def test_sets_without_our_prefix_are_not_seen(space: str, sets: NetlinkSets) -> None:
    ipset(space, "restore", text="create KUBE-X hash:ip\nadd KUBE-X 1.2.3.4\ncreate L list:set\n")
    sets.apply(SetTransaction((CreateSet(S4),)))
    assert set(sets.headers()) == {S4.name}
    assert set(sets.dump()) == {S4.name}


@pytest.mark.parametrize(
    "line",
    [
        "create KNP-S4 list:set",
        "create KNP-S4 hash:net,port",
        "create KNP-S4 hash:ip timeout 60",
        "create KNP-S4 hash:ip netmask 24",
    ],
)
def test_a_set_that_is_not_ours_under_our_prefix_is_named(
    space: str, sets: NetlinkSets, line: str
) -> None:
    ipset(space, "restore", text=f"{line}\n")
    with pytest.raises(SetError, match="KNP-S4") as of_dump:
        sets.dump()
    assert of_dump.value.name == S4.name
    with pytest.raises(SetError, match=line.split()[2]) as of_create:
        sets.apply(SetTransaction((CreateSet(S4),)))
    assert of_create.value.name == S4.name
    sets.apply(SetTransaction((DestroySet(S4.name), CreateSet(S4))))
    assert sets.dump()[S4.name].members == {}


def test_what_others_did_to_members_is_seen_and_repaired(space: str, sets: NetlinkSets) -> None:
    net, marked = parse_prefix("10.0.0.0/8"), parse_prefix("10.244.0.0/16")
    sets.apply(SetTransaction((CreateSet(N4), CreateSet(M4), CreateSet(P4))))
    ipset(
        space,
        "restore",
        text=f"add {N4.name} {net} nomatch\n"
        f"add {M4.name} {marked} skbmark 0x100000/0xff\nadd {P4.name} 10.0.0.1,udplite:5\n",
    )
    dumps = sets.dump()
    assert dumps[N4.name].members == {net: FOREIGN_MARK}
    assert dumps[M4.name].members == {marked: FOREIGN_MARK}
    (foreign,) = dumps[P4.name].members
    assert foreign != AddressPort(parse_address("10.0.0.1"), Protocol.UDP, 5)
    sets.apply(
        SetTransaction(
            (
                AddMembers(N4, {net: None}),
                AddMembers(M4, {marked: 1 << 20}),
                DeleteMembers(P4, [foreign]),
            )
        )
    )
    dumps = sets.dump()
    assert dumps[N4.name].members == {net: None}
    assert dumps[M4.name].members == {marked: 1 << 20}
    assert dumps[P4.name].members == {}


def test_a_full_set_names_the_member_that_did_not_fit(space: str, sets: NetlinkSets) -> None:
    ipset(space, "restore", text="create KNP-S4 hash:ip maxelem 64 hashsize 64\n")
    members = {(0x0A000000 + n).to_bytes(4, "big"): None for n in range(200)}
    with pytest.raises(SetError, match="full") as caught:
        sets.apply(SetTransaction((CreateSet(S4), AddMembers(S4, members))))
    assert caught.value.code == 4352
    held = sets.headers()[S4.name]
    assert caught.value.member == list(members)[held]


def test_pairs_of_prefixes_where_the_kernel_has_them(sets: NetlinkSets) -> None:
    spec = SetSpec(SetName("KNP-NN"), SetKind.HASH_NET_NET, Family.V4)
    pod = parse_prefix("10.0.0.1/32")
    try:
        sets.apply(SetTransaction((CreateSet(spec),)))
    except KernelMissingError as e:
        assert "hash:net,net" in str(e)  # noqa: PT017 - this kernel lacks it, and says which
        return
    sets.apply(SetTransaction((AddMembers(spec, {NetPair(pod, pod): None}),)))
    assert sets.dump()[spec.name].members == {NetPair(pod, pod): None}


async def test_it_works_inside_a_running_loop_and_from_many_threads(sets: NetlinkSets) -> None:
    sets.apply(SetTransaction((CreateSet(S4),)))
    loop = asyncio.get_running_loop()

    def add(n: int) -> None:
        sets.apply(SetTransaction((AddMembers(S4, {bytes([10, 0, 0, n]): None}),)))

    with ThreadPoolExecutor(8) as pool:
        await asyncio.gather(*(loop.run_in_executor(pool, add, n) for n in range(100)))
    assert sets.headers() == {S4.name: 100}


def test_a_driver_stays_in_the_namespace_it_was_made_in(space: str, sets: NetlinkSets) -> None:
    sets.apply(SetTransaction((CreateSet(S4),)))
    assert ipset(space, "list", "-n").split() == [S4.name]


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("kind", [SetKind.HASH_IP, SetKind.HASH_NET])
def test_entries_of_the_usual_layout_and_others_in_one_set(
    space: str, sets: NetlinkSets, family: Family, kind: SetKind
) -> None:
    spec = SetSpec(SetName("KNP-X"), kind, family, marks=kind is SetKind.HASH_NET)
    n = family.bits // 8
    addresses = [bytes([10]) + i.to_bytes(n - 1, "big") for i in range(2000)]
    members: dict[Member, int | None] = (
        {Prefix(a, n * 8): (i % 4096) << 20 for i, a in enumerate(addresses)}
        if spec.marks
        else dict.fromkeys(addresses)
    )
    sets.apply(SetTransaction((CreateSet(spec, 2000), AddMembers(spec, members))))
    assert sets.dump()[spec.name].members == members
    if spec.marks:
        odd = next(iter(members))
        ipset(space, "-exist", "restore", text=f"add KNP-X {odd} nomatch\n")
        assert sets.dump()[spec.name].members == {**members, odd: FOREIGN_MARK}
