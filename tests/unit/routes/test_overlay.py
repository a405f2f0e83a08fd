"""Which links and entries a plan's tunnels need."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from netpol.model.net import FAMILIES, parse_address, parse_prefix
from netpol.model.objects import Node
from routes import guard
from routes.bird.render import render, tunnel6_link
from routes.options import Encapsulation, OverlayMode, RouteOptions
from routes.overlay import IPIP6_END, LINK_PREFIXES, overlay_of
from routes.plan import RoutePlan, Tunnel, plan, tunnel_link_local, vxlan_mac

IFNAME_MAX = 15  # linux/if.h: IFNAMSIZ - 1
SUBNETS = tuple(parse_prefix(p) for p in ("10.0.1.0/24", "10.0.2.0/24", "fd00:1::/64"))


def node(name: str, *addresses: str) -> Node:
    return Node(
        name=name,
        addresses=tuple(parse_address(a) for a in addresses),
        pod_cidrs=(parse_prefix(f"10.1.{name[1:]}.0/24"),),
        annotations=(),
    )


N1 = node("n1", "10.0.1.1", "fd00:1::1")
N2 = node("n2", "10.0.1.2", "fd00:1::2")
N3 = node("n3", "10.0.2.3", "fd00:2::3")


def made(*nodes: Node, encapsulation: Encapsulation, mode: OverlayMode) -> RoutePlan:
    options = RouteOptions(subnets=SUBNETS, overlay=mode, encapsulation=encapsulation)
    return plan(nodes, nodes[0].name, options)


def test_vxlan_has_one_link_and_a_remote_for_each_node_that_is_tunnelled() -> None:
    found = overlay_of(
        made(N1, N2, N3, encapsulation=Encapsulation.VXLAN, mode=OverlayMode.CROSS_SUBNET),
        underlay_mtu=1500,
    )
    assert found.vxlan is not None
    assert (found.vxlan.local, found.vxlan.mtu) == (N1.addresses[0], 1450)
    (remote,) = found.remotes
    mac = vxlan_mac("n3")
    assert remote == (mac, N3.addresses[0], (N3.addresses[0], tunnel_link_local(mac)))
    assert not found.tunnels


def test_ipip_has_one_link_for_ipv4_and_one_a_node_for_ipv6() -> None:
    found = overlay_of(
        made(N1, N2, N3, encapsulation=Encapsulation.IPIP, mode=OverlayMode.ALWAYS),
        underlay_mtu=1500,
    )
    assert found.vxlan is None
    assert {(t.name, t.local, t.remote, t.mtu) for t in found.tunnels} == {
        ("knp-ipip0", N1.addresses[0], b"", 1480),
        *((tunnel6_link(n.addresses[1]), N1.addresses[1], n.addresses[1], 1460) for n in (N2, N3)),
    }
    for tunnel in found.tunnels:
        assert tunnel.name.startswith(LINK_PREFIXES)
        assert len(tunnel.name) <= IFNAME_MAX


def test_two_nodes_of_one_address_have_one_tunnel() -> None:
    """The kernel takes no second link with the same ends, and BIRD leads both to the first."""
    once = made(N1, N3, encapsulation=Encapsulation.IPIP, mode=OverlayMode.ALWAYS)
    again = tuple(Tunnel("n9", t.address, t.mac) for t in once.tunnels)
    twice = dataclasses.replace(once, tunnels=(*once.tunnels, *again))
    assert overlay_of(twice, underlay_mtu=1500) == overlay_of(once, underlay_mtu=1500)
    assert render(twice).count(f'via "{tunnel6_link(N3.addresses[1])}"') == 2


@pytest.mark.parametrize("encapsulation", Encapsulation)
def test_nothing_to_tunnel_needs_no_link(encapsulation: Encapsulation) -> None:
    alone = made(N1, N2, encapsulation=encapsulation, mode=OverlayMode.CROSS_SUBNET)
    found = overlay_of(alone, underlay_mtu=1500)
    assert (found.vxlan, found.remotes, found.tunnels) == (None, frozenset(), frozenset())


def test_a_node_of_ipv6_alone_has_no_link_of_ipv4() -> None:
    six = [msgspec.structs.replace(n, addresses=n.addresses[1:]) for n in (N1, N3)]
    tunnels = overlay_of(
        made(*six, encapsulation=Encapsulation.IPIP, mode=OverlayMode.ALWAYS), underlay_mtu=9000
    ).tunnels
    assert [(t.remote, t.mtu) for t in tunnels] == [(N3.addresses[1], 8960)]


def test_what_is_only_taken_has_ends_and_a_guard_and_no_entries() -> None:
    """While a cluster changes over, a node hears those that have changed already."""
    both = (Encapsulation.VXLAN, Encapsulation.IPIP)
    options = RouteOptions(subnets=SUBNETS, overlay=OverlayMode.NEVER, accept=both)
    quiet = plan((N1, N3), "n1", options)
    found = overlay_of(quiet, underlay_mtu=1500)
    assert found.vxlan is not None
    assert found.remotes == frozenset()
    assert {(t.name, t.remote) for t in found.tunnels} == {("knp-ipip0", b""), (IPIP6_END, b"")}
    assert "knp-" not in render(quiet)
    for family in FAMILIES:
        assert len(guard.ruleset(quiet, family).chains[guard.INPUT]) == len(both)
    # What is sent by one is taken of both.
    sends = dataclasses.replace(
        options, overlay=OverlayMode.ALWAYS, encapsulation=Encapsulation.IPIP
    )
    loud = plan((N1, N3), "n1", sends)
    tunnels = {t.name for t in overlay_of(loud, underlay_mtu=1500).tunnels}
    assert tunnels == {"knp-ipip0", IPIP6_END, tunnel6_link(N3.addresses[1])}
    assert guard.taken(loud) == (Encapsulation.IPIP, Encapsulation.VXLAN)
    assert guard.taken(plan((N1, N3), "n1", RouteOptions(overlay=OverlayMode.NEVER))) == ()
