"""A pod that is new here, told together with policies that isolate it, is never open in between.

Of the news of one moment, pods come before policies (ADR 0002). For a pod that had no rules yet, that would
be a time without any: it must stay unknown until its policies are there. Plans are cut into the smallest
steps, and packets walk after each.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.model.flow import Verdict
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES
from netpol.policy.evaluate import evaluate
from netpol.policy.graph import Graph
from tests import builders as make
from tests.prop import churn, worlds
from tests.prop.test_plan_safety import OUTSIDE, Judge, Node, Quad, Watch, gone, pod, policy, quads
from tests.prop.test_plan_safety import role as of_role

ROLES = ("a", "b")
SUBJECTS: tuple[make.Json, ...] = ({}, of_role("a"), of_role("b"))


@st.composite
def pods(draw: st.DrawFn) -> churn.Event:
    """Few names and addresses: pods are made again with another uid, and take over addresses."""
    made = pod(
        draw(worlds.one(("x", "y", "z"))),
        draw(st.integers(2, 4)),
        created=draw(st.integers(0, 9)),
        role=draw(worlds.one(ROLES)),
    )
    addresses = made.value.addresses[: draw(st.integers(0, 2))]
    uid = draw(worlds.one(("u1", "u2")))
    return replace(made, value=msgspec.structs.replace(made.value, uid=uid, addresses=addresses))


@st.composite
def policies(draw: st.DrawFn) -> churn.Event:
    types = draw(worlds.one(("Ingress", "Egress", "Ingress Egress")))
    rules: dict[str, list[make.Json]] = {}
    if draw(st.booleans()):
        peer = make.pods(role=draw(worlds.one(ROLES)))
        rules = {"ingress": [make.ingress(peer)], "egress": [make.egress(peer)]}
        rules = {k: v for k, v in rules.items() if k.title() in types.split()}
    return policy(draw(worlds.one(("p", "q", "r"))), draw(worlds.one(SUBJECTS)), types, **rules)


@st.composite
def news(draw: st.DrawFn) -> churn.Event:
    event = draw(st.one_of(pods(), policies()))
    return gone(event) if draw(st.integers(0, 4)) == 0 else event


def new_addresses(before: churn.Objects, after: churn.Objects) -> set[bytes]:
    """Addresses that pods of this node have, and did not have before."""
    had = {(p.key, p.uid, a) for p in before.pods.values() for a in p.addresses}
    world = after.world()
    return {
        a
        for p in after.pods.values()
        for a in world.owned(p)
        if p.node == churn.NODE and (p.key, p.uid, a) not in had
    }


def own_end_denies(judge: Judge, quad: Quad, new: set[bytes]) -> bool:
    """Whether the policies of a new pod deny a flow, whatever those of the other end say."""
    trace = evaluate(judge.world, judge.flow(quad))
    src, dst = quad[:2]
    return (src in new and trace.egress.verdict is Verdict.DENY) or (
        dst in new and trace.ingress.verdict is Verdict.DENY
    )


@given(
    st.lists(pods(), max_size=3),
    st.lists(policies(), max_size=3),
    st.lists(news(), min_size=1, max_size=4),
    worlds.one((None, *ROLES)),
)
def test_what_its_policies_deny_a_new_pod_is_denied_at_every_step(
    start: list[churn.Event],
    rules: list[churn.Event],
    events: list[churn.Event],
    late: str | None,
) -> None:
    """Also where one more pod, of the role `late`, comes when the first delta was taken already."""
    before = churn.Objects()
    for event in (*start, *rules):
        event.happen(before)
    node = Node(before, churn.options_of(churn.WIDE))
    after = before.copy()
    more = [] if late is None else [pod("late", 9, role=late)]
    for event in (*events, *more):
        event.happen(after)
    old, final = (Judge(o.world(), hold=True) for o in (before, after))
    new = new_addresses(before, after)
    denied = [
        q for q in quads([before, after]) if not old.passes(q) and own_end_denies(final, q, new)
    ]
    watch = Watch(final.world, node.options.field_mask, denied, [], set())
    for event in events:
        event.tell(node.graph)
    done = ["the start"]
    for plan in node.plans():
        while more:
            more.pop().tell(node.graph)
        for step in node.kernel.steps(plan):
            done.append(step)
            watch.look(node.kernel, "\n".join(done))
    for event in more:
        event.tell(node.graph)
    for plan in node.plans():
        node.kernel.run(plan)
    node.check(after)


@pytest.mark.parametrize("known", [False, True], ids=["new", "known without an address"])
def test_an_address_waits_for_the_policies(known: bool) -> None:
    """Many pods, of which one is to be isolated: the others do not wait."""
    graph = Graph(churn.NODE)
    made = pod("x", 2, role="a")
    if known:
        graph.upsert_pod(msgspec.structs.replace(made.value, addresses=()))
        graph.flush(together=True)
    for event in (made, pod("y", 3, role="b"), policy("p", of_role("a"), "Ingress")):
        event.tell(graph)
    assert graph.flush().pods.keys() == {pod("y", 3).key}
    assert graph.pending
    here = graph.flush().pods[made.key]
    assert here is not None
    assert here.addresses == made.value.addresses
    assert here.ingress is not None
    assert not graph.pending


def test_it_waits_as_long_as_the_policy_and_no_longer() -> None:
    graph = Graph(churn.NODE)
    made = pod("x", 2, role="a")
    for event in (made, policy("p", of_role("a"), "Ingress")):
        event.tell(graph)
    assert not graph.flush().pods
    pod("y", 3).tell(graph)  # pods that come meanwhile change nothing
    assert graph.flush().pods.keys() == {pod("y", 3).key}
    policy("p", of_role("b"), "Ingress").tell(graph)
    here = graph.flush().pods[made.key]
    assert here is not None
    assert here.ingress is None


def test_a_pod_that_goes_while_it_waits_leaves_nothing() -> None:
    graph = Graph(churn.NODE)
    for event in (pod("x", 2, role="a"), policy("p", of_role("a"), "Ingress")):
        event.tell(graph)
    graph.flush()
    graph.remove_pod(pod("x", 2).key)
    while graph.pending:
        assert not graph.flush().pods
    assert not graph.local_pods


def test_without_a_hold_the_pod_is_as_unknown_as_before() -> None:
    """No entry, neither before the policies nor for another reason, and in force right behind them."""
    options = replace(churn.options_of(churn.WIDE), hold_ranges=())
    node = Node(churn.Objects(), options)
    made = pod("x", 2, role="a")
    for event in (made, policy("p", of_role("a"), "Ingress Egress")):
        event.tell(node.graph)
    after = churn.Objects()
    for event in (made, policy("p", of_role("a"), "Ingress Egress")):
        event.happen(after)
    judge = Judge(after.world(), hold=False)
    denied = [
        (outside, address, *port)
        for outside, address in product(OUTSIDE, made.value.addresses)
        for port in ((Protocol.TCP, 80),)
        if len(outside) == len(address)
    ]
    assert len(denied) == len(FAMILIES)
    assert not any(judge.passes(q) for q in denied)
    for plan in node.plans():
        node.kernel.run(plan)
    Watch(judge.world, options.field_mask, denied, [], set()).look(node.kernel, "the end")
    node.check(after)
