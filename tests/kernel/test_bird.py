"""Rendered configurations in real BIRDs: sessions, routes in the kernel, and what must not get there."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol.kernel.netns import in_netns
from netpol.kernel.overlay import apply_overlay
from netpol.model.net import parse_prefix
from routes.bird import reply
from routes.bird.render import node_name, render
from routes.options import OverlayMode, RouteOptions
from routes.overlay import LINK_PREFIXES, overlay_of
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, bird_net

pytestmark = pytest.mark.kernel

SUBNETS = tuple(
    parse_prefix(p) for p in ("10.0.1.0/24", "10.0.2.0/24", "fd00:1::/64", "fd00:2::/64")
)


def options(folder: Path, **more: object) -> RouteOptions:
    return RouteOptions(run_dir=str(folder), **more)  # type: ignore[arg-type]


def start_mesh(net: BirdNet, **more: object) -> None:
    nodes = [h.node() for h in net.hosts.values()]
    for name, host in net.hosts.items():
        net.start(name, render(plan(nodes, name, options(host.folder, **more))))


def all_routes(net: BirdNet) -> bool:
    return all(
        h.routes() == {p for o in net.hosts.values() if o is not h for p in o.pods}
        for h in net.hosts.values()
    )


def test_a_mesh_of_three_routes_every_pod_range_both_families() -> None:
    with bird_net([(1, 1), (1, 2), (1, 3)]) as net:
        start_mesh(net)
        assert net.wait(lambda: all_routes(net)), [h.routes() for h in net.hosts.values()]
        one, two, three = net.hosts.values()
        assert one.pings(two)
        assert one.pings(three)
        states = reply.protocols(one.ask("show protocols all"))
        state = states[node_name("n2")]
        assert state.established
        assert (state.neighbor, state.asn) == ("10.0.1.2", 64512)
        assert (state.imported, state.exported) == (2, 2)
        views = reply.routes(one.ask("show route for 10.1.2.7 all"))
        assert [(str(v.prefix), v.protocol, v.best) for v in views] == [
            ("10.1.2.0/24", node_name("n2"), True)
        ]


def test_a_node_cannot_take_what_is_not_its_own() -> None:
    """n2 announces n1's range, n3's, the default route and a node's address; nothing gets anywhere."""
    with bird_net([(1, 1), (1, 2), (1, 3)]) as net:
        nodes = [h.node() for h in net.hosts.values()]
        made = {n: plan(nodes, n, options(net.hosts[n].folder)) for n in net.hosts}
        for name in ("n1", "n3"):
            net.start(name, render(made[name]))
        rogue = render(made["n2"])
        stolen = ["10.1.1.0/24", "10.1.3.0/24", "10.1.1.0/25", "0.0.0.0/0", "10.0.1.3/32"]
        lines = "".join(f"  route {p} blackhole;\n" for p in stolen)
        rogue = rogue.replace(
            "protocol static own_pods4 { ipv4;\n", f"protocol static own_pods4 {{ ipv4;\n{lines}"
        )
        assert lines in rogue
        net.start("n2", rogue)
        one, three = net.hosts["n1"], net.hosts["n3"]
        want = {*net.hosts["n2"].pods, *three.pods}
        assert net.wait(lambda: one.routes() == want)
        state = reply.protocols(one.ask("show protocols all"))[node_name("n2")]
        assert state.imported == 2
        views = reply.routes(one.ask("show route"))
        assert {str(v.prefix) for v in views if v.protocol == node_name("n2")} == set(
            net.hosts["n2"].pods
        )
        assert one.pings(three)


def test_what_bird_refuses_is_told_with_its_line() -> None:
    with bird_net([(1, 1)]) as net:
        start_mesh(net)
        host = net.hosts["n1"]
        assert net.wait(host.socket.exists)
        bad = net.folder / "bad.conf"
        bad.write_text("router id 10.0.0.1;\nprotocol nonsense {}\n", encoding="utf-8")
        answer = host.ask(f'configure check "{bad}"')
        assert answer.code == reply.CONFIG_ERROR
        assert reply.config_fault(answer).line == 2
        assert host.ask(f'configure check "{host.folder / "bird.conf"}"').code == reply.CONFIG_OK


def test_a_peer_that_is_unreachable_is_never_reached_plainly() -> None:
    """Two subnets, tunnels wanted and no tunnel there: fail closed, not by the router."""
    with bird_net([(1, 1), (1, 2), (2, 3)]) as net:
        start_mesh(net, subnets=SUBNETS, overlay=OverlayMode.CROSS_SUBNET)
        one = net.hosts["n1"]
        want = {*net.hosts["n2"].pods, *(f"unreachable {p}" for p in net.hosts["n3"].pods)}
        assert net.wait(lambda: one.routes() == want), one.routes()
        assert one.pings(net.hosts["n2"])
        assert not one.pings(net.hosts["n3"])


