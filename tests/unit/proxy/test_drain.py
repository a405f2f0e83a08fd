"""The life of a real server."""

from __future__ import annotations

import itertools

import pytest

from netpol.model.ids import Protocol
from netpol.model.ipvs import RealConfig, RealState, ServerState, VirtualServer
from proxy.drain import TRANSITIONS, Deed, Drains, Event, Gone, Life, leaves_by
from tests.proxynode import id_of, real

WEB, POD = id_of("10.96.0.1"), real("10.0.1.2")


def state(active: int = 0, inactive: int = 0, persistent: int = 0) -> dict[object, ServerState]:
    found = RealState(RealConfig(0), active, inactive, persistent)
    return {WEB: ServerState(VirtualServer(WEB), {POD: found})}


def test_every_event_has_an_answer_in_every_life():
    assert set(TRANSITIONS) == set(itertools.product(Life, Event))


def test_nothing_is_done_to_what_is_absent_but_to_add_it():
    deeds = {e: TRANSITIONS[Life.ABSENT, e] for e in Event}
    assert deeds.pop(Event.PLANNED) == (Life.ACTIVE, Deed.ADD)
    assert set(deeds.values()) == {(Life.ABSENT, Deed.NOTHING)}


@pytest.mark.parametrize(
    ("protocol", "scheduler", "event"),
    [
        (Protocol.TCP, "rr", Event.LEFT),
        (Protocol.TCP, "mh", Event.LEFT),
        (Protocol.TCP, "dh", Event.DROPPED),
        (Protocol.UDP, "rr", Event.DROPPED),
        (Protocol.SCTP, "rr", Event.DROPPED),
    ],
)
def test_who_may_drain(protocol: Protocol, scheduler: str, event: Event):
    assert leaves_by(protocol, scheduler) is event


@pytest.mark.parametrize(
    ("states", "now_s", "gone"),
    [
        (state(active=1), 109.0, False),
        (state(inactive=1), 109.0, False),
        (state(active=1), 110.0, True),
        (state(), 100.0, True),
        (state(persistent=3), 100.0, True),  # templates are no connections
    ],
)
def test_a_drain_ends_when_idle_or_overdue(states: dict, now_s: float, gone: bool):
    drains = Drains(10.0)
    drains.begin(WEB, POD, now_s=100.0)
    drains.begin(WEB, POD, now_s=105.0)  # it drains already
    expected = Gone(((WEB, POD),), ()) if gone else Gone((), ())
    assert drains.look(states, now_s=now_s) == expected


def test_what_vanished_is_not_deleted():
    drains = Drains(10.0)
    drains.begin(WEB, POD, now_s=100.0)
    gone = Gone((), ((WEB, POD),))
    assert drains.look({}, now_s=100.0) == gone
    assert drains.look({WEB: ServerState(VirtualServer(WEB))}, now_s=100.0) == gone


def test_what_has_a_weight_again_is_not_deleted():
    drains = Drains(10.0)
    drains.begin(WEB, POD, now_s=100.0)
    states = {WEB: ServerState(VirtualServer(WEB), {POD: RealState(RealConfig(1))})}
    assert drains.look(states, now_s=1000.0) == Gone((), ((WEB, POD),))


def test_drains_are_forgotten_with_their_servers():
    drains = Drains(10.0)
    dns = id_of("10.96.0.2")
    for id_ in (WEB, dns):
        drains.begin(id_, POD, now_s=1.0)
        drains.begin(id_, real("10.0.1.3"), now_s=1.0)
    assert len(drains) == 4
    drains.end(WEB, POD)
    drains.keep([WEB])
    assert (drains.ids, len(drains)) == ((WEB,), 1)
    drains.forget(WEB)
    drains.end(WEB, POD)
    assert not drains.ids
