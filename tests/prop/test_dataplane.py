"""The incremental dataplane against the same state rendered from scratch, over long random histories."""

from __future__ import annotations

import pytest

from netpol.enforce.dataplane import Dataplane, dump_kernel, execute
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.model.net import FAMILIES
from netpol.policy.graph import Graph
from netpol.render.node import classes_in_use, render_graph
from tests.prop import churn

STEPS = 60
SEEDS = 10


class Node:
    """A node's graph, dataplane and kernel."""

    def __init__(self, field_mask: int) -> None:
        self.graph = Graph(churn.NODE)
        self.options = churn.options_of(field_mask)
        self.sets = FakeSets()
        self.tables = FakeTables(sets=self.sets)
        self.start()

    def start(self) -> None:
        """A new agent: knows nothing but what the caches and the kernel tell."""
        self.dataplane = Dataplane(self.graph, self.options)
        self.graph.flush(together=True)
        execute(
            self.dataplane.reconcile(dump_kernel(self.sets, self.tables)), self.sets, self.tables
        )

    def apply(self) -> None:
        """What the room does with a mark."""
        while True:
            delta = self.graph.flush()
            if delta.empty and not self.graph.pending:
                return
            names = self.dataplane.returning_sets(delta)
            returning = self.sets.dump(names) if names else {}
            execute(self.dataplane.change(delta, returning), self.sets, self.tables)

    def check(self, *, exact: bool) -> None:
        """Compare with scratch; `exact` where the garbage was just collected."""
        used = classes_in_use(self.graph)
        numbers = self.dataplane.numbers.used
        want = render_graph(self.graph, self.options, {k: numbers[k] for k in used if k in numbers})
        have = self.sets.dump()
        for name, (spec, members) in want.sets.items():
            assert (have[name].spec, have[name].members) == (spec, members), name
        for family in FAMILIES:
            chains = self.tables.dump("mangle", family).chains
            for name, chain in want.rulesets[family].chains.items():
                if exact or not name.startswith(("KNP-TREE", "KNP-OVER")):
                    assert chains[name] == chain, name
            if exact:
                assert set(chains) == set(want.rulesets[family].chains)
        if exact:
            assert set(have) == set(want.sets)
        assert self.dataplane.drift(dump_kernel(self.sets, self.tables)) == ""


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_incremental_is_scratch(field_mask: int, seed: int) -> None:
    """Also over restarts, and with and without garbage collected in between."""
    dice = churn.Dice(seed, pods=8, addresses=12)
    objects = churn.Objects()
    node = Node(field_mask)
    for _ in range(STEPS):
        for _ in range(dice.random.randrange(1, 4)):
            event = dice.event(objects)
            event.happen(objects)
            event.tell(node.graph)
        if dice.random.random() < 0.1:
            node.start()
        else:
            node.apply()
        node.check(exact=False)
        if dice.random.random() < 0.3:
            execute(node.dataplane.collect(), node.sets, node.tables)
            node.check(exact=True)


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
def test_a_restart_changes_nothing(field_mask: int) -> None:
    """Of the same world, a new agent keeps numbers and entries and writes nothing at all."""
    dice = churn.Dice(99, pods=8, addresses=12)
    node = Node(field_mask)
    for event in dice.fill(4):
        event.tell(node.graph)
    node.apply()
    again = Dataplane(node.graph, node.options)
    assert again.reconcile(dump_kernel(node.sets, node.tables)).steps == ()


def test_a_pod_that_joins_a_class_calls_no_iptables() -> None:
    dice = churn.Dice(7)
    node = Node(churn.WIDE)
    for event in dice.fill(4):
        event.tell(node.graph)
    node.apply()
    known = next(p for p in map(node.graph.members.pod, node.graph.local_pods) if p is not None)
    before = node.tables.calls["apply"]
    twin = {"key": known.key._replace(name="twin"), "addresses": (bytes([10, 0, 1, 200]),)}
    node.graph.upsert_pod(
        type(known)(**{f: getattr(known, f) for f in known.__struct_fields__} | twin)
    )
    node.apply()
    node.check(exact=False)
    assert node.tables.calls["apply"] == before
