"""The routes room while things go wrong: changes on trial, hanging steps, meddling, death at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from netpol.aio.clock import SystemClock
from netpol.kernel.drivers import Variant
from netpol.kernel.netns import enter, in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.kernel.testing import FakeTables
from netpol.kernel.testing_sets import FakeSets
from netpol.model.ids import ROUTES, ObjectKey
from netpol.model.net import parse_address
from netpol.model.objects import EndpointSlice, Node, Service, SliceEndpoint
from routes import guard
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine
from routes.options import Encapsulation, ExternalPeer, OverlayMode, RouteOptions
from routes.rules import RuleDrivers
from routes.rules_keeper import RulesKeeper
from routes.state import Facts
from routes.sync import RoutesRoom
from tests.kernel.birdnet import BirdNet, Host, bird_net
from tests.kernel.test_routes_room import Agent, Cluster

pytestmark = pytest.mark.kernel

#: What the issue promises for an address without a ready endpoint.
WITHDRAWN_S = 1.0
#: What somebody changed is back after this; the runner, the tools and the test itself take their time.
REPAIRED_S = 1.5
VIP = "203.0.113.7"


@pytest.fixture
def three() -> Iterator[Cluster]:
    with bird_net([(1, 1), (1, 2), (2, 3)]) as net:
        cluster = Cluster(net, overlay=OverlayMode.CROSS_SUBNET)
        try:
            yield cluster
        finally:
            cluster.close()


def router(net: BirdNet) -> None:
    """A router outside that takes any AS for the node's."""
    path = net.folder / "router.conf"
    path.write_text(
        f'log "{net.folder}/router.log" all;\nrouter id 10.0.1.254;\nprotocol device {{}}\n'
        "protocol kernel { ipv4 { export where source = RTS_BGP; import none; }; }\n"
        "protocol direct { ipv4; }\n"
        "protocol bgp n1 { local 10.0.1.254 as 65000; neighbor 10.0.1.1 external; passive;\n"
        "  ipv4 { import all; export none; }; }\n"
    )
    net.run_bird("router", net.router, path)


def service(*, ready: bool) -> dict[str, Any]:
    key = ObjectKey("shop", "web")
    there = SliceEndpoint((parse_address("10.1.1.9"),), "n1", None, ready, ready, not ready)
    return {
        "services": (
            Service(
                key=key,
                type="LoadBalancer",
                external_ips=(parse_address(VIP),),
                external_local=True,
                annotations=(("netpol.io/service.advertise.externalip", "true"),),
            ),
        ),
        "slices": (EndpointSlice(key=ObjectKey("shop", "w"), service=key, endpoints=(there,)),),
    }


@dataclass
class Shop:
    """A Service on n1, announced to the router; what n1's agent is told, and nobody else's."""

    cluster: Cluster
    mine: Node
    ready: bool = True

    def tell(self, *, ready: bool | None = None, mine: Node | None = None) -> None:
        self.ready = self.ready if ready is None else ready
        self.mine = mine or self.mine
        two = self.cluster.net.hosts["n2"].node()
        self.cluster.world.facts = Facts((self.mine, two), **service(ready=self.ready))
        for agent in self.cluster.agents.values():
            agent.changed()

    def heard(self) -> bool:
        return VIP in self.cluster.net.routes_in(self.cluster.net.router)

    def withdrawn_in_s(self) -> float:
        began = time.monotonic()
        self.tell(ready=False)
        while self.heard() and time.monotonic() - began < 10:
            time.sleep(0.01)
        return time.monotonic() - began


@pytest.fixture
def shop(three: Cluster) -> Shop:
    router(three.net)
    peer = "[{address: 10.0.1.254, asn: 65000}]"
    made = Shop(three, three.net.hosts["n1"].node(peers=peer))
    made.tell()
    three.run("n1", "n2")
    assert three.net.wait(made.heard)
    assert three.net.wait(lambda: three.net.hosts["n1"].routes() == set(three.net.hosts["n2"].pods))
    return made


def room_of(cluster: Cluster) -> RoutesRoom:
    room = cluster.agents["n1"].room
    assert room is not None
    return room


