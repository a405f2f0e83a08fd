"""Why a packet was dropped, computed by the real evaluator on a small world."""

import pytest

from netpol.audit import attribute
from netpol.audit.attribute import Attributor, nearest_rule
from netpol.audit.packet import parse
from netpol.model.flow import Flow
from netpol.model.ids import Direction, Protocol
from netpol.model.net import parse_address
from netpol.policy.evaluate import evaluate
from netpol.render.logprefix import decode
from tests.unit.audit import samples
from tests.unit.audit.samples import API, DB, WEB, Judge, payload


def attribution(judge, prefix, *packet, **how):
    attributor = Attributor(
        party=judge.party, resolve=judge.resolve, generation=lambda: judge.generation
    )
    return attributor.attribute(decode(prefix), parse(payload(*packet, **how)))


def test_a_denied_packet_names_both_pods_the_policies_and_the_nearest_rule():
    got = attribution(Judge(samples.DB_POLICY, samples.DENY_ALL), samples.INGRESS, WEB, DB)
    assert (got.src.namespace, got.src.pod, got.src.uid, got.src.kind) == (
        "shop",
        "web",
        "uid-web",
        "pod",
    )
    assert (got.dst.ip, got.dst.pod) == (DB, "db")
    assert got.policies == ("shop/db", "shop/deny-all")
    assert (got.rule.policy, got.rule.direction, got.rule.number) == ("shop/db", "ingress", 1)
    assert [(t.term, t.reason) for t in got.rule.failed] == [
        ("pods with app=api in shop", "shop/web has app=web")
    ]
    assert (got.note, got.generation) == ("", 1)


def test_the_failed_term_of_a_right_peer_on_a_wrong_port_is_the_port():
    got = attribution(Judge(samples.DB_POLICY), samples.INGRESS, API, DB, dport=80)
    assert got.rule.number == 1
    assert [(t.term, t.reason) for t in got.rule.failed] == [("port 5432/TCP", "the port is 80")]


def test_a_policy_without_rules_has_no_nearest_rule():
    got = attribution(Judge(samples.DENY_ALL), samples.INGRESS, WEB, API)
    assert got.policies == ("shop/deny-all",)
    assert got.rule is None


def test_the_direction_of_the_prefix_is_the_one_explained():
    out = samples.policy("web-out", samples.app("web"), direction=Direction.EGRESS)
    judge = Judge(samples.DB_POLICY, out)
    assert attribution(judge, samples.EGRESS, WEB, DB).policies == ("shop/web-out",)
    assert attribution(judge, samples.INGRESS, WEB, DB).policies == ("shop/db",)


def test_when_the_policies_allow_it_by_now_the_note_says_so():
    got = attribution(Judge(samples.DB_POLICY), samples.INGRESS, API, DB)
    assert (got.note, got.policies, got.rule) == ("policy changed since", ("shop/db",), None)
    got = attribution(Judge(), samples.INGRESS, API, DB)
    assert (got.note, got.policies) == ("policy changed since", ())


def test_without_an_evaluator_the_parties_are_still_named():
    judge = Judge()
    judge.resolve = lambda _: None
    got = attribution(judge, samples.INGRESS, WEB, DB)
    assert (got.src.pod, got.dst.pod, got.note) == ("web", "db", attribute.NOTE_UNKNOWN)


@pytest.mark.parametrize(
    ("prefix", "note"),
    [(samples.HELD, attribute.NOTE_HELD), (samples.SPOOFED, attribute.NOTE_SPOOFED)],
)
def test_held_and_spoofed_packets_ask_no_policy(prefix, note):
    judge = Judge(samples.DENY_ALL)
    got = attribution(judge, prefix, "10.244.0.99", DB)
    assert (got.note, got.policies, got.rule, judge.asked) == (note, (), None, 0)
    assert (got.src.kind, got.src.pod) == ("external", "")


def test_nodes_and_outsiders_are_told_apart():
    judge = Judge(samples.DENY_ALL)
    got = attribution(judge, samples.INGRESS, "192.168.5.1", DB)
    assert (got.src.kind, got.src.name, got.src.pod) == ("node", "node1", "")
    assert attribution(judge, samples.INGRESS, "203.0.113.7", DB).src.kind == "external"


def test_protocols_that_no_policy_names_and_fragments_carry_a_note():
    judge = Judge(samples.DB_POLICY)
    got = attribution(judge, samples.INGRESS, API, DB, protocol=47)
    assert (got.policies, got.rule) == (("shop/db",), None)
    assert got.note == "no policy can name IP protocol 47"
    got = attribution(judge, samples.INGRESS, API, DB, protocol=1, rest=b"\x08\x00")
    assert got.rule.number == 1


def test_answers_are_remembered_until_the_generation_changes():
    judge = Judge(samples.DB_POLICY)
    attributor = Attributor(
        party=judge.party, resolve=judge.resolve, generation=lambda: judge.generation
    )
    prefix = decode(samples.INGRESS)
    for sport in range(3):
        attributor.attribute(prefix, parse(payload(WEB, DB, sport=sport)))
    assert judge.asked == 1
    judge.replace(samples.DENY_ALL)
    got = attributor.attribute(prefix, parse(payload(WEB, DB)))
    assert (judge.asked, got.policies, got.generation) == (2, ("shop/deny-all",), 2)


def test_a_rule_with_many_failing_terms_is_cut_and_says_so():
    blocks = tuple(samples.block(f"172.16.{i}.0/24") for i in range(20))
    judge = Judge(
        samples.policy("wide", samples.app("db"), samples.PolicyRule(blocks, samples.TCP_5432))
    )
    failed = attribution(judge, samples.INGRESS, WEB, DB).rule.failed
    assert len(failed) == attribute.FAILED_MAX + 1
    assert failed[-1].term == "12 more"


def test_the_nearest_rule_is_the_first_of_equals():
    judge = Judge(
        samples.policy(
            "two",
            samples.app("db"),
            samples.PolicyRule((samples.block("172.16.0.0/16"),), samples.TCP_5432),
            samples.PolicyRule((samples.block("172.17.0.0/16"),), samples.TCP_5432),
        )
    )
    flow = Flow(judge.party(parse_address(WEB)), judge.party(parse_address(DB)), Protocol.TCP, 5432)
    assert nearest_rule(evaluate(judge.world, flow).ingress).ref.number == 0
    assert nearest_rule(evaluate(judge.world, flow).egress) is None
