"""The incremental graph against the same world computed from scratch, after any sequence of events.

A mirror is kept from the deltas alone, as the kernel would be: it must equal the state too.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.k8s.decode import NAMESPACE, NETWORK_POLICY, POD, decode
from netpol.model.ids import ObjectKey
from netpol.model.policy import CompiledPolicy
from netpol.policy.compile import compile_policy
from netpol.policy.graph import Graph, GraphDelta, LocalPod, PolicyId
from netpol.policy.members import Holding, SetKey
from netpol.policy.world import World
from netpol.render.node import graph_of, render_graph, render_node
from netpol.render.options import RenderOptions
from tests import builders as make
from tests import engine
from tests.prop import worlds

Json = dict[str, Any]
#: Flushes after which a graph must have come to rest.
REST_MAX = 10


class Mirror:
    """What a reader of deltas alone would know."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sets: dict[SetKey, dict[bytes, Holding]] = {}
        self.pods: dict[ObjectKey, LocalPod] = {}
        self.policies: dict[PolicyId, CompiledPolicy] = {}

    def flush(self) -> None:
        """Take one delta in."""
        delta: GraphDelta = self.graph.flush()
        for key in delta.gone_sets:
            del self.sets[key]
        for key, change in delta.set_deltas.items():
            assert key not in delta.new_sets, key
            for address, (before, now) in change.changes.items():
                assert self.sets[key].get(address) == before, (key, address)
                assert before != now
                if now is None:
                    del self.sets[key][address]
                else:
                    self.sets[key][address] = now
        for key in delta.new_sets:
            assert key not in self.sets, key
            self.sets[key] = dict(self.graph.members.holdings(key))
        for identity, policy in delta.policies.items():
            if policy is None:
                del self.policies[identity]
            else:
                self.policies[identity] = policy
        for name, pod in delta.pods.items():
            if pod is None:
                del self.pods[name]
            else:
                assert self.pods.get(name) != pod
                self.pods[name] = pod

    def rest(self) -> None:
        """Flush until nothing is left to do."""
        for _ in range(REST_MAX):
            self.flush()
            if not self.graph.pending:
                break
        assert not self.graph.pending
        assert self.graph.flush().empty

    def must_be(self, world: World) -> None:
        """Compare with a graph that saw only the final world."""
        fresh = graph_of(world, self.graph.node)
        wanted = {k: dict(fresh.members.holdings(k)) for k in fresh.members.active()}
        assert self.sets == wanted
        assert {k: dict(self.graph.members.holdings(k)) for k in self.graph.members.active()} == (
            wanted
        )
        assert self.policies == fresh.active_policies
        local = {k: p for k, p in fresh.local_pods.items() if p.addresses}
        assert {k: p for k, p in self.pods.items() if p.addresses} == local
        options = RenderOptions()
        assert render_graph(self.graph, options) == render_node(world, self.graph.node, options)


class Live:
    """A world that changes, fed to a graph event by event."""

    def __init__(self, start: make.World, node: str) -> None:
        self.objects: dict[tuple[str, str], Json] = {}
        self.graph = Graph(node)
        self.mirror = Mirror(self.graph)
        for kind in make.KINDS:
            for thing in start[kind]:
                self.put(thing)

    def put(self, thing: Json) -> None:
        kind = thing["kind"]
        self.objects[kind, make.reference(thing)] = thing
        if kind == "Pod":
            self.graph.upsert_pod(decode(POD, thing).value)
        elif kind == "Namespace":
            self.graph.upsert_namespace(decode(NAMESPACE, thing).value)
        elif kind == "NetworkPolicy":
            self.graph.upsert_policy(compile_policy(decode(NETWORK_POLICY, thing).value))

    def remove(self, kind: str, ref: str) -> None:
        self.objects.pop((kind, ref), None)
        namespace, _, name = ref.rpartition("/")
        if kind == "Pod":
            self.graph.remove_pod(ObjectKey(namespace, name))
        elif kind == "Namespace":
            self.graph.remove_namespace(ref)
        elif kind == "NetworkPolicy":
            self.graph.remove_policy(ObjectKey(namespace, name))

    def check(self) -> None:
        """Come to rest and compare."""
        self.mirror.rest()
        self.mirror.must_be(engine.build(make.world(*self.objects.values())))


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
