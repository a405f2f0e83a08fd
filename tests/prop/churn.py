"""Worlds that change at random, as typed values: few names and addresses, so that everything overlaps.

Plain random numbers instead of Hypothesis, since a history is long; a seed names one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.kernel.drivers import SetDriver, TableDriver
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.model import networkpolicy as raw
from netpol.model import objects as api
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.labels import labels
from netpol.model.net import FAMILIES, parse_address, parse_prefix
from netpol.model.objects import ContainerPort, Endpoint, Namespace
from netpol.model.policy import CompiledPolicy
from netpol.policy.compile import compile_policy
from netpol.policy.graph import Graph
from netpol.policy.world import World
from netpol.render.node import classes_in_use, render_graph
from netpol.render.options import RenderOptions

Json = dict[str, Any]

NODE = "n1"
NODES = tuple(
    api.Node(
        name=f"n{n}",
        addresses=(parse_address(f"172.18.0.{n + 1}"), parse_address(f"fd00:18::{n + 1}")),
        pod_cidrs=(parse_prefix(f"10.0.{n}.0/24"), parse_prefix(f"fd00:0:{n}::/64")),
    )
    for n in (1, 2)
)
NAMESPACES = ("a", "b")
KEYS, VALUES = ("app", "tier", "x"), "12"
WIDE, NARROW = 0xFFF0_0000, 0xE000_0000
PORTS = (
    ContainerPort("web", Protocol.TCP, 80),
    ContainerPort("web", Protocol.TCP, 81),
    ContainerPort("dns", Protocol.UDP, 53),
    ContainerPort("dns", Protocol.UDP, 54),
)


def options_of(field_mask: int) -> RenderOptions:
    """A node with a bridge that holds its podCIDRs."""
    here = NODES[0]
    gateways = (parse_address("10.0.1.1"), parse_address("fd00:0:1::1"))
    return RenderOptions(
        field_mask=field_mask,
        pod_interfaces=("cni0",),
        hold_ranges=here.pod_cidrs,
        own_addresses=(*here.addresses, *gateways),
    )


@dataclass(slots=True)
class Objects:
    """What the API server holds at one moment."""

    pods: dict[ObjectKey, Endpoint] = field(default_factory=dict)
    namespaces: dict[str, Namespace] = field(default_factory=dict)
    policies: dict[ObjectKey, CompiledPolicy] = field(default_factory=dict)

    def copy(self) -> Objects:
        return Objects(dict(self.pods), dict(self.namespaces), dict(self.policies))

    def world(self) -> World:
        return World.build(
            namespaces=self.namespaces.values(),
            pods=self.pods.values(),
            policies=self.policies.values(),
            nodes=NODES,
        )


@dataclass(frozen=True, slots=True)
class Event:
    """One object as the API server would report it; None where it was deleted."""

    kind: str
    key: Any
    value: Any

    def happen(self, objects: Objects) -> None:
        """Change the objects."""
        store: dict[Any, Any] = getattr(objects, self.kind)
        if self.value is None:
            store.pop(self.key, None)
        else:
            store[self.key] = self.value

    def tell(self, graph: Graph) -> None:
        """Tell a graph, as the caches would."""
        match self.kind, self.value:
            case "pods", None:
                graph.remove_pod(self.key)
            case "pods", pod:
                graph.upsert_pod(pod)
            case "namespaces", None:
                graph.remove_namespace(self.key)
            case "namespaces", namespace:
                graph.upsert_namespace(namespace)
            case "policies", None:
                graph.remove_policy(self.key)
            case "policies", policy:
                graph.upsert_policy(policy)


class Dice:
    """Makes objects and events."""

    def __init__(self, seed: int, *, pods: int = 6, addresses: int = 6) -> None:
        self.random = random.Random(seed)
        self._pods, self._addresses = pods, addresses
        self._born = 0

    # -- events -----------------------------------------------------------------------------

    def fill(self, policies: int) -> list[Event]:
        """The events of a start."""
        out = [self._namespace(n) for n in NAMESPACES]
        out += [self._pod(f"o{number}") for number in range(self._pods)]
        return out + [self._policy(f"p{n}") for n in range(policies)]

    def event(self, objects: Objects) -> Event:
        """Something that happens to objects; mostly to such as exist."""
        r = self.random
        kind = r.choice(
            ("relabel", "relabel", "pod", "pod gone", "reuse", "namespace", "policy", "policy gone")
        )
        name = f"o{r.randrange(self._pods)}"
        if kind == "pod":
            return self._pod(name)
        if kind == "namespace":
            return self._namespace(r.choice(NAMESPACES))
        if kind == "policy":
            return self._policy(f"p{r.randrange(4)}")
        store: dict[Any, Any] = objects.policies if kind == "policy gone" else objects.pods
        if not store:
            return self._pod(name)
        key = r.choice(sorted(store))
        if kind == "policy gone":
            return Event("policies", key, None)
        if kind == "pod gone":
            return Event("pods", key, None)
        old: Endpoint = store[key]
        if kind == "relabel" or old.host_network:
            return Event("pods", key, msgspec.structs.replace(old, labels=self._labels()))
        new = self._endpoint(f"o{r.randrange(self._pods)}")
        taken = msgspec.structs.replace(
            new, addresses=old.addresses, node=old.node, created="2026-02-01T00:00:00Z"
        )
        return Event("pods", taken.key, taken)

    def _namespace(self, name: str) -> Event:
        have = {**self._some_labels(), "kubernetes.io/metadata.name": name}
        return Event("namespaces", name, Namespace(name=name, labels=labels(have)))

    def _pod(self, name: str) -> Event:
        made = self._endpoint(name)
        return Event("pods", made.key, made)

    def _policy(self, name: str) -> Event:
        r = self.random
        spec: Json = {
            "podSelector": self._selector() if r.random() < 0.8 else {},
            "policyTypes": r.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"])),
            "ingress": [self._rule("from") for _ in range(r.randrange(3))],
            "egress": [self._rule("to") for _ in range(r.randrange(3))],
        }
        key = ObjectKey(r.choice(NAMESPACES), name)
        made = raw.NetworkPolicy(key, "u", msgspec.convert(spec, raw.NetworkPolicySpec))
        return Event("policies", key, compile_policy(made))

    # -- parts ------------------------------------------------------------------------------

    def _endpoint(self, name: str) -> Endpoint:
        r = self.random
        self._born += 1
        node, last = r.choice((1, 1, 2)), r.randrange(2, 2 + self._addresses)
        both = (parse_address(f"10.0.{node}.{last}"), parse_address(f"fd00:0:{node}::{last}"))
        host_network = r.random() < 0.03
        return Endpoint(
            key=ObjectKey(r.choice(NAMESPACES), name),
            uid=f"u{self._born}" if r.random() < 0.3 else name,
            labels=self._labels(),
            node=f"n{node}",
            addresses=NODES[node - 1].addresses
            if host_network
            else r.choice((both, both, both[:1], both[1:], ())),
            ports=tuple(r.sample(PORTS, r.randrange(3))),
            created=f"2026-01-01T00:00:{r.randrange(60):02d}Z",
            phase=r.choice((*["Running"] * 6, "Succeeded")),
            host_network=host_network,
        )

    def _some_labels(self) -> dict[str, str]:
        return {k: self.random.choice(VALUES) for k in KEYS if self.random.random() < 0.6}

    def _labels(self) -> Any:
        return labels(self._some_labels())

    def _selector(self) -> Json:
        r, out = self.random, {}
        if r.random() < 0.7:
            out["matchLabels"] = {r.choice(KEYS): r.choice(VALUES)}
        if r.random() < 0.3:
            out["matchExpressions"] = [
                r.choice(
                    (
                        {"key": "x", "operator": "Exists"},
                        {"key": "tier", "operator": "NotIn", "values": ["1"]},
                        {"key": "app", "operator": "In", "values": ["1", "2"]},
                        {"key": "x", "operator": "DoesNotExist"},
                    )
                )
            ]
        return out

    def _rule(self, key: str) -> Json:
        r, out = self.random, {}
        if r.random() < 0.85:
            out[key] = [self._peer() for _ in range(r.randrange(1, 3))]
        if r.random() < 0.6:
            ports = (
                {"port": 80},
                {"port": "web"},
                {"protocol": "UDP", "port": "dns"},
                {"port": 79, "endPort": 80},
                {"protocol": "UDP"},
            )
            out["ports"] = [r.choice(ports) for _ in range(r.randrange(1, 3))]
        return out

    def _peer(self) -> Json:
        r = self.random
        if r.random() < 0.2:
            holes = [f"10.0.{r.randrange(1, 3)}.{2 * r.randrange(1, 4)}/31"]
            return {"ipBlock": {"cidr": "10.0.0.0/16", "except": holes}}
        out: Json = {}
        if r.random() < 0.5:
            out["namespaceSelector"] = self._selector()
        if r.random() < 0.7 or not out:
            out["podSelector"] = self._selector()
        return out


class Node:
    """A node's graph and dataplane, and the kernel that its drivers reach."""

    def __init__(self, field_mask: int, sets: SetDriver, tables: TableDriver) -> None:
        self.graph = Graph(NODE)
        self.options = options_of(field_mask)
        self.sets, self.tables = sets, tables
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
            execute(self.dataplane.change(delta), self.sets, self.tables)

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


def node(field_mask: int) -> Node:
    """A node whose kernel is in memory."""
    sets = FakeSets()
    return Node(field_mask, sets, FakeTables(sets=sets))
