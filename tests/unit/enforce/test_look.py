"""A look finds what somebody changed behind our back, costs little, and gives way to events."""

import pytest

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.enforce.look import Look
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.model.ids import ChainName, ObjectKey
from netpol.model.labels import EVERYTHING, labels
from netpol.model.net import FAMILIES, Family, parse_address
from netpol.model.objects import Endpoint, Namespace
from netpol.model.policy import CompiledPolicy, PodPeer, PolicyRule
from netpol.model.ruleset import Drop, Rule
from netpol.policy.graph import Graph
from netpol.render.options import RenderOptions
from netpol.render.static import TABLE


class Node:
    def __init__(self) -> None:
        graph = Graph("node1")
        graph.upsert_namespace(Namespace(name="a"))
        for number in range(1, 4):
            graph.upsert_pod(
                Endpoint(
                    key=ObjectKey("a", f"p{number}"),
                    uid=f"u{number}",
                    labels=labels({"app": "x"}),
                    node="node1",
                    addresses=(parse_address(f"10.0.0.{number}"),),
                )
            )
        rule = PolicyRule((PodPeer("a", EVERYTHING),), None)
        policy = CompiledPolicy(
            key=ObjectKey("a", "q"),
            uid="q",
            subject=EVERYTHING,
            isolates=frozenset({"Ingress"}),
            ingress=(rule,),
            egress=(),
        )
        graph.upsert_policy(policy)
        graph.flush(together=True)
        self.sets = FakeSets()
        self.tables = FakeTables(sets=self.sets)
        self.dataplane = Dataplane(graph, RenderOptions())
        execute(
            self.dataplane.reconcile(dump_kernel(self.sets, self.tables)), self.sets, self.tables
        )
        self.look = Look(self.dataplane, sets=self.sets, tables=self.tables, run=self.run)
        self.steps = 0
        self.overtaken_at = 0

    async def run(self, work):
        self.steps += 1
        return work()

    def still(self):
        return self.steps != self.overtaken_at

    async def drift(self, *, members=True):
        return await self.look.drift(still=self.still, transactions=1, members=members)

    def any_set(self):
        return next(n for n, d in self.sets.dump().items() if d.members)


async def test_what_was_applied_is_no_drift():
    assert await Node().drift() == ""


async def test_tables_that_were_right_are_not_read_again():
    node = Node()
    assert await node.drift(members=False) == ""
    reads = node.tables.calls["dump"]
    assert await node.drift(members=False) == ""
    assert node.tables.calls["dump"] == reads
    assert await node.look.drift(still=node.still, transactions=2, members=False) == ""
    assert node.tables.calls["dump"] == reads + len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_changed_chain_is_found_by_every_look(family):
    node = Node()
    await node.drift()
    table = node.tables.table(TABLE, family)
    table.chains[ChainName("KNP-OK")] = [Rule(Drop())]
    for _ in range(2):
        assert "KNP-OK is changed" in await node.drift(members=False)


async def test_members_are_looked_at_only_when_asked():
    node = Node()
    name = node.any_set()
    node.sets.state[name].members.clear()
    assert await node.drift(members=False) == ""
    assert name in await node.drift()


async def test_a_lost_set_and_a_foreign_one_are_found():
    node = Node()
    lost = node.any_set()
    node.sets.state["KNP-X"] = node.sets.state.pop(lost)
    found = await node.drift()
    assert f"set {lost} is gone" in found
    assert "set KNP-X is not ours to have" in found


async def test_a_look_that_is_overtaken_at_any_step_says_nothing():
    whole = Node()
    await whole.drift()
    assert whole.steps > 4
    for step in range(1, whole.steps + 1):
        node = Node()
        node.overtaken_at = step
        assert await node.drift() is None


async def test_dual_stack_is_looked_at_in_both_families():
    node = Node()
    node.tables.table(TABLE, Family.V6).hooks.clear()
    assert "ip6tables" in await node.drift(members=False)
