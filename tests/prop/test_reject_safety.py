"""With `--deny-with=reject`, and on the way to it and back: what is denied passes at no moment.

A denied packet meets three hooks, each in the state that it has by then; tables change one after the other.
So a packet is sent through each hook in every state that the kernel may have reached meanwhile, filter also
without anything of ours, since others flush it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from netpol.enforce.kernel_state import dump_kernel
from netpol.kernel.drivers import HookState, TableDump, TableError, TableTransaction
from netpol.model.flow import Flow
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import Hook
from netpol.render import names
from netpol.render.options import DenyWith
from netpol.render.reject import TABLE as FILTER
from tests.prop import churn
from tests.prop.test_plan_safety import (
    CASES,
    SEEDS,
    Kernel,
    Node,
    Quad,
    Watch,
    _party,
    _text,
    moving,
    news,
    node_at,
    step_by_step,
)
from tests.walker.cluster import Cluster, Text

MASKS = pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
WAYS = pytest.mark.parametrize(
    ("before", "after"), [tuple(DenyWith), tuple(DenyWith)[::-1]], ids=["on", "off"]
)


def rejecting(node: Node, deny_with: DenyWith = DenyWith.REJECT) -> Node:
    """The same node, with an agent that has another setting."""
    node.options = replace(node.options, deny_with=deny_with)
    return node


@MASKS
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(max(2, SEEDS // 3)))
def test_no_state_on_the_way_is_wrong(seed: int, count: int, field_mask: int) -> None:
    dice = churn.Dice(31000 + seed * 10 + count)
    node = rejecting(node_at(dice, field_mask))
    node.restart()
    step_by_step(node, news(dice, node.objects, count))


@pytest.mark.parametrize("case", CASES)
def test_a_hard_case(case: str) -> None:
    before, events = CASES[case]
    objects = churn.Objects()
    for event in before:
        event.happen(objects)
    options = replace(churn.options_of(churn.WIDE), deny_with=DenyWith.REJECT)
    step_by_step(Node(objects, options), events)


def switch(node: Node, after: DenyWith) -> Iterator[str]:
    """A restart with another setting, in its smallest steps, garbage included."""
    rejecting(node, after)
    yield from node.kernel.steps(node.reconcile())
    yield from node.kernel.steps(node.dataplane.collect())


def ours(kernel: Kernel) -> tuple[dict[Family, TableDump], dict[Family, HookState | None]]:
    """What there is beyond mangle's three hooks: filter, and the net."""
    filters = {f: d for f in FAMILIES if (d := kernel.tables.dump(FILTER, f)) != TableDump()}
    nets = {}
    for family in FAMILIES:
        dump = kernel.tables.dump("mangle", family)
        if names.hook_chain(Hook.POSTROUTING) in dump.chains or Hook.POSTROUTING in dump.hooks:
            nets[family] = dump.hooks.get(Hook.POSTROUTING)
    return filters, nets


