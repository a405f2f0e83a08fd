"""Keeps the routes room's rules and sets in the kernel. Blocking: called where the room's kernel work runs.

What they are say `routes.egress` (masquerade) and `routes.guard` (who may send tunnelled packets).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from netpol.kernel.converge import set_changes, table_change
from netpol.kernel.drivers import SetDriver, TableDriver
from netpol.model.ids import SetName
from netpol.model.net import FAMILIES, Family
from netpol.model.objects import Endpoint
from netpol.model.ruleset import Members, Ruleset, SetSpec
from routes import egress, guard
from routes.egress import EgressOptions
from routes.plan import RoutePlan

TABLES = (guard.TABLE, egress.TABLE)


@dataclass(frozen=True, slots=True)
class RuleDrivers:
    """Drivers that see what is the routes room's alone."""

    sets: SetDriver
    tables: TableDriver


@dataclass(frozen=True, slots=True)
class RoutesRules:
    """All of the room's rules and sets; a table and family that is not named has none."""

    rulesets: Mapping[tuple[str, Family], Ruleset] = field(default_factory=dict)
    sets: Mapping[SetName, tuple[SetSpec, Members]] = field(default_factory=dict)


def keep_rules(drivers: RuleDrivers, want: RoutesRules) -> int:
    """Make rules and sets what they should be; returns how many transactions it took.

    Raises:
        KernelError: the kernel refuses something; what follows was not done.
    """
    first, last = set_changes(drivers.sets.dump(), want.sets)
    done = 0
    if first.ops:
        drivers.sets.apply(first)
        done += 1
    for table in TABLES:
        for family in FAMILIES:
            rules = want.rulesets.get((table, family), Ruleset())
            have = drivers.tables.dump(table, family)
            tx = table_change(have, rules, table=table, family=family)
            if tx is not None:
                drivers.tables.apply(tx)
                done += 1
    if last.ops:
        drivers.sets.apply(last)
        done += 1
    return done


def rules_of(
    plan: RoutePlan,
    options: EgressOptions,
    pods: Iterable[Endpoint],
    *,
    namespaces: Mapping[str, bool],
    nodes: Collection[bytes],
) -> RoutesRules:
    """All rules and sets of a plan.

    Args:
        plan: its tunnels and ranges.
        options: masquerade.
        pods: those of this node.
        namespaces: those that say something of masquerade for their pods.
        nodes: addresses of all nodes.
    """
    rulesets: dict[tuple[str, Family], Ruleset] = {}
    sets: dict[SetName, tuple[SetSpec, Members]] = {}
    if guard.needed(plan):
        rulesets |= {(guard.TABLE, f): guard.ruleset(plan, f) for f in FAMILIES}
        sets |= _with_specs(guard.SPECS, guard.members(nodes))
    if options.enabled:
        rulesets |= {(egress.TABLE, f): egress.ruleset(f) for f in FAMILIES}
        found = egress.members(plan, options, pods, namespaces=namespaces, nodes=nodes)
        sets |= _with_specs(egress.SPECS, found)
    return RoutesRules(rulesets, sets)


def _with_specs(
    specs: Mapping[SetName, SetSpec], members: Mapping[SetName, Members]
) -> dict[SetName, tuple[SetSpec, Members]]:
    return {name: (spec, members.get(name, {})) for name, spec in specs.items()}
