"""Services by IPVS through the rules' text: INPUT sees the Service's address, OUTPUT the backend's.

Which hooks a packet passes and with which addresses is the kernel's doing, and `tests/uml` proves it with
legacy tables; here the same walks go through the text that both variants are given.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import NamedTuple

import pytest

from netpol.model.flow import Flow
from netpol.model.ids import PORT_PROTOCOLS, Protocol
from netpol.model.net import parse_address
from netpol.model.ruleset import AddressPort
from netpol.policy.world import World
from netpol.render.node import render_node
from netpol.render.options import DEFAULT_FIELD_MASK
from tests import builders as make
from tests import engine
from tests.spec.policy.case import BASE, TOOL, WEB, Case, with_
from tests.spec.policy.cases import CASES
from tests.walker.cluster import BRIDGE, UPLINK, Cluster, Hop, options_of, text_of
from tests.walker.tables import Walk

VIP = {4: "10.96.0.10", 6: "fd00:10:96::10"}
SERVED = tuple(
    AddressPort(parse_address(vip), protocol, port)
    for vip in VIP.values()
    for protocol, port in ((Protocol.TCP, 80), (Protocol.UDP, 53), (Protocol.SCTP, 90))
)
#: Cases whose sources are nodes: those pass OUTPUT twice, unjudged.
FROM_NODES = ("78", "79", "79a")
PORTS = {Protocol.TCP: 80, Protocol.UDP: 53, Protocol.SCTP: 90}


def cluster_of(world: World, served: tuple[AddressPort, ...] | None = SERVED) -> Cluster:
    texts = {
        node: text_of(
            render_node(world, node, replace(options_of(world, node), ipvs_services=served)),
            field_mask=DEFAULT_FIELD_MASK,
        )
        for node in world.nodes
    }
    return Cluster(world, texts)


class Through(NamedTuple):
    """The hooks of a request to a Service, in order, as far as it came."""

    walks: tuple[tuple[str, Walk], ...]

    @property
    def passed(self) -> bool:
        return all(walk.passed for _, walk in self.walks)

    def __str__(self) -> str:
        return "\n".join(f"{hook}: {walk}" for hook, walk in self.walks)


def through(cluster: Cluster, flow: Flow) -> Through | None:
    """The way of a flow whose source asked a Service that chose the flow's destination.

    None where IPVS has no part, or the backend is on the very node that asks (no OUTPUT there).
    """
    kind, home = cluster.place(flow.src)
    to_kind, to_home = cluster.place(flow.dst)
    if kind == "host" or (kind == "outside" and to_kind != "pod"):
        return None
    balancer = home if kind == "pod" else to_home
    if to_kind == "host" and to_home == balancer:
        return None
    vip = engine.party(cluster.world, VIP[int(flow.family)], int(flow.family))
    asked = replace(flow, dst=vip, port=PORTS[flow.protocol])
    steps = [
        (Hop(balancer, "INPUT", BRIDGE if kind == "pod" else UPLINK, ""), asked),
        (Hop(balancer, "OUTPUT", "", BRIDGE if to_home == balancer else UPLINK), flow),
    ]
    if to_kind == "pod" and to_home != balancer:
        steps.append((Hop(to_home, "FORWARD", UPLINK, BRIDGE), flow))
    elif to_kind == "host":
        steps.append((Hop(to_home, "INPUT", UPLINK, ""), flow))
    seen = []
    for hop, tuple_now in steps:
        walk = cluster._at(hop, tuple_now, {})
        seen.append((f"{hop.node} {hop.hook}", walk))
        if not walk.passed:
            break
    return Through(tuple(seen))


def by_service(case: Case) -> bool:
    """Whether any flow of a case can be asked by way of a Service: a port, and nothing but its tuple."""
    flows = [f for step in case.steps for f in step.flows]
    return case.row not in FROM_NODES and any(not f.packet and f.port != "ICMP" for f in flows)


@pytest.mark.parametrize("case", [c for c in CASES if by_service(c)], ids=lambda c: c.id)
def test_a_service_changes_no_verdict(case: Case):
    """Every flow of the case table, asked by way of a Service: denied or allowed as its backend is."""
    asked = 0
    for number, step in enumerate(case.steps):
        world = engine.build(step.world)
        cluster = cluster_of(world)
        for flow in step.flows:
            for family in (4, 6) if flow.family is None else (flow.family,):
                try:
                    made = engine.flow(world, flow.src, flow.dst, flow.port, family)
                except engine.NoPartyError:
                    continue
                if flow.packet or made.protocol not in PORT_PROTOCOLS:
                    continue
                got = through(cluster, made)
                if got is not None:
                    asked += 1
                    assert got.passed == flow.allow, f"step {number} {flow} IPv{family}\n{got}"
                    assert got.walks[0][1].passed, got  # INPUT judges nothing of it
    assert asked


SHUT = make.policy("a/shut", make.selector(role="web"), types=["Egress"])
ONLY_VIPS = make.policy(
    "a/vips",
    make.selector(role="web"),
    egress=[make.egress(make.block(f"{VIP[4]}/32"), make.block(f"{VIP[6]}/128"))],
)


def at_input(cluster: Cluster, flow: Flow, *, iif: str = BRIDGE, **fields: object) -> Walk:
    return cluster._at(Hop("n1", "INPUT", iif, ""), flow, dict(fields))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("port", "passes"),
    [
        ("80/TCP", True),
        ("53/UDP", True),
        ("90/SCTP", True),
        ("53/TCP", False),
        ("80/UDP", False),
        ("81/TCP", False),
        ("ICMP", False),
    ],
)
def test_input_lets_exactly_the_served_ports_through(port: str, passes: bool, family: int):
    world = engine.build(with_(SHUT))
    flow = engine.flow(world, WEB, VIP[family], port, family)
    assert at_input(cluster_of(world), flow).passed is passes
    assert not at_input(cluster_of(world, ()), flow).passed
    assert not at_input(cluster_of(world, None), flow).passed


@pytest.mark.parametrize("family", [4, 6])
def test_a_policy_that_names_the_address_opens_the_nodes_ports_alone(family: int):
    world = engine.build(with_(ONLY_VIPS))
    cluster = cluster_of(world)
    assert at_input(cluster, engine.flow(world, WEB, VIP[family], "81/TCP", family)).passed
    backend = engine.flow(world, WEB, TOOL, "80/TCP", family)
    got = through(cluster, backend)
    assert got is not None
    assert [walk.passed for _, walk in got.walks] == [True, False]


def test_a_forged_source_is_no_pods_to_services_either():
    world = engine.build(BASE)
    cluster = cluster_of(world)
    flow = engine.flow(world, WEB, VIP[4], "80/TCP", 4)
    for borrowed in ("10.244.2.10", "198.51.100.7", "172.18.0.2"):
        walk = at_input(cluster, flow, src=ipaddress.ip_address(borrowed))
        assert not walk.passed, borrowed


def test_an_unknown_pod_passes_input_and_is_held_at_output():
    world = engine.build(BASE)
    cluster = cluster_of(world)
    nobody = engine.flow(world, "10.244.1.77", TOOL, "80/TCP", 4)
    got = through(cluster, nobody)
    assert got is not None
    assert [walk.passed for _, walk in got.walks] == [True, False]
    assert got.walks[-1][1].prefix == "KNP|H|E"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("port", "fields"),
    [
        ("80/TCP", {"pkttype": 1}),
        ("53/UDP", {"pkttype": 1}),
        ("90/SCTP", {"pkttype": 1}),
        ("80/TCP", {"pkttype": 2}),
        ("80/TCP", {"sport": 20}),
        ("53/UDP", {"sport": 20}),
        ("90/SCTP", {"sport": 20}),
        ("90/SCTP", {"chunk": 4}),
        ("90/SCTP", {"chunk": 0}),
    ],
)
def test_what_ipvs_leaves_to_the_node_is_judged_as_the_nodes(
    port: str, fields: dict[str, int], family: int
):
    shut, free = engine.build(with_(SHUT)), engine.build(BASE)
    flow = engine.flow(shut, WEB, VIP[family], port, family)
    assert not at_input(cluster_of(shut), flow, **fields).passed
    assert at_input(cluster_of(free), flow, **fields).passed


def test_without_ipvs_there_is_no_set_and_no_rule():
    world = engine.build(BASE)
    text = cluster_of(world, None).texts["n1"]
    assert "KNP-IPVS" not in text.sets + "".join(text.tables.values())
