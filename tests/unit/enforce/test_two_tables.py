"""The second table of `--deny-with=reject`: what is looked at, what is left, what happens without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.enforce.look import Look
from netpol.enforce.plan import Plan
from netpol.kernel.drivers import SetTransaction, TableDump, TableError
from netpol.kernel.testing import FakeSets, FakeTable, FakeTables
from netpol.model.ids import ChainName
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import Drop, Hook, Rule
from netpol.policy.graph import Graph
from netpol.render import names
from netpol.render.options import DenyWith
from netpol.render.reject import TABLE as FILTER
from netpol.render.static import TABLE as MANGLE
from tests import builders as make
from tests.prop import churn
from tests.unit.enforce.rooms import Scene, until

T = TypeVar("T")


class Tables(FakeTables):
    """Tables of which filter may be one that iptables cannot read."""

    unreadable = False

    def dump(self, table: str, family: Family) -> TableDump:
        if self.unreadable and table == FILTER:
            raise TableError("table filter is incompatible", retryable=False)
        return super().dump(table, family)


class Node:
    def __init__(self) -> None:
        self.graph = Graph(churn.NODE)
        for event in churn.Dice(4).fill(3):
            event.tell(self.graph)
        self.graph.flush(together=True)
        self.sets = FakeSets()
        self.tables = Tables(sets=self.sets)

    def start(self, deny_with: DenyWith) -> Plan:
        """A new agent."""
        options = churn.options_of(churn.WIDE)
        self.dataplane = Dataplane(self.graph, replace(options, deny_with=deny_with))
        self.look = Look(self.dataplane, sets=self.sets, tables=self.tables, run=self.run)
        return self.again()

    def again(self) -> Plan:
        """Compare and apply."""
        plan = self.dataplane.reconcile(dump_kernel(self.sets, self.tables))
        execute(plan, self.sets, self.tables)
        return plan

    async def run(self, work: Callable[[], T]) -> T:
        return work()

    async def drift(self) -> str | None:
        return await self.look.drift(still=lambda: True, transactions=1, members=True)


def order(plan: Plan) -> list[tuple[str, int]]:
    return [(s.table, int(s.family)) for s in plan.steps if not isinstance(s, SetTransaction)]


@pytest.fixture
def node() -> Node:
    return Node()


async def test_filter_comes_first_and_goes_with_the_garbage(node: Node) -> None:
    node.start(DenyWith.DROP)
    assert await node.drift() == ""
    assert not node.tables.transactions[-1].startswith("*filter")
    on = node.start(DenyWith.REJECT)
    assert order(on) == [(FILTER, 4), (MANGLE, 4), (FILTER, 6), (MANGLE, 6)]
    assert await node.drift() == ""
    assert node.start(DenyWith.REJECT).steps == ()
    off = node.start(DenyWith.DROP)
    assert order(off) == [(MANGLE, 4), (MANGLE, 6)]
    assert node.dataplane.has_garbage
    assert await node.drift() == ""
    left = node.dataplane.collect()
    execute(left, node.sets, node.tables)
    assert order(left) == [
        *[(table, f) for f in (4, 6) for table in (FILTER, MANGLE)],
        (MANGLE, 4),
        (MANGLE, 6),
    ]
    for family in FAMILIES:
        assert node.tables.dump(FILTER, family) == TableDump()
        mangle = node.tables.dump(MANGLE, family)
        assert names.hook_chain(Hook.POSTROUTING) not in mangle.chains
        assert Hook.POSTROUTING not in mangle.hooks
    assert not node.dataplane.has_garbage
    assert await node.drift() == ""


def _no_jump(table: FakeTable) -> None:
    table.hooks[Hook.FORWARD].clear()


def _second_jump(table: FakeTable) -> None:
    table.hooks[Hook.OUTPUT].insert(0, names.REJECT)


def _rule_less(table: FakeTable) -> None:
    table.chains[names.REJECT].pop()


def _stranger(table: FakeTable) -> None:
    table.chains[ChainName("KNP-STRANGER")] = []


def _another_hook(table: FakeTable) -> None:
    table.hooks[Hook.INPUT] = [names.REJECT]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_no_jump, "FORWARD does not begin with our jump alone"),
        (_second_jump, "OUTPUT does not begin"),
        (_rule_less, "chain KNP-REJECT is changed"),
        (_stranger, "chain KNP-STRANGER is not ours"),
        (_another_hook, "INPUT has a jump to us"),
    ],
)
async def test_what_others_do_to_filter_is_seen(
    node: Node, harm: Callable[[FakeTable], None], words: str, family: Family
) -> None:
    node.start(DenyWith.REJECT)
    tool = "iptables" if family is Family.V4 else "ip6tables"
    harm(node.tables.table(FILTER, family))
    assert f"{tool} -t filter {words}" in (await node.drift() or "")
    node.again()
    execute(node.dataplane.collect(), node.sets, node.tables)
    assert await node.drift() == ""


async def test_with_drops_filter_is_not_looked_at(node: Node) -> None:
    node.start(DenyWith.DROP)
    node.tables.unreadable = True
    assert await node.drift() == ""
    assert node.again().steps == ()
    assert node.dataplane.reject_fault == ""


async def test_a_filter_that_cannot_be_read_means_drops_until_it_can(node: Node) -> None:
    node.start(DenyWith.REJECT)
    node.tables.unreadable = True
    node.again()
    assert "incompatible" in node.dataplane.reject_fault
    classes = [
        rules
        for family in FAMILIES
        for name, rules in node.tables.dump(MANGLE, family).chains.items()
        if name.startswith(("KNP-CI-", "KNP-CE-"))
    ]
    assert classes
    assert all(rules[-1] == Rule(Drop()) for rules in classes)
    assert await node.drift() == ""
    node.tables.unreadable = False
    assert await node.drift() == "the filter table can be read again"
    node.again()
    assert node.dataplane.reject_fault == ""
    assert node.dataplane.options.rejects
    assert await node.drift() == ""


async def test_policy_goes_on_where_filter_takes_no_answers() -> None:
    """Readable, but without REJECT: it drops, says so, and does not try without end."""
    scene = Scene()
    scene.options = replace(scene.options, deny_with=DenyWith.REJECT)
    scene.pod("web", 2, role="web")
    scene.policy("web", make.pods(role="db"))
    refused = TableError("refused", retryable=False, got="no REJECT")
    scene.tables.refuses = lambda tx: refused if tx.table == FILTER and tx.replace else None
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        assert "no REJECT" in room.dataplane.reject_fault
        assert all(scene.has("web", f) and scene.number(2, f) for f in FAMILIES)
        scene.policy("web", make.pods(role="x"))
        assert await scene.told()
        assert all(scene.has("web", f) for f in FAMILIES)
        before = room.status.reconciles
        assert not await until(lambda: room.status.reconciles > before, 1.5), room.status
        room.resync()
        assert await until(lambda: room.status.reconciles > before and room.in_sync)
        assert "no REJECT" in room.dataplane.reject_fault
