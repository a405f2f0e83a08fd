"""The proxy's room on a kernel with IPVS: clients that stay connected, restarts, drift, and who refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.uml.inside.steps_proxy_sync import BACKENDS, FOREIGN, GRACE_S

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

Guest = dict[str, Any]


@pytest.fixture(scope="module")
def guest(answers_of: Callable[[str], Guest]) -> Guest:
    """What the group wrote, by the name of each step."""
    return answers_of("proxy_sync")


def test_all_backends_answer_and_settings_are_kept(guest: Guest):
    assert guest["asked"] == sorted(BACKENDS)
    assert guest["faults"] == []
    kept = ("conntrack", "expire_nodest_conn", "expire_quiescent_template")
    assert guest["flags"] == dict.fromkeys(kept, "1")


def test_a_connection_outlives_its_endpoint_and_a_restart_until_the_grace_period_ends(guest: Guest):
    drain = guest["drain"]
    # Connected; the endpoint left; looked at; the agent restarted; the grace period over.
    assert drain["said"] == ["held", "held", "held", "held", ""]
    assert drain["new"] == [True] * 3
    assert (drain["weight"], drain["active"], drain["draining"]) == (0, 1, 1)
    assert GRACE_S - 0.2 <= drain["ended"] < GRACE_S + 3


def test_a_restart_changes_nothing_that_is_right(guest: Guest):
    assert guest["drain"]["repaired"] == ""


def test_a_backend_without_connections_goes_when_it_is_looked_at(guest: Guest):
    assert 0 <= guest["idle"] < 4


def test_a_udp_client_moves_with_its_next_packet(guest: Guest):
    assert guest["udp"] == {"stays": True, "moves": [True, True]}
    assert guest["udp refused"]


def test_affinity_does_not_stick_to_an_endpoint_that_left(guest: Guest):
    assert guest["affinity"] == {"kept": True, "after": True}


def test_a_service_without_endpoints_is_refused_at_once(guest: Guest):
    assert guest["refused"] == [True] * 3
    assert guest["served again"] == sorted(BACKENDS)


def test_the_address_of_a_deleted_service_does_not_lead_to_the_node(guest: Guest):
    assert guest["nobody's"] == [""]


def test_clients_of_the_node_are_served_by_mark_and_stay_at_their_backend(guest: Guest):
    first, *others = guest["by mark"]
    assert first in BACKENDS
    assert others == [first] * 3
    # Why affinity is no persistence there: the port that was dialled would be kept.
    assert guest["by mark, persistent"] == [""]
    assert guest["by mark, repaired"] == [first]


def test_drift_is_found_and_repaired(guest: Guest):
    assert guest["drift"] == [True, True, sorted(BACKENDS)]


def test_somebody_elses_server_is_reported_and_never_touched(guest: Guest):
    assert guest["foreign"] == [str(FOREIGN)]
    assert guest["at the end"]
    assert guest["addresses at the end"]
