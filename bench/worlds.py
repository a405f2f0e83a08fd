"""Clusters of a given size as API objects, always the same for the same shape.

Two kinds of selectors: `narrow` is what teams write (an app talks to an app, seldom across namespaces),
`broad` is the stress (whole namespaces and whole clusters as peers). Pods of `node1` are the local ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

LOCAL_NODE = "node1"
#: Pods of every other node.
PODS_PER_NODE = 110
APPS, VERSIONS, INSTANCES, TEAMS = 200, 10, 500, 40
TIERS = ("fe", "be", "db", "cache")
STAGES = ("prod", "stage", "dev")
PORTS = (80, 443, 8080, 5432)


@dataclass(frozen=True)
class Shape:
    """What a world is like."""

    pods: int = 10_000
    policies: int = 1_000
    local: int = PODS_PER_NODE
    namespaces: int = 200
    broad: bool = False
    seed: int = 20


#: The worlds of the budget, by the peer's measurements of the same shapes.
TEAMS_WORLD = Shape()
BROAD_WORLD = Shape(broad=True)


@dataclass
class Cluster:
    """The objects of a world."""

    namespaces: list[Json]
    nodes: list[Json]
    pods: list[Json]
    policies: list[Json]

    @property
    def local(self) -> list[Json]:
        return [p for p in self.pods if p["spec"]["nodeName"] == LOCAL_NODE]


def make(shape: Shape) -> Cluster:
    """Make a world."""
    rng = random.Random(shape.seed)
    others = max(0, shape.pods - shape.local)
    nodes = 1 + -(-others // PODS_PER_NODE)
    return Cluster(
        namespaces=[_namespace(rng, i) for i in range(shape.namespaces)],
        nodes=[_node(i) for i in range(1, nodes + 1)],
        pods=[
            pod(
                rng, number, *_seat(number, shape.local), namespace=f"ns{number % shape.namespaces}"
            )
            for number in range(shape.pods)
        ],
        policies=[
            _policy(rng, number, f"ns{rng.randrange(shape.namespaces)}", broad=shape.broad)
            for number in range(shape.policies)
        ],
    )


def one_policy_each(local: int = 250, others: int = 50, namespaces: int = 10) -> Cluster:
    """Every local pod has a policy of its own, in both directions: the worst case for a dispatcher."""
    cluster = make(
        Shape(pods=local + others, policies=0, local=local, namespaces=namespaces, seed=3)
    )
    for number, each in enumerate(cluster.local):
        each["metadata"]["labels"]["id"] = f"p{number}"
        ports = [{"protocol": "TCP", "port": 80}]
        spec = {
            "podSelector": {"matchLabels": {"id": f"p{number}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {}}], "ports": ports}],
            "egress": [{"to": [{"podSelector": {}}], "ports": ports}],
        }
        cluster.policies.append(policy(f"q{number}", each["metadata"]["namespace"], spec))
    return cluster


def many_policies_on_one(count: int = 50) -> Cluster:
    """Two local pods; `count` policies isolate the second, and only the last allows the first."""
    cluster = make(Shape(pods=2, policies=0, local=2, namespaces=1))
    for number in range(count):
        last = number == count - 1
        peer = {"podSelector": {} if last else {"matchLabels": {"app": f"none{number}"}}}
        ports = [{"protocol": "UDP", "port": 80}]
        spec = {"podSelector": {}, "ingress": [{"from": [peer], "ports": ports}]}
        cluster.policies.append(policy(f"q{number:02}", "ns0", spec))
    return cluster


def _seat(number: int, local: int) -> tuple[int, int]:
    """The node of a pod, and its place there."""
    if number < local:
        return 1, number
    node, place = divmod(number - local, PODS_PER_NODE)
    return node + 2, place


def _namespace(rng: random.Random, number: int) -> Json:
    labels = {
        "kubernetes.io/metadata.name": f"ns{number}",
        "team": f"t{number % TEAMS}",
        "env": rng.choice(STAGES),
    }
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": f"ns{number}", "uid": f"ns-{number}", "labels": labels},
    }


def _node(number: int) -> Json:
    cidr = f"10.{64 + number // 256}.{number % 256}.0/24"
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": f"node{number}",
            "labels": {"kubernetes.io/hostname": f"node{number}"},
        },
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"addresses": [{"type": "InternalIP", "address": _host(number)}]},
    }


def _host(node: int) -> str:
    return f"10.0.{node // 250}.{node % 250 + 1}"


#: The local node's.
NODE_ADDRESS = _host(1)


def address(node: int, place: int) -> str:
    """The address of a pod by its node and its place there."""
    return f"10.{64 + node // 256}.{node % 256}.{place + 2}"


def pod(rng: random.Random, number: int, node: int, place: int, *, namespace: str) -> Json:
    """One running pod."""
    ip = address(node, place)
    labels = {
        "app": f"a{rng.randrange(APPS)}",
        "tier": rng.choice(TIERS),
        "ver": f"v{rng.randrange(VERSIONS)}",
        "inst": f"i{rng.randrange(INSTANCES)}",
    }
    ports = [{"name": "http", "containerPort": 80, "protocol": "TCP"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"pod-{number}",
            "namespace": namespace,
            "uid": f"{number:08x}-0000-4000-8000-000000000000",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels,
        },
        "spec": {
            "nodeName": f"node{node}",
            "containers": [{"name": "c", "image": "x", "ports": ports}],
        },
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "hostIP": _host(node),
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def policy(name: str, namespace: str, spec: Json) -> Json:
    """A NetworkPolicy object."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace, "uid": f"{namespace}-{name}"},
        "spec": spec,
    }


