"""What pods send out of the cluster, as real packets: who is seen as the source."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from netpol.kernel import netns
from netpol.kernel.drivers import Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import ROUTES, ObjectKey
from netpol.model.net import Family, parse_address, parse_prefix
from netpol.model.objects import Endpoint, Node
from routes.egress import EgressOptions
from routes.options import Encapsulation, OverlayMode, RouteOptions
from routes.plan import plan
from routes.rules import RoutesRules, RuleDrivers, keep_rules, rules_of

pytestmark = pytest.mark.kernel

NODE = Node(
    name="n1",
    addresses=(parse_address("10.0.1.1"), parse_address("fd00:1::1")),
    pod_cidrs=(parse_prefix("10.1.1.0/24"), parse_prefix("fd01:0:0:1::/64")),
)
OTHER = Node(
    name="n2",
    addresses=(parse_address("10.0.1.2"),),
    pod_cidrs=(parse_prefix("10.1.2.0/24"), parse_prefix("fd01:0:0:2::/64")),
)


@pytest.fixture(params=list(Variant), ids=str)
def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str, str, RuleDrivers]]:
    """A pod, its node, and one namespace that has every address outside."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    pod, node, out = (f"knpt-m{os.getpid()}-{x}" for x in ("pod", "node", "out"))
    for space in (pod, node, out):
        netns.create(space)
    batches = {
        node: [
            f"link add p type veth peer name eth0 netns {pod}",
            f"link add eth0 type veth peer name eth0 netns {out}",
            "address add 10.1.1.254/24 dev p",
            "address add fd01:0:0:1::fe/64 dev p nodad",
            "address add 10.0.1.1/24 dev eth0",
            "address add fd00:1::1/64 dev eth0 nodad",
            "link set p up",
            "link set eth0 up",
            "route add default via 10.0.1.9",
            "route add default via fd00:1::9",
        ],
        pod: [
            "link set eth0 up",
            "address add 10.1.1.7/24 dev eth0",
            "address add 10.1.1.8/24 dev eth0",
            "address add fd01:0:0:1::7/64 dev eth0 nodad",
            "route add default via 10.1.1.254",
            "route add default via fd01:0:0:1::fe",
        ],
        out: [
            "link set eth0 up",
            "address add 10.0.1.9/24 dev eth0",
            "address add 10.0.1.2/24 dev eth0",
            "address add fd00:1::9/64 dev eth0 nodad",
            "address add 198.51.100.9/32 dev lo",
            "address add 203.0.113.9/32 dev lo",
            "address add 10.1.2.9/32 dev lo",
            "address add fd01:0:0:2::9/128 dev lo",
            "address add 2001:db8::9/128 dev lo",
            "route add 10.1.1.0/24 via 10.0.1.1",
            "route add fd01:0:0:1::/64 via fd00:1::1",
        ],
    }
    for space, lines in batches.items():
        subprocess.run(
            ["ip", "-n", space, "-batch", "-"], input="\n".join(lines), text=True, check=True
        )

    def forward() -> None:
        for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", key).write_text("1", encoding="ascii")

    in_netns(node, forward)
    sets = in_netns(node, lambda: NetlinkSets(owner=ROUTES))
    tables = RestoreTables(request.param, netns=node, owner=ROUTES)
    try:
        yield pod, out, node, RuleDrivers(sets, tables)
    finally:
        sets.close()
        for space in (pod, node, out):
            netns.delete(space)


def seen(pod: str, out: str, to: str, *, source: str = "") -> str:
    """The source that a receiver sees of a datagram."""
    kind = socket.AF_INET6 if ":" in to else socket.AF_INET
    receiver = in_netns(out, lambda: socket.socket(kind, socket.SOCK_DGRAM))
    with receiver:
        receiver.settimeout(5)
        receiver.bind((to, 0))
        port = receiver.getsockname()[1]

        def send() -> None:
            with socket.socket(kind, socket.SOCK_DGRAM) as s:
                if source:
                    s.bind((source, 0))
                s.sendto(b"x", (to, port))

        in_netns(pod, send)
        return str(receiver.recvfrom(10)[1][0])


def want(
    *pods: Endpoint, namespaces: dict[str, bool] | None = None, **options: object
) -> RoutesRules:
    made = plan([NODE, OTHER], "n1", RouteOptions())
    addresses = [*NODE.addresses, *OTHER.addresses]
    chosen = EgressOptions(enabled=True, **options)  # type: ignore[arg-type]
    return rules_of(made, chosen, pods, namespaces=namespaces or {}, nodes=addresses)


def endpoint(address: str, *, masquerade: bool | None = None) -> Endpoint:
    return Endpoint(
        key=ObjectKey("shop", "p"),
        uid="u",
        addresses=(parse_address(address),),
        masquerade=masquerade,
    )


