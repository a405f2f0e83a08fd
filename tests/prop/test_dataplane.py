"""The incremental dataplane against the same state rendered from scratch, over long random histories."""

from __future__ import annotations

import pytest

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from tests.prop import churn

STEPS = 60
SEEDS = 10


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_incremental_is_scratch(field_mask: int, seed: int) -> None:
    """Also over restarts, and with and without garbage collected in between."""
    dice = churn.Dice(seed, pods=8, addresses=12)
    objects = churn.Objects()
    node = churn.node(field_mask)
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
    node = churn.node(field_mask)
    for event in dice.fill(4):
        event.tell(node.graph)
    node.apply()
    again = Dataplane(node.graph, node.options)
    assert again.reconcile(dump_kernel(node.sets, node.tables)).steps == ()


def test_a_pod_that_joins_a_class_calls_no_iptables() -> None:
    dice = churn.Dice(7)
    node = churn.node(churn.WIDE)
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
