"""Who peers with whom, what is accepted, what is tunnelled, what is protected."""

from __future__ import annotations

import pytest

from netpol.model.net import Family, Prefix, parse_address, parse_prefix
from netpol.model.objects import Node
from routes.bird.render import render
from routes.members import _hashed_id, members_of
from routes.options import Encapsulation, ExternalPeer, ImportPolicy, OverlayMode, RouteOptions
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
    assert made.problems == (
        "node n2: podCIDR 10.9.2.0/24 is outside the cluster's ranges",
        "node n2: IPv6 pods are not reached: one of the nodes has no IPv6 address",
    )


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
        assert any(p.covers(parse_prefix(text)) for p in made.protected), text
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


# -- what nodes may not take from each other ------------------------------------------------------

OLD = "2026-01-01T00:00:00Z"
YOUNG = "2026-02-01T00:00:00Z"


@pytest.mark.parametrize(
    "address", ["::", "fe80::9", "127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "ff02::1"]
)
def test_an_address_that_is_nobodys_is_left_out(address: str) -> None:
    """BIRD refuses a whole configuration for one of them, on every node."""
    made = plan([N1, node("n2", address, pods="10.1.2.0/24")], "n1", RouteOptions())
    assert made.peers == ()
    assert "is no address of a node" in made.problems[0]


def test_an_address_of_two_nodes_is_the_older_ones() -> None:
    old = node("z", "10.0.1.9", pods="10.1.9.0/24", created=OLD)
    thief = node("a", "10.0.1.9", "fd00:1::7", pods="10.1.7.0/24", created=YOUNG)
    made = plan([N1, old, thief], "n1", RouteOptions(overlay=OverlayMode.ALWAYS))
    assert {p.node: p.address for p in made.peers} == {
        "z": parse_address("10.0.1.9"),
        "a": parse_address("fd00:1::7"),
    }
    assert [t.node for t in made.tunnels if t.address == parse_address("10.0.1.9")] == ["z"]
    assert made.problems == ("node a: 10.0.1.9 is the address of node z",)


def test_a_node_keeps_its_own_address_whoever_is_older() -> None:
    mine = node("n1", "10.0.1.1", created=YOUNG)
    made = plan([mine, node("n2", "10.0.1.1", created=OLD)], "n1", RouteOptions())
    assert made.addresses == {Family.V4: parse_address("10.0.1.1")}
    assert made.peers == ()


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("10.0.1.1/32", "10.0.1.1 of node n1"),
        ("10.0.1.0/30", "10.0.1.1 of node n1"),
        ("10.0.0.0/16", "the subnet 10.0.1.0/24"),
        ("10.96.0.0/24", "the Service range 10.96.0.0/12"),
        ("10.0.0.0/7", "the Service range"),
    ],
)
def test_a_pod_range_that_holds_what_nodes_live_on_is_nobodys(block: str, said: str) -> None:
    options = RouteOptions(subnets=SUBNETS, service_cidrs=(parse_prefix("10.96.0.0/12"),))
    rogue = node("rogue", "10.0.1.8", pods=block, created=OLD)
    made = plan([N1, N3, rogue], "n1", options)
    assert peers(made)["rogue"] == ()
    assert said in made.problems[0]


def test_a_pod_range_inside_the_nodes_subnet_is_fine() -> None:
    lan = node("n2", "10.0.1.2", pods="10.0.1.128/25")
    made = plan([N1, lan], "n1", RouteOptions(subnets=SUBNETS))
    assert peers(made) == {"n2": ("10.0.1.128/25",)}
    assert made.problems == ()


def test_an_address_named_inside_somebodys_pods_takes_nothing_away() -> None:
    """A kubelet writes its own addresses: one of somebody's pods is no node's, whoever is older."""
    rogue = node("rogue", "10.1.2.7", pods="10.1.8.0/24", created=OLD)
    two = node("n2", "10.0.1.2", pods="10.1.2.0/24", created=OLD)
    made = plan([N1, two, rogue], "n1", RouteOptions(subnets=SUBNETS))
    assert peers(made)["n2"] == ("10.1.2.0/24",)


# -- routers outside ------------------------------------------------------------------------------


def test_what_the_node_rejects_is_rejected_of_global_peers_too() -> None:
    bad = parse_prefix("198.51.100.0/24")
    mine = node("n1", "10.0.1.1", node_bgp_customimportreject=str(bad))
    peer = ExternalPeer(parse_address("192.0.2.1"), 65010)
    made = plan([mine], "n1", RouteOptions(peers=(peer,)))
    assert made.external[0].imports.reject == (bad,)


