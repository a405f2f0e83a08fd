"""What every SetDriver does; the classes that run it provide the fixture `sets`."""

from __future__ import annotations

import errno

import pytest

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    EmptySet,
    SetDriver,
    SetError,
    SetOp,
    SetTransaction,
)
from netpol.model.ids import Protocol, SetName
from netpol.model.net import Family, Prefix, host_prefix, parse_address, parse_prefix
from netpol.model.ruleset import AddressPort, AddressPortNet, Member, SetKind, SetSpec

S4 = SetSpec(SetName("KNP-S4"), SetKind.HASH_IP, Family.V4)
S6 = SetSpec(SetName("KNP-S6"), SetKind.HASH_IP, Family.V6)
N4 = SetSpec(SetName("KNP-N4"), SetKind.HASH_NET, Family.V4)
N6 = SetSpec(SetName("KNP-N6"), SetKind.HASH_NET, Family.V6)
P4 = SetSpec(SetName("KNP-P4"), SetKind.HASH_IP_PORT, Family.V4)
P6 = SetSpec(SetName("KNP-P6"), SetKind.HASH_IP_PORT, Family.V6)
M4 = SetSpec(SetName("KNP-M4"), SetKind.HASH_NET, Family.V4, marks=True)
M6 = SetSpec(SetName("KNP-M6"), SetKind.HASH_NET, Family.V6, marks=True)
Q4 = SetSpec(SetName("KNP-Q4"), SetKind.HASH_IP_PORT_NET, Family.V4)
Q6 = SetSpec(SetName("KNP-Q6"), SetKind.HASH_IP_PORT_NET, Family.V6)
R4 = SetSpec(SetName("KNP-R4"), SetKind.HASH_IP_PORT, Family.V4, marks=True)
R6 = SetSpec(SetName("KNP-R6"), SetKind.HASH_IP_PORT, Family.V6, marks=True)


def sources(address: str, *nets: str) -> dict[Member, int | None]:
    dialled = parse_address(address)
    return {
        AddressPortNet(dialled, protocol, port, parse_prefix(net)): None
        for protocol in (Protocol.TCP, Protocol.SCTP)
        for port in (1, 65535)
        for net in nets
    }


MEMBERS: dict[SetSpec, dict[Member, int | None]] = {
    S4: {parse_address(a): None for a in ("10.0.0.1", "255.255.255.255", "1.2.3.4")},
    S6: {parse_address(a): None for a in ("fd00::1", "::1", "2001:db8::ffff")},
    N4: {parse_prefix(p): None for p in ("10.0.0.0/8", "0.0.0.0/1", "128.0.0.0/1", "1.2.3.4/32")},
    N6: {parse_prefix(p): None for p in ("fd00::/16", "::/1", "8000::/1", "fd00::1/128")},
    P4: {
        AddressPort(parse_address("10.0.0.1"), protocol, port): None
        for protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP)
        for port in (1, 80, 65535)
    },
    P6: {AddressPort(parse_address("fd00::1"), Protocol.SCTP, 7): None},
    M4: {parse_prefix("10.244.1.0/24"): 1 << 20, parse_prefix("10.244.1.7/32"): 0xFFF << 20},
    M6: {parse_prefix("fd00:244::/64"): 1 << 20, parse_prefix("fd00:244::7/128"): 0},
    Q4: sources("10.0.0.1", "10.0.0.0/8", "0.0.0.0/1", "128.0.0.0/1", "1.2.3.4/32"),
    Q6: sources("fd00::1", "fd00::/16", "::/1", "8000::/1", "fd00::2/128"),
    R4: {
        AddressPort(parse_address("10.0.0.1"), Protocol.TCP, 80): 1 << 20,
        AddressPort(parse_address("10.0.0.1"), Protocol.UDP, 80): 0xFFF << 20,
    },
    R6: {AddressPort(parse_address("fd00::1"), Protocol.SCTP, 7): 0},
}


def run(sets: SetDriver, *ops: SetOp) -> None:
    sets.apply(SetTransaction(ops))


def refusal(sets: SetDriver, *ops: SetOp) -> SetError:
    with pytest.raises(SetError) as caught:
        run(sets, *ops)
    return caught.value