def _policy(rng: random.Random, number: int, namespace: str, *, broad: bool) -> Json:
    peer = _broad_peer if broad else _narrow_peer
    ports = [{"protocol": "TCP", "port": rng.choice(PORTS)}]
    peers = [peer(rng) for _ in range(rng.randint(1, 4))]
    spec: Json = {
        "podSelector": _selector(rng),
        "policyTypes": ["Ingress"],
        "ingress": [{"from": peers, "ports": ports}],
    }
    if rng.random() < 0.3:
        block = {"cidr": "10.96.0.0/12", "except": ["10.96.1.0/24"]}
        spec["policyTypes"].append("Egress")
        spec["egress"] = [
            {
                "to": [{"podSelector": _selector(rng)}],
                "ports": [{"protocol": "TCP", "port": 5432}],
            },
            {"to": [{"ipBlock": block}]},
        ]
    return policy(f"p{number}", namespace, spec)


def _narrow_peer(rng: random.Random) -> Json:
    out: Json = {}
    if rng.random() < 0.2:
        out["namespaceSelector"] = {"matchLabels": {"team": f"t{rng.randrange(TEAMS)}"}}
    labels = (
        {"app": f"a{rng.randrange(APPS)}"}
        if rng.random() < 0.8
        else {"tier": rng.choice(TIERS[:2])}
    )
    return {**out, "podSelector": {"matchLabels": labels}}


def _broad_peer(rng: random.Random) -> Json:
    out: Json = {}
    if rng.random() < 0.6:
        out["namespaceSelector"] = _namespace_selector(rng)
    if rng.random() < 0.8 or not out:
        out["podSelector"] = _selector(rng)
    return out


def _namespace_selector(rng: random.Random) -> Json:
    which = rng.random()
    if which < 0.2:
        return {}
    if which < 0.6:
        return {"matchLabels": {"team": f"t{rng.randrange(TEAMS)}"}}
    return {"matchLabels": {"env": rng.choice(STAGES)}}


def _selector(rng: random.Random) -> Json:
    which = rng.random()
    if which < 0.15:
        return {}
    labels = {"app": f"a{rng.randrange(APPS)}"} if which < 0.6 else {"tier": rng.choice(TIERS)}
    if rng.random() < 0.3:
        labels["ver"] = f"v{rng.randrange(VERSIONS)}"
    out: Json = {"matchLabels": labels}
    which = rng.random()
    if which < 0.1:
        out["matchExpressions"] = [{"key": "tier", "operator": "In", "values": ["fe", "be"]}]
    elif which < 0.15:
        out["matchExpressions"] = [{"key": "ver", "operator": "NotIn", "values": ["v1", "v2"]}]
    elif which < 0.2:
        out["matchExpressions"] = [{"key": "inst", "operator": "Exists"}]
    return out


def as_list(kind: str, items: Iterable[Json]) -> Json:
    """A list page as the API answers it."""
    return {"kind": f"{kind}List", "metadata": {"resourceVersion": "1"}, "items": list(items)}
