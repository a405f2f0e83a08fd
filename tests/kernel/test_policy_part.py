"""The agent's policy part: when the cluster's pods are watched, and what it tells of denied packets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from netpol.agent.policy import PEERS_LINGER_S, PolicyPart
from netpol.aio.clock import SystemClock
from netpol.config import Settings
from netpol.enforce.node import NodeFacts
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.render.options import DenyWith
from tests import builders as make
from tests.prop.test_plan_safety import pod, policy, role


class Watches:
    """The watches that run, by name."""

    def __init__(self) -> None:
        self.running = {"cluster pods": object()}

    def get(self, name: str) -> Any:
        return self.running.get(name)

    async def stop(self, name: str) -> None:
        del self.running[name]


class Later(SystemClock):
    """A clock that is put forward."""

    skipped_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.skipped_s


@pytest.fixture
def part() -> Iterator[PolicyPart]:
    settings = Settings(node="n1", deny_with="reject")
    made = PolicyPart(
        settings,
        facts=NodeFacts(settings),
        tables=FakeTables(sets=FakeSets()),
        clock=Later(),
        applied=lambda: None,
    )
    yield made
    made.close()


async def test_the_clusters_pods_are_watched_while_older_rules_may_name_them(
    part: PolicyPart,
) -> None:
    watches, clock = Watches(), part._clock
    assert isinstance(clock, Later)
    part._watches = watches  # type: ignore[assignment]
    peers = policy("p", role("a"), "Ingress", ingress=[make.ingress(make.pods(role="b"))])
    for event in (pod("x", 2, role="a"), peers):
        event.tell(part.graph)
    part.graph.flush(together=True)
    await part._mind_peers(wait=False)
    # The policy no longer names pods, and the kernel does not take that.
    policy("p", role("a"), "Ingress").tell(part.graph)
    part.graph.flush(together=True)
    assert not part.graph.needs_peers
    ((identity, now),) = part.graph.active_policies.items()
    part.room.dataplane.refusals.policies[identity] = now, "refused"
    clock.skipped_s += 2 * PEERS_LINGER_S
    await part._mind_peers(wait=False)
    assert watches.running
    # When it does, the watch lingers and then ends.
    part.room.dataplane.refusals.policies.clear()
    await part._mind_peers(wait=False)
    assert watches.running
    clock.skipped_s += 2 * PEERS_LINGER_S
    await part._mind_peers(wait=False)
    assert not watches.running


def test_status_says_what_becomes_of_denied_packets(part: PolicyPart) -> None:
    assert part.document()["deny_with"] == "reject"
    assert "deny_fallback" not in part.document()
    plane = part.room.dataplane
    plane.reject_fault = "table filter is incompatible"
    plane.options = type(plane.options)(deny_with=DenyWith.DROP)
    assert part.document()["deny_with"] == "drop"
    assert part.document()["deny_fallback"] == "table filter is incompatible"
