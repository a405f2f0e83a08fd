"""A policy is applied though pods come all the time, and a look that fails ends nothing."""

from __future__ import annotations

import asyncio

from netpol.enforce.worker import PolicyRoom
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.model import networkpolicy as raw
from netpol.model.ids import ObjectKey
from netpol.model.objects import Endpoint
from netpol.policy.compile import compile_policy
from netpol.policy.graph import Graph
from netpol.render.options import RenderOptions

LOCAL = ObjectKey("a", "web")


def policy(name: str, **spec: object) -> raw.NetworkPolicy:
    return raw.NetworkPolicy(ObjectKey("a", name), name, raw.NetworkPolicySpec(**spec))


PEERS = policy(
    "peers", ingress=(raw.IngressRule(peers=(raw.Peer(pod_selector=raw.LabelSelector()),)),)
)
DENY = policy("deny", policy_types=("Egress",))


async def test_pods_that_come_all_the_time_do_not_keep_a_policy_waiting() -> None:
    graph, sets = Graph("n1"), FakeSets()
    graph.upsert_policy(compile_policy(PEERS))
    graph.upsert_pod(Endpoint(key=LOCAL, uid="1", node="n1", addresses=(b"\x0a\x01\x01\x02",)))
    room = PolicyRoom(graph, sets=sets, tables=FakeTables(sets=sets), options=RenderOptions())
    running = asyncio.create_task(room.run_forever())
    room.start()
    await room.runner.wait_idle()

    async def churn() -> None:
        number = 0
        while True:
            number += 1
            address = bytes([10, 2, number // 250, number % 250 + 1])
            key = ObjectKey("a", f"r{number}")
            graph.upsert_pod(Endpoint(key=key, uid="1", node="n2", addresses=(address,)))
            room.changed()
            await asyncio.sleep(0)

    async def three_runs() -> None:
        runs = room.runner.runs
        while room.runner.runs < runs + 3:  # noqa: ASYNC110
            await asyncio.sleep(0)

    churning = asyncio.create_task(churn())
    await three_runs()
    graph.upsert_policy(compile_policy(DENY))
    room.changed()
    await three_runs()
    churning.cancel()
    running.cancel()
    await asyncio.gather(churning, running, return_exceptions=True)
    room.close()

    egress = graph.local_pods[LOCAL].egress
    assert egress is not None
    assert [str(p.key) for p in egress.policies] == ["a/deny"]
