"""`netpol-ctl render`: what a node would get, as text that its tools load."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from netpol.ctl.output import emit, write
from netpol.ctl.source import Cluster, cluster
from netpol.kernel.drivers import AddMembers, CreateSet, SetOp, SetTransaction, TableTransaction
from netpol.kernel.rule_text import rule_text
from netpol.kernel.set_text import member_text, restore_text
from netpol.kernel.table_text import transaction_text
from netpol.lib.errors import NoAnswerError
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import Ruleset
from netpol.render import reject, static
from netpol.render.node import Desired, render_node
from netpol.render.options import DenyWith, RenderOptions

_TOOLS = {Family.V4: "iptables-restore", Family.V6: "ip6tables-restore"}


def run(args: argparse.Namespace) -> int:
    """Print the node's sets and rules."""
    where = cluster(args)
    if args.node not in where.node_names:
        known = ", ".join(where.node_names[:20]) or "none"
        raise NoAnswerError(f"no node {args.node}", got=f"nodes: {known}")
    families = (Family(args.family),) if args.family else FAMILIES
    desired = render_node(where.world, args.node, options(where, args))
    if args.output != "text":
        document = describe(desired, args.node, families=families, only=args.only)
        emit(document, "", form=args.output)
        return 0
    parts: list[str] = []
    if args.only != "rules":
        parts.append("# ipset restore\n" + sets_text(desired, families))
    if args.only != "sets":
        parts += [
            f"# {_TOOLS[tx.family]} --noflush\n" + transaction_text(tx)
            for f in families
            for tx in transactions(desired, f)
        ]
    write("".join(parts))
    return 0


def options(where: Cluster, args: argparse.Namespace) -> RenderOptions:
    """The agent's defaults, and what the command line says."""
    node = where.world.nodes.get(args.node)
    hold = node.pod_cidrs if node is not None and args.hold_unknown_pods else ()
    return RenderOptions(
        pod_interfaces=tuple(args.pod_interfaces),
        hold_ranges=hold,
        own_addresses=node.addresses if node is not None else (),
        deny_with=DenyWith(args.deny_with),
    )


def sets_text(desired: Desired, families: tuple[Family, ...]) -> str:
    """The sets as `ipset restore` takes them, in order of name."""
    ops: list[SetOp] = []
    for name, (spec, members) in sorted(desired.sets.items()):
        if spec.family in families:
            ordered = dict(sorted(members.items(), key=lambda m: member_text(m[0])))
            ops.append(CreateSet(desired.sets[name][0], len(members)))
            if ordered:
                ops.append(AddMembers(spec, ordered))
    return restore_text(SetTransaction(tuple(ops)))


def transactions(desired: Desired, family: Family) -> list[TableTransaction]:
    """One family's rules on a node that has none of ours yet, in the order in which they may come."""
    return [
        TableTransaction(
            table, family, replace=dict(sorted(rules.chains.items())), hooks=dict(rules.hooks)
        )
        for table, rules in _tables(desired, family)
    ]


def _tables(desired: Desired, family: Family) -> Iterator[tuple[str, Ruleset]]:
    """The tables that have something, that of the answers before the one that relies on it."""
    answers = desired.filters[family]
    if answers.chains:
        yield reject.TABLE, answers
    yield static.TABLE, desired.rulesets[family]


def describe(
    desired: Desired, node: str, *, families: tuple[Family, ...], only: str | None
) -> dict[str, Any]:
    """The same as a document."""
    document: dict[str, Any] = {"node": node}
    if only != "rules":
        document["sets"] = [
            {
                "name": spec.name,
                "type": spec.kind.value,
                "family": int(spec.family),
                "members": [
                    {"member": member_text(m)}
                    if mark is None
                    else {"member": member_text(m), "mark": f"{mark:#x}"}
                    for m, mark in sorted(members.items(), key=lambda m: member_text(m[0]))
                ],
            }
            for _, (spec, members) in sorted(desired.sets.items())
            if spec.family in families
        ]
    if only != "sets":
        document["rules"] = [
            {
                "table": table,
                "family": int(family),
                "hooks": {h.value: c for h, c in rules.hooks.items()},
                "chains": {
                    name: [rule_text(r, family) for r in chain]
                    for name, chain in sorted(rules.chains.items())
                },
            }
            for family in families
            for table, rules in _tables(desired, family)
        ]
    return document
