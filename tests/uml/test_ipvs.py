"""Services by IPVS under policy, with real packets: law 9 of the dataplane.

Packets run through legacy tables here, since this kernel has no nft tables; that the nft text says the same
is proven by the walker (`tests/walker/test_services.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.uml.inside import lan
from tests.uml.inside.steps import QUESTIONS, SERVICES, STEPS

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

Guest = dict[str, Any]

CLIENT, CLIENT6, OTHER, OTHER6 = lan.v4(10), lan.v6(10), lan.v4(30), lan.v6(30)
#: The right answer to each question where nothing forbids it. Sources are kept, but of a pod that reaches
#: itself; the node speaks to its own address with that address.
ANSWERS = {
    "direct": f"backend saw {CLIENT}",
    "vip": f"backend saw {CLIENT}",
    "vip udp": f"backend saw {CLIENT}",
    "vip sctp": f"backend saw {CLIENT}",
    "vip of other": f"other saw {CLIENT}",
    "vip of the node": f"node saw {CLIENT}",
    "vip, other port": f"node saw {CLIENT}",
    "nodeport": f"backend saw {CLIENT}",
    "the node": f"node saw {CLIENT}",
    "direct6": f"backend saw {CLIENT6}",
    "vip6": f"backend saw {CLIENT6}",
    "vip6 udp": f"backend saw {CLIENT6}",
    "vip6, other port": f"node saw {CLIENT6}",
    "other to vip": f"backend saw {OTHER}",
    "other to vip6": f"backend saw {OTHER6}",
    "backend to itself": f"backend saw {lan.v4(1)}",
    "node to vip": f"backend saw {lan.VIP4}",
    "outsider to nodeport": "backend saw 172.18.0.9",
}
EVERYTHING = set(ANSWERS)
TO_BACKEND = {"direct", "vip", "nodeport", "direct6", "vip6"}
#: What policies of the client and the backend do not touch.
OTHERS = {"other to vip", "other to vip6", "outsider to nodeport"}
OWN = {"backend to itself", "node to vip"}
OF_THE_NODE = {"vip of the node", "vip, other port", "the node", "vip6, other port"}
UDP_AND_SCTP = {"vip udp", "vip6 udp", "vip sctp"}

#: What is answered in each step; everything else must not be.
ALLOWED = {
    "no policy": EVERYTHING,
    # The ports of the pod count, not those of the Service; the node is no backend.
    "egress names the backend": TO_BACKEND | OTHERS | OWN,
    # The Service's address is nobody's: its served ports are the backend's, the others the node's.
    "egress names the vip": {"vip, other port"} | OTHERS | OWN,
    "ingress names the client": TO_BACKEND | OF_THE_NODE | OWN | {"vip of other"},
    # The client takes no connections itself, and has its answers all the same.
    "both name each other": TO_BACKEND | OWN,
    "backend shut": OF_THE_NODE | OWN | {"vip of other"},
}


@pytest.fixture(scope="module")
def guest(answers_of: Callable[[str], Guest]) -> Guest:
    """What the group wrote, by the name of each step."""
    return answers_of("policy")


def answered(answers: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in answers.items() if text}


def expected(names: set[str]) -> dict[str, str]:
    return {name: ANSWERS[name] for name in names}


def test_every_step_has_a_claim():
    assert set(ALLOWED) == set(STEPS)
    assert EVERYTHING | {"unknown pod to vip"} == set(QUESTIONS)


@pytest.mark.parametrize("step", STEPS)
def test_packets_through_services(guest: Guest, step: str):
    assert answered(guest[step]) == expected(ALLOWED[step])


def test_a_pod_that_is_not_known_is_held_through_services_too(guest: Guest):
    assert {guest[step]["unknown pod to vip"] for step in STEPS} == {""}


def test_without_the_module_no_rule_and_no_set(guest: Guest):
    assert guest["without the module"] == {"looked": False, "rules": 0}
    assert guest["with the module"] == {"looked": True, "rules": 1}


def test_what_is_let_through_is_what_the_kernel_serves(guest: Guest):
    told = {(a, protocol.lower(), port) for a, protocol, port in guest["served"]["services"]}
    at_home = {s for s in SERVICES if s.to == lan.NODE4}
    assert told == {(s.address, s.protocol, s.port) for s in SERVICES if s not in at_home}
    (note,) = guest["served"]["notes"]
    assert note.startswith(f"IPVS services with a backend on this node itself: {len(at_home)},")
    assert guest["served"]["faults"] == []


def test_the_rule_is_what_lets_services_through(guest: Guest):
    """Without it INPUT judges a Service's address, which no policy names."""
    assert answered(guest["without the rule"]) == expected({"direct", "direct6"} | OTHERS | OWN)


def test_a_service_comes_and_goes_with_set_members_alone(guest: Guest):
    backend = f"backend saw {CLIENT}"
    look = {"changed": True, "tables": False, "drift": ""}
    assert guest["late, not looked"] == {"late": "", "vip": backend}
    assert guest["late, look"] == look
    assert guest["late, looked"] == {"late": backend, "vip": backend}
    assert guest["gone, look"] == look
    assert guest["gone, looked"] == {"late": "", "vip": backend}


def test_the_hole_that_a_service_leaves_until_the_next_look(guest: Guest):
    """What docs/adr/0004 says: the node's own listener on the port is reached for that long."""
    assert guest["gone, not looked"]["late"] == f"node saw {CLIENT}"


def test_a_known_flow_is_judged_again_when_its_backend_changes(guest: Guest):
    """IPVS ends conntrack's entry with its own, so that the flow is new when it goes elsewhere."""
    served = expected(TO_BACKEND | UDP_AND_SCTP | OTHERS | OWN)
    assert answered(guest["served before the move"]) == served
    assert guest["flow before the move"] == f"backend saw {CLIENT}"
    assert guest["flow after the move"] == ["", ""]
    assert guest["flow without policy"] == f"other saw {CLIENT}"


RST_ALONE = 0x04


@pytest.mark.parametrize(
    "step", ["forged, egress", "forged, ingress", "forged, ingress from outside"]
)
def test_a_reset_of_the_node_makes_no_flow_established(guest: Guest, step: str):
    """Out of the blue, reset, SYN: were the entry kept after the reset, OUTPUT would pass the SYN."""
    assert guest[step] == [[RST_ALONE], [], []]


def test_what_ipvs_leaves_to_the_node_is_judged_as_the_nodes(guest: Guest):
    """It begins nothing from port 20, and looks at no frame to everybody; the node listens there."""
    node = f"node saw {CLIENT}"
    assert guest["passed by IPVS, open"] == {"port 20": node, "broadcast": node}
    assert guest["passed by IPVS, shut"] == {"port 20": "", "broadcast": ""}


def test_replies_belong_to_their_connection_with_vs_conntrack_alone(guest: Guest):
    """The client takes no connections, so that a reply that is none of its own is dropped."""
    assert answered(guest["conntrack on"]) == expected(EVERYTHING)
    lost = {"vip", "vip of other", "nodeport", "vip6", *UDP_AND_SCTP}
    assert not lost & set(answered(guest["conntrack off"]))
    assert guest["conntrack off"]["direct"] == ANSWERS["direct"]
    assert guest["conntrack kept"] == ["1"]
