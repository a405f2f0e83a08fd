"""Who peers with whom, what is accepted, what is tunnelled, what is protected."""

from __future__ import annotations

import pytest

from netpol.model.net import Family, Prefix, parse_address, parse_prefix
from netpol.model.objects import Node
from routes.options import ExternalPeer, OverlayMode, RouteOptions
from routes.plan import RoutePlan, plan, tunnel_link_local, vxlan_mac


def node(name: str, *addresses: str, pods: str = "", created: str = "", **annotations: str) -> Node:
    named = {f"netpol.io/{k.replace('_', '.')}": v for k, v in annotations.items()}
    return Node(
        name=name,
        addresses=tuple(parse_address(a) for a in addresses),
        pod_cidrs=tuple(parse_prefix(p) for p in pods.split()),
        annotations=tuple(sorted(named.items())),
        created=created,
    )


N1 = node("n1", "10.0.1.1", "fd00:1::1", pods="10.1.1.0/24 fd01:0:0:1::/64")
N2 = node("n2", "10.0.1.2", "fd00:1::2", pods="10.1.2.0/24 fd01:0:0:2::/64")
N3 = node("n3", "10.0.2.3", "fd00:2::3", pods="10.1.3.0/24 fd01:0:0:3::/64")
SUBNETS = tuple(
    parse_prefix(p) for p in ("10.0.1.0/24", "10.0.2.0/24", "fd00:1::/64", "fd00:2::/64")
)


def peers(made: RoutePlan) -> dict[str, tuple[str, ...]]:
    return {p.node: tuple(str(a) for a in p.accept) for p in made.peers}


def test_a_full_mesh_accepts_from_each_node_just_its_own() -> None:
    made = plan([N3, N1, N2], "n1", RouteOptions())
    assert peers(made) == {
        "n2": ("10.1.2.0/24", "fd01:0:0:2::/64"),
        "n3": ("10.1.3.0/24", "fd01:0:0:3::/64"),
    }
    assert made.own_pods == N1.pod_cidrs
    assert made.router_id == parse_address("10.0.1.1")
    assert (made.asn, made.tunnels, made.problems) == (64512, (), ())


def test_the_order_of_nodes_does_not_matter() -> None:
    assert plan([N1, N2, N3], "n1", RouteOptions()) == plan([N3, N2, N1], "n1", RouteOptions())


def test_without_a_mesh_there_are_no_nodes_to_peer_with() -> None:
    assert plan([N1, N2], "n1", RouteOptions(mesh=False)).peers == ()


def test_a_node_that_is_not_there() -> None:
    with pytest.raises(KeyError):
        plan([N1], "n9", RouteOptions())


@pytest.mark.parametrize(
    ("mode", "tunnelled"),
    [
        (OverlayMode.NEVER, []),
        (OverlayMode.CROSS_SUBNET, ["10.0.2.3", "fd00:2::3"]),
        (OverlayMode.ALWAYS, ["10.0.1.2", "fd00:1::2", "10.0.2.3", "fd00:2::3"]),
    ],
)
def test_which_nodes_are_tunnelled(mode: OverlayMode, tunnelled: list[str]) -> None:
    made = plan([N1, N2, N3], "n1", RouteOptions(overlay=mode, subnets=SUBNETS))
    assert [t.address for t in made.tunnels] == [parse_address(a) for a in tunnelled]


def test_an_address_in_no_subnet_is_behind_a_router() -> None:
    options = RouteOptions(subnets=(parse_prefix("10.0.1.0/24"),))
    made = plan([N1, N2, N3], "n1", options)
    # IPv6 has no subnet given: there all nodes share one.
    assert [t.address for t in made.tunnels] == [parse_address("10.0.2.3")]


def test_the_mac_of_a_tunnel_and_what_follows_from_it() -> None:
    mac = vxlan_mac("n2")
    assert len(mac) == 6
    assert mac[0] == 2
    assert tunnel_link_local(b"\x02\x3b\x5b\xb1\xc6\xe7") == parse_address(
        "fe80::3b:5bff:feb1:c6e7"
    )


