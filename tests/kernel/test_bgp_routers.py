"""Routers outside the cluster: FRR and GoBGP as they are used, and one that means harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from netpol.kernel.netns import in_netns
from netpol.model.net import Prefix, parse_address, parse_prefix
from routes.bird import reply
from routes.bird.render import peer_name, render
from routes.options import Community, ExternalPeer, ImportPolicy, RouteOptions
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, Host, bird_net
from tests.kernel.speaker import Speaker, nlri

pytestmark = pytest.mark.kernel
T = TypeVar("T")

ROUTER = "10.0.1.254"
ROUTER6 = "fd00:1::254"
KEY = "the-key-of-both"
VIP = parse_prefix("203.0.113.7/32")
LEARN = ImportPolicy(enabled=True)


@pytest.fixture
def net() -> Iterator[BirdNet]:
    with bird_net([(1, 1), (1, 2)]) as made:
        yield made


def start(
    net: BirdNet,
    *peers: ExternalPeer,
    vips: tuple[Prefix, ...] = (VIP,),
    services: tuple[Prefix, ...] = (),
    **more: object,
) -> Host:
    """Both nodes with these peers; returns the first."""
    nodes = [h.node() for h in net.hosts.values()]
    for name, host in net.hosts.items():
        options = RouteOptions(run_dir=str(host.folder), peers=peers, **more)  # type: ignore[arg-type]
        net.start(name, render(plan(nodes, name, options, vips=vips, services=services)))
    one = net.hosts["n1"]
    assert net.wait(one.socket.exists)
    return one


def session(host: Host, peer: ExternalPeer) -> reply.ProtocolState:
    return reply.protocols(host.ask("show protocols all"))[peer_name(peer)]


def of_mesh(net: BirdNet, host: Host) -> set[str]:
    return {p for o in net.hosts.values() if o is not host for p in o.pods}


# -- FRR ----------------------------------------------------------------------------------------


class Frr:
    """FRR's daemons in a namespace, with a configuration."""

    def __init__(self, space: str, folder: Path, config: str) -> None:
        self._space, self._folder = space, folder
        folder.mkdir()
        shutil.chown(folder, "frr", "frr")
        folder.chmod(0o755)
        (folder / "frr.conf").write_text(config, encoding="utf-8")
        for name in ("zebra", "staticd", "bfdd", "bgpd"):
            more = ["--bfdctl", f"{folder}/bfdd.sock"] if name == "bfdd" else []
            self._inside(
                f"/usr/lib/frr/{name}",
                *("-d", "--vty_socket", str(folder), "-z", f"{folder}/zserv.api"),
                *("-i", f"{folder}/{name}.pid", "-f", f"{folder}/frr.conf", *more),
            )

    def _inside(self, *command: str) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self._space, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def show(self, what: str) -> dict[str, object]:
        text = self._inside("vtysh", "--vty_socket", str(self._folder), "-c", f"show {what} json")
        found: dict[str, object] = json.loads(text or "{}")
        return found

    def close(self) -> None:
        for path in self._folder.glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


FRR = f"""
bfd
 profile fast
  receive-interval 200
  transmit-interval 200
  detect-multiplier 3
ip route 10.200.0.0/16 blackhole
ipv6 route fd99::/48 blackhole
router bgp 64600
 bgp router-id {ROUTER}
 no bgp default ipv4-unicast
 no bgp ebgp-requires-policy
 bgp graceful-restart
 neighbor K8S peer-group
 neighbor K8S remote-as 64512
 neighbor K8S password {KEY}
 neighbor K8S bfd profile fast
 neighbor K8S ttl-security hops 1
 neighbor K8S timers 3 9
 bgp listen range 10.0.1.0/24 peer-group K8S
 address-family ipv4 unicast
  network 10.200.0.0/16
  neighbor K8S activate
  maximum-paths 16
 exit-address-family
 address-family ipv6 unicast
  network fd99::/48
  neighbor K8S activate
 exit-address-family
"""


