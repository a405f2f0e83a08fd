"""A thousand peers that live, while every Node's heartbeat arrives each ten seconds: what it costs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from netpol.k8s.cache import Store
from netpol.k8s.decode import NODE, decode
from netpol.kernel.netns import enter, in_netns
from netpol.kernel.routes import bird_routes
from netpol.model.net import format_address
from netpol.model.objects import Node
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine
from routes.options import OverlayMode, RouteOptions
from routes.state import Facts
from routes.sync import RoutesRoom
from tests.kernel.birdnet import Host, bird_net
from tests.kernel.test_bgp_scale import NODES, node, serve, wire

pytestmark = [pytest.mark.kernel, pytest.mark.alone]

HEARTBEAT_S = 10.0
MEASURED_S = 10.0
#: The share of one core for which the agent's routes, and BIRD, may be busy at rest.
AGENT_SHARE, BIRD_SHARE = 0.10, 0.10
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def heartbeat(of: Node, number: int) -> bytes:
    """A Node as a kubelet writes it, with a time that nothing reads."""
    document: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": of.name, "uid": of.name, "resourceVersion": str(number + 1)},
        "spec": {"podCIDRs": [str(p) for p in of.pod_cidrs]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": format_address(a)} for a in of.addresses
            ],
            "conditions": [
                {"type": kind, "status": "False", "lastHeartbeatTime": f"2026-01-01T00:00:{number}"}
                for kind in ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
            ],
            "images": [
                {"names": [f"registry.example/image-{i}"], "sizeBytes": i} for i in range(50)
            ],
        },
    }
    return json.dumps(document).encode()


def agent(host: Host, nodes: list[Node]) -> int:
    """An agent's routes room in a process of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        enter(host.netns)
        asyncio.run(_agent(host, nodes))
    finally:
        os._exit(1)


async def _agent(host: Host, nodes: list[Node]) -> None:
    store: Store[Node] = Store("nodes")
    for each in nodes:
        store.put(decode(NODE, heartbeat(each, 0)))

    async def has_routes() -> bool:
        return False

    where = host.folder / "run"
    room = RoutesRoom(
        BirdEngine(BirdDaemon(Folder(where)), has_routes=has_routes),
        node=nodes[0].name,
        options=RouteOptions(run_dir=str(where), overlay=OverlayMode.NEVER),
        facts=lambda: Facts(nodes=tuple(store)),
    )
    store.subscribe(lambda _: room.changed())
    room.start()
    running = asyncio.create_task(room.run_forever())
    number = 0
    while not running.done():
        number += 1
        for each in nodes:
            store.put(decode(NODE, heartbeat(each, number)))
            await asyncio.sleep(HEARTBEAT_S / len(nodes))


def test_a_thousand_live_peers_and_their_heartbeats_cost_little() -> None:
    with bird_net([(1, 1)]) as net:
        host = net.hosts["n1"]
        others = [node(i) for i in range(NODES)]
        wire(net, others)
        me = Node(name="n1", addresses=(bytes((10, 9, 0, 1)),), pod_cidrs=())
        pid = agent(host, [me, *others])
        daemon = BirdDaemon(Folder(host.folder / "run"))

        async def main() -> tuple[float, float]:
            stop = asyncio.Event()
            serving = asyncio.create_task(serve(others, stop))
            try:
                for _ in range(300):
                    found = await asyncio.to_thread(in_netns, host.netns, bird_routes)
                    if sum(r.reachable for r in found) >= NODES:
                        break
                    await asyncio.sleep(0.2)
                assert sum(r.reachable for r in found) == NODES
                await asyncio.sleep(3)
                bird = daemon.running()
                assert bird is not None
                before, began_s = (cpu_s(pid), cpu_s(bird)), time.monotonic()
                await asyncio.sleep(MEASURED_S)
                took_s = time.monotonic() - began_s
                return (cpu_s(pid) - before[0]) / took_s, (cpu_s(bird) - before[1]) / took_s
            finally:
                stop.set()
                await asyncio.gather(serving, return_exceptions=True)

        try:
            shares = in_netns(net.router, lambda: asyncio.run(main()))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            running = daemon.running()
            if running is not None:
                os.kill(running, signal.SIGKILL)
        print(f"agent {shares[0]:.1%}, BIRD {shares[1]:.1%} of a core")
        assert shares[0] < AGENT_SHARE
        assert shares[1] < BIRD_SHARE