def test_an_address_is_withdrawn_while_a_change_is_on_trial_and_stays_so_when_it_is_undone(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, room = shop.cluster, room_of(shop.cluster)
    one, two = cluster.net.hosts["n1"], cluster.net.hosts["n2"]
    monkeypatch.setattr("routes.trial.TRIAL_S", 8.0)
    cluster.agents.pop("n2").stop()  # its BIRD goes on with the AS that it knows
    good = shop.mine
    annotations = tuple(sorted((*good.annotations, ("netpol.io/node.asn", "64999"))))
    shop.tell(mine=msgspec.structs.replace(good, annotations=annotations))
    assert cluster.net.wait(lambda: room.status.on_trial)

    def by_the_new_as() -> bool:
        said = cluster.net.ask(cluster.net.folder / "router.ctl", f"show route {VIP}/32 all")
        return "64999" in str(said)

    assert cluster.net.wait(by_the_new_as)
    assert room.status.on_trial
    assert shop.withdrawn_in_s() < WITHDRAWN_S
    assert room.status.on_trial
    # It is undone, and the address is not announced by what is gone back to.
    seen = []
    assert cluster.net.wait(lambda: seen.append(shop.heard()) or room.status.reverts == 1)  # type: ignore[func-returns-value]
    back = set(two.pods)
    assert cluster.net.wait(lambda: seen.append(shop.heard()) or one.routes() == back)  # type: ignore[func-returns-value]
    assert not any(seen)
    assert "undone" in room.status.error
    # Other changes go on on the ground that is proven.
    shop.tell(ready=True)
    assert cluster.net.wait(shop.heard)
    assert shop.withdrawn_in_s() < WITHDRAWN_S
    assert room.status.reverts == 1
    # The change is taken back: all is well.
    shop.tell(mine=good)
    assert cluster.net.wait(lambda: room.ready), room.status.error
    assert one.routes() == back


def test_an_address_is_withdrawn_while_rules_cannot_be_written(shop: Shop) -> None:
    """The lock of iptables may be somebody's for as long as it likes."""
    room, held = room_of(shop.cluster), threading.Event()

    class Hanging(FakeTables):
        def dump(self, *_: Any) -> Any:
            held.wait(30)
            return super().dump(*_)

    room._rules = RulesKeeper(RuleDrivers(FakeSets(), Hanging()), SystemClock())
    shop.cluster.agents["n1"].changed()
    time.sleep(0.5)
    try:
        assert shop.withdrawn_in_s() < WITHDRAWN_S
    finally:
        held.set()


def test_an_address_is_withdrawn_while_the_api_has_no_object_of_the_node(shop: Shop) -> None:
    room = room_of(shop.cluster)
    two = shop.cluster.net.hosts["n2"].node()
    shop.cluster.agents.pop("n2").stop()  # it would let the node go
    shop.cluster.world.facts = Facts((two,), **service(ready=True))
    shop.cluster.agents["n1"].changed()
    assert shop.cluster.net.wait(lambda: "routes stay" in room.status.error)
    began = time.monotonic()
    shop.cluster.world.facts = Facts((two,), **service(ready=False))
    shop.cluster.agents["n1"].changed()
    assert shop.cluster.net.wait(lambda: not shop.heard())
    assert time.monotonic() - began < WITHDRAWN_S
    assert shop.cluster.net.hosts["n1"].routes() == set(shop.cluster.net.hosts["n2"].pods)


def test_a_password_is_changed_on_both_sides_one_after_the_other(three: Cluster) -> None:
    one = three.net.hosts["n1"]
    path = three.net.folder / "router.conf"

    def router_has(password: str) -> None:
        path.write_text(
            f'log "{three.net.folder}/router.log" all;\nrouter id 10.0.1.254;\nprotocol device {{}}\n'
            "protocol kernel { ipv4 { export where source = RTS_BGP; import none; }; }\n"
            "protocol bgp n1 { local 10.0.1.254 as 65000; neighbor 10.0.1.1 as 64512;\n"
            f'  password "{password}"; connect delay time 1; connect retry time 2;\n'
            "  error wait time 1,2; ipv4 { import all; export none; }; }\n"
        )

    router_has("first")
    three.net.run_bird("router", three.net.router, path)
    three.know("n1")
    three.run("n1")
    room = room_of(three)

    def node_has(password: str) -> None:
        peer = ExternalPeer(parse_address("10.0.1.254"), 65000, password=password)
        room.options = replace(room.options, peers=(peer,))
        three.agents["n1"].changed()

    def heard() -> bool:
        return one.pods[0] in three.net.routes_in(three.net.router)

    def router_told() -> bool:
        return not three.net.ask(path.with_suffix(".ctl"), "configure").failed

    node_has("first")
    assert three.net.wait(heard)
    node_has("second")
    assert three.net.wait(lambda: 'password "second"' in (one.folder / "run/bird.conf").read_text())
    assert not room.status.on_trial
    router_has("second")
    assert router_told()
    assert three.net.wait(
        lambda: "Established" in str(three.net.ask(path.with_suffix(".ctl"), "show protocols n1"))
    )
    assert three.net.wait(heard)
    assert room.status.reverts == 0


# -- meddling -----------------------------------------------------------------------------------


def test_what_somebody_changes_is_put_right_within_a_moment(three: Cluster) -> None:
    three.know("n1", "n2", "n3")
    three.run("n1", "n2", "n3")
    assert three.converged("n1", "n2", "n3")
    one, two, third = three.net.hosts.values()
    assert one.pings(third)
    link = "dev", "knp-vxlan0"
    fdb = one.run("bridge", "fdb", "show", *link).split()
    mac = fdb[0]
    shown = {
        "link": ("ip", "-d", "link", "show", *link),
        "fdb": ("bridge", "fdb", "show", *link),
        "neighbours": ("ip", "neigh", "show", *link),
        "neighbours 6": ("ip", "-6", "neigh", "show", *link),
    }

    def state() -> dict[str, str]:
        found = {what: one.run(*command) for what, command in shown.items()}
        found["link"] = found["link"].partition(":")[2]  # its number is new each time
        return found

    before = state()
    everything = {*two.pods, *third.pods}

    def whole() -> bool:
        return state() == before and one.routes() == everything

    assert three.net.wait(whole)
    for meddling in (
        ("ip", "route", "del", two.pods[0], "proto", "bird"),
        ("ip", "-6", "route", "del", two.pods[1], "proto", "bird"),
        ("ip", "route", "flush", "proto", "bird"),
        ("bridge", "fdb", "del", mac, *link, "dst", "10.0.2.3"),
        ("ip", "neigh", "del", "10.0.2.3", *link),
        ("ip", "neigh", "replace", "10.0.2.3", "lladdr", "02:00:00:00:00:01", *link),
        ("ip", "link", "set", *link, "mtu", "1300"),
        ("ip", "link", "set", *link, "down"),
        ("ip", "-6", "address", "flush", *link),
        ("ip", "link", "del", *link),
    ):
        assert not one.run(*meddling), meddling
        assert three.net.wait(whole, within_s=REPAIRED_S), (meddling, state(), one.routes())
    assert one.pings(third)


def test_rules_that_somebody_removes_are_back_within_a_moment(three: Cluster) -> None:
    """Without the one of the overlay's end, strangers could send tunnelled packets."""
    three.know("n1", "n2", "n3")
    three.run("n1")
    one, room = three.net.hosts["n1"], room_of(three)
    sets = in_netns(one.netns, lambda: NetlinkSets(owner=ROUTES))
    tables = RestoreTables(Variant.NFT, owner=ROUTES, netns=one.netns)
    room._rules = RulesKeeper(RuleDrivers(sets, tables), SystemClock())
    three.agents["n1"].changed()

    def guarded() -> bool:
        return f"-j {guard.INPUT}" in one.run("iptables-nft", "-S", "INPUT")

    assert three.net.wait(guarded)
    time.sleep(1)
    one.run("iptables-nft", "-F", "INPUT")
    assert not guarded()
    assert three.net.wait(guarded, within_s=2)
    assert "udp" in one.run("iptables-nft", "-S", guard.INPUT)


def test_the_nodes_own_link_changes_under_way(three: Cluster) -> None:
    three.know("n1", "n2", "n3")
    three.run("n1", "n2", "n3")
    assert three.converged("n1", "n2", "n3")
    one, _, third = three.net.hosts.values()
    one.run("ip", "link", "set", "eth0", "mtu", "1400")
    conf = one.folder / "net.d/10-kuberouter.conflist"
    assert three.net.wait(
        lambda: "mtu 1350" in one.run("ip", "link", "show", "knp-vxlan0"), within_s=REPAIRED_S
    )
    assert '"mtu": 1350' in conf.read_text()
    one.run("ip", "link", "set", "eth0", "down")
    one.run("ip", "link", "set", "eth0", "name", "uplink0")
    one.run("ip", "link", "set", "uplink0", "up")
    one.run("ip", "address", "add", f"{one.addresses[1]}/64", "dev", "uplink0", "nodad")
    one.run("ip", "route", "add", "default", "via", "10.0.1.254")
    one.run("ip", "-6", "route", "add", "default", "via", "fd00:1::254")
    assert three.net.wait(lambda: one.pings(third)), room_of(three).status.error
    assert three.net.wait(lambda: room_of(three).ready), room_of(three).status.error
    assert room_of(three).plan is not None
    assert room_of(three).plan.options.interface == "uplink0"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("before", "after"),
    [(OverlayMode.NEVER, OverlayMode.ALWAYS), (OverlayMode.ALWAYS, OverlayMode.CROSS_SUBNET)],
)
def test_nodes_that_change_the_overlay_one_by_one_lose_nothing_where_both_ways_are_taken(
    three: Cluster, before: OverlayMode, after: OverlayMode
) -> None:
    """One after the other, as a DaemonSet does: each is an agent that starts with other settings."""
    three.know("n1", "n2")
    one, two = three.net.hosts["n1"], three.net.hosts["n2"]

    def start(host: Host, overlay: OverlayMode, *accept: Encapsulation) -> None:
        if host.name in three.agents:
            three.agents.pop(host.name).stop()
        options = RouteOptions(run_dir=str(host.folder / "run"), overlay=overlay, accept=accept)
        three.agents[host.name] = Agent(host, three.world, options)

    def ways() -> set[tuple[str, ...]]:
        found = set()
        for a, b in ((one, two), (two, one)):
            words = [a.run("ip", "route", "get", to).split() for to in b.pod_addresses]
            found.add((a.name, *(w[w.index("dev") + 1] for w in words)))
        return found

    def lead(mine: str, theirs: str) -> bool:
        """Which links both families take, from each to the other."""
        return three.net.wait(lambda: ways() == {("n1", mine, mine), ("n2", theirs, theirs)})

    link = {OverlayMode.ALWAYS: "knp-vxlan0"}
    was, now = link.get(before, "eth0"), link.get(after, "eth0")
    for host in (one, two):
        start(host, before)
    assert three.converged("n1", "n2")
    assert lead(was, was)
    for host in (one, two):
        start(host, before, Encapsulation.VXLAN)
        assert three.net.wait(lambda host=host: "knp-vxlan0" in host.run("ip", "link"))
    start(one, after, Encapsulation.VXLAN)
    assert lead(now, was)
    assert one.pings(two)
    start(two, after, Encapsulation.VXLAN)
    assert lead(now, now)
    assert one.pings(two)
    for host in (one, two):
        start(host, after)
    assert lead(now, now)
    gone = after is not OverlayMode.ALWAYS
    assert three.net.wait(lambda: gone is ("knp-vxlan0" not in one.run("ip", "link")))
    assert one.pings(two)


