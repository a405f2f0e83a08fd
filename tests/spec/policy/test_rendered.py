"""Every case through rendered rules: the packets of its flows walk every hook on their way."""

from __future__ import annotations

import ipaddress

import pytest

from netpol.render.node import render_node
from netpol.render.options import DenyWith
from tests import builders as make
from tests import engine
from tests.prop.live import Live
from tests.spec.policy.case import B_WEB, BASE, TOOL, WEB, Case, Flow, with_
from tests.spec.policy.cases import CASES
from tests.walker.cluster import Cluster

WIDE, NARROW = 0xFFF0_0000, 0xE000_0000


def families(flow: Flow) -> tuple[int, ...]:
    return (4, 6) if flow.family is None else (flow.family,)


@pytest.mark.parametrize(
    ("field_mask", "deny_with"),
    [(WIDE, DenyWith.DROP), (NARROW, DenyWith.DROP), (WIDE, DenyWith.REJECT)],
    ids=["12bit", "3bit", "reject"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_walk(case: Case, field_mask: int, deny_with: DenyWith):
    for number, step in enumerate(case.steps):
        world = engine.build(step.world)
        cluster = Cluster.rendered(world, field_mask=field_mask, deny_with=deny_with)
        for flow in step.flows:
            walked = 0
            for family in families(flow):
                try:
                    made = engine.flow(world, flow.src, flow.dst, flow.port, family)
                except engine.NoPartyError:
                    continue
                outcome = cluster.walk(made, **(flow.packet or {}))
                assert outcome.passed == flow.allow, f"step {number} {flow} IPv{family}\n{outcome}"
                walked += 1
            assert walked, (number, flow)


@pytest.mark.parametrize("node", ["n1", "n2"])
@pytest.mark.parametrize("case", [c for c in CASES if len(c.steps) > 1], ids=lambda c: c.id)
def test_each_step_follows_from_the_one_before(case: Case, node: str):
    """The incremental graph goes through the steps and stands where a fresh one would."""
    live = Live(make.world(), node)
    for step in case.steps:
        new = {(o["kind"], make.reference(o)): o for kind in make.KINDS for o in step.world[kind]}
        for gone in [k for k in live.objects if k not in new]:
            live.remove(*gone)
        for key, thing in new.items():
            if live.objects.get(key) != thing:
                live.put(thing)
        live.check()


def test_rendering_is_a_function_of_the_world():
    """Row 93: whoever computes it again gets the same, to the byte, in whatever order objects come."""
    policies = [make.policy(f"a/{n}", ingress=[make.ingress(make.pods())]) for n in ("p", "q")]
    state = with_(*policies)
    backwards = {kind: things[::-1] for kind, things in state.items()}
    for node in ("n1", "n2"):
        one = render_node(engine.build(state), node)
        assert one == render_node(engine.build(backwards), node)


def test_row48_link_local_addresses_pass_between_pods_only_as_neighbour_discovery():
    """No policy can name them, so that every pod, isolated or not, is kept from using them."""
    world = engine.build(BASE)
    cluster = Cluster.rendered(world)
    there = ipaddress.ip_address("fe80::5")
    flow = engine.flow(world, WEB, B_WEB, "80/TCP", 6)
    assert cluster.walk(flow).passed
    assert not cluster.walk(flow, dst=there).passed
    assert not cluster.walk(flow, src=there).passed
    echo = engine.flow(world, WEB, B_WEB, "ICMP", 6)
    assert not cluster.walk(echo, dst=there, icmp_type=128, hop_limit=255).passed
    assert cluster.walk(echo, dst=there, icmp_type=135, hop_limit=255).passed


def test_a_pod_that_speaks_with_anothers_address_is_dropped():
    """Identity is the address, so no address may be borrowed on a pod's link."""
    world = engine.build(BASE)
    cluster = Cluster.rendered(world)
    flow = engine.flow(world, WEB, TOOL, "80/TCP", 4)
    for borrowed in ("10.244.2.10", "198.51.100.7", "172.18.0.2", "10.244.1.1"):
        outcome = cluster.walk(flow, src=ipaddress.ip_address(borrowed))
        assert not outcome.passed, borrowed
        assert outcome.hops[-1][1].prefix in {"KNP|S", "KNP|H|E"}