def test_frr_with_password_bfd_ttl_security_and_attributes(net: BirdNet) -> None:
    peer = ExternalPeer(
        parse_address(ROUTER),
        64600,
        password=KEY,
        ttl_security=True,
        bfd=True,
        imports=LEARN,
        communities=(Community(64512, 100), Community(64512, 1, 2)),
        prepend=(64512, 2),
        med=7,
        hold_s=9,
    )
    frr = Frr(net.router, net.folder / "frr", FRR)
    try:
        one = start(net, peer)
        want = {*of_mesh(net, one), "10.200.0.0/16", "fd99::/48"}
        assert net.wait(lambda: one.routes() == want), (one.routes(), session(one, peer))
        assert session(one, peer).established

        def path() -> dict[str, object]:
            table = frr.show("bgp ipv4 unicast 10.1.1.0/24")
            return table["paths"][0] if table.get("paths") else {}  # type: ignore[index,return-value]

        assert net.wait(lambda: bool(path()))
        seen = path()
        assert seen["community"]["string"] == "64512:100"  # type: ignore[index]
        assert seen["largeCommunity"]["string"] == "64512:1:2"  # type: ignore[index]
        assert seen["aspath"]["string"] == "64512 64512 64512"  # type: ignore[index]
        assert seen["metric"] == 7
        # Both nodes announce the Service's address, each its own pods, nobody the other's.
        vip = frr.show("bgp ipv4 unicast 203.0.113.7/32")
        assert len(vip["paths"]) == 2  # type: ignore[arg-type]
        pods = frr.show("bgp ipv4 unicast 10.1.2.0/24")
        assert [p["nexthops"][0]["ip"] for p in pods["paths"]] == ["10.0.1.2"]  # type: ignore[attr-defined]
        assert net.wait(lambda: {p["status"] for p in frr.show("bfd peers")} == {"up"})  # type: ignore[index]
        # BFD tells in less than a second what the hold time would tell in nine.
        subprocess.run(
            ["ip", "-n", net.router, "link", "set", "n1", "down"], check=True, timeout=10
        )
        began = time.monotonic()
        assert net.wait(lambda: len(frr.show("bgp ipv4 unicast 203.0.113.7/32")["paths"]) == 1)  # type: ignore[arg-type]
        assert time.monotonic() - began < 5
    finally:
        frr.close()


def test_a_wrong_password_costs_that_session_alone(net: BirdNet) -> None:
    peer = ExternalPeer(parse_address(ROUTER), 64600, password=KEY[1:], imports=LEARN)
    frr = Frr(net.router, net.folder / "frr", FRR)
    try:
        one = start(net, peer)
        assert net.wait(lambda: one.routes() == of_mesh(net, one))
        assert not session(one, peer).established
    finally:
        frr.close()


RR = f"""
ip nht resolve-via-default
ipv6 nht resolve-via-default
router bgp 64512
 bgp router-id {ROUTER}
 bgp cluster-id {ROUTER}
 no bgp default ipv4-unicast
 neighbor NODES peer-group
 neighbor NODES remote-as 64512
 neighbor NODES passive
 bgp listen range 10.0.0.0/16 peer-group NODES
 address-family ipv4 unicast
  neighbor NODES activate
  neighbor NODES route-reflector-client
 exit-address-family
 address-family ipv6 unicast
  neighbor NODES activate
  neighbor NODES route-reflector-client
 exit-address-family
"""


def test_frr_as_a_route_reflector(net: BirdNet) -> None:
    frr = Frr(net.router, net.folder / "frr", RR)
    try:
        peer = ExternalPeer(parse_address(ROUTER), 64512, reflector=True)
        one = start(net, peer, mesh=False)
        assert net.wait(lambda: all(h.routes() == of_mesh(net, h) for h in net.hosts.values()))
        assert one.pings(net.hosts["n2"])
        assert f"via {net.hosts['n2'].addresses[0]} " in one.run("ip", "route")
    finally:
        frr.close()


# -- GoBGP --------------------------------------------------------------------------------------

GOBGP = f"""
[global.config]
  as = 64601
  router-id = "{ROUTER}"
[[peer-groups]]
  [peer-groups.config]
    peer-group-name = "k8s"
    peer-as = 64512
    auth-password = "{KEY}"
  [[peer-groups.afi-safis]]
    [peer-groups.afi-safis.config]
      afi-safi-name = "ipv4-unicast"
  [[peer-groups.afi-safis]]
    [peer-groups.afi-safis.config]
      afi-safi-name = "ipv6-unicast"
[[neighbors]]
  [neighbors.config]
    neighbor-address = "10.0.1.1"
    peer-group = "k8s"
  [neighbors.transport.config]
    passive-mode = true
"""


