"""The routes room on real nodes: join, change, announce, leave."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from netpol.kernel.netns import enter
from netpol.kernel.routes import bird_routes
from netpol.model.ids import ObjectKey
from netpol.model.net import parse_address
from netpol.model.objects import EndpointSlice, Service, SliceEndpoint
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine
from routes.options import OverlayMode, RouteOptions
from routes.state import Facts
from routes.sync import RoutesRoom
from tests.kernel.birdnet import BirdNet, Host, bird_net, lasting

pytestmark = pytest.mark.kernel


class World:
    """What the API says, for all rooms."""

    def __init__(self) -> None:
        self.facts = Facts()


class Agent(threading.Thread):
    """A room in a node's namespace, with a loop of its own."""

    def __init__(self, host: Host, world: World, options: RouteOptions) -> None:
        super().__init__(daemon=True)
        self.host, self._world, self._options = host, world, options
        self._up = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.room: RoutesRoom | None = None
        self.start()
        assert self._up.wait(10)

    def run(self) -> None:
        enter(self.host.netns)
        asyncio.run(self._main())

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()

        async def has_routes() -> bool:
            return bool(await asyncio.to_thread(bird_routes))

        engine = BirdEngine(BirdDaemon(Folder(self.host.folder / "run")), has_routes=has_routes)
        self.room = room = RoutesRoom(
            engine,
            node=self.host.name,
            options=self._options,
            facts=lambda: self._world.facts,
            cni_conf_dir=self.host.folder / "net.d",
        )
        await engine.prepare()
        task = asyncio.create_task(room.run_forever())
        room.start()
        self._up.set()
        await self._over.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.close()
        room.close()

    def changed(self) -> None:
        assert self.loop is not None
        assert self.room is not None
        self.loop.call_soon_threadsafe(self.room.changed)

    def stop(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._over.set)
        self.join(10)


class Cluster:
    """Nodes with rooms."""

    def __init__(self, net: BirdNet, **options: object) -> None:
        self.net, self.world = net, World()
        self._options = options
        self.agents: dict[str, Agent] = {}

    def know(self, *names: str, **more: object) -> None:
        nodes = tuple(self.net.hosts[n].node() for n in names)
        self.world.facts = Facts(nodes=nodes, **more)  # type: ignore[arg-type]
        for agent in self.agents.values():
            agent.changed()

    def run(self, *names: str) -> None:
        for name in names:
            host = self.net.hosts[name]
            options = RouteOptions(run_dir=str(host.folder / "run"), **self._options)  # type: ignore[arg-type]
            self.agents[name] = Agent(host, self.world, options)

    def converged(self, *names: str) -> bool:
        hosts = [self.net.hosts[n] for n in names]
        return self.net.wait(
            lambda: all(
                h.routes() == {p for o in hosts if o is not h for p in o.pods} for h in hosts
            )
        )

    def close(self) -> None:
        try:
            for agent in self.agents.values():
                agent.stop()
        finally:
            for host in self.net.hosts.values():
                pid = BirdDaemon(Folder(host.folder / "run")).running()
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def three() -> Iterator[Cluster]:
    with bird_net([(1, 1), (1, 2), (2, 3)]) as net:
        cluster = Cluster(net, overlay=OverlayMode.CROSS_SUBNET)
        try:
            yield cluster
        finally:
            cluster.close()


def test_nodes_come_and_go_without_disturbing_the_others(three: Cluster) -> None:
    three.know("n1", "n2")
    three.run("n1", "n2")
    assert three.converged("n1", "n2")
    one, two, third = three.net.hosts.values()
    assert one.pings(two)
    conf = json.loads((one.folder / "net.d/10-kuberouter.conflist").read_text())
    assert conf["plugins"][0]["ipam"]["ranges"][0] == [{"subnet": one.pods[0]}]
    assert conf["plugins"][0]["mtu"] == 1450

    def since() -> dict[str, str]:
        room = three.agents["n1"].room
        assert room is not None
        loop = three.agents["n1"].loop
        assert loop is not None
        found: dict[str, Any] = {}

        def settled() -> bool:
            # While a change is under way, the plan and BIRD speak of different nodes.
            found.update(asyncio.run_coroutine_threadsafe(room.peers(), loop).result(10))
            return {p["state"] for p in found["peers"]} == {"Established"}

        assert three.net.wait(settled), found
        return {p["peer"]: p["since"] for p in found["peers"]}

    before = since()
    three.run("n3")
    three.know("n1", "n2", "n3")
    assert three.converged("n1", "n2", "n3")
    assert one.pings(third)
    assert third.pings(two)
    assert lasting(before, since())
    three.know("n1", "n2")
    assert three.net.wait(lambda: one.routes() == set(two.pods))
    after = since()
    assert after.keys() == before.keys()
    assert lasting(before, after)
    assert three.net.wait(lambda: "10.0.2.3" not in one.run("bridge", "fdb", "show"))


