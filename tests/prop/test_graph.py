"""The incremental graph against the same world computed from scratch, after any sequence of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import builders as make
from tests.prop import worlds
from tests.prop.live import Live

Json = dict[str, Any]


@st.composite
def _relabel(draw: st.DrawFn, old: Json) -> Json:
    """The same pod with other labels, phase or ports: what happens most."""
    new = {**old, "metadata": {**old["metadata"], "labels": draw(worlds.labels)}}
    what = draw(st.integers(0, 5))
    if what == 0:
        phase = draw(worlds.one(("Running", "Succeeded", "Pending")))
        new["status"] = {**old["status"], "phase": phase}
    elif what == 1:
        spec = {"containers": [{"name": "main", "image": "probe"}]}
        spec["containers"][0]["ports"] = [  # type: ignore[assignment]
            make.container_port(p) for p in draw(worlds.container_ports)
        ]
        new["spec"] = {**old["spec"], **spec}
    return new


def _one_event(data: st.DataObject, live: Live) -> None:
    kind = data.draw(
        worlds.one(("pod", "relabel", "relabel", "namespace", "policy", "remove", "flush"))
    )
    if kind == "pod":
        live.put(data.draw(worlds.pods(data.draw(worlds.one(("p0", "p1", "p2", "p3"))))))
    elif kind == "relabel":
        pods = sorted(k for k in live.objects if k[0] == "Pod")
        if pods:
            live.put(data.draw(_relabel(live.objects[data.draw(worlds.one(pods))])))
    elif kind == "namespace":
        live.put(data.draw(worlds.namespaces(data.draw(worlds.one(worlds.NAMESPACES)))))
    elif kind == "policy":
        live.put(data.draw(worlds.policies(data.draw(worlds.one(("p0", "p1", "p2"))))))
    elif kind == "remove":
        gone = sorted(k for k in live.objects if k[0] != "Node")
        if gone:
            live.remove(*data.draw(worlds.one(gone)))
    else:
        live.mirror.flush()


@given(st.data(), worlds.worlds(), worlds.one(("n1", "n2")))
def test_incremental_is_fresh(data: st.DataObject, start: make.World, node: str):
    live = Live(start, node)
    if data.draw(st.booleans()):
        live.check()
    for _ in range(data.draw(st.integers(1, 12))):
        _one_event(data, live)
    live.check()
    # And what was followed event by event is what the index says as a whole.
    live.graph.members.recompute()
    live.check()


@given(st.data(), worlds.worlds())
def test_order_of_events_does_not_matter(data: st.DataObject, start: make.World):
    """Every order of the same objects ends in the same state."""
    things = [t for kind in make.KINDS for t in start[kind]]
    live = Live(make.world(), "n1")
    for thing in data.draw(st.permutations(things)):
        live.put(thing)
        if data.draw(st.integers(0, 3)) == 0:
            live.mirror.flush()
    live.check()


@given(st.data(), st.lists(worlds.peers(), min_size=2, max_size=5))
def test_labels_churn(data: st.DataObject, peers: list[Json]):
    """Standing rules, the same pods, and labels that change all the time."""
    policy = make.policy("a/pol", make.selector(role="web"), ingress=[make.ingress(*peers)])
    subject = make.pod("a/web", ip="10.0.1.9", role="web")
    pods = [make.pod(f"{home}/p", ip=f"10.0.1.{n}") for n, home in enumerate("abc", 2)]
    spaces = [make.namespace(n) for n in worlds.NAMESPACES]
    live = Live(make.world(*spaces, subject, *pods, policy), "n1")
    live.check()
    for _ in range(data.draw(st.integers(4, 16))):
        if data.draw(st.integers(0, 4)) == 0:
            live.put(data.draw(worlds.namespaces(data.draw(worlds.one(worlds.NAMESPACES)))))
        else:
            old = data.draw(worlds.one(pods))
            have = data.draw(worlds.labels)
            live.put({**old, "metadata": {**old["metadata"], "labels": have}})
        live.mirror.flush()
    live.check()


@pytest.mark.parametrize("demanded", [("k",), ("l",), ("m",), ("k", "l"), ("l", "m"), ("k", "m")])
@pytest.mark.parametrize("first", ["k", "l", "m"])
@pytest.mark.parametrize("second", ["k", "l", "m"])
def test_a_label_that_no_index_is_anchored_on(demanded: tuple[str, ...], first: str, second: str):
    """A selector is found whichever of a pod's labels changes, and whichever it is filed under."""
    peer = make.pods(**dict.fromkeys(demanded, "1"))
    pod = make.pod("a/p", ip="10.0.1.2", k="1", l="1", m="1")
    subject = make.pod("a/web", ip="10.0.1.3", role="web")
    policy = make.policy("a/pol", make.selector(role="web"), ingress=[make.ingress(peer)])
    live = Live(make.world(make.namespace("a"), pod, subject, policy), "n1")
    live.check()
    assert [len(s) for s in live.mirror.sets.values()] == [1]
    for key in (first, second):
        labels = {k: "1" for k in ("k", "l", "m") if k != key}
        live.put({**pod, "metadata": {**pod["metadata"], "labels": labels}})
        live.check()
        assert [len(s) for s in live.mirror.sets.values()] == [0 if key in demanded else 1]
        live.put(pod)
        live.check()
        assert [len(s) for s in live.mirror.sets.values()] == [1]


def test_membership_alone_changes_no_rules():
    """A peer that comes is a change of a set; no policy, no set and no local pod is touched."""
    policy = make.policy(
        "a/pol", make.selector(role="web"), ingress=[make.ingress(make.pods(k="1"))]
    )
    subject = make.pod("a/web", ip="10.0.1.3", role="web")
    live = Live(make.world(make.namespace("a"), subject, policy), "n1")
    live.check()
    live.put(make.pod("a/p", ip="10.0.2.2", node="n2", k="1"))
    delta = live.graph.flush()
    assert [len(d.changes) for d in delta.set_deltas.values()] == [1]
    assert [delta.new_sets, delta.gone_sets, delta.policies, delta.pods] == [(), (), {}, {}]


def test_a_policy_that_selects_no_local_pod_costs_nothing():
    policy = make.policy(
        "a/pol", make.selector(role="web"), ingress=[make.ingress(make.pods(k="1"))]
    )
    subject = make.pod("a/web", ip="10.0.2.3", node="n2", role="web")
    live = Live(make.world(make.namespace("a"), subject, policy), "n1")
    live.check()
    assert not live.mirror.sets
    assert not live.mirror.policies