def test_who_is_seen_outside_and_inside(world: tuple[str, str, str, RuleDrivers]) -> None:
    pod, out, _, drivers = world
    assert seen(pod, out, "198.51.100.9") == "10.1.1.7"  # without it, the pod itself
    assert keep_rules(drivers, want(exclude=(parse_prefix("203.0.113.0/24"),)))
    assert keep_rules(drivers, want(exclude=(parse_prefix("203.0.113.0/24"),))) == 0
    assert seen(pod, out, "198.51.100.9") == "10.0.1.1"
    assert seen(pod, out, "2001:db8::9") == "fd00:1::1"
    for inside in ("10.1.2.9", "10.0.1.2", "203.0.113.9"):
        assert seen(pod, out, inside) == "10.1.1.7", inside
    assert seen(pod, out, "fd01:0:0:2::9") == "fd01:0:0:1::7"
    assert keep_rules(drivers, RoutesRules())
    assert seen(pod, out, "198.51.100.9") == "10.1.1.7"
    assert drivers.sets.dump() == {}
    assert keep_rules(drivers, RoutesRules()) == 0


def test_a_pod_and_a_namespace_say_otherwise(world: tuple[str, str, str, RuleDrivers]) -> None:
    pod, out, _, drivers = world
    keep_rules(drivers, want(endpoint("10.1.1.7", masquerade=False)))
    assert seen(pod, out, "198.51.100.9", source="10.1.1.7") == "10.1.1.7"
    assert seen(pod, out, "198.51.100.9", source="10.1.1.8") == "10.0.1.1"
    off = want(endpoint("10.1.1.7"), namespaces={"shop": False})
    keep_rules(drivers, off)
    assert seen(pod, out, "198.51.100.9", source="10.1.1.7") == "10.1.1.7"
    only = want(endpoint("10.1.1.7", masquerade=True), by_default=False)
    keep_rules(drivers, only)
    assert seen(pod, out, "198.51.100.9", source="10.1.1.7") == "10.0.1.1"
    assert seen(pod, out, "198.51.100.9", source="10.1.1.8") == "10.1.1.8"


def test_tunnelled_packets_come_from_nodes_alone(
    world: tuple[str, str, str, RuleDrivers],
) -> None:
    """Whoever reaches a node's VXLAN port could claim to be any pod."""
    pod, out, node, drivers = world
    listener = in_netns(node, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with listener:
        listener.bind(("10.0.1.1", 4789))
        listener.settimeout(0.5)

        def arrives(space: str, source: str) -> bool:
            def send() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                    s.bind((source, 0))
                    s.sendto(b"vxlan", ("10.0.1.1", 4789))

            in_netns(space, send)
            try:
                return listener.recvfrom(10)[1][0] == source
            except TimeoutError:
                return False

        assert arrives(pod, "10.1.1.7")
        always = RouteOptions(overlay=OverlayMode.ALWAYS)
        made = plan([NODE, OTHER], "n1", always)
        nodes = [*NODE.addresses, *OTHER.addresses]
        guarded = rules_of(made, EgressOptions(), (), namespaces={}, nodes=nodes)
        assert keep_rules(drivers, guarded)
        assert keep_rules(drivers, guarded) == 0
        assert not arrives(pod, "10.1.1.7")
        assert not arrives(out, "10.0.1.9")  # a host beside the nodes
        assert arrives(out, "10.0.1.2")  # the other node
        ipip = plan([NODE, OTHER], "n1", replace(always, encapsulation=Encapsulation.IPIP))
        keep_rules(drivers, rules_of(ipip, EgressOptions(), (), namespaces={}, nodes=nodes))
        assert arrives(pod, "10.1.1.7")  # VXLAN's port is nobody's then
        keep_rules(drivers, RoutesRules())
        assert drivers.sets.dump() == {}


def test_ipip_comes_from_nodes_alone(world: tuple[str, str, str, RuleDrivers]) -> None:
    _, out, node, drivers = world
    catcher = in_netns(node, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 4))
    with catcher:
        catcher.settimeout(0.5)

        def arrives(source: str) -> bool:
            def send() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_RAW, 4) as s:
                    s.bind((source, 0))
                    s.sendto(bytes(40), ("10.0.1.1", 0))

            in_netns(out, send)
            try:
                return catcher.recvfrom(100)[1][0] == source
            except TimeoutError:
                return False

        made = plan(
            [NODE, OTHER],
            "n1",
            RouteOptions(overlay=OverlayMode.ALWAYS, encapsulation=Encapsulation.IPIP),
        )
        nodes = [*NODE.addresses, *OTHER.addresses]
        rules = rules_of(made, EgressOptions(), (), namespaces={}, nodes=nodes)
        assert keep_rules(drivers, rules)
        assert keep_rules(drivers, rules) == 0
        assert drivers.tables.counters("filter", Family.V4)["KNP-RT-IN"][0][0] == 0
        arrives("10.0.1.9")
        assert drivers.tables.counters("filter", Family.V4)["KNP-RT-IN"][0][0] == 1
        arrives("10.0.1.2")
        assert drivers.tables.counters("filter", Family.V4)["KNP-RT-IN"][0][0] == 1