def ask(agent: Agent, address: str | None = None) -> dict[str, Any]:
    assert agent.loop is not None
    assert agent.room is not None
    packed = parse_address(address) if address is not None else None
    found: dict[str, Any] = asyncio.run_coroutine_threadsafe(
        agent.room.routes(packed), agent.loop
    ).result(10)
    return found


def test_what_people_are_told(three: Cluster) -> None:
    three.know("n1", "n2", "n3")
    three.run("n1", "n2")
    one, two, third = three.net.hosts.values()
    assert three.net.wait(lambda: set(two.pods) <= one.routes())
    agent = three.agents["n1"]
    found = ask(agent)
    assert [(r["prefix"], r["peer"], r["via"], r["kernel"]) for r in found["routes"]] == [
        (two.pods[0], "n2", [two.addresses[0]], "agrees"),
        (two.pods[1], "n2", [two.addresses[1]], "agrees"),
    ]
    assert found["missing"] == sorted(third.pods)
    assert found["extra"] == []
    assert ask(agent, two.pod_addresses[0]) == {
        "node": "n1",
        "address": two.pod_addresses[0],
        "where": "via 10.0.1.2 on eth0",
        "prefix": two.pods[0],
        "peer": "n2",
        "by": "bird",
        "learnt": two.pods[0],
    }
    assert ask(agent, one.pod_addresses[0])["where"] == "this node's own pods"
    assert "kernel's own" in ask(agent, "198.51.100.1")["where"]
    # Somebody's more specific route goes before BIRD's, and the kernel says so.
    part = two.pods[0].replace("/24", "/28")
    one.run("ip", "route", "add", part, "via", "10.0.1.3", "proto", "static")
    other = ask(agent, two.pod_addresses[0])
    assert (other["prefix"], other["by"], other["learnt"]) == (part, "static", two.pods[0])
    assert other["where"].startswith("via 10.0.1.3 on eth0: ")
    one.run("ip", "route", "replace", "unreachable", part)
    assert ask(agent, two.pod_addresses[0])["where"].startswith("nowhere: one of the kernel's own")
    one.run("ip", "route", "del", part)
    # Somebody takes a route away: BIRD puts it back.
    one.run("ip", "route", "del", two.pods[0], "proto", "bird")
    assert three.net.wait(lambda: two.pods[0] in one.routes(), within_s=2)
    assert ask(agent)["routes"][0]["kernel"] == "agrees"


def test_the_agent_dies_and_forwarding_goes_on(three: Cluster) -> None:
    three.know("n1", "n2")
    three.run("n1", "n2")
    assert three.converged("n1", "n2")
    one, two, _ = three.net.hosts.values()
    three.agents.pop("n1").stop()
    assert one.routes() == set(two.pods)
    assert one.pings(two)
    starts = BirdDaemon(Folder(one.folder / "run")).running()
    three.run("n1")
    assert three.converged("n1", "n2")
    assert BirdDaemon(Folder(one.folder / "run")).running() == starts


def test_a_node_that_the_api_lost_keeps_its_routes(three: Cluster) -> None:
    three.know("n1", "n2")
    three.run("n1", "n2")
    assert three.converged("n1", "n2")
    one, two, _ = three.net.hosts.values()
    room = three.agents["n1"].room
    assert room is not None
    three.world.facts = Facts(nodes=(two.node(),))
    three.agents["n1"].changed()  # and nobody tells the other one
    assert three.net.wait(lambda: "none: routes stay" in room.status.error)
    assert one.routes() == set(two.pods)
    three.know("n1", "n2")
    assert three.net.wait(lambda: not room.status.error)
    assert three.converged("n1", "n2")


def test_a_broken_conflist_is_told_and_routes_go_on(three: Cluster) -> None:
    one = three.net.hosts["n1"]
    folder = one.folder / "net.d"
    folder.mkdir()
    (folder / "10-kuberouter.conflist").write_text("{ half")
    three.know("n1", "n2")
    three.run("n1", "n2")
    assert three.converged("n1", "n2")
    room = three.agents["n1"].room
    assert room is not None
    assert "no JSON" in room.status.conflist_error
    assert (folder / "10-kuberouter.conflist").read_text() == "{ half"


