"""What the proxy's rules did to real packets, with policy's tables in place before them (legacy tables).

The same rules as nft tables: `tests/kernel/test_proxy_rules.py`, as far as the machine's kernel has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from netpol.model.net import FAMILIES, Family
from tests.uml.inside import lan
from tests.uml.inside.rows_proxy_rules import (
    HOST_PORT,
    NODE_OWN,
    OUTSIDER4,
    OUTSIDER6,
    TOWARDS_REMOTE,
)

pytestmark = [
    pytest.mark.uml,
    pytest.mark.kernel,
    pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"]),
]

Answers = dict[str, Any]
REFUSED, SILENCE = "refused", ""
#: A client as the backends see it without masquerade.
SEEN = {
    "client": (lan.v4(10), lan.v6(10)),
    "backend": (lan.v4(20), lan.v6(20)),
    "other": (lan.v4(30), lan.v6(30)),
    "node": (lan.NODE4, lan.NODE6),
    lan.OUTSIDER: (OUTSIDER4, OUTSIDER6),
}
WEB, DNS, ASSOCIATION = "tcp 80", "udp 53", "sctp 90"
INSIDE, EVERYBODY = ("client", "node"), ("client", "node", lan.OUTSIDER)


@pytest.fixture
def guest(answers_of: Callable[[str], Answers]) -> Answers:
    return answers_of("proxy_rules")


def saw(server: str, who: str, family: Family) -> str:
    return f"{server} saw {SEEN[who][0 if family is Family.V4 else 1]}"


def masked(server: str, family: Family) -> str:
    """The node on the link to the other one."""
    return f"{server} saw {TOWARDS_REMOTE[family]}"


def test_tables_and_hooks_are_as_they_were_written(guest: Answers, family: Family) -> None:
    assert guest["tables"] == []
    assert guest["policy's drift"] == "", f"IPv{family}: policy sees rules that are none of its own"


@pytest.mark.parametrize("what", [WEB, DNS, ASSOCIATION])
@pytest.mark.parametrize("who", EVERYBODY)
def test_a_backend_of_this_node_sees_who_asks(
    guest: Answers, family: Family, who: str, what: str
) -> None:
    assert guest["rules"][f"{who} to web {what}, IPv{family}"] == saw("backend", who, family)


def test_a_backend_on_the_node_itself_sees_who_asks(guest: Answers, family: Family) -> None:
    for who in EVERYBODY:
        assert guest["rules"][f"{who} to host {WEB}, IPv{family}"] == saw("node", who, family)


def test_a_nodeport_is_served_to_all(guest: Answers, family: Family) -> None:
    for who in EVERYBODY:
        assert guest["rules"][f"{who} to nodeport, IPv{family}"] == saw("backend", who, family)


@pytest.mark.parametrize("row", [f"far {WEB}", f"far {DNS}", "nodeport remote"])
def test_only_outsiders_are_masqueraded_to_another_node(
    guest: Answers, family: Family, row: str
) -> None:
    for who in INSIDE:
        assert guest["rules"][f"{who} to {row}, IPv{family}"] == saw("remote", who, family)
    answer = guest["rules"][f"{lan.OUTSIDER} to {row}, IPv{family}"]
    assert answer == masked("remote", family)


def test_without_masquerade_the_answer_would_not_come_back(guest: Answers, family: Family) -> None:
    assert guest["no rules"][f"{lan.OUTSIDER} to far {WEB}, IPv{family}"] == SILENCE
    assert guest["no rules"][f"backend to itself, IPv{family}"] == SILENCE


def test_a_pod_reaches_itself(guest: Answers, family: Family) -> None:
    bridge = lan.v4(1) if family is Family.V4 else lan.v6(1)
    for words in ("itself", "itself udp"):
        answer = guest["rules"][f"backend to {words}, IPv{family}"]
        assert answer == f"backend saw {bridge}"


def test_nothing_else_is_masqueraded(guest: Answers, family: Family) -> None:
    rules = guest["rules"]
    for server in ("backend", "remote"):
        assert rules[f"client to {server}, IPv{family}"] == saw(server, "client", family)
    for who in EVERYBODY:
        assert rules[f"{who} to the node, IPv{family}"] == saw("node", who, family)


@pytest.mark.parametrize("what", [WEB, DNS])
def test_a_local_policy_keeps_the_source_and_lets_this_node_reach_all(
    guest: Answers, family: Family, what: str
) -> None:
    rules = guest["rules"]
    outside = f"{lan.OUTSIDER} to local {what}, IPv{family}"
    assert rules[outside] == saw("backend", lan.OUTSIDER, family)
    for who in INSIDE:
        assert rules[f"{who} to local {what}, IPv{family}"] == saw("remote", who, family)


@pytest.mark.parametrize("row", [f"drop {WEB}", f"drop {DNS}", "nodeport drop"])
def test_a_local_policy_without_an_endpoint_here_drops_outsiders_alone(
    guest: Answers, family: Family, row: str
) -> None:
    assert guest["rules"][f"{lan.OUTSIDER} to {row}, IPv{family}"] == SILENCE
    for who in INSIDE:
        assert guest["rules"][f"{who} to {row}, IPv{family}"] == saw("remote", who, family)


def test_a_drop_leaves_what_is_established(guest: Answers, family: Family) -> None:
    answer = saw("backend", lan.OUTSIDER, family)
    assert guest["established at a drop"][f"IPv{family}"] == [answer, answer, SILENCE]


@pytest.mark.parametrize("what", [WEB, DNS])
def test_no_endpoint_is_refused_at_once(guest: Answers, family: Family, what: str) -> None:
    for who in ("client", lan.OUTSIDER):
        assert guest["rules"][f"{who} to nobody {what}, IPv{family}"] == REFUSED
    if what == WEB:
        assert guest["many at once"][f"nobody 80, IPv{family}"] == 20
    # IPVS takes the node's own packets before filter: its datagram is not sent, its SYN not answered at
    # once but when it is sent again.
    answer = guest["rules"][f"node to nobody {what}, IPv{family}"]
    assert answer in ({"EPERM"} if what == DNS else {SILENCE, "EAGAIN", REFUSED})


def test_source_ranges_hold_for_pods_and_the_node_too(guest: Answers, family: Family) -> None:
    rules = guest["rules"]
    allowed = {"client", lan.OUTSIDER}
    for who in (*EVERYBODY, "other"):
        wanted = saw("backend", who, family) if who in allowed else SILENCE
        assert rules[f"{who} to ranges {WEB}, IPv{family}"] == wanted, who
    for who in EVERYBODY:
        assert rules[f"{who} to no range {WEB}, IPv{family}"] == SILENCE
        assert rules[f"{who} to any range {WEB}, IPv{family}"] == saw("backend", who, family)


@pytest.mark.parametrize("who", EVERYBODY)
def test_nothing_of_the_node_is_reachable_on_a_vip(
    guest: Answers, family: Family, who: str
) -> None:
    closed = [f"tcp {NODE_OWN}", f"udp {NODE_OWN}", f"tcp {HOST_PORT}", "tcp 53"]
    for what in closed:
        assert guest["rules"][f"{who} to web {what}, IPv{family}"] == REFUSED, what
    without = guest["no rules"][f"{who} to web tcp {NODE_OWN}, IPv{family}"]
    assert without == saw("node", who, family), "the node did not listen, so that nothing was shown"


@pytest.mark.parametrize("who", EVERYBODY)
def test_what_ipvs_leaves_to_the_node_is_refused_on_a_vip(
    guest: Answers, family: Family, who: str
) -> None:
    """IPVS begins no connection for source port 20, and the node listens on the very port."""
    words = f"{who} to web {WEB}, IPv{family}"
    assert guest["no rules, port 20"][words] == saw("node", who, family)
    assert guest["port 20"][words] == REFUSED


def test_closed_ports_are_refused_at_once(guest: Answers, family: Family) -> None:
    assert guest["many at once"][f"web {NODE_OWN}, IPv{family}"] == 20


def test_vips_answer_ping(guest: Answers, family: Family) -> None:
    answers = {w: a for w, a in guest["ping"].items() if w.endswith(f"IPv{family}")}
    assert len(answers) == 6
    assert all(answers.values()), answers


def test_errors_about_a_connection_reach_ipvs(guest: Answers, family: Family) -> None:
    errors = guest["errors about a connection"]
    assert errors[f"known, IPv{family}"] == 1
    assert errors[f"unknown, IPv{family}"] == 0


def test_a_bit_of_another_program_makes_a_client_external(guest: Answers, family: Family) -> None:
    """A limit of IPVS: the whole mark is compared."""
    answer = guest["another program's bit"][f"client to local {WEB}, IPv{family}"]
    assert answer == saw("backend", "client", family)


def test_persistence_by_mark_would_keep_the_dialled_port(guest: Answers, family: Family) -> None:
    """Why affinity is the scheduler's matter there (`proxy.lower`): nothing listens on that port."""
    assert guest["affinity by mark"][f"client to local {WEB}, IPv{family}"] == REFUSED


