"""The engine alone: all selectors of a world at once, and one pod's label change."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from bench import worlds
from bench.measure import Row, p99, settle, spread, timed
from netpol.k8s.decode import KINDS, decode
from netpol.model.labels import labels
from netpol.model.objects import Endpoint, Namespace
from netpol.model.policy import PodPeer
from netpol.policy.compile import compile_policy
from netpol.policy.graph import sets_of
from netpol.policy.match import pod_matches
from netpol.policy.members import Members, PortSet

ROUNDS, RELABELS, NAIVE_RELABELS = 15, 2_000, 5


def selectors() -> Iterator[Row]:
    """Every selector of every policy is in use, as if all pods were local; broad selectors."""
    cluster = worlds.make(worlds.BROAD_WORLD)
    namespaces: list[Namespace] = _all("Namespace", cluster.namespaces)
    pods: list[Endpoint] = _all("Pod", cluster.pods)
    policies = [compile_policy(p) for p in _all("NetworkPolicy", cluster.policies)]
    keys = [key for policy in policies for key in sets_of(policy)]
    members = Members("node1")
    for namespace in namespaces:
        members.put_namespace(namespace)
    for pod in pods:
        members.put(pod)
    members.activate(keys)
    settle()
    full = [timed(members.recompute) * 1000 for _ in range(ROUNDS)]
    named = (k.peer if isinstance(k, PortSet) else k for k in keys)
    peers = list(dict.fromkeys(p for p in named if isinstance(p, PodPeer)))
    begin = time.perf_counter()
    naive = {
        peer: {pod.key for pod in pods if pod_matches(peer, pod, members)} for peer in peers[:50]
    }
    naive_ms = (time.perf_counter() - begin) * 1000 * len(peers) / len(naive)
    for peer, found in naive.items():
        mine = len(list(members.holdings(peer)))
        if mine != len(found):
            raise AssertionError(f"{peer}: {mine} members, the naive way finds {len(found)}")
    yield Row(
        "selectors.full.ms",
        min(full),
        "ms",
        baseline=naive_ms,
        target=50.0,
        note=f"{len(peers)} distinct selectors, {spread(full)}; baseline: each selector against "
        "each pod, extrapolated from 50 selectors",
    )
    yield _relabel(members, pods, peers, naive_full_ms=naive_ms)


def _all(kind: str, objects: list[worlds.Json]) -> list[Any]:
    return [decode(KINDS[kind], msgspec.json.encode(o)).value for o in objects]


def _relabel(
    members: Members, pods: list[Endpoint], peers: list[PodPeer], *, naive_full_ms: float
) -> Row:
    # CPU time: this waits for nothing, and other programs' turns are not what is asked.
    rng = random.Random(6)
    members.take_deltas()
    samples = []
    for _ in range(RELABELS):
        pod = rng.choice(pods)
        now = dict(pod.labels)
        now[rng.choice(("app", "ver"))] = rng.choice(("a1", "a2", "v1", "v2", "v3"))
        changed = msgspec.structs.replace(pod, labels=labels(now))
        begin = time.thread_time()
        members.put(changed)
        members.take_deltas()
        samples.append((time.thread_time() - begin) * 1000)
        members.put(pod)
        members.take_deltas()
    begin = time.perf_counter()
    for pod in pods[:NAIVE_RELABELS]:
        for peer in peers:
            pod_matches(peer, pod, members)
    naive_ms = (time.perf_counter() - begin) * 1000 / NAIVE_RELABELS
    return Row(
        "selectors.pod_label.p99_ms",
        p99(samples),
        "ms",
        baseline=naive_ms,
        target=1.0,
        note=f"{spread(samples)} of CPU; baseline: the pod against every selector (everything again would "
        f"be {naive_full_ms:.0f} ms)",
    )