def test_a_node_of_the_mesh_is_no_router_outside() -> None:
    peer = ExternalPeer(parse_address("10.0.1.2"), 65010)
    two = node("n2", "10.0.1.2", pods="10.1.2.0/24")
    made = plan([N1, two], "n1", RouteOptions(peers=(peer,)))
    assert made.external == ()
    assert "this is node n2" in made.problems[0]
    assert plan([N1, two], "n1", RouteOptions(peers=(peer,), mesh=False)).external == (peer,)


def test_a_service_cannot_have_a_routers_address_announced() -> None:
    peer = ExternalPeer(parse_address("192.0.2.1"), 65010)
    vips = [parse_prefix(f"{a}/32") for a in ("192.0.2.1", "255.255.255.255", "203.0.113.7")]
    made = plan([N1], "n1", RouteOptions(peers=(peer,)), vips=vips)
    assert made.vips == (parse_prefix("203.0.113.7/32"),)


@pytest.mark.parametrize("learns", [True, False])
def test_every_address_of_a_service_is_protected_where_something_is_learnt(*, learns: bool) -> None:
    peer = ExternalPeer(parse_address("192.0.2.1"), 65010, imports=ImportPolicy(enabled=learns))
    service = parse_prefix("203.0.113.7/32")
    made = plan([N1], "n1", RouteOptions(peers=(peer,)), services=[service])
    assert (service in made.protected) is learns


def test_a_reflector_gives_each_node_its_own_alone() -> None:
    """A client that announces another's range has itself as the next hop, and is not followed."""
    peer = ExternalPeer(parse_address("10.0.1.254"), 64512, reflector=True)
    text = render(plan([N1, N2, N3], "n1", RouteOptions(peers=(peer,), mesh=False)))
    assert "    10.0.1.2 : if net ~ [ 10.1.2.0/24 ] then accept;" in text
    assert "10.1.1.0/24 ] then accept" not in text


# -- ranges of two nodes, identifiers, and reflectors of other kinds -------------------------------


def test_a_node_whose_range_is_anothers_by_right_keeps_it_from_its_kernel() -> None:
    """Its pods have addresses of it: the other's route would lead their packets away."""
    old = node("old", "10.0.1.8", pods="10.1.9.0/24 fd01:0:0:9::/64", created=OLD)
    mine = node("n9", "10.0.1.9", pods="10.1.9.0/24 fd01:0:0:9::/64", created=YOUNG)
    made = plan([old, mine], "n9", RouteOptions())
    assert made.own_pods == ()
    assert made.guarded == mine.pod_cidrs
    text = render(made)
    assert "if net ~ [ 10.1.9.0/24+ ] then reject;" in text
    assert "if net ~ [ fd01:0:0:9::/64+ ] then reject;" in text


def test_a_range_that_is_outside_the_clusters_is_guarded_too() -> None:
    options = RouteOptions(cluster_cidrs=(parse_prefix("10.1.0.0/16"),))
    made = plan([node("n1", "10.0.1.1", pods="10.9.1.0/24")], "n1", options)
    assert made.own_pods == ()
    assert parse_prefix("10.9.1.0/24") in made.protected


def test_nodes_without_ipv4_never_share_an_identifier() -> None:
    six = [node(f"n{i}", f"fd00:1::{i + 1:x}", created=OLD) for i in range(6000)]
    ids = [plan(six, n.name, RouteOptions(mesh=False)).router_id for n in six[::1500]]
    assert len(set(ids)) == len(ids)
    problems: list[str] = []
    members = members_of(six, "n0", RouteOptions(), problems)
    found = [_hashed_id(m.node.name, ()) for m in members.values()]
    assert len(set(found)) == len(found)


def test_an_identifier_that_an_older_node_has_is_not_taken() -> None:
    first = _hashed_id("young", ())
    older = node("a", "fd00:1::1", created=OLD, router_id=".".join(map(str, first)))
    made = plan([older, node("young", "fd00:1::2", created=YOUNG)], "young", RouteOptions())
    assert made.router_id == _hashed_id("young", {first})
    same = node("b", "10.0.1.2", router_id="10.0.1.1")
    told = plan([node("n1", "10.0.1.1", pods="10.1.1.0/24"), same], "n1", RouteOptions())
    assert "identifier 10.0.1.1 is that of node b too" in told.problems[0]


def test_a_client_without_a_reflector_is_told() -> None:
    made = plan([C1, N1], "c1", RouteOptions())
    assert made.peers == ()
    assert made.problems == ("node c1 is a client of reflector 0.0.0.42, and no node is one",)


