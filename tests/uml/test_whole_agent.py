"""The whole agent, policy and proxy together, on a real kernel with IPVS and against a real API."""

from __future__ import annotations

from typing import Any

import pytest

from tests.uml import machine
from tests.uml.inside.whole_agent import GATEWAY, NODE_IP, OUTSIDE_IP, PODS

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

_MODULE = "tests.uml.inside.whole_agent"
#: What an agent and the lab's API server import.
PACKAGES = (
    *("aiohappyeyeballs", "aiohttp", "aiohttp_retry", "aiosignal", "annotated_types", "attr"),
    *("certifi", "charset_normalizer", "dateutil", "durationpy", "frozenlist", "idna"),
    *("kubernetes", "multidict", "oauthlib", "prometheus_client", "propcache", "pydantic"),
    *("pydantic_core", "pygments", "requests", "requests_oauthlib", "rich"),
    *("typing_inspection", "urllib3", "websocket", "yaml", "yarl"),
)


@pytest.fixture(scope="module")
def guest() -> dict[str, Any]:
    """A guest of its own, with more memory and more packages than the others."""
    reason = machine.lacking()
    if reason:
        pytest.skip(reason)
    answers = machine.run_guest((_MODULE,), packages=PACKAGES, memory="512M")[_MODULE]
    assert "failed" not in answers, answers["failed"]
    return answers


def test_it_becomes_ready_without_a_fault_or_a_repair(guest: dict[str, Any]) -> None:
    assert guest["ready"] is None
    assert guest["status"] == {
        "in_sync": True,
        "errors": [],
        "rooms": ["policy", "proxy"],
        "drifts": 0,
        "operations": 8,  # four servers with a backend each, one of them by mark
        "servers": 4,
    }


@pytest.mark.parametrize(
    ("question", "seen"),
    [
        ("node to VIP", NODE_IP),
        ("node to load balancer's address", NODE_IP),
        ("node to NodePort", NODE_IP),
        ("pod to VIP", PODS["client"]),
        ("pod to load balancer's address", PODS["client"]),
        ("pod to itself", GATEWAY),
        ("another port of the VIP", "ConnectionRefusedError"),
    ],
)
def test_whom_the_backend_sees(guest: dict[str, Any], question: str, seen: str) -> None:
    assert guest[question] == seen


def test_load_balancers_are_answered(guest: dict[str, Any]) -> None:
    assert (guest["health port"], guest["healthz"]) == (200, 200)


def test_the_command_line_shows_the_kernel(guest: dict[str, Any]) -> None:
    code, said = guest["services"]
    assert code == 0
    assert said.startswith("3 addresses of 1 Service on node n1: 3 forward")
    assert said.count(f"{PODS['backend']}:8080 (active") == 3
    assert "missing" not in said


def test_direct_server_return_comes_and_goes_with_policies(guest: dict[str, Any]) -> None:
    """How many tunnels IPVS has, whether the pod has an end, whom it sees."""
    assert guest["direct"] == [1, True, OUTSIDE_IP]
    assert guest["node to direct"] == NODE_IP
    assert guest["direct, isolated"] == [0, False, OUTSIDE_IP]
    (told,) = guest["direct, told"]
    assert (
        "203.0.113.7:8080/TCP: policy default/guard isolates endpoint 10.244.1.5 (ingress)" in told
    )
    assert guest["direct, again"] == [1, True, OUTSIDE_IP]
    assert guest["direct, gone"][:2] == [0, False]


def test_egress_policy_holds_on_a_vip_also_for_the_nodes_own_ports(guest: dict[str, Any]) -> None:
    assert guest["denied"] == "TimeoutError"


def test_services_and_connections_outlive_the_agent_and_are_taken_over(
    guest: dict[str, Any],
) -> None:
    assert guest["while it is away"] == NODE_IP
    assert guest["connection"] == "still there"
    assert guest["restarted"] == {
        "in_sync": True,
        "errors": [],
        "rooms": ["proxy"],  # policy was switched off
        "drifts": 0,
        "operations": 0,
        "servers": 4,
    }


def test_cleanup_leaves_nothing(guest: dict[str, Any]) -> None:
    code, said = guest["cleanup"]
    assert code == 0, said
    assert guest["left"] == {
        "servers": [],
        "rules": [],
        "sets": [],
        "links": 0,
        "forward": "0",
        "conntrack": "0",
        "files": [],
    }