def test_gobgp(net: BirdNet) -> None:
    config = net.folder / "gobgp.toml"
    config.write_text(GOBGP)
    inside = ["ip", "netns", "exec", net.router]
    daemon = subprocess.Popen(
        [*inside, "gobgpd", "-t", "toml", "-f", str(config), "--api-hosts", "127.0.0.1:50051"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def gobgp(*words: str) -> str:
        done = subprocess.run(
            [*inside, "gobgp", *words], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    try:
        peer = ExternalPeer(parse_address(ROUTER), 64601, password=KEY, imports=LEARN)
        one = start(net, peer)
        assert net.wait(lambda: session(one, peer).established), gobgp("neighbor")
        gobgp("global", "rib", "add", "10.201.0.0/24", "nexthop", ROUTER)
        gobgp("global", "rib", "add", "-a", "ipv6", "fd03::/64", "nexthop", ROUTER6)
        want = {*of_mesh(net, one), "10.201.0.0/24", "fd03::/64"}
        assert net.wait(lambda: one.routes() == want), one.routes()
        assert "10.1.1.0/24" in gobgp("global", "rib")
        assert "10.1.2.0/24" not in gobgp("global", "rib")  # n2 is no neighbour of it here
        assert "fd01:0:0:1::/64" in gobgp("global", "rib", "-a", "ipv6")
    finally:
        daemon.kill()
        daemon.wait()


def gobgp_neighbor(address: str) -> str:
    """A node that GoBGP reflects to; IPv6 goes over the IPv4 session."""
    families = "".join(
        f"""
  [[neighbors.afi-safis]]
    [neighbors.afi-safis.config]
      afi-safi-name = "{name}"
"""
        for name in ("ipv4-unicast", "ipv6-unicast")
    )
    return f"""
[[neighbors]]
  [neighbors.config]
    neighbor-address = "{address}"
    peer-as = 64512
  [neighbors.transport.config]
    passive-mode = true
  [neighbors.route-reflector.config]
    route-reflector-client = true
    route-reflector-cluster-id = "{ROUTER}"
{families}"""


def test_gobgp_as_a_route_reflector(net: BirdNet) -> None:
    config = net.folder / "gobgp.toml"
    nodes = "".join(gobgp_neighbor(h.addresses[0]) for h in net.hosts.values())
    config.write_text(f'[global.config]\n  as = 64512\n  router-id = "{ROUTER}"\n{nodes}')
    daemon = subprocess.Popen(
        [
            *("ip", "netns", "exec", net.router),
            *("gobgpd", "-t", "toml", "-f", str(config), "--api-hosts", "127.0.0.1:50051"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        peer = ExternalPeer(parse_address(ROUTER), 64512, reflector=True)
        one = start(net, peer, mesh=False)
        assert net.wait(lambda: all(h.routes() == of_mesh(net, h) for h in net.hosts.values()))
        assert one.pings(net.hosts["n2"])
    finally:
        daemon.kill()
        daemon.wait()


# -- BIRD as another cluster's nodes run it -----------------------------------------------------

CALICO = f"""
router id {ROUTER};
filter export_pool {{
  if net ~ 10.77.0.0/16 then accept;
  reject;
}}
protocol device {{ scan time 2; }}
protocol direct {{ debug {{ states }}; interface -"cali*", "*"; ipv4; }}
protocol static pool {{ ipv4; route 10.77.1.0/26 blackhole; }}
template bgp bgp_template {{
  description "Connection to BGP peer";
  local as 64600;
  multihop;
  ipv4 {{ import all; export filter export_pool; next hop self; add paths on; }};
  graceful restart;
  connect delay time 2;
  connect retry time 5;
  error wait time 5,30;
}}
protocol bgp Node_10_0_1_1 from bgp_template {{ neighbor 10.0.1.1 as 64512; local {ROUTER} as 64600; }}
"""


def test_a_bird_as_calico_runs_it(net: BirdNet) -> None:
    """Another cluster's node: add-paths, no IPv6, a template of its own."""
    path = net.folder / "calico.conf"
    path.write_text(CALICO)
    net.run_bird("calico", net.router, path)
    peer = ExternalPeer(parse_address(ROUTER), 64600, multihop=2, imports=LEARN)
    one = start(net, peer)
    want = {*of_mesh(net, one), "10.77.1.0/26"}
    assert net.wait(lambda: one.routes() == want), (one.routes(), session(one, peer))
    heard = str(net.ask(path.with_suffix(".ctl"), "show route protocol Node_10_0_1_1"))
    assert "10.1.1.0/24" in heard
    assert "10.1.2.0/24" not in heard


def test_frr_keeps_routes_while_a_bird_starts_again(net: BirdNet) -> None:
    """RFC 4724 on the other side: stale, not gone, and fresh again after recovery."""
    config = FRR.replace(f" neighbor K8S password {KEY}\n", "").replace(
        " neighbor K8S ttl-security hops 1\n", ""
    )
    frr = Frr(
        net.router, net.folder / "frr", config.replace(" neighbor K8S bfd profile fast\n", "")
    )
    try:
        peer = ExternalPeer(parse_address(ROUTER), 64600)
        one = start(net, peer)

        def paths() -> list[dict[str, object]]:
            found: list[dict[str, object]] = frr.show("bgp ipv4 unicast 10.1.1.0/24").get(
                "paths", []
            )  # type: ignore[assignment]
            return found

        assert net.wait(lambda: bool(paths()))
        text = (one.folder / "bird.conf").read_text()
        net.kill("n1")
        assert net.wait(lambda: bool(paths()) and bool(paths()[0].get("stale")))
        net.start("n1", text, "-R")
        assert net.wait(lambda: bool(paths()) and not paths()[0].get("stale"))
    finally:
        frr.close()


# -- one that means harm ------------------------------------------------------------------------


def speak(net: BirdNet, work: Callable[[Speaker], Awaitable[T]], *, to: str = "10.0.1.1") -> T:
    """Run a speaker in the router's place."""

    async def main() -> T:
        speaker = Speaker(asn=64666, router_id=ROUTER)

        async def dial() -> None:
            while not speaker.notified:
                with contextlib.suppress(OSError):
                    await speaker.connect(to, source=ROUTER)
                speaker.established.clear()
                await asyncio.sleep(0.2)

        task = asyncio.create_task(dial())
        try:
            async with asyncio.timeout(30):
                await speaker.established.wait()
            return await work(speaker)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return in_netns(net.router, lambda: asyncio.run(main()))


STOLEN = [
    "0.0.0.0/0",  # everything
    "10.0.1.2/32",  # a node's address
    "10.0.1.0/25",  # a part of the nodes' subnet
    "10.0.0.0/8",  # what all of it lies in
    "10.1.2.0/24",  # another node's pods
    "10.1.1.0/25",  # a part of our own
    "10.96.0.10/32",  # a Service
    "203.0.113.7/32",  # an address that we announce
    "127.0.0.0/8",
    "169.254.169.254/32",
    "224.0.0.0/24",
    "10.0.1.254/32",  # the router itself
    "0.0.0.0/1",  # the two halves of everything
    "128.0.0.0/1",
    "64.0.0.0/3",  # a large part of it, with nothing of the cluster's in it
    "203.0.113.9/32",  # a Service that this node does not announce
    "172.30.0.0/16",  # another network of the node
    "172.30.4.0/24",
]
SERVICES = parse_prefix("10.96.0.0/12")


@pytest.mark.parametrize("default_route", [False, True])
def test_a_router_cannot_take_the_cluster_over(net: BirdNet, *, default_route: bool) -> None:
    imports = ImportPolicy(enabled=True, default_route=default_route)
    peer = ExternalPeer(parse_address(ROUTER), 64666, imports=imports)
    subnets = (parse_prefix("10.0.1.0/24"), parse_prefix("fd00:1::/64"))
    one = start(
        net,
        peer,
        services=(parse_prefix("203.0.113.9/32"),),
        service_cidrs=(SERVICES,),
        subnets=subnets,
        connected=(parse_prefix("172.30.0.0/16"),),
    )
    want = {*of_mesh(net, one), "198.51.100.0/24"}
    if default_route:
        want |= {"default", "64.0.0.0/3"}

    async def work(speaker: Speaker) -> bool:
        await speaker.announce([nlri(p) for p in [*STOLEN, "198.51.100.0/24"]], next_hop=ROUTER)
        for _ in range(100):
            await asyncio.sleep(0.1)
            await asyncio.to_thread(one.ask, "show status")
            if one.routes() == want:
                return True
        return False

    assert speak(net, work), one.routes()
    assert net.hosts["n2"].routes() == of_mesh(net, net.hosts["n2"])  # nodes are not told
    assert one.pings(net.hosts["n2"])


def test_nothing_is_learnt_from_outside_unless_asked(net: BirdNet) -> None:
    peer = ExternalPeer(parse_address(ROUTER), 64666)
    one = start(net, peer)

    async def work(speaker: Speaker) -> None:
        await speaker.announce([nlri("198.51.100.0/24")], next_hop=ROUTER)
        for _ in range(20):
            await asyncio.sleep(0.1)
            await asyncio.to_thread(one.ask, "show status")

    speak(net, work)
    assert net.wait(lambda: one.routes() == of_mesh(net, one))


@pytest.mark.parametrize("learns", [False, True])
def test_the_internet_does_not_fit_in(net: BirdNet, *, learns: bool) -> None:
    """A million prefixes: at most the limit gets into the kernel, and nodes stay connected."""
    imports = ImportPolicy(enabled=learns, limit=50)
    peer = ExternalPeer(parse_address(ROUTER), 64666, imports=imports)
    one = start(net, peer)
    assert net.wait(lambda: one.routes() == of_mesh(net, one))

    def table() -> Iterator[bytes]:
        for number in range(1_000_000):
            yield bytes([24, 20 + number // 65536, number // 256 % 256, number % 256])

    async def work(speaker: Speaker) -> float:
        began = time.monotonic()
        await speaker.announce(table(), next_hop=ROUTER)
        for _ in range(200):
            if not learns or (await asyncio.to_thread(session, one, peer)).imported >= 50:
                break
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    speak(net, work)
    extra = one.routes() - of_mesh(net, one)
    assert len(extra) <= (50 if learns else 0)
    assert of_mesh(net, one) <= one.routes()
    assert one.pings(net.hosts["n2"])
    began = time.monotonic()
    assert not one.ask("show status").failed
    assert time.monotonic() - began < 2
