"""The evaluator against the oracle, on worlds in which everything overlaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netpol.model.flow import Flow, Verdict
from netpol.policy.evaluate import evaluate, verdict
from netpol.policy.world import World
from tests import builders, engine
from tests.oracle.oracle import allowed
from tests.prop import worlds


def flows(
    world: World, manifests: builders.World, ports: list[str]
) -> list[tuple[str, str, str, int, Flow]]:
    """All flows of a world that have a pod at one end at least."""
    ends = worlds.ends(manifests)
    out = []
    for family in (4, 6):
        for src in ends:
            for dst in ends:
                if "/" not in src + dst:
                    continue
                for port in ports:
                    try:
                        out.append(
                            (src, dst, port, family, engine.flow(world, src, dst, port, family))
                        )
                    except engine.NoPartyError:
                        break
    return out


@given(worlds.worlds(), st.lists(worlds.one(worlds.PORTS), min_size=2, max_size=2, unique=True))
def test_engine_is_oracle(manifests: builders.World, ports: list[str]):
    world = engine.build(manifests)
    for src, dst, port, family, flow in flows(world, manifests, ports):
        wanted = allowed(manifests, src, dst, flow.protocol.value, flow.port, family=family)
        trace = evaluate(world, flow)
        assert (trace.verdict is Verdict.ALLOW) == wanted, (src, dst, port, family, trace)
        assert verdict(world, flow) is trace.verdict, (src, dst, port, family)


@given(worlds.worlds(), worlds.one(worlds.PORTS))
def test_traces_are_whole(manifests: builders.World, port: str):
    """A trace names every isolating policy, and its verdict follows from what it lists."""
    world = engine.build(manifests)
    for *_, flow in flows(world, manifests, [port]):
        trace = evaluate(world, flow)
        for one in (trace.egress, trace.ingress):
            if one.isolating:
                assert (one.verdict is Verdict.ALLOW) == any(p.matched for p in one.isolating)
                for policy in one.isolating:
                    assert policy.matched == any(r.matched for r in policy.rules)
                    for rule in policy.rules:
                        assert rule.matched != bool(rule.failed), rule
            else:
                assert one.verdict is Verdict.ALLOW
            assert one.reason
        both = {trace.egress.verdict, trace.ingress.verdict}
        assert (trace.verdict is Verdict.DENY) == (Verdict.DENY in both)
