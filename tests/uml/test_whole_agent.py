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


def test_what_the_kernel_lacks_is_said_before_anything_is_done(guest: dict[str, Any]) -> None:
    text = "IPVS: needed IPv{} and the scheduler nosuch; got no module ip_vs_nosuch"
    assert guest["lacks"] == [[], [[text.format(4)], [text.format(6)]]]


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


def test_answers_pass_a_host_that_forwards_nothing(guest: dict[str, Any]) -> None:
    assert guest["forward"] == PODS["client"]
    # What is no Service's is the host's matter.
    assert guest["forward, no Service"] == "TimeoutError"


@pytest.mark.parametrize("name", ["proxy alone", "proxy and routes"])
def test_it_works_without_policy(guest: dict[str, Any], name: str) -> None:
    assert guest[f"{name}: ready"] is None
    assert guest[f"{name}: answers"] == [NODE_IP, PODS["client"], PODS["client"]]
    status = guest[f"{name}: status"]
    assert status == {
        "in_sync": True,
        "errors": [],
        "rooms": ["proxy", "routes"] if "routes" in name else ["proxy"],
        "drifts": 0,
        "operations": 8,
        "servers": 4,
    }
    assert guest[f"{name}: facts"] == {"pod_ranges": ["10.244.1.0/24"]}
    assert guest[f"{name}: chains of policy"] == 0
    left = guest[f"{name}: left"]
    assert not any(left[what] for what in ("servers", "rules", "sets", "links", "files"))


@pytest.mark.parametrize("ledger", ["no ledger", "no readable ledger"])
def test_servers_of_kube_proxy_stay_while_nobody_can_tell_them_from_ours(
    guest: dict[str, Any], ledger: str
) -> None:
    code, said = guest[f"kube-proxy, {ledger}"]
    assert code == 3
    assert "cannot be told from netpol's; nothing was removed" in said
    assert guest["kube-proxy, nothing removed"]


def test_of_kube_proxys_servers_all_go_and_no_other_one(guest: dict[str, Any]) -> None:
    code, said = guest["kube-proxy"]
    assert code == 0
    assert "removed of kube-proxy: 1 set, 1 link, 2 servers" in said
    assert "left alone: 1 server of IPVS on the node's own addresses" in said
    assert guest["kube-proxy, spared"]
    assert guest["kube-proxy, again"][1] == "nothing of kube-proxy here\n"
    assert guest["kube-proxy, then netpol"] == [f"{NODE_IP}:3306/TCP"]