def test_no_neighbour_is_told_where_a_vip_is(guest: Answers, family: Family) -> None:
    assert guest["on the link"][f"IPv{family}"] is False


def test_no_mark_leaves_the_rules(guest: Answers, family: Family) -> None:
    marks = guest["marks that left"]
    assert marks[f"cleared, IPv{family}"] > 0
    assert marks[f"left, IPv{family}"] == 0


@pytest.mark.parametrize(
    ("policy", "who", "web", "local"),
    [
        ("egress of two", "client", False, True),
        ("egress of two", "other", True, False),
        ("egress names addresses of Services", "client", False, False),
    ],
)
@pytest.mark.parametrize("what", [WEB, DNS])
def test_egress_is_judged_on_the_backend_of_either_server(
    guest: Answers, family: Family, policy: str, *, who: str, web: bool, local: bool, what: str
) -> None:
    """The server by address leads to the backend here, that by mark to the remote one."""
    web_answer, local_answer = (
        guest[policy][f"{who} to {row} {what}, IPv{family}"] for row in ("web", "local")
    )
    assert web_answer == (saw("backend", who, family) if web else SILENCE)
    assert local_answer == (saw("remote", who, family) if local else SILENCE)


def test_egress_to_nodeports_is_judged_on_the_backend_too(guest: Answers, family: Family) -> None:
    answers = guest["egress of two"]
    assert answers[f"client to nodeport, IPv{family}"] == SILENCE
    for row in ("nodeport drop", "nodeport remote"):
        assert answers[f"client to {row}, IPv{family}"] == saw("remote", "client", family)


