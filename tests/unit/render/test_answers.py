"""Answers with a Service's address on a pod's interface: who may send them, in rules."""

from __future__ import annotations

import pytest

from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES, Family, host_prefix, parse_address
from netpol.model.ruleset import (
    AddressPort,
    Goto,
    Hook,
    InInterface,
    InPort,
    Jump,
    NetMatch,
    Return,
    Rule,
    SetMatch,
    Side,
)
from netpol.render import names, static
from netpol.render.options import AnswerLink, RenderOptions

VIP = {Family.V4: parse_address("203.0.113.7"), Family.V6: parse_address("2001:db8::7")}
PORTS = tuple(AddressPort(a, Protocol.TCP, 80) for a in VIP.values())
OPTIONS = RenderOptions(
    pod_interfaces=("kube-bridge", "ptp1"),
    direct_ports=PORTS,
    direct_links=(
        *(AnswerLink(a, "veth1", port=True) for a in VIP.values()),
        AnswerLink(VIP[Family.V4], "ptp1", port=False),
    ),
)


def unknown_sources(options: RenderOptions, hook: Hook, family: Family) -> list[object]:
    """What becomes of sources on pod interfaces that are no pods."""
    chain = static.static_chains(options, family)[names.hook_chain(hook)]
    targets = {names.SPOOFED, names.ANSWERS}
    return [
        rule.action
        for rule in chain
        if isinstance(rule.action, Goto | Jump)
        and rule.action.chain in targets
        and not any(isinstance(m, NetMatch) for m in rule.matches)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_forwarded_answers_are_looked_at_once_more(family):
    forward = unknown_sources(OPTIONS, Hook.FORWARD, family)
    assert [type(a) for a in forward] == [Jump, Jump]
    assert forward == [Jump(names.ANSWERS)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_speaks_to_the_node_from_a_services_address(family):
    found = unknown_sources(OPTIONS, Hook.INPUT, family)
    assert [type(a) for a in found] == [Goto, Goto]


def test_only_what_is_named_comes_back():
    place = NetMatch(Side.SRC, host_prefix(VIP[Family.V4]))
    ports = SetMatch(names.answers_set(Family.V4), (Side.SRC, Side.SRC), negate=True)
    assert static.static_chains(OPTIONS, Family.V4)[names.ANSWERS] == (
        Rule(Goto(names.SPOOFED), (ports,)),
        Rule(Return(), (place, InPort("veth1"))),
        Rule(Return(), (place, InInterface("ptp1"))),
        Rule(Goto(names.SPOOFED)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_set_has_the_ports_of_its_family(family):
    ((spec, members),) = static.answer_sets(OPTIONS, family)
    assert spec.family is family
    assert set(members) == {AddressPort(VIP[family], Protocol.TCP, 80)}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_direct_return_there_is_none_of_it(family):
    options = RenderOptions(pod_interfaces=("kube-bridge",))
    chains = static.static_chains(options, family)
    assert names.ANSWERS not in chains
    assert not static.answer_sets(options, family)
    assert unknown_sources(options, Hook.FORWARD, family) == [Goto(names.SPOOFED)]