# -- death --------------------------------------------------------------------------------------


class Steps:
    """Runs a coroutine and ends the process, as kill -9 does, where it would wait for the n-th time."""

    def __init__(self, work: Coroutine[Any, Any, Any], *, deadly: int) -> None:
        self._work, self._deadly = work, deadly

    def __await__(self) -> Generator[Any, Any, Any]:
        steps, count = self._work.__await__(), 0
        value: Any = None
        while True:
            try:
                wanted = steps.send(value)
            except StopIteration as e:
                return e.value
            if count == self._deadly:
                os._exit(9)
            count += 1
            value = yield wanted


def applies(host: Host, facts: Facts, *, deadly: int = -1) -> int:
    """One run of a room in a process of its own; 9 where it was killed on the way."""
    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            enter(host.netns)
            asyncio.run(_one_run(host, facts, deadly))
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def _one_run(host: Host, facts: Facts, deadly: int) -> None:
    async def has_routes() -> bool:
        return False

    where = host.folder / "run"
    engine = BirdEngine(BirdDaemon(Folder(where)), has_routes=has_routes)
    options = RouteOptions(run_dir=str(where), overlay=OverlayMode.ALWAYS)
    conf = host.folder / "net.d"
    room = RoutesRoom(
        engine, node=host.name, options=options, facts=lambda: facts, cni_conf_dir=conf
    )
    room.start()
    await Steps(room._run(), deadly=deadly)


