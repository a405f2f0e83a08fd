"""Direct server return on two nodes of a guest: whom pods see, which way answers go, who may forge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from netpol.model.net import FAMILIES, Family
from tests.uml.inside.steps_proxy_dsr import (
    CLIENT_ADDRESS,
    LARGE,
    NODES,
    PORT,
    VIP,
    node_address,
    pod_address,
)

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

Answers = dict[str, Any]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


@pytest.fixture
def guest(answers_of: Callable[[str], Answers]) -> Answers:
    return answers_of("proxy_dsr")


def both(address: str, tail: str = ", got 0") -> list[str]:
    return [f"{pod} saw {address}{tail}" for pod in ("pod-a", "pod-b")]


def test_ends_are_made_once_and_policys_rules_stay(guest: Answers) -> None:
    made = {"faults": {}, "same": True, "drift": "", "ports": [True, True]}
    assert guest["ends"] == {"a": made, "b": made}
    assert guest["links"] == {
        "pod-a": ["knp-dsr", "knp-dsr6"],
        "pod-b": ["knp-dsr", "knp-dsr6"],
        "other-b": [],
    }


@each_family
def test_pods_see_the_client_and_answer_it_without_the_node_that_it_reached(
    guest: Answers, family: Family
) -> None:
    answers, ways = guest[f"answers, IPv{family}"]
    assert answers == both(CLIENT_ADDRESS[family])
    # pod-a is on the node that the client reached, pod-b's answers come by its own node.
    assert ways == [[f"lan-{node}", VIP[family], PORT] for node in ("a", "b")]


@each_family
def test_datagrams_go_the_same_ways(guest: Answers, family: Family) -> None:
    answers, ways = guest[f"by UDP, IPv{family}"]
    assert answers == both(CLIENT_ADDRESS[family], "")
    assert ways == [[f"lan-{node}", VIP[family], PORT] for node in ("a", "b")]


@each_family
def test_much_goes_both_ways(guest: Answers, family: Family) -> None:
    tail = f", got {LARGE}, back {LARGE}"
    assert guest[f"large, IPv{family}"] == both(CLIENT_ADDRESS[family], tail)


@each_family
def test_clients_of_nodes_are_served_without_tunnels(guest: Answers, family: Family) -> None:
    """Answers from an address that is also their own node's would not reach them."""
    seen = guest[f"clients of nodes, IPv{family}"]
    for node in NODES:
        assert seen[node] == both(node_address(node, family))
    assert seen["other-b"] == both(pod_address("other-b", family))


def test_only_a_backend_speaks_from_the_services_address_and_port(guest: Answers) -> None:
    assert guest["forged"] == {
        f"pod-b {PORT}": True,
        f"pod-b {PORT + 1}": False,
        f"other-b {PORT}": False,
    }


def test_an_end_goes_with_its_need(guest: Answers) -> None:
    assert guest["pod-a left"] == [{}, [], ["knp-dsr", "knp-dsr6"]]
    assert guest["links, isolated"] == {"pod-a": [], "pod-b": [], "other-b": []}


def test_the_hosts_settings_come_and_go_with_the_ends(guest: Answers) -> None:
    assert guest["host"] == {"a": ["1", "2"], "b": ["1", "2"]}
    assert guest["host, isolated"] == "0"


def test_a_tunnel_to_an_isolated_pod_ends_nowhere(guest: Answers) -> None:
    """The other node may not know yet: the pod's own node has taken the end away."""
    assert not [a for a in guest["isolated without ends"] if "saw" in a]


@each_family
def test_isolated_backends_are_served_by_the_node_that_the_client_reached(
    guest: Answers, family: Family
) -> None:
    answers, ways = guest[f"fallback, IPv{family}"]
    assert answers == [
        f"pod-a saw {CLIENT_ADDRESS[family]}, got 0",
        f"pod-b saw {node_address('a', family)}, got 0",
    ]
    assert ways == [["lan-a", VIP[family], PORT]]
