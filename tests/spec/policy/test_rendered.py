"""Every case through rendered rules: the packets of its flows walk every hook on their way."""

from __future__ import annotations

import pytest

from tests import engine
from tests.spec.policy.case import Case, Flow
from tests.spec.policy.cases import CASES
from tests.walker.cluster import Cluster

WIDE, NARROW = 0xFFF0_0000, 0xE000_0000


def families(flow: Flow) -> tuple[int, ...]:
    return (4, 6) if flow.family is None else (flow.family,)


@pytest.mark.parametrize("field_mask", [WIDE, NARROW], ids=["12bit", "3bit"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_walk(case: Case, field_mask: int):
    for number, step in enumerate(case.steps):
        world = engine.build(step.world)
        cluster = Cluster.rendered(world, field_mask=field_mask)
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
