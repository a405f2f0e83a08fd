"""What reaches every pod of a bridge at once passes no isolation."""

from __future__ import annotations

import ipaddress

import pytest

from tests import engine
from tests.spec.policy.test_rendered import BASE, TOOL, WEB
from tests.walker.cluster import Cluster


@pytest.mark.parametrize(
    ("family", "there"),
    [
        (4, "224.0.0.1"),
        (4, "239.255.255.250"),
        (4, "255.255.255.255"),
        (6, "ff02::1"),
        (6, "ff05::2"),
    ],
)
def test_multicast_and_broadcast_from_a_pod_do_not_reach_its_neighbours(
    family: int, there: str
) -> None:
    world = engine.build(BASE)
    flow = engine.flow(world, WEB, TOOL, "80/UDP", family)

    outcome = Cluster.rendered(world).walk(flow, dst=ipaddress.ip_address(there))

    assert not outcome.passed