def _what_is(host: Host) -> tuple[Any, ...]:
    said = str(host_ask(host, "show protocols")).split("; ")
    sessions = sorted(line.split()[0] for line in said if " BGP " in f"{line} ")
    fdb = sorted(
        w for w in host.run("bridge", "fdb", "show", "dev", "knp-vxlan0").split() if "." in w
    )
    conf = (host.folder / "net.d/10-kuberouter.conflist").read_text()
    return sessions, fdb, conf


def host_ask(host: Host, command: str) -> Any:
    from tests.kernel.birdnet import _ask

    return _ask(host.folder / "run/bird.ctl", command)


def test_killed_at_every_await_the_next_agent_ends_where_it_would_have_ended() -> None:
    with bird_net([(1, 1), (1, 2), (1, 3)]) as net:
        one, two, third = net.hosts.values()
        moved = msgspec.structs.replace(one.node(), pod_cidrs=third.node().pod_cidrs)
        worlds = [
            Facts((one.node(), two.node())),
            Facts((moved, msgspec.structs.replace(two.node(), pod_cidrs=()))),
            Facts((one.node(), third.node())),
        ]
        try:
            right = []
            for world in worlds:
                assert applies(one, world) == 0
                right.append(_what_is(one))
            assert len({repr(r) for r in right}) == len(worlds)
            killed = deadly = 0
            while True:
                at = (killed + 1) % len(worlds)
                code = applies(one, worlds[at], deadly=deadly)
                if code == 0:
                    break
                assert code == 9
                killed += 1
                deadly += 1
                # Whoever comes next may want the same, or something else by now.
                after = (at + deadly % 2) % len(worlds)
                assert applies(one, worlds[after]) == 0
                assert _what_is(one) == right[after], deadly
            assert killed > 10
        finally:
            pid = BirdDaemon(Folder(one.folder / "run")).running()
            if pid is not None:
                os.kill(pid, 9)