def test_a_denied_pod_is_not_refused_but_dropped(guest: Answers, family: Family) -> None:
    """A VIP's closed ports are the node's, which no policy here names; policy comes first."""
    for policy in ("egress of two", "egress names addresses of Services"):
        assert guest[policy][f"client to web udp {NODE_OWN}, IPv{family}"] == SILENCE


def test_ingress_sees_the_client_where_the_backend_is_here(guest: Answers, family: Family) -> None:
    answers = guest["ingress names the outsider"]
    for row in (f"web {WEB}", f"web {DNS}", f"local {WEB}", "nodeport"):
        words = f"{lan.OUTSIDER} to {row}, IPv{family}"
        assert answers[words] == saw("backend", lan.OUTSIDER, family), words
    for row in (f"web {WEB}", f"web {DNS}", "nodeport"):
        assert answers[f"client to {row}, IPv{family}"] == SILENCE
    assert answers[f"backend to itself, IPv{family}"].startswith("backend saw ")


def test_another_programs_translation_does_not_take_services(
    guest: Answers, family: Family
) -> None:
    answers = guest["another program's DNAT"]
    host_port = f"{lan.OUTSIDER} to the node's host port, IPv{family}"
    assert answers[host_port] == saw("other", lan.OUTSIDER, family), "the translation is not there"
    for who in EVERYBODY:
        for row in (f"web {WEB}", "nodeport"):
            assert answers[f"{who} to {row}, IPv{family}"] == saw("backend", who, family)
        assert answers[f"{who} to web tcp {HOST_PORT}, IPv{family}"] == REFUSED


def test_an_old_tuple_opens_nothing_when_its_port_is_gone(guest: Answers, family: Family) -> None:
    before, after = guest["a port that goes"][f"IPv{family}"]
    assert before == saw("backend", "other", family)
    assert after == REFUSED, "the node listens on that port"