class SetContract:
    @pytest.mark.parametrize("spec", MEMBERS, ids=lambda spec: spec.name)
    def test_members_come_back_as_they_were_added(self, sets: SetDriver, spec: SetSpec) -> None:
        run(sets, CreateSet(spec, 10), AddMembers(spec, MEMBERS[spec]))
        dump = sets.dump()[spec.name]
        assert dump.spec == spec
        assert dump.members == MEMBERS[spec]
        assert dump.references == 0
        assert sets.headers() == {spec.name: len(MEMBERS[spec])}

    @pytest.mark.parametrize("spec", MEMBERS, ids=lambda spec: spec.name)
    def test_deleted_members_are_gone(self, sets: SetDriver, spec: SetSpec) -> None:
        first, *rest = MEMBERS[spec]
        run(sets, CreateSet(spec), AddMembers(spec, MEMBERS[spec]), DeleteMembers(spec, [first]))
        assert set(sets.dump()[spec.name].members) == set(rest)

    @pytest.mark.parametrize("spec", MEMBERS, ids=lambda spec: spec.name)
    def test_an_emptied_set_stands_without_members(self, sets: SetDriver, spec: SetSpec) -> None:
        run(sets, CreateSet(spec), AddMembers(spec, MEMBERS[spec]), EmptySet(spec), EmptySet(spec))
        assert sets.headers() == {spec.name: 0}

    def test_a_fresh_namespace_is_empty(self, sets: SetDriver) -> None:
        assert sets.dump() == {}
        assert sets.headers() == {}

    def test_only_named_sets_are_dumped_and_missing_ones_left_out(self, sets: SetDriver) -> None:
        run(sets, CreateSet(S4), CreateSet(N4))
        assert set(sets.dump([S4.name, SetName("KNP-NONE")])) == {S4.name}

    def test_everything_twice_is_no_error(self, sets: SetDriver) -> None:
        ops: list[SetOp] = [CreateSet(M4, 10), AddMembers(M4, MEMBERS[M4])]
        run(sets, *ops, *ops)
        assert sets.dump()[M4.name].members == MEMBERS[M4]
        gone: list[SetOp] = [DeleteMembers(M4, list(MEMBERS[M4]))]
        run(sets, *gone, *gone, DestroySet(M4.name), DestroySet(M4.name))
        assert sets.dump() == {}

    def test_create_takes_an_equal_set_of_any_size(self, sets: SetDriver) -> None:
        run(sets, CreateSet(S4, 3), CreateSet(S4, 5_000_000))
        assert sets.headers() == {S4.name: 0}

    def test_adding_a_member_again_changes_its_mark(self, sets: SetDriver) -> None:
        member = parse_prefix("10.244.1.7/32")
        run(sets, CreateSet(M4), AddMembers(M4, {member: 5 << 20}))
        run(sets, AddMembers(M4, {member: 9 << 20}))
        assert sets.dump()[M4.name].members == {member: 9 << 20}

    @pytest.mark.parametrize(
        "other",
        [
            SetSpec(S4.name, SetKind.HASH_NET, Family.V4),
            SetSpec(S4.name, SetKind.HASH_IP, Family.V6),
            SetSpec(S4.name, SetKind.HASH_IP, Family.V4, marks=True),
        ],
        ids=["type", "family", "marks"],
    )
    def test_another_set_under_the_name_is_refused_by_name(
        self, sets: SetDriver, other: SetSpec
    ) -> None:
        run(sets, CreateSet(other), AddMembers(other, {}))
        error = refusal(sets, CreateSet(S4))
        assert error.name == S4.name
        assert error.code == errno.EEXIST
        assert S4.name in str(error)
        assert sets.dump()[S4.name].spec == other

    def test_a_prefix_of_length_0_is_refused_with_its_member(self, sets: SetDriver) -> None:
        good, bad, late = (
            parse_prefix("10.0.0.0/8"),
            Prefix(bytes(4), 0),
            parse_prefix("11.0.0.0/8"),
        )
        run(sets, CreateSet(N4))
        error = refusal(sets, AddMembers(N4, {good: None, bad: None, late: None}))
        assert (error.name, error.member, error.code) == (N4.name, bad, 4104)
        assert set(sets.dump()[N4.name].members) == {good}

    def test_sources_of_length_0_are_refused_too(self, sets: SetDriver) -> None:
        bad = AddressPortNet(parse_address("10.0.0.1"), Protocol.TCP, 80, Prefix(bytes(4), 0))
        run(sets, CreateSet(Q4))
        error = refusal(sets, AddMembers(Q4, {bad: None}))
        assert (error.name, error.member, error.code) == (Q4.name, bad, 4104)

    def test_operations_after_a_refusal_are_not_applied(self, sets: SetDriver) -> None:
        run(sets, CreateSet(N4))
        refusal(sets, CreateSet(S4), AddMembers(N4, {Prefix(bytes(4), 0): None}), CreateSet(P4))
        assert set(sets.headers()) == {N4.name, S4.name}

    def test_a_member_of_the_other_family_is_refused(self, sets: SetDriver) -> None:
        run(sets, CreateSet(S4))
        error = refusal(sets, AddMembers(S4, {parse_address("fd00::1"): None}))
        assert error.member == parse_address("fd00::1")
        assert error.code == 4097

    @pytest.mark.parametrize(
        "op", [AddMembers(S4, {bytes(4): None}), DeleteMembers(S4, [bytes(4)])]
    )
    def test_a_missing_set_is_refused_by_name(self, sets: SetDriver, op: SetOp) -> None:
        error = refusal(sets, op)
        assert (error.name, error.code) == (S4.name, errno.ENOENT)

    def test_a_name_of_31_characters_is_the_longest(self, sets: SetDriver) -> None:
        longest = SetName("KNP-" + "x" * 27)
        run(sets, CreateSet(SetSpec(longest, SetKind.HASH_IP, Family.V4)))
        assert set(sets.headers()) == {longest}
        with pytest.raises(ValueError, match="not a set name"):
            run(sets, CreateSet(SetSpec(SetName(longest + "x"), SetKind.HASH_IP, Family.V4)))

    def test_more_members_than_one_frame_holds(self, sets: SetDriver) -> None:
        members: dict[Member, int | None] = {
            host_prefix((0x0A000000 + n).to_bytes(4, "big")): (n % 4096) << 20
            for n in range(20_000)
        }
        run(sets, CreateSet(M4, len(members)), AddMembers(M4, members))
        assert sets.dump()[M4.name].members == members
        run(sets, DeleteMembers(M4, list(members)[1:]))
        assert sets.headers() == {M4.name: 1}

    def test_a_refusal_in_a_later_frame_names_its_member(self, sets: SetDriver) -> None:
        members: dict[Member, int | None] = {
            host_prefix((0x0A000000 + n).to_bytes(4, "big")): None for n in range(10_000)
        }
        bad = Prefix(bytes(4), 0)
        members[bad] = None
        run(sets, CreateSet(N4, len(members)))
        error = refusal(sets, AddMembers(N4, members))
        assert error.member == bad
        assert sets.headers() == {N4.name: 10_000}
