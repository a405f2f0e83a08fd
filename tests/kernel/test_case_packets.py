"""The case table as real packets on the real kernel: evaluator, walker and packets agree on one table.

Each step's rules are on two nodes by the real drivers, in both variants of iptables; every new connection of
the table is a packet of its own between namespaces, in every family that both ends have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from netpol.kernel.drivers import Variant
from netpol.model.net import format_address
from tests import engine
from tests.kernel.caselayout import Shot, is_new, shots_of, spaces_of
from tests.kernel.casenet import CaseNet, pool
from tests.spec.policy.case import Case
from tests.spec.policy.cases import CASES

pytestmark = pytest.mark.kernel

#: Flows of the table that are no new connections, and why no packet of this lab stands for them; the
#: walker takes them all.
SKIPPED = {
    "18": (3, "packets of a connection that is there already, or related to one"),
    "75": (
        9,
        "neighbour discovery (all neighbours are static here), errors related to a connection",
    ),
    "84": (4, "needs IPVS to send from OUTPUT"),
    "89": (1, "a packet of a connection that is there already"),
}
#: New connections of the table, of both families.
SHOTS = 755
SEVERAL = [c for c in CASES if len(c.steps) > 1]


@pytest.fixture(scope="module", params=list(Variant))
def net(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CaseNet]:
    lock_file = tmp_path_factory.mktemp("case") / "xtables.lock"
    with pool(str(request.param)[0], request.param, lock_file) as made:
        yield made


def _run(net: CaseNet, case: Case, *, follow: bool) -> None:
    """Send the flows of every step of a case under its rules."""
    for number, step in enumerate(case.steps):
        world = engine.build(step.world)
        shots, _ = shots_of(world, step)
        net.place(spaces_of(world, shots, net.placed))
        net.rules(world, follow=follow and number > 0)
        answered = net.send(shots)
        wrong = [
            _told(shot, passed=passed)
            for shot, passed in zip(shots, answered, strict=True)
            if passed != shot.asked.allow
        ]
        if wrong:
            rules = "\n".join(n.text() for n in net.nodes)
            told = "\n".join(wrong)
            pytest.fail(f"{case.id}, step {number}:\n{told}\n\n{case}\n\n{rules}", pytrace=False)


def _told(shot: Shot, *, passed: bool) -> str:
    src, dst = map(format_address, shot.ends)
    verb = "passed" if passed else "did not pass"
    return f"{src} to {dst} {verb}: {shot.asked}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_packets(net: CaseNet, case: Case) -> None:
    """Rules of an agent that starts, over whatever the case before has left."""
    _run(net, case, follow=False)


@pytest.mark.parametrize("case", SEVERAL, ids=lambda c: c.id)
def test_packets_after_changes(net: CaseNet, case: Case) -> None:
    """Rules of an agent that runs while the world goes through the steps."""
    _run(net, case, follow=True)


def test_without_rules_every_packet_arrives(tmp_path_factory: pytest.TempPathFactory) -> None:
    """So that a packet that does not arrive above was stopped by a rule."""
    lock_file = tmp_path_factory.mktemp("case") / "xtables.lock"
    seen: set[object] = set()
    with pool("x", Variant.NFT, lock_file) as net:
        for case in CASES:
            for step in case.steps:
                world = engine.build(step.world)
                every, _ = shots_of(world, step)
                spaces = spaces_of(world, every, net.placed)
                shots = []
                for shot in every:
                    way = (shot.ends, shot.port, *(spaces[a] for a in shot.ends))
                    if way not in seen:
                        seen.add(way)
                        shots.append(shot)
                if not shots:
                    continue
                net.place(spaces)
                answered = net.send(shots)
                lost = [
                    _told(shot, passed=False)
                    for shot, passed in zip(shots, answered, strict=True)
                    if not passed
                ]
                assert not lost, f"{case.id}:\n" + "\n".join(lost)


def test_nothing_of_the_table_is_left_out_unseen() -> None:
    """What is sent and what is not, by number; a family is left out only where an end is of the other."""
    sent, skipped = 0, Counter[str]()
    for case in CASES:
        for step in case.steps:
            shots, absent = shots_of(engine.build(step.world), step)
            sent += len(shots)
            skipped.update(case.row for f in step.flows if not is_new(f))
            for flow, family in absent:
                literals = [r for r in (flow.src, flow.dst) if "/" not in r]
                assert any((":" in r) != (family == 6) for r in literals), (case.id, flow)
    assert sent == SHOTS
    assert skipped == {row: count for row, (count, _) in SKIPPED.items()}
