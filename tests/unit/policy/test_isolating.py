"""Which policy isolates the pod of an address, wherever the pod is: what direct server return asks."""

from __future__ import annotations

import pytest

from netpol.model.ids import Direction, ObjectKey
from netpol.model.net import parse_address
from netpol.policy.graph import Graph
from tests import builders as make
from tests import engine

ADDRESS = parse_address("10.244.2.5")


def graph(*policies) -> Graph:
    pod = make.pod("shop/web", ip="10.244.2.5", node="n2", app="web")
    world = engine.build(make.world(make.namespace("shop"), pod, *policies))
    out = Graph("n1")
    for known in world.pods.values():
        out.upsert_pod(known)
    for policy in world.policies.values():
        out.upsert_policy(policy)
    return out


def test_a_pod_without_policies_is_isolated_by_none():
    assert graph().isolating(ADDRESS) is None


@pytest.mark.parametrize(
    ("name", "types", "direction"),
    [("in", ["Ingress"], Direction.INGRESS), ("out", ["Egress"], Direction.EGRESS)],
)
def test_a_policy_that_selects_it_does_so_at_once(name, types, direction):
    found = graph(make.policy(f"shop/{name}", make.selector(app="web"), types=types))
    assert found.isolating(ADDRESS) == (f"shop/{name}", direction)
    found.flush(together=True)
    assert found.isolating(ADDRESS) == (f"shop/{name}", direction)
    found.remove_policy(ObjectKey("shop", name))
    assert found.isolating(ADDRESS) is None, "before the next flush"


def test_policies_for_others_do_not_count():
    others = make.policy("shop/in", make.selector(app="db"), ingress=[])
    elsewhere = make.policy("x/in", ingress=[])
    assert graph(others, elsewhere).isolating(ADDRESS) is None


def test_an_address_of_no_pod_is_not_known():
    with pytest.raises(KeyError):
        graph().isolating(parse_address("10.244.2.6"))