def test_a_reflector_that_is_its_own_client_is_a_reflector() -> None:
    both = node("b", "10.0.1.41", pods="10.1.41.0/24", rr_server="42", rr_client="42")
    found = {
        n.name: {p.node for p in plan([both, C1, PLAIN], n.name, RouteOptions()).peers}
        for n in (both, C1, PLAIN)
    }
    assert found == {"b": {"c1", "p"}, "c1": {"b"}, "p": {"b"}}


def test_a_reflector_passes_next_hops_on_to_other_ases() -> None:
    made = plan([RR1, node("p", "10.0.1.31", node_asn="65001")], "rr1", RouteOptions())
    assert render(made).count("    next hop keep;") == 1


@pytest.mark.parametrize(
    ("announced", "options", "protected"),
    [
        ("10.0.1.128/25", RouteOptions(), True),
        ("fd00:1::8000:0:0:0/65", RouteOptions(), True),
        ("10.0.2.0/24", RouteOptions(), False),
        ("10.0.1.128/25", RouteOptions(subnets=(parse_prefix("10.0.1.0/26"),)), False),
        ("203.0.113.64/26", RouteOptions(vip_cidrs=(parse_prefix("203.0.113.0/24"),)), True),
    ],
)
def test_subnets_of_nodes_and_ranges_of_services_are_protected(
    announced: str, options: RouteOptions, *, protected: bool
) -> None:
    """Where nobody names subnets, the usual ones around nodes' addresses are."""
    made = plan([N1], "n1", options)
    block = parse_prefix(announced)
    assert any(p.covers(block) for p in made.protected) is protected


def test_sessions_with_nodes_are_where_other_nodes_look_for_them() -> None:
    bound = node("n1", "10.0.1.1", pods="10.1.1.0/24", bgp_local_addresses="10.0.7.7")
    key = {k.replace("bgp.local.addresses", "bgp-local-addresses"): v for k, v in bound.annotations}
    bound = Node(
        name="n1",
        addresses=bound.addresses,
        pod_cidrs=bound.pod_cidrs,
        annotations=tuple(key.items()),
    )
    peer = ExternalPeer(parse_address("10.0.7.254"), 65010)
    text = render(plan([bound, N2], "n1", RouteOptions(peers=(peer,))))
    assert text.count("  local 10.0.1.1 port 179 as 64512;") == 1
    assert text.count("  local 10.0.7.7 port 179 as 64512;") == 1
    assert text.count("strict bind yes;") == 2


# -- nodes without an address of a family that pods have --------------------------------------------

SIX = node("six", "fd00:1::6", pods="10.1.6.0/24 fd01:0:0:6::/64")


def test_ipv4_pods_of_a_node_without_ipv4_are_told_by_ipv6() -> None:
    """RFC 8950, at both ends of the session; between nodes with IPv4 nothing changes."""
    made = plan([N1, N2, SIX], "n1", RouteOptions())
    assert {p.node: p.six for p in made.peers} == {"n2": False, "six": True}
    assert made.problems == ()
    text = render(made)
    assert text.count("extended next hop yes; next hop address fd00:1::1;") == 1
    other = plan([N1, N2, SIX], "six", RouteOptions())
    assert all(p.six for p in other.peers)
    assert render(other).count("extended next hop yes; next hop address fd00:1::6;") == 2


@pytest.mark.parametrize(
    ("one", "two", "options", "said"),
    [
        (N1, node("four", "10.0.1.4", pods="fd01:0:0:4::/64"), RouteOptions(), "no IPv6 address"),
        (
            SIX,
            node("far", "fd00:2::9", pods="10.1.9.0/24"),
            RouteOptions(overlay=OverlayMode.ALWAYS, encapsulation=Encapsulation.IPIP),
            "ipip carries no IPv4",
        ),
    ],
)
def test_pods_that_cannot_be_reached_are_told(
    one: Node, two: Node, options: RouteOptions, said: str
) -> None:
    made = plan([one, two], one.name, options)
    assert [p for p in made.problems if "are not reached" in p and said in p]


def test_a_reflector_tells_no_ipv4_by_ipv6() -> None:
    client = node("c", "fd00:1::8", pods="10.1.8.0/24", rr_client="42")
    server = node("r", "10.0.1.7", "fd00:1::7", pods="10.1.7.0/24", rr_server="42")
    four = node("d", "10.0.1.9", "fd00:1::9", pods="10.1.9.0/24", rr_client="42")
    made = plan([client, server, four], "c", RouteOptions())
    assert [p.split(":")[0] for p in made.problems] == ["node d"]
    assert "no reflector tells IPv4 by IPv6" in made.problems[0]