def test_a_wider_subnet_of_the_link_is_no_way_either() -> None:
    """The subnets that are named are narrower than the link's own: the tunnel is the only way."""
    with bird_net([(1, 1), (2, 3)]) as net:
        one, three = net.hosts.values()
        four, _ = one.addresses
        one.run("ip", "address", "add", f"{four}/16", "dev", "eth0")
        one.run("ip", "address", "del", f"{four}/24", "dev", "eth0")
        one.run("ip", "address", "add", "fd00::77/16", "dev", "eth0", "nodad")
        one.run("ip", "route", "add", "10.0.2.0/24", "via", "10.0.1.254")
        one.run("ip", "route", "add", "fd00:2::/64", "via", "fd00:1::254")
        start_mesh(net, subnets=SUBNETS, overlay=OverlayMode.CROSS_SUBNET)
        closed = {f"unreachable {p}" for p in three.pods}
        assert net.wait(lambda: one.routes() == closed), one.run("ip", "route")
        made = overlay(net, "n1", prune=True, mode=OverlayMode.CROSS_SUBNET)
        assert made
        assert net.wait(lambda: one.routes() == set(three.pods)), one.run("ip", "route")
        assert "dev knp-vxlan0" in one.run("ip", "route", "get", three.pod_addresses[0])
        assert "dev knp-vxlan0" in one.run("ip", "-6", "route", "get", three.pod_addresses[1])
        one.run("ip", "link", "delete", "knp-vxlan0")
        assert net.wait(lambda: one.routes() == closed), one.run("ip", "route")


def overlay(net: BirdNet, name: str, *, prune: bool, mode: OverlayMode) -> list[str]:
    host = net.hosts[name]
    nodes = [h.node() for h in net.hosts.values()]
    made = plan(nodes, name, options(host.folder, subnets=SUBNETS, overlay=mode))
    state = overlay_of(made, underlay_mtu=1500)
    return in_netns(host.netns, lambda: apply_overlay(state, prefixes=LINK_PREFIXES, prune=prune))


def test_vxlan_crosses_a_router_that_knows_no_pod_route() -> None:
    with bird_net([(1, 1), (1, 2), (2, 3)]) as net:
        cross = OverlayMode.CROSS_SUBNET
        for name in net.hosts:
            assert overlay(net, name, prune=True, mode=cross)
            assert overlay(net, name, prune=True, mode=cross) == []  # a second run changes nothing
        start_mesh(net, subnets=SUBNETS, overlay=cross)
        assert net.wait(lambda: all_routes(net)), [h.routes() for h in net.hosts.values()]
        one, two, three = net.hosts.values()
        assert one.pings(two)
        assert one.pings(three)
        assert three.pings(two)
        assert "mtu 1450" in one.run("ip", "link", "show", "knp-vxlan0")
        # Without the link there is no other way; with it again, the way is back without a word to BIRD.
        one.run("ip", "link", "delete", "knp-vxlan0")
        gone = {*two.pods, *(f"unreachable {p}" for p in three.pods)}
        assert net.wait(lambda: one.routes() == gone), one.routes()
        assert overlay(net, "n1", prune=True, mode=cross)
        assert net.wait(lambda: one.routes() == {*two.pods, *three.pods}), one.routes()
        assert one.pings(three)


def test_always_never_takes_the_plain_way() -> None:
    with bird_net([(1, 1), (1, 2)]) as net:
        always = OverlayMode.ALWAYS
        start_mesh(net, subnets=SUBNETS, overlay=always)
        one, two = net.hosts.values()
        closed = {f"unreachable {p}" for p in two.pods}
        assert net.wait(lambda: one.routes() == closed), one.routes()
        assert not one.pings(two)
        for name in net.hosts:
            overlay(net, name, prune=True, mode=always)
        assert net.wait(lambda: all_routes(net)), one.routes()
        assert one.pings(two)
        assert "dev knp-vxlan0" in one.run("ip", "route", "get", two.pod_addresses[0])
        # The mode changes while it runs: first the routes, then the links.
        nodes = [h.node() for h in net.hosts.values()]
        for name, host in net.hosts.items():
            text = render(plan(nodes, name, options(host.folder, overlay=OverlayMode.NEVER)))
            (host.folder / "bird.conf").write_text(text, encoding="utf-8")
            assert not host.ask("configure").failed
        assert net.wait(
            lambda: all(
                f" via {hop} dev eth0 " in a.run("ip", "route", "get", address)
                for a, b in ((one, two), (two, one))
                for address, hop in zip(b.pod_addresses, b.addresses, strict=True)
            )
        )
        assert one.pings(two)
        assert reply.established(reply.protocols(one.ask("show protocols all")).values()) == 1
