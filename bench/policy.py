"""From an event to the kernel: pods that come and go, policies that change, the first apply."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator

import msgspec

from bench import worlds
from bench.measure import Row, p99, settle, spread
from bench.node import Node, lists
from bench.worlds import Cluster, Json, Shape

JOINS, CHANGES, COLD_STARTS = 150, 60, 3
#: Mean pause between events: long enough that the room looks for drift in between, as it does in life.
PAUSE_S = 0.06
#: After a table transaction the tables are read back once; the measurement begins when that is over.
SETTLED_S = 1.0


def pod_join() -> Iterator[Row]:
    """Pods that join and leave classes that exist already."""
    yield asyncio.run(_pod_join(worlds.TEAMS_WORLD, "policy.pod_join.p99_ms", target=5.0))
    yield asyncio.run(_pod_join(worlds.BROAD_WORLD, "policy.pod_join.broad.p99_ms", target=None))


def policy_change() -> Iterator[Row]:
    """Policies that isolate local pods change their rules, their subject, or come and go."""
    yield asyncio.run(_policy_change())


def cold_start() -> Iterator[Row]:
    """Everything from the lists' bytes to the first complete apply."""
    for shape, name, target in (
        (worlds.TEAMS_WORLD, "policy.cold_start.s", 3.0),
        (worlds.BROAD_WORLD, "policy.cold_start.broad.s", None),
    ):
        answers = lists(worlds.make(shape))
        samples = [asyncio.run(_cold_start(answers)) for _ in range(COLD_STARTS)]
        yield Row(name, max(samples), "s", target=target, note=spread(samples, "s"))


async def _cold_start(answers: dict[str, bytes]) -> float:
    node = Node()
    settle()
    begin = time.perf_counter()
    task = await node.start(answers)
    took_s = time.perf_counter() - begin
    await node.stop(task)
    return took_s


def _twin(cluster: Cluster, rng: random.Random, number: int) -> Json:
    """A new pod that is like a local one, so that its classes exist; its address is free."""
    like = rng.choice([p for p in cluster.local if len(p["metadata"]["labels"]) == 4])
    ip = worlds.address(1, worlds.PODS_PER_NODE + number % 120)
    return {
        **like,
        "metadata": {**like["metadata"], "name": f"twin-{number}", "uid": f"twin-{number}"},
        "status": {**like["status"], "podIP": ip, "podIPs": [{"ip": ip}]},
    }


async def _timed_event(node: Node, rng: random.Random, act: Callable[[], None]) -> float:
    await asyncio.sleep(rng.expovariate(1 / PAUSE_S))
    begin = time.perf_counter()
    act()
    await node.applied()
    return (time.perf_counter() - begin) * 1000


async def _pod_join(shape: Shape, name: str, *, target: float | None) -> Row:
    cluster, rng = worlds.make(shape), random.Random(4)
    node = Node()
    task = await node.start(lists(cluster))
    twins = [msgspec.json.encode(_twin(cluster, rng, i)) for i in range(JOINS)]
    await _warm(node, twins[0])
    await asyncio.sleep(SETTLED_S)
    settle()
    transactions, applies = node.room.status.table_transactions, node.room.status.applies
    joins, leaves = [], []
    here: list[bytes] = []
    for raw in twins:
        joins.append(await _timed_event(node, rng, lambda raw=raw: node.event("local", raw)))  # type: ignore[misc]
        here.append(raw)
        if len(here) > 5:
            gone = here.pop(rng.randrange(len(here)))
            leaves.append(
                await _timed_event(
                    node,
                    rng,
                    lambda gone=gone: node.event("local", gone, deleted=True),  # type: ignore[misc]
                )
            )
    status = node.room.status
    if status.table_transactions != transactions:
        raise AssertionError("a pod that joined a known class made an iptables transaction")
    if status.applies - applies < len(joins) + len(leaves):
        raise AssertionError("some events reached no kernel")
    if status.drifts or status.failures:
        raise AssertionError(f"drift {status.drift!r}, error {status.error!r}")
    await node.stop(task)
    samples = joins + leaves
    note = f"joins: {spread(joins)}; leaves: {spread(leaves)}; iptables transactions: 0"
    return Row(name, p99(samples), "ms", target=target, note=note)


async def _warm(node: Node, raw: bytes) -> None:
    for deleted in (False, True):
        node.event("local", raw, deleted=deleted)
        await node.applied()


async def _policy_change() -> Row:
    cluster, rng = worlds.make(worlds.TEAMS_WORLD), random.Random(5)
    # All local pods in one namespace, so that one policy can isolate all of them.
    for pod in cluster.local:
        pod["metadata"]["namespace"] = "ns0"
    wide = [worlds.policy(f"all-{i}", "ns0", _spec(rng)) for i in range(3)]
    cluster.policies += wide
    node = Node()
    task = await node.start(lists(cluster))
    settle()
    samples: dict[str, list[float]] = {}
    applies = node.room.status.applies
    for number in range(CHANGES):
        target = wide[number % len(wide)]
        kind = ("ports", "peers", "removed", "added")[number % 4]
        changed = {**target, "spec": _spec(rng)}
        if kind == "ports":
            changed["spec"]["ingress"][0]["from"] = target["spec"]["ingress"][0]["from"]
        if kind in ("removed", "added"):
            changed = worlds.policy("more", "ns0", wide[0]["spec"])
        raw = msgspec.json.encode(changed)
        took_ms = await _timed_event(
            node,
            rng,
            lambda raw=raw, gone=kind == "removed": node.event(  # type: ignore[misc]
                "NetworkPolicy", raw, deleted=gone
            ),
        )
        samples.setdefault(kind, []).append(took_ms)
    samples["removed"] = samples["removed"][1:]  # the first found nothing to remove
    if node.room.status.applies - applies < CHANGES - 1:
        raise AssertionError("some changes reached no kernel")
    if node.room.status.drifts or node.room.status.failures:
        raise AssertionError(f"drift {node.room.status.drift!r}")
    await node.stop(task)
    note = "; ".join(f"{kind}: {spread(values)}" for kind, values in samples.items())
    merged = [x for values in samples.values() for x in values]
    return Row("policy.policy_change.p99_ms", p99(merged), "ms", target=100.0, note=note)


def _spec(rng: random.Random) -> Json:
    """A policy for every pod of a namespace."""
    peers = [
        {
            "namespaceSelector": {"matchLabels": {"team": f"t{rng.randrange(worlds.TEAMS)}"}},
            "podSelector": {"matchLabels": {"app": f"a{rng.randrange(worlds.APPS)}"}},
        }
        for _ in range(3)
    ]
    ports = [{"protocol": "TCP", "port": rng.randrange(1024, 60000)} for _ in range(2)]
    return {"podSelector": {}, "ingress": [{"from": peers, "ports": ports}]}
