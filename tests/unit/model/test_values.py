"""Keys, labels, endpoints, rules: what equality, order and text of the shared values mean."""

from __future__ import annotations

import pytest

from netpol.model.flow import RuleTrace, TermTrace
from netpol.model.ids import ChainName, Direction, ObjectKey, Protocol
from netpol.model.labels import Operator, Requirement, labels, selector
from netpol.model.objects import Endpoint
from netpol.model.policy import CompiledPolicy, PolicyRule, RuleRef
from netpol.model.ruleset import Drop, Goto, Jump, Return, Rule


def test_keys_print_as_people_write_them():
    assert str(ObjectKey("a", "web")) == "a/web"
    assert str(ObjectKey("", "n1")) == "n1"


def test_labels_are_sorted_pairs():
    assert labels({"b": "1", "a": "2"}) == (("a", "2"), ("b", "1"))
    assert labels(None) == labels({}) == ()


@pytest.mark.parametrize(
    ("operator", "values", "have", "wanted"),
    [
        (Operator.IN, ("1",), {"k": "1"}, True),
        (Operator.IN, ("1",), {}, False),
        (Operator.NOT_IN, ("1",), {"k": "1"}, False),
        (Operator.NOT_IN, ("1",), {"k": "2"}, True),
        (Operator.NOT_IN, ("1",), {}, True),
        (Operator.EXISTS, (), {"k": ""}, True),
        (Operator.EXISTS, (), {}, False),
        (Operator.DOES_NOT_EXIST, (), {"k": ""}, False),
        (Operator.DOES_NOT_EXIST, (), {"l": "1"}, True),
    ],
)
def test_operators(operator: Operator, values: tuple[str, ...], have: dict[str, str], wanted: bool):
    assert Requirement("k", operator, values).matches(have) is wanted


def test_selectors_written_otherwise_are_equal():
    one = selector([Requirement("k", Operator.IN, ("2", "1", "2"))] * 2)
    assert one == selector([Requirement("k", Operator.IN, ("1", "2"))])
    assert str(one) == "k in (1, 2)"


@pytest.mark.parametrize(
    ("phase", "host_network", "live", "policed"),
    [
        ("Running", False, True, True),
        ("Pending", False, True, True),
        ("Unknown", False, True, True),
        ("Succeeded", False, False, False),
        ("Failed", False, False, False),
        ("Running", True, True, False),
        ("Failed", True, False, False),
    ],
)
def test_who_is_policed(phase: str, host_network: bool, live: bool, policed: bool):
    pod = Endpoint(key=ObjectKey("a", "p"), uid="u", phase=phase, host_network=host_network)
    assert (pod.live, pod.policed) == (live, policed)


def test_rules_of_equal_contents_and_other_classes_differ():
    chain = ChainName("KNP-X")
    assert Jump(chain) == Goto(chain)  # as tuples
    assert Rule(Jump(chain)) != Rule(Goto(chain))
    assert Rule(Return()) != Rule(Drop())
    assert Rule(Drop()) == Rule(Drop())
    assert hash(Rule(Jump(chain))) != hash(Rule(Goto(chain)))


def test_failed_terms_are_those_of_the_side_without_a_match():
    ref = RuleRef(ObjectKey("a", "p"), Direction.INGRESS, 0)
    hit, miss = TermTrace("x", True, "r"), TermTrace("y", False, "r")
    assert RuleTrace(ref, False, (miss,), (hit,)).failed == (miss,)
    assert RuleTrace(ref, False, (miss, hit), (miss,)).failed == (miss,)
    assert RuleTrace(ref, True, (), ()).failed == ()


def test_any_and_nothing_are_different_rules():
    assert PolicyRule(None, None) != PolicyRule((), ())
    policy = CompiledPolicy(
        ObjectKey("a", "p"), "u", selector([]), frozenset(Direction), (PolicyRule(None, None),), ()
    )
    assert policy.rules(Direction.INGRESS) == policy.ingress
    assert policy.rules(Direction.EGRESS) == ()
    assert Protocol("ICMPv6") is Protocol.ICMPV6
