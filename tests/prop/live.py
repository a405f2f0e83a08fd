"""A world that changes, its incremental graph, and a mirror of it made of deltas alone.

The mirror is what the kernel would hold: it must equal the graph's state, and that of a graph that saw only
the final world.
"""

from __future__ import annotations

from typing import Any

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
