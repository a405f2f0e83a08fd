"""What drivers of several owners do in one kernel: each sees and touches its own.

The classes that run it provide the fixtures `tables` and `services` (drivers of policy and of the
services' owner on the same tables), `sets` and `service_sets`, and `meddle`, which appends a rule of
another program to a hook of mangle, IPv4.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

import pytest

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    HookState,
    SetDriver,
    SetError,
    SetTransaction,
    TableDriver,
    TableDump,
    TableError,
    TableTransaction,
)
from netpol.model.ids import ChainName, SetName
from netpol.model.net import Family, parse_address
from netpol.model.ruleset import Drop, Hook, Return, Rule, SetKind, SetSpec
from tests.kernel.contract_tables import change
from tests.kernel.forms import CHAIN_A, CHAIN_B

SVC, SVC_2 = ChainName("KNP-SVC-A"), ChainName("KNP-SVC-B")
HOOK = Hook.INPUT
Meddle = Callable[[Hook], None]


def jump(tables: TableDriver, chain: ChainName | None, state: HookState | None = None) -> None:
    """Have the owner's one jump of the hook lead to a chain."""
    replace: Mapping[ChainName, tuple[Rule, ...]] = (
        {} if chain is None else {chain: (Rule(Drop()),)}
    )
    found = tables.dump("mangle", Family.V4).hooks.get(HOOK, HookState())
    tables.apply(change(replace=replace, hooks={HOOK: chain}, state={HOOK: state or found}))


def state_of(tables: TableDriver) -> HookState:
    return tables.dump("mangle", Family.V4).hooks.get(HOOK, HookState())


class OwnersContract:
    def test_each_reads_its_own_chains(self, tables: TableDriver, services: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: (Rule(Drop()),)}))
        services.apply(change(replace={SVC: (Rule(Return()), Rule(Drop()))}))
        assert tables.dump("mangle", Family.V4) == TableDump({CHAIN_A: (Rule(Drop()),)})
        assert services.dump("mangle", Family.V4) == TableDump(
            {SVC: (Rule(Return()), Rule(Drop()))}
        )
        assert set(tables.counters("mangle", Family.V4)) == {CHAIN_A}
        assert services.counters("mangle", Family.V4) == {SVC: ((0, 0), (0, 0))}

    def test_neither_touches_the_others_chains(
        self, tables: TableDriver, services: TableDriver
    ) -> None:
        tables.apply(change(replace={CHAIN_A: (Rule(Drop()),)}))
        services.apply(change(replace={SVC: (Rule(Drop()),)}))
        for driver, theirs in ((tables, SVC), (services, CHAIN_A)):
            refused: tuple[TableTransaction, ...] = (
                change(replace={theirs: ()}),
                change(delete=(theirs,)),
            )
            for tx in refused:
                with pytest.raises(TableError, match="not ours"):
                    driver.apply(tx)
        assert set(tables.dump("mangle", Family.V4).chains) == {CHAIN_A}
        assert set(services.dump("mangle", Family.V4).chains) == {SVC}

    def test_policy_goes_first_whoever_came_first(
        self, tables: TableDriver, services: TableDriver, meddle: Meddle
    ) -> None:
        meddle(HOOK)
        jump(services, SVC)
        assert state_of(services) == HookState(((1, SVC),), place=1)
        jump(tables, CHAIN_A)
        assert state_of(tables) == HookState(((1, CHAIN_A),))
        assert state_of(services) == HookState(((2, SVC),), place=2)
        # Both are where they have to be, so that the same again writes nothing.
        for driver, chain in ((tables, CHAIN_A), (services, SVC)):
            before = driver.fingerprint("mangle", Family.V4)
            jump(driver, chain)
            assert driver.fingerprint("mangle", Family.V4) == before
        # A jump that moves to another chain stays behind policy's.
        jump(services, SVC_2)
        assert state_of(services) == HookState(((2, SVC_2),), place=2)
        jump(tables, CHAIN_B)
        assert state_of(tables) == HookState(((1, CHAIN_B),))
        assert state_of(services) == HookState(((2, SVC_2),), place=2)

    def test_a_jump_behind_another_program_comes_back_to_its_place(
        self, tables: TableDriver, services: TableDriver, meddle: Meddle
    ) -> None:
        jump(tables, CHAIN_A)
        meddle(HOOK)
        services.apply(change(replace={SVC: ()}))
        # As if another program had come between: an insertion that was made for another state.
        jump(services, SVC, HookState((), place=3))
        assert state_of(services) == HookState(((3, SVC),), place=2)
        jump(services, SVC)
        assert state_of(services) == HookState(((2, SVC),), place=2)
        assert state_of(tables) == HookState(((1, CHAIN_A),))

    def test_one_that_goes_leaves_the_other(
        self, tables: TableDriver, services: TableDriver
    ) -> None:
        jump(tables, CHAIN_A)
        jump(services, SVC)
        jump(tables, None)
        tables.apply(change(delete=(CHAIN_A,)))
        assert tables.dump("mangle", Family.V4) == TableDump()
        assert state_of(services) == HookState(((1, SVC),), place=1)
        jump(services, None)
        services.apply(change(delete=(SVC,)))
        assert services.dump("mangle", Family.V4) == TableDump()

    def test_an_insertion_for_a_jump_that_is_gone_is_refused(self, services: TableDriver) -> None:
        with pytest.raises(TableError):
            jump(services, SVC, HookState((), place=3))
        assert services.dump("mangle", Family.V4) == TableDump()

    def test_chains_of_services_are_no_change_to_policy(
        self, tables: TableDriver, services: TableDriver
    ) -> None:
        tables.apply(change(replace={CHAIN_A: ()}))
        before = tables.fingerprint("mangle", Family.V4), services.fingerprint("mangle", Family.V4)
        services.apply(change(replace={SVC: (Rule(Return()),), SVC_2: ()}))
        assert tables.fingerprint("mangle", Family.V4) == before[0]
        own = services.fingerprint("mangle", Family.V4)
        assert own != before[1]
        services.apply(change(replace={SVC: (Rule(Drop()),)}))
        assert tables.fingerprint("mangle", Family.V4) == before[0]
        assert services.fingerprint("mangle", Family.V4) != own

    def test_each_sees_and_changes_its_own_sets(
        self, sets: SetDriver, service_sets: SetDriver
    ) -> None:
        mine = SetSpec(SetName("KNP-S4"), SetKind.HASH_IP, Family.V4)
        theirs = SetSpec(SetName("KNP-SVC-S4"), SetKind.HASH_IP, Family.V4)
        address = parse_address("10.0.0.1")
        for driver, own, other in ((sets, mine, theirs), (service_sets, theirs, mine)):
            driver.apply(SetTransaction((CreateSet(own), AddMembers(own, {address: None}))))
            for op in (
                CreateSet(other),
                AddMembers(other, {address: None}),
                DeleteMembers(other, [address]),
                DestroySet(other.name),
            ):
                with pytest.raises(SetError) as caught:
                    driver.apply(SetTransaction((op,)))
                assert (caught.value.name, caught.value.code) == (other.name, errno.EPERM)
        assert sets.headers() == {mine.name: 1}
        assert service_sets.headers() == {theirs.name: 1}
        assert set(sets.dump()) == {mine.name}
        assert set(service_sets.dump()) == {theirs.name}