@pytest.mark.parametrize(
    ("first", "said"),
    [("", "BIRD 2"), ("echo BIRD version 1.6.8", r"2.0.12 or later"), ("exit 1", "BIRD 2")],
)
def test_without_a_bird_that_can_be_used_the_rest_is_done_and_it_is_told(
    first: str, said: str
) -> None:
    with bird_net([(1, 1)]) as net:
        one = net.hosts["n1"]
        program = one.folder / "bird"
        if first:
            program.write_text(f"#!/bin/sh\n{first}\n")
            program.chmod(0o755)

        async def main() -> None:
            async def has_routes() -> bool:
                return False

            where = Folder(one.folder / "run")
            engine = BirdEngine(BirdDaemon(where, binary=str(program)), has_routes=has_routes)
            room = RoutesRoom(
                engine,
                node="n1",
                options=RouteOptions(run_dir=str(where.path)),
                facts=lambda: Facts((one.node(),)),
                cni_conf_dir=one.folder / "net.d",
            )
            room.start()
            running = asyncio.create_task(room.run_forever())

            async def until(condition: Callable[[], bool]) -> None:
                for _ in range(100):
                    if condition():
                        return
                    await asyncio.sleep(0.1)
                raise AssertionError(room.status)

            try:
                await until(lambda: said in room.status.error)
                assert not room.ready
                assert (one.folder / "net.d/10-kuberouter.conflist").exists()
                # Somebody installs it.
                program.unlink(missing_ok=True)
                program.symlink_to("/usr/sbin/bird")
                room.changed()
                await until(lambda: room.ready)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                await engine.close()
                room.close()
                pid = BirdDaemon(where).running()
                if pid is not None:
                    os.kill(pid, 9)

        in_netns(one.netns, lambda: asyncio.run(main()))


def test_nodes_of_ipv6_alone(three: Cluster) -> None:
    def six(name: str) -> Node:
        node = three.net.hosts[name].node()
        return msgspec.structs.replace(
            node, addresses=node.addresses[1:], pod_cidrs=node.pod_cidrs[1:]
        )

    three.world.facts = Facts(tuple(six(n) for n in ("n1", "n2", "n3")))
    three.run("n1", "n2", "n3")
    one, two, third = three.net.hosts.values()
    wanted = {two.pods[1], third.pods[1]}
    assert three.net.wait(lambda: one.routes() == wanted), one.routes()
    for other in (two, third):
        ping = "ping", "-c", "2", "-W", "2", "-I", one.pod_addresses[1], other.pod_addresses[1]
        assert three.net.wait(lambda ping=ping: " 0% packet loss" in one.run(*ping))
    assert "mtu 1430" in one.run("ip", "link", "show", "knp-vxlan0")


def test_a_folder_for_the_cni_that_cannot_be_written_stops_no_routes(three: Cluster) -> None:
    one = three.net.hosts["n1"]
    (one.folder / "net.d").write_text("a file where the folder should be")
    three.know("n1", "n2")
    three.run("n1", "n2")
    assert three.converged("n1", "n2")
    assert three.net.wait(lambda: "net.d" in room_of(three).status.conflist_error)
    assert room_of(three).ready