def test_an_address_of_a_service_is_announced_while_an_endpoint_is_ready(
    three: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between nodes nothing of Services is told; a router outside hears it, and hears it end."""
    key = ObjectKey("shop", "web")
    peer = "[{address: 10.0.1.254, asn: 65000}]"
    one = three.net.hosts["n1"]
    router = three.net.folder / "router.conf"
    router.write_text(
        f'log "{three.net.folder}/router.log" all;\nrouter id 10.0.1.254;\n'
        "protocol device {}\nprotocol kernel { ipv4 { export where source = RTS_BGP; import none; }; }\n"
        "protocol direct { ipv4; }\n"
        "protocol bgp n1 { local 10.0.1.254 as 65000; neighbor 10.0.1.1 as 64512; passive;\n"
        "  ipv4 { import all; export none; }; }\n"
    )
    three.net.run_bird("router", three.net.router, router)
    service = Service(
        key=key,
        type="LoadBalancer",
        external_ips=(parse_address("203.0.113.7"),),
        external_local=True,
        annotations=(("netpol.io/service.advertise.externalip", "true"),),
    )

    def slices(*, ready: bool) -> tuple[EndpointSlice, ...]:
        there = SliceEndpoint((parse_address("10.1.1.9"),), "n1", None, ready, ready, not ready)
        return (EndpointSlice(key=ObjectKey("shop", "w"), service=key, endpoints=(there,)),)

    def know(*, ready: bool) -> None:
        three.world.facts = Facts((one.node(peers=peer),), (service,), slices(ready=ready))
        for agent in three.agents.values():
            agent.changed()

    know(ready=True)
    three.run("n1")

    def heard() -> set[str]:
        return three.net.routes_in(three.net.router)

    assert three.net.wait(lambda: heard() == {"10.1.1.0/24", "203.0.113.7"}), heard()
    know(ready=False)
    assert three.net.wait(lambda: heard() == {"10.1.1.0/24"}, within_s=3), heard()
    know(ready=True)
    assert three.net.wait(lambda: heard() == {"10.1.1.0/24", "203.0.113.7"}, within_s=3), heard()

    # A drain asks to be left alone, then takes the address back; a restart does not forget it.
    def communities() -> str:
        return str(three.net.ask(router.with_suffix(".ctl"), "show route 203.0.113.7/32 all"))

    def drain(*, on: bool) -> None:
        agent = three.agents["n1"]
        assert agent.loop is not None
        assert agent.room is not None
        agent.loop.call_soon_threadsafe(lambda: agent.room.drain(on=on))  # type: ignore[union-attr]

    drain(on=True)
    assert three.net.wait(lambda: "(65535,0)" in communities()), communities()
    assert heard() == {"10.1.1.0/24", "203.0.113.7"}
    three.agents.pop("n1").stop()
    monkeypatch.setattr("routes.drain.DRAIN_S", 0.5)
    three.run("n1")
    assert three.net.wait(lambda: heard() == {"10.1.1.0/24"}), heard()
    drain(on=False)
    assert three.net.wait(lambda: heard() == {"10.1.1.0/24", "203.0.113.7"}), heard()
    assert three.net.wait(lambda: "(65535,0)" not in communities())


def test_a_change_that_bird_refuses_is_an_error_until_it_is_mended(three: Cluster) -> None:
    three.know("n1", "n2")
    three.run("n1", "n2")
    assert three.converged("n1", "n2")
    one, two, _ = three.net.hosts.values()
    room = three.agents["n1"].room
    assert room is not None
    good = room.options
    # A name that the settings would not take: what BIRD says is what counts here.
    room.options = dataclasses.replace(good, run_dir='x"; nonsense')
    three.agents["n1"].changed()
    assert three.net.wait(lambda: "refuses" in room.status.error), room.status.error
    assert not room.ready
    assert one.routes() == set(two.pods)
    three.agents["n1"].changed()  # nothing new: the fault stays
    assert not three.net.wait(lambda: not room.status.error, within_s=1.5)
    room.options = good
    three.agents["n1"].changed()
    assert three.net.wait(lambda: room.ready), room.status.error
    assert one.routes() == set(two.pods)


def test_a_router_that_is_taken_away_takes_its_routes_with_it(three: Cluster) -> None:
    """Fewer routes are what was asked for: nothing to undo."""
    one, two, _ = three.net.hosts.values()
    router = three.net.folder / "router.conf"
    outside = [f"198.51.100.{n * 16}/28" for n in range(8)]
    router.write_text(
        f'log "{three.net.folder}/router.log" all;\nrouter id 10.0.1.254;\nprotocol device {{}}\n'
        f"protocol static {{ ipv4; {' '.join(f'route {p} blackhole;' for p in outside)} }}\n"
        "protocol bgp n1 { local 10.0.1.254 as 65000; neighbor 10.0.1.1 as 64512; passive;\n"
        "  ipv4 { import none; export all; }; }\n"
    )
    three.net.run_bird("router", three.net.router, router)
    peer = "[{address: 10.0.1.254, asn: 65000, import: true}]"
    three.world.facts = Facts((one.node(peers=peer), two.node()))
    three.run("n1", "n2")
    assert three.net.wait(lambda: one.routes() == {*two.pods, *outside}), one.routes()
    three.know("n1", "n2")
    assert three.net.wait(lambda: one.routes() == set(two.pods), within_s=8), one.routes()
    room = three.agents["n1"].room
    assert room is not None
    assert three.net.wait(lambda: room.ready, within_s=8), room.status.error
