"""Families apart from each other: ahead, stopped, unread, back. Nothing forbidden passes in either.

Plans are cut and packets walk as in `test_plan_safety`.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest

from netpol.enforce.plan import Step, family_of_step
from netpol.kernel.drivers import SetError
from netpol.model.net import FAMILIES, Family
from netpol.render import names
from netpol.render.static import TABLE
from tests import builders as make
from tests.prop import churn
from tests.prop.test_plan_safety import (
    SEEDS,
    Node,
    P,
    Q,
    Watch,
    interleaved,
    moving,
    news,
    node_at,
    orders,
    policy,
    role,
    seen,
    smallest,
)


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_families_may_be_ahead_of_each_other(seed: int, field_mask: int) -> None:
    """Whatever part of each family's steps was done: its packets meet its own alone."""
    dice = churn.Dice(3000 + seed)
    node = node_at(dice, field_mask)
    events = news(dice, node.objects, dice.random.randrange(1, 4))
    worlds = orders(node.objects, events)
    watch = Watch.between(worlds, node.options)
    for event in events:
        event.tell(node.graph)
    done: list[str] = ["the start"]
    for plan in node.plans():
        watch.moving = moving(plan)
        for step in interleaved(plan, dice.random):
            done.append(node.kernel.step(step))
            watch.look(node.kernel, seen(worlds, done, events))
    node.check(worlds[-1])


def tried(node: Node, step: Step, down: Family | None) -> str:
    """Do a step; of a family that is down as far as possible."""
    lenient = (
        contextlib.suppress(SetError) if family_of_step(step) is down else contextlib.nullcontext()
    )
    with lenient:
        return node.kernel.step(step)
    return "not possible"


#: Batches of events while a family is down.
BATCHES = 3


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_family_that_stops_lets_nothing_forbidden_pass(seed: int, field_mask: int) -> None:
    """It stops within a plan, stays behind while the other follows events, and comes back."""
    dice = churn.Dice(9000 + seed)
    node = node_at(dice, field_mask)
    start, down, fault = node.objects, dice.random.choice(FAMILIES), RuntimeError("down")
    whole = next(f for f in FAMILIES if f is not down)
    since: list[churn.Event] = []
    left, objects = dice.random.randrange(12), start  # so many steps it still takes
    for batch in range(BATCHES):
        events = news(dice, objects, dice.random.randrange(1, 3))
        since += events
        worlds = orders(objects, events)
        objects = worlds[-1]
        good = Watch.between(worlds, node.options).of(whole)
        bad = Watch.between(orders(start, since), node.options).of(down)
        bad.allowed.clear()  # the price of being behind
        for event in events:
            event.tell(node.graph)
        done = [f"batch {batch}"]
        for plan in node.after(
            down=down, fault=fault, restart=batch and dice.random.random() < 0.4
        ):
            good.moving = moving(plan)
            for step in smallest(plan, down if batch else None):
                if not batch and family_of_step(step) is down:
                    if not left:
                        continue
                    left -= 1
                done.append(tried(node, step, down if batch else None))
                for watch in (good, bad):
                    watch.look(node.kernel, seen(worlds, done, since))
        if batch and dice.random.random() < 0.5:
            # The numbers of what went are free for the next batch, whatever the other family has.
            good.moving = set()
            for step in smallest(node.dataplane.collect(without=[down]), down):
                done.append(node.kernel.step(step))
                for watch in (good, bad):
                    watch.look(node.kernel, seen(worlds, done, since))
    bad = replace(
        bad, denied=[*bad.denied, *Watch.between([objects], node.options).of(whole).denied]
    )
    plan = node.reconcile() if dice.random.random() < 0.5 else node.revive()
    for step in interleaved(plan, dice.random):
        done.append(node.kernel.step(step))
        bad.look(node.kernel, seen(worlds, done, since))
    node.check(objects)


def disagree(node: Node, events: list[churn.Event], dice: random.Random) -> None:
    """Lose all of one family, number it anew while the other cannot be read, then read both."""
    lost, kept = dice.sample(FAMILIES, 2)
    for name in [n for n in node.kernel.sets.state if names.family_of_set(n) is lost]:
        del node.kernel.sets.state[name]
    del node.kernel.tables.state[TABLE, lost]
    worlds = orders(node.objects, events)
    node.know(worlds[-1])
    for plan in node.after(down=kept, fault=RuntimeError("unread"), restart=True):
        for step in smallest(plan, kept):
            tried(node, step, kept)
    watch = Watch.between(worlds, node.options)
    watch.allowed.clear()
    done = ["both can be read"]
    watch.look(node.kernel, done[0])
    for step in interleaved(node.revive(), dice):
        done.append(node.kernel.step(step))
        watch.look(node.kernel, seen(worlds, done, events))
    node.check(worlds[-1])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_numbers_that_the_families_disagree_about_mix_no_classes(seed: int) -> None:
    dice = churn.Dice(11000 + seed)
    node = node_at(dice, churn.WIDE)
    disagree(node, news(dice, node.objects, 3), dice.random)


@pytest.mark.parametrize("seed", range(4))
def test_a_number_that_opens_in_one_family_and_shuts_in_the_other(seed: int) -> None:
    """The class that came while one was unreadable is the first in order of name."""
    objects = churn.Objects()
    for event in (policy("shut", role("q"), "Ingress"), Q, P):
        event.happen(objects)
    node = Node(objects, churn.options_of(churn.WIDE))
    opens = policy("open", role("p"), "Ingress", ingress=[make.ingress()])
    disagree(node, [opens], random.Random(seed))
