"""BGP: how fast a mesh of nodes comes up, a node joins, and a thousand peers get one more.

Nodes are namespaces on one link with a BIRD each, configured by our renderer and kept awake as the engine
does. What the kernel has is read by `ip route`, which costs some milliseconds a look.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.measure import Row, settle
from netpol.kernel.netns import in_netns
from netpol.lib.errors import NetpolError
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import Node
from routes.bird.control import BirdControl
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import AWAKE_S, BirdEngine
from routes.bird.render import render
from routes.options import RouteOptions
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, bird_net

RUNS = 20
PEERS = 1000
#: So long before its BIRD starts the others know a node that joins.
KNOWN_S = 2.0
#: A mesh that takes longer has failed.
PATIENCE_S = 15.0


def mesh() -> Iterator[Row]:
    """Three daemons start at once; then that of a fourth node, which the others were told of before.

    A Node object is there as soon as its kubelet is, some seconds before any agent runs on it.
    """
    settle()
    up: list[float] = []
    joined: list[float] = []
    for _ in range(RUNS):
        with bird_net([(1, 1), (1, 2), (1, 3), (1, 4)]) as net:
            first, last = _one_run(net)
            up.append(first)
            joined.append(last)
    yield Row("bgp.mesh3.s", _p95(up), "s", target=1.3, note=_spread(up))
    yield Row("bgp.join.s", _p95(joined), "s", target=1.0, note=_spread(joined))


def _one_run(net: BirdNet) -> tuple[float, float]:
    names = ["n1", "n2", "n3"]
    for name in net.hosts:
        _write(net, name, names if name in names else [*names, "n4"])
    began = time.monotonic()
    for name in names:
        net.run_bird(name, net.hosts[name].netns, net.hosts[name].folder / "bird.conf")
    asyncio.run(_until_routed(net, names))
    first = time.monotonic() - began
    everybody = [*names, "n4"]
    for name in names:
        _write(net, name, everybody)
        if net.hosts[name].ask("configure").failed:
            raise AssertionError(f"BIRD of {name} refuses")
    time.sleep(KNOWN_S)
    began = time.monotonic()
    net.run_bird("n4", net.hosts["n4"].netns, net.hosts["n4"].folder / "bird.conf")
    asyncio.run(_until_routed(net, everybody))
    return first, time.monotonic() - began


def _write(net: BirdNet, name: str, members: Iterable[str]) -> None:
    host = net.hosts[name]
    nodes = [net.hosts[m].node() for m in members]
    text = render(plan(nodes, name, RouteOptions(run_dir=str(host.folder))))
    (host.folder / "bird.conf").write_text(text, encoding="utf-8")


async def _until_routed(net: BirdNet, names: list[str]) -> None:
    """Keep the daemons awake as the engine does, and look until every kernel has every range."""
    hosts = [net.hosts[n] for n in names]
    controls = [BirdControl(h.socket) for h in hosts]
    want = {h.name: {p for o in hosts if o is not h for p in o.pods} for h in hosts}

    async def wake() -> None:
        while True:
            for control in controls:
                with contextlib.suppress(NetpolError):  # it is still starting
                    await control.ask("show status")
            await asyncio.sleep(AWAKE_S)

    waking = asyncio.create_task(wake())
    try:
        deadline = time.monotonic() + PATIENCE_S
        for host in hosts:
            while await asyncio.to_thread(host.routes) != want[host.name]:
                if time.monotonic() > deadline:
                    raise AssertionError(f"no mesh after {PATIENCE_S:g} s")
                await asyncio.sleep(0.01)
    finally:
        waking.cancel()
        await asyncio.gather(waking, return_exceptions=True)
        for control in controls:
            await control.close()


def add_node() -> Iterator[Row]:
    """A thousand peers are configured (none answers): one more node is planned, rendered, in force."""
    settle()
    with bird_net([(1, 1)]) as net:
        host = net.hosts["n1"]
        nodes = [host.node(), *(_node(i) for i in range(PEERS))]
        options = RouteOptions(run_dir=str(host.folder))
        took, memory = in_netns(host.netns, lambda: asyncio.run(_adds(host.folder, nodes, options)))
    yield Row("bgp.add_node.ms", max(took), "ms", target=100.0, note=_spread(took, "ms"))
    yield Row("bgp.bird_memory.mb", memory, "MB", note=f"BIRD with {PEERS} peers, none answers")


async def _adds(
    folder: Path, nodes: list[Node], options: RouteOptions
) -> tuple[list[float], float]:
    async def no_routes() -> bool:
        return False

    daemon = BirdDaemon(Folder(folder))
    engine = BirdEngine(daemon, has_routes=no_routes)
    await engine.prepare()
    try:
        await engine.apply(render(plan(nodes, "n1", options)))
        took = []
        for extra in range(RUNS):
            more = [*nodes, *(_node(PEERS + i) for i in range(extra + 1))]
            began = time.monotonic()
            await engine.apply(render(plan(more, "n1", options)))
            took.append((time.monotonic() - began) * 1000)
        return took, _resident_mb(daemon.running() or 0)
    finally:
        await engine.close()
        await daemon.kill()


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _node(number: int) -> Node:
    high, low = number // 250 + 16, number % 250 + 1
    return Node(
        name=f"node-{number}",
        addresses=(parse_address(f"10.0.{high}.{low}"), parse_address(f"fd00:{high:x}::{low:x}")),
        pod_cidrs=(
            parse_prefix(f"10.{high}.{low}.0/24"),
            parse_prefix(f"fd01:{high:x}:{low:x}::/64"),
        ),
    )


def _p95(samples: list[float]) -> float:
    return sorted(samples)[max(0, -(-len(samples) * 95 // 100) - 1)]


def _spread(samples: list[float], unit: str = "s") -> str:
    low, middle, high = min(samples), statistics.median(samples), max(samples)
    return f"{len(samples)} runs: {low:.2f}, {middle:.2f}, {high:.2f} {unit} (least, median, most)"
