"""Rendered rules against the oracle: the packets of every flow of random worlds walk the rules' text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from netpol.model.flow import Flow, Party, PartyKind, Verdict
from netpol.policy.evaluate import evaluate
from netpol.render.logprefix import DropReason, decode
from netpol.render.options import DenyWith
from tests import builders, engine
from tests.oracle.oracle import allowed
from tests.prop import worlds
from tests.prop.test_policy import flows
from tests.walker.cluster import Cluster

WIDE, NARROW = 0xFFF0_0000, 0xE000_0000


def held(cluster: Cluster, party: Party) -> bool:
    """Whether a node holds back an address: in its pod range, and of no pod that it knows."""
    return party.kind is PartyKind.EXTERNAL and cluster.place(party)[0] == "pod"


def expected(cluster: Cluster, manifests: builders.World, src: str, dst: str, flow: Flow) -> bool:
    """The oracle's answer, and the dataplane's own law about addresses that nobody has."""
    if held(cluster, flow.src):
        return False
    if held(cluster, flow.dst) and cluster.place(flow.src) != ("host", cluster.place(flow.dst)[1]):
        return False
    return allowed(manifests, src, dst, flow.protocol.value, flow.port, family=int(flow.family))


@given(
    worlds.worlds(),
    st.lists(worlds.one(worlds.PORTS), min_size=1, max_size=2, unique=True),
    worlds.one((WIDE, NARROW)),
    worlds.one((0, 0x0010_0000, 0x2000_0000, 0x0550_0000, 0xFFF0_0000)),
    worlds.one(tuple(DenyWith)),
)
def test_walk_is_oracle(
    manifests: builders.World, ports: list[str], field_mask: int, dirty: int, deny_with: DenyWith
):
    """Also with bits left over in the field, which no judgement may read."""
    world = engine.build(manifests)
    cluster = Cluster.rendered(world, field_mask=field_mask, deny_with=deny_with)
    for src, dst, port, family, flow in flows(world, manifests, ports):
        if not cluster.hops(flow):
            continue
        # What OUTPUT and INPUT let pass at once keeps the mark that it came with.
        judged = "host" not in (cluster.place(flow.src)[0], cluster.place(flow.dst)[0])
        fields = {"mark": 0xC001 | dirty & field_mask} if judged else {}
        outcome = cluster.walk(flow, **fields)
        wanted = expected(cluster, manifests, src, dst, flow)
        assert outcome.passed == wanted, f"{src} to {dst} {port} IPv{family}\n{outcome}"


@settings(max_examples=settings.default.max_examples // 4)
@given(worlds.crowded(), worlds.one(worlds.PORTS), worlds.one((NARROW, 0x0001_C000)))
def test_overflow_is_oracle(manifests: builders.World, port: str, field_mask: int):
    """Classes beyond the field's numbers are found by sets; the field may lie anywhere."""
    world = engine.build(manifests)
    cluster = Cluster.rendered(world, field_mask=field_mask, foreign_mark=0x0400_2001)
    assert "KNP-OI4-" in cluster.texts["n1"].sets
    assert "KNP-OE6-" in cluster.texts["n1"].sets
    for src, dst, _, family, flow in flows(world, manifests, [port]):
        if not cluster.hops(flow):
            continue
        outcome = cluster.walk(flow)
        wanted = expected(cluster, manifests, src, dst, flow)
        assert outcome.passed == wanted, f"{src} to {dst} {port} IPv{family}\n{outcome}"


@settings(max_examples=settings.default.max_examples // 5)
@given(worlds.worlds(max_policies=3))
def test_established_packets_pass(manifests: builders.World):
    world = engine.build(manifests)
    cluster = Cluster.rendered(world)
    for *_, flow in flows(world, manifests, ["80/TCP"]):
        if cluster.hops(flow):
            assert cluster.walk(flow, ctstate="ESTABLISHED").passed


@settings(max_examples=settings.default.max_examples // 5)
@given(worlds.worlds(), worlds.one(tuple(DenyWith)))
def test_denied_packets_say_where(manifests: builders.World, deny_with: DenyWith):
    """The prefix of a denied packet names the direction that the evaluator blames first."""
    world = engine.build(manifests)
    cluster = Cluster.rendered(world, deny_with=deny_with)
    for *_, flow in flows(world, manifests, ["80/TCP"]):
        if not cluster.hops(flow) or held(cluster, flow.src) or held(cluster, flow.dst):
            continue
        outcome = cluster.walk(flow)
        if outcome.passed:
            continue
        prefix = outcome.hops[-1][1].prefix
        assert prefix is not None
        reading = decode(prefix)
        assert reading is not None
        assert reading.reason is DropReason.DENIED
        trace = evaluate(world, flow)
        first = trace.egress if trace.egress.verdict is Verdict.DENY else trace.ingress
        assert reading.direction is first.direction
