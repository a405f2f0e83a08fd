"""The table catches what agents are known to get wrong: each defect is built in, and its case must fail.

A defect is put either into the compiled policies or into the rules' text; the walk is the same as in
test_rendered. A case that still passed would prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from netpol.model.ids import Direction
from netpol.model.net import parse_prefix, subtract
from netpol.model.policy import BlockPeer, CompiledPolicy, PodPeer, PolicyRule, PortName, PortRange
from netpol.policy.match import pod_matches
from netpol.policy.world import World
from tests import engine
from tests.spec.policy.case import Case, Flow
from tests.spec.policy.cases import CASES
from tests.walker.cluster import Cluster, Text, options_of, render_node, text_of

Rewrite = Callable[[PolicyRule], PolicyRule]


def wrong(
    case: Case,
    *,
    rewrite: Callable[[World], Rewrite] | None = None,
    edit: Callable[[Text], Text] = lambda t: t,
) -> list[Flow]:
    """The flows of a case that rules with a defect judge wrongly."""
    out = []
    for step in case.steps:
        world = engine.build(step.world)
        if rewrite is not None:
            policies = [_rewritten(p, rewrite(world)) for p in world.policies.values()]
            world = World.build(
                namespaces=world.namespaces.values(),
                pods=world.pods.values(),
                policies=policies,
                nodes=world.nodes.values(),
            )
        texts = {}
        for node in world.nodes:
            options = options_of(world, node)
            text = text_of(render_node(world, node, options), field_mask=options.field_mask)
            texts[node] = edit(text)
        cluster = Cluster(world, texts)
        for flow in step.flows:
            for family in (4, 6) if flow.family is None else (flow.family,):
                try:
                    made = engine.flow(world, flow.src, flow.dst, flow.port, family)
                except engine.NoPartyError:
                    continue
                if cluster.walk(made, **(flow.packet or {})).passed != flow.allow:
                    out.append(flow)
    return out


def _rewritten(policy: CompiledPolicy, rewrite: Rewrite) -> CompiledPolicy:
    return replace(
        policy,
        ingress=tuple(map(rewrite, policy.ingress)),
        egress=tuple(map(rewrite, policy.egress)),
    )


def cases(row: str, words: str) -> Case:
    (found,) = [c for c in CASES if c.row == row and words in c.claim]
    return found


# -- the defects --------------------------------------------------------------------------------


def shared_nomatch(_world: World) -> Rewrite:
    """One set for all blocks of a rule: an except takes from its neighbours too."""

    def rewrite(rule: PolicyRule) -> PolicyRule:
        blocks = [p for p in rule.peers or () if isinstance(p, BlockPeer)]
        holes = [h for b in blocks for h in b.excepts]
        peers = tuple(
            p._replace(prefixes=tuple(x for q in p.prefixes for x in subtract(q, holes)))
            if isinstance(p, BlockPeer)
            else p
            for p in rule.peers or ()
        )
        return rule._replace(peers=peers or rule.peers)

    return rewrite


def few_ranges(_world: World) -> Rewrite:
    """::/0 as the ranges that somebody thought of."""
    ranges = tuple(parse_prefix(t) for t in ("2000::/3", "64:ff9b::/96"))

    def rewrite(rule: PolicyRule) -> PolicyRule:
        peers = tuple(
            p._replace(prefixes=ranges)
            if isinstance(p, BlockPeer) and p.cidr == parse_prefix("::/0")
            else p
            for p in rule.peers or ()
        )
        return rule._replace(peers=peers or rule.peers)

    return rewrite


def unresolved_name(world: World) -> Rewrite:
    """A port name as a number that some pod has, for every destination."""
    numbers = {
        p.name: p.number for pod in world.pods.values() for p in pod.ports if p.name == "http"
    }

    def rewrite(rule: PolicyRule) -> PolicyRule:
        ports = tuple(
            PortRange(p.protocol, numbers[p.name], numbers[p.name])
            if isinstance(p, PortName) and p.name in numbers
            else p
            for p in rule.ports or ()
        )
        return rule._replace(ports=ports or rule.ports)

    return rewrite


def empty_is_any(world: World) -> Rewrite:
    """A selector that finds nobody as no selector."""

    def rewrite(rule: PolicyRule) -> PolicyRule:
        nobody = rule.peers is not None and not any(
            isinstance(p, BlockPeer)
            or (
                isinstance(p, PodPeer)
                and any(pod_matches(p, pod, world) for pod in world.pods.values())
            )
            for p in rule.peers
        )
        return rule._replace(peers=None) if nobody else rule

    return rewrite


def _policy_chains(text: str, direction: Direction) -> dict[str, str]:
    """Policy name to its chain, from the comments of the class chains."""
    letter = direction.name[0]
    jump = rf"-A KNP-C{letter}-\S+ -m comment --comment (\S+) -j (KNP-P{letter}-\S+)"
    return dict(re.findall(jump, text))


def _edit_tables(text: Text, change: Callable[[str], str]) -> Text:
    return text._replace(tables={family: change(t) for family, t in text.tables.items()})


def shared_mark(text: Text) -> Text:
    """One mark for both directions: what an egress rule of a policy marks, ingress takes as allowed."""

    def change(table: str) -> str:
        egress = _policy_chains(table, Direction.EGRESS)
        out = []
        for line in table.splitlines():
            found = re.match(r"-A (KNP-CI-\S+) -m comment --comment (\S+) -j KNP-PI-", line)
            if found and found[2] in egress:
                out.append(f"-A {found[1]} -j {egress[found[2]]}")
            out.append(line)
        return "\n".join(out)

    return _edit_tables(text, change)


def unseparated_names(text: Text) -> Text:
    """Two policies whose namespace and name run together alike get one chain."""

    def change(table: str) -> str:
        by_text: dict[str, str] = {}
        for name, chain in _policy_chains(table, Direction.INGRESS).items():
            first = by_text.setdefault(name.replace("/", ""), chain)
            table = table.replace(chain, first)
        return table

    return _edit_tables(text, change)


def _id(value: object) -> str:
    return value.id if isinstance(value, Case) else str(getattr(value, "__name__", value))


REWRITES = [
    (shared_nomatch, cases("43", "except of one peer")),
    (shared_nomatch, cases("53", "with and without")),
    (few_ranges, cases("48", "every IPv6")),
    (unresolved_name, cases("69", "to everybody")),
    (unresolved_name, cases("66", "with peers")),
    (unresolved_name, cases("67", "resolved on the destination")),
    (unresolved_name, cases("68", "outside of pods")),
    (empty_is_any, cases("36", "empty resolved set")),
]
EDITS = [
    (shared_mark, cases("16", "never opens ingress")),
    (unseparated_names, cases("12", "hashed")),
]


@pytest.mark.parametrize(("defect", "case"), REWRITES, ids=_id)
def test_defect_in_the_meaning_is_caught(defect: Callable[[World], Rewrite], case: Case):
    assert not wrong(case)
    assert wrong(case, rewrite=defect)


@pytest.mark.parametrize(("defect", "case"), EDITS, ids=_id)
def test_defect_in_the_rules_is_caught(defect: Callable[[Text], Text], case: Case):
    assert not wrong(case)
    assert wrong(case, edit=defect)


def test_sets_hold_no_exceptions_and_no_zero_prefix():
    """`except` never becomes a nomatch member; /0 never reaches a set (the walker refuses both)."""
    for case in CASES:
        for step in case.steps:
            world = engine.build(step.world)
            for node in world.nodes:
                options = options_of(world, node)
                text = text_of(render_node(world, node, options), field_mask=options.field_mask)
                assert "nomatch" not in text.sets
                assert not re.search(r"/0( |$)", text.sets, re.MULTILINE)
