"""The drivers in memory pass the contracts of the real ones, and fail on demand."""

from __future__ import annotations

import pytest

from netpol.kernel.drivers import (
    CreateSet,
    ForeignRule,
    SetError,
    SetTransaction,
    TableError,
    TableTransaction,
)
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.model.ids import SERVICES
from netpol.model.net import Family
from netpol.model.ruleset import Drop, Hook, Rule
from tests.kernel.contract_owners import Meddle, OwnersContract
from tests.kernel.contract_sets import M4, N4, S4, SetContract
from tests.kernel.contract_tables import TableContract
from tests.kernel.forms import CHAIN_A


class TestFakeSets(SetContract):
    @pytest.fixture
    def sets(self) -> FakeSets:
        return FakeSets()


class TestFakeTables(TableContract):
    @pytest.fixture
    def sets(self) -> FakeSets:
        return FakeSets()

    @pytest.fixture
    def tables(self, sets: FakeSets) -> FakeTables:
        return FakeTables(sets=sets)


class TestFakesOfTwoOwners(OwnersContract):
    @pytest.fixture
    def sets(self) -> FakeSets:
        return FakeSets()

    @pytest.fixture
    def service_sets(self, sets: FakeSets) -> FakeSets:
        return sets.seen_by(SERVICES)

    @pytest.fixture
    def tables(self, sets: FakeSets) -> FakeTables:
        return FakeTables(sets=sets)

    @pytest.fixture
    def services(self, tables: FakeTables) -> FakeTables:
        return tables.seen_by(SERVICES)

    @pytest.fixture
    def meddle(self, tables: FakeTables) -> Meddle:
        def append(hook: Hook) -> None:
            rules = tables.table("mangle", Family.V4).hooks.setdefault(hook, [])
            rules.append(ForeignRule("-s 192.0.2.1/32 -j DROP"))

        return append


def test_a_planned_failure_stops_a_set_transaction_at_its_step() -> None:
    sets = FakeSets()
    sets.failures.plan(SetError("no memory", name=N4.name, code=12), after=1)
    tx = SetTransaction((CreateSet(S4), CreateSet(N4), CreateSet(M4)))
    with pytest.raises(SetError, match="no memory"):
        sets.apply(tx)
    assert set(sets.headers()) == {S4.name}
    sets.apply(tx)
    assert set(sets.headers()) == {S4.name, N4.name, M4.name}
    assert sets.calls["apply"] == 2


def test_a_planned_failure_leaves_a_table_as_it_was() -> None:
    tables = FakeTables()
    tables.failures.plan(TableError("locked", retryable=True))
    tx = TableTransaction("mangle", Family.V4, {CHAIN_A: (Rule(Drop()),)})
    with pytest.raises(TableError, match="locked"):
        tables.apply(tx)
    assert tables.dump("mangle", Family.V4).chains == {}
    tables.apply(tx)
    assert tables.dump("mangle", Family.V4).chains == {CHAIN_A: (Rule(Drop()),)}
    assert len(tables.transactions) == 1