@WAYS
@MASKS
@pytest.mark.parametrize("seed", range(max(2, SEEDS // 3)))
def test_switching_changes_no_verdict(
    seed: int, field_mask: int, before: DenyWith, after: DenyWith
) -> None:
    node = rejecting(node_at(churn.Dice(32000 + seed), field_mask), before)
    node.restart()
    assert all(map(bool, ours(node.kernel))) == (before is DenyWith.REJECT)
    watch = Watch.between([node.objects], node.options)
    assert watch.denied
    done = ["the start"]
    for step in switch(node, after):
        done.append(step)
        watch.look(node.kernel, "\n".join(done))
    assert len(done) > 4
    node.check(node.objects)
    filters, nets = ours(node.kernel)
    assert set(filters) == set(nets) == (set(FAMILIES) if after is DenyWith.REJECT else set())
    # And nothing is left to do.
    assert node.reconcile().steps == node.dataplane.collect().steps == ()


@WAYS
def test_killed_anywhere_the_next_may_go_either_way(before: DenyWith, after: DenyWith) -> None:
    node = rejecting(node_at(churn.Dice(33000), churn.WIDE), before)
    node.restart()
    watch = Watch.between([node.objects], node.options)
    states = [node.kernel.copy(), *(node.kernel.copy() for _ in switch(node, after))]
    for kernel, then in itertools.product(states, DenyWith):
        node.kernel = kernel.copy()
        for step in switch(node, then):
            watch.look(node.kernel, step)
        assert all(map(bool, ours(node.kernel))) == (then is DenyWith.REJECT)


class Moments:
    """Hooks of different moments for one packet."""

    def __init__(self, node: Node, kernels: list[Kernel]) -> None:
        mask = node.options.field_mask
        self._texts = [k.text(mask) for k in kernels]
        self._world, self._mask = node.objects.world(), mask

    def opened(self, quads: list[Quad]) -> Iterator[str]:
        """Flows that pass if each hook is of a moment, none before that of the hook before."""
        for first, filtered in itertools.combinations_with_replacement(range(len(self._texts)), 2):
            for last in range(filtered, len(self._texts)):
                yield from self._opened(quads, first, filtered, last)

    def _opened(self, quads: list[Quad], first: int, filtered: int, last: int) -> Iterator[str]:
        texts = self._texts
        mixed = Text(texts[first].sets, texts[first].tables, texts[filtered].filters)
        cluster = Cluster(
            self._world, {churn.NODE: mixed}, field_mask=self._mask, nets={churn.NODE: texts[last]}
        )
        for quad in quads:
            src, dst, protocol, port = quad
            flow = Flow(_party(src), _party(dst), protocol, port)
            if cluster.walk_at(churn.NODE, flow).passed:
                yield f"{_text(quad)}: judged at {first}, filter at {filtered}, net at {last}"


@WAYS
def test_a_packet_under_way_while_tables_change_is_stopped(
    before: DenyWith, after: DenyWith
) -> None:
    """But for the garbage, which comes seconds later."""
    node = rejecting(node_at(churn.Dice(34000), churn.WIDE), before)
    node.restart()
    denied = Watch.between([node.objects], node.options).denied
    kernels = [node.kernel.copy()]
    rejecting(node, after)
    kernels += [node.kernel.copy() for _ in node.kernel.steps(node.reconcile())]
    assert len(kernels) > 2
    assert not list(Moments(node, kernels).opened(denied))


def test_without_filter_the_net_holds() -> None:
    node = rejecting(node_at(churn.Dice(35000), churn.WIDE))
    node.restart()
    watch = Watch.between([node.objects], node.options)
    for family in FAMILIES:
        node.kernel.tables.state.pop((FILTER, family))
    watch.look(node.kernel, "filter was flushed")
    # And repaired: filter first.
    plan = node.reconcile()
    assert [s.table for s in plan.steps if isinstance(s, TableTransaction)] == [FILTER] * 2
    node.kernel.run(plan)
    watch.look(node.kernel, "repair")


def test_a_filter_that_cannot_be_read_means_drops() -> None:
    """Policy goes on; when it can be read again, answers come back."""
    node = rejecting(node_at(churn.Dice(36000), churn.WIDE))
    node.restart()
    watch = Watch.between([node.objects], node.options)
    dump = dump_kernel(node.kernel.sets, node.kernel.tables)
    broken = replace(
        dump, filters={}, filter_faults={FAMILIES[0]: TableError("foreign", retryable=False)}
    )
    plan = node.dataplane.reconcile(broken)
    assert "foreign" in node.dataplane.reject_fault
    for step in node.kernel.steps(plan):
        watch.look(node.kernel, step)
    assert not moving(plan)
    node.options = replace(node.options, deny_with=DenyWith.REJECT)
    node.kernel.run(node.reconcile())
    assert not node.dataplane.reject_fault
    assert all(map(bool, ours(node.kernel)))