def test_a_range_that_lies_in_another_nodes_is_nobodys() -> None:
    thief = node("a-thief", "10.0.1.9", pods="10.1.2.128/25", created="2026-02-01T00:00:00Z")
    old = node("n2", "10.0.1.2", pods="10.1.2.0/24", created="2026-01-01T00:00:00Z")
    made = plan([N1, old, thief], "n1", RouteOptions())
    assert peers(made) == {"n2": ("10.1.2.0/24",), "a-thief": ()}
    assert made.problems == ("node a-thief: podCIDR 10.1.2.128/25 overlaps 10.1.2.0/24 of node n2",)


def test_our_own_range_cannot_be_taken() -> None:
    mine = node("n1", "10.0.1.1", pods="10.1.1.0/24", created="2026-01-01T00:00:00Z")
    rogue = node("n2", "10.0.1.2", pods="10.1.0.0/16", created="2026-01-02T00:00:00Z")
    made = plan([mine, rogue], "n1", RouteOptions())
    assert made.own_pods == (parse_prefix("10.1.1.0/24"),)
    assert peers(made) == {"n2": ()}


def test_a_cluster_range_narrows_what_nodes_may_have() -> None:
    options = RouteOptions(cluster_cidrs=(parse_prefix("10.1.0.0/16"),))
    odd = node("n2", "10.0.1.2", pods="10.9.2.0/24 fd01:0:0:2::/64")
    made = plan([N1, odd], "n1", options)
    assert peers(made) == {"n2": ("fd01:0:0:2::/64",)}  # no bound was given for IPv6
    assert made.problems == ("node n2: podCIDR 10.9.2.0/24 is outside the cluster's ranges",)


@pytest.mark.parametrize("block", ["127.0.0.0/16", "0.0.0.0/0", "224.0.0.0/8", "fe80::/64", "::/0"])
def test_a_range_that_cannot_be_routed(block: str) -> None:
    made = plan([N1, node("n2", "10.0.1.2", pods=block)], "n1", RouteOptions())
    assert peers(made) == {"n2": ()}
    assert "is no range that can be routed" in made.problems[0]


# -- route reflectors ---------------------------------------------------------------------------

RR1 = node("rr1", "10.0.1.11", pods="10.1.11.0/24", rr_server="42")
RR2 = node("rr2", "10.0.1.12", pods="10.1.12.0/24", rr_server="42")
C1 = node("c1", "10.0.1.21", pods="10.1.21.0/24", rr_client="42")
C2 = node("c2", "10.0.1.22", pods="10.1.22.0/24", rr_client="42")
PLAIN = node("p", "10.0.1.31", pods="10.1.31.0/24")
ALL = (RR1, RR2, C1, C2, PLAIN)


def test_who_peers_with_whom_behind_reflectors() -> None:
    found = {n.name: {p.node for p in plan(ALL, n.name, RouteOptions()).peers} for n in ALL}
    assert found == {
        "rr1": {"rr2", "c1", "c2", "p"},
        "rr2": {"rr1", "c1", "c2", "p"},
        "c1": {"rr1", "rr2"},
        "c2": {"rr1", "rr2"},
        "p": {"rr1", "rr2"},
    }
    for one, theirs in found.items():
        assert all(one in found[other] for other in theirs)


def test_what_is_accepted_behind_reflectors() -> None:
    of_client = {p.node: p for p in plan(ALL, "c1", RouteOptions()).peers}
    others = tuple(sorted(p for n in ALL if n is not C1 for p in n.pod_cidrs))
    assert of_client["rr1"].accept == others
    assert of_client["rr1"].reflects
    assert not of_client["rr1"].client
    of_server = {p.node: p for p in plan(ALL, "rr1", RouteOptions()).peers}
    assert of_server["c1"].client
    assert of_server["c1"].accept == C1.pod_cidrs
    assert not of_server["rr2"].client
    assert plan(ALL, "rr1", RouteOptions()).cluster_id == bytes([0, 0, 0, 42])


