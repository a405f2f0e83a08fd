"""A thousand nodes: every session up, exactly their ranges in the kernel, one more in one change."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from netpol.kernel.netns import in_netns
from netpol.kernel.routes import bird_routes
from netpol.model.net import Family, format_address, parse_address, parse_prefix
from netpol.model.objects import Node
from routes.bird import reply
from routes.bird.render import render
from routes.options import OverlayMode, RouteOptions
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, bird_net
from tests.kernel.speaker import Speaker, nlri

pytestmark = [pytest.mark.kernel, pytest.mark.alone]

NODES = 1000


def node(number: int) -> Node:
    high, low = number // 250 + 1, number % 250 + 1
    return Node(
        name=f"node-{number}",
        addresses=(parse_address(f"10.9.{high}.{low}"),),
        pod_cidrs=(parse_prefix(f"10.{high + 20}.{low}.0/24"),),
    )


async def serve(nodes: list[Node], stop: asyncio.Event) -> None:
    """Every node but the real one speaks BGP, and announces its range and its neighbour's."""
    servers = []
    for number, each in enumerate(nodes):
        address = format_address(each.addresses[0])
        mine = str(each.pod_cidrs[0])
        stolen = str(nodes[(number + 1) % len(nodes)].pod_cidrs[0])
        speaker = Speaker(asn=64512, router_id=address)

        async def accept(
            reader: asyncio.StreamReader,
            writer: asyncio.StreamWriter,
            speaker: Speaker = speaker,
            address: str = address,
            ranges: tuple[str, str] = (mine, stolen),
        ) -> None:
            serving = asyncio.ensure_future(speaker.serve(reader, writer))
            await speaker.established.wait()
            await speaker.announce([nlri(p) for p in ranges], next_hop=address, internal=True)
            await serving

        servers.append(await asyncio.start_server(accept, address, 179))
    await stop.wait()
    for server in servers:
        server.close()


def wire(net: BirdNet, nodes: list[Node]) -> None:
    lines = [f"address add {format_address(n.addresses[0])}/16 dev br1" for n in nodes]
    subprocess.run(
        ["ip", "-n", net.router, "-batch", "-"], input="\n".join(lines), text=True, check=True
    )
    net.hosts["n1"].run("ip", "address", "add", "10.9.0.1/16", "dev", "eth0")


def test_a_thousand_nodes() -> None:
    with bird_net([(1, 1)]) as net:
        host = net.hosts["n1"]
        others = [node(i) for i in range(NODES)]
        wire(net, others)
        me = Node(name="n1", addresses=(parse_address("10.9.0.1"),), pod_cidrs=())
        options = RouteOptions(run_dir=str(host.folder), overlay=OverlayMode.NEVER)

        async def main() -> None:
            stop = asyncio.Event()
            serving = asyncio.create_task(serve(others, stop))
            net.start("n1", render(plan([me, *others[:-1]], "n1", options)))
            try:
                await until(net, len(others) - 1)
                # One more node: a reconfiguration that disturbs nobody.
                text = render(plan([me, *others], "n1", options))
                await asyncio.to_thread((host.folder / "bird.conf").write_text, text)
                assert not (await asyncio.to_thread(host.ask, "configure")).failed
                await until(net, len(others))
            finally:
                stop.set()
                await asyncio.gather(serving, return_exceptions=True)

        in_netns(net.router, lambda: asyncio.run(main()))


async def until(net: BirdNet, count: int) -> None:
    """Until all sessions are up and the kernel has exactly one range of each node."""
    host = net.hosts["n1"]
    for _ in range(300):
        await asyncio.to_thread(net.nudge)
        found = await asyncio.to_thread(in_netns, host.netns, bird_routes)
        routed = {r.prefix for r in found if r.prefix.family is Family.V4 and r.reachable}
        if len(routed) == count:
            break
        await asyncio.sleep(0.1)
    states = reply.protocols(await asyncio.to_thread(host.ask, "show protocols all"))
    assert reply.established(states.values()) == count
    assert routed == {p for i in range(count) for p in node(i).pod_cidrs}