def test_another_cluster_id_is_another_reflector() -> None:
    lost = node("c3", "10.0.1.23", pods="10.1.23.0/24", rr_client="43")
    assert plan([*ALL, lost], "c3", RouteOptions()).peers == ()


def test_a_client_of_another_as_is_refused() -> None:
    odd = node("odd", "10.0.1.24", pods="10.1.24.0/24", rr_client="42", node_asn="65001")
    made = plan([*ALL, odd], "odd", RouteOptions())
    assert made.peers == ()
    assert "need one AS" in made.problems[0]
    assert "odd" not in {p.node for p in plan([*ALL, odd], "rr1", RouteOptions()).peers}


def test_reflection_works_without_a_mesh() -> None:
    made = plan(ALL, "c1", RouteOptions(mesh=False))
    assert {p.node for p in made.peers} == {"rr1", "rr2"}


# -- what protects the cluster ------------------------------------------------------------------


def test_what_nobody_outside_may_announce() -> None:
    options = RouteOptions(
        service_cidrs=(parse_prefix("10.96.0.0/12"),),
        subnets=SUBNETS,
        peers=(ExternalPeer(parse_address("192.0.2.1"), 65010),),
    )
    made = plan([N1, N2], "n1", options, vips=[parse_prefix("203.0.113.7/32")])
    for text in (
        *("10.96.0.0/12", "10.0.2.0/24", "10.1.2.0/24", "10.0.1.2/32", "192.0.2.1/32"),
        *("203.0.113.7/32", "127.0.0.0/8", "fe80::/10", "fd00:1::2/128", "ff00::/8"),
    ):
        assert parse_prefix(text) in made.protected, text
    assert Prefix(bytes(10) + b"\xff\xff" + bytes(4), 96) in made.protected


def test_a_nodes_own_peer_replaces_the_global_one() -> None:
    mine = node(
        "n1",
        "10.0.1.1",
        peers="[{address: 192.0.2.1, asn: 65099}, {address: 192.0.2.2, asn: 65012}]",
    )
    options = RouteOptions(peers=(ExternalPeer(parse_address("192.0.2.1"), 65010),))
    assert [p.asn for p in plan([mine], "n1", options).external] == [65099, 65012]


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (ExternalPeer(parse_address("fd00::9"), 65010), "has no IPv6"),
        (ExternalPeer(parse_address("10.0.1.1"), 65010), "is the node itself"),
        (
            ExternalPeer(parse_address("10.0.1.254"), 65010, reflector=True),
            "has the AS of the node",
        ),
    ],
)
def test_peers_that_cannot_be(peer: ExternalPeer, said: str) -> None:
    made = plan([node("n1", "10.0.1.1")], "n1", RouteOptions(peers=(peer,)))
    assert made.external == ()
    assert said in made.problems[0]


def test_a_node_without_addresses_speaks_no_bgp() -> None:
    made = plan([N1, node("n2", pods="10.1.2.0/24")], "n1", RouteOptions())
    assert made.peers == ()
    assert "n2 has no address" in made.problems[0]
    alone = plan([node("n1", pods="10.1.1.0/24"), N2], "n1", RouteOptions())
    assert alone.peers == ()
    assert alone.router_id != bytes(4)


def test_a_session_takes_a_family_that_both_ends_have() -> None:
    six = node("six", "fd00:1::6", pods="fd01:0:0:6::/64")
    four = node("four", "10.0.1.4", pods="10.1.4.0/24")
    made = plan([N1, six, four], "n1", RouteOptions())
    assert {p.node: p.address for p in made.peers} == {
        "six": parse_address("fd00:1::6"),
        "four": parse_address("10.0.1.4"),
    }
    alone = plan([N1, six, four], "six", RouteOptions())
    assert alone.addresses == {Family.V6: parse_address("fd00:1::6")}
    assert {p.node for p in alone.peers} == {"n1"}
    assert alone.problems == ("node four has no address of a family that this node has",)
