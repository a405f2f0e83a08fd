"""What the kernel holds for one pod, in the words of the tools: for `explain` on the node."""

from __future__ import annotations

from typing import Any

from netpol.enforce.kernel_state import DRIVER_ERRORS
from netpol.kernel.drivers import SetDriver, TableDriver
from netpol.kernel.rule_text import rule_text
from netpol.kernel.set_text import member_text
from netpol.model.ids import ChainName, Direction, SetName
from netpol.model.net import FAMILIES, Family, family_of, host_prefix
from netpol.model.ruleset import Jump, Rule, SetMatch
from netpol.policy.graph import LocalPod
from netpol.render import names
from netpol.render.static import TABLE


def live_view(pod: LocalPod, sets: SetDriver, tables: TableDriver) -> dict[str, Any]:
    """The chains that judge a pod with their counters, the sets they name, and its map entries.

    Blocking: reads the kernel. A family whose table cannot be read is left out, unless all are.
    """
    chains: list[dict[str, Any]] = []
    wanted: dict[SetName, None] = {}
    families = sorted({family_of(a) for a in pod.addresses}) or list(FAMILIES)
    faults: list[Exception] = []
    for family in families:
        try:
            dump = tables.dump(TABLE, family)
            counters = tables.counters(TABLE, family)
        except DRIVER_ERRORS as e:
            faults.append(e)
            if len(faults) == len(families):
                raise
            continue
        for direction in Direction:
            key = pod.class_of(direction)
            wanted[names.class_map(direction, family)] = None
            if key is None:
                continue
            todo = [names.class_chain(key)]
            for name in todo:
                rules = dump.chains.get(name, ())
                chains.append(_chain(name, rules, counters.get(name, ()), family, direction))
                for rule in rules:
                    if isinstance(rule, Rule):
                        if isinstance(rule.action, Jump):
                            todo.append(rule.action.chain)
                        wanted.update(
                            (m.name, None) for m in rule.matches if isinstance(m, SetMatch)
                        )
    maps = {names.class_map(d, f) for d in Direction for f in FAMILIES}
    mine = {host_prefix(a) for a in pod.addresses}
    shown: list[dict[str, Any]] = []
    for set_name, found in sets.dump(list(wanted)).items():
        if set_name in maps:
            texts = [
                f"{member_text(m)} mark {v or 0:#010x}"
                for m, v in found.members.items()
                if m in mine
            ]
        else:
            texts = sorted(member_text(m) for m in found.members)
        shown.append({"name": set_name, "size": len(found.members), "members": texts})
    return {"chains": chains, "sets": shown}


def _chain(
    name: ChainName,
    rules: tuple[object, ...],
    counters: tuple[tuple[int, int], ...],
    family: Family,
    direction: Direction,
) -> dict[str, Any]:
    rows = []
    for i, rule in enumerate(rules):
        packets, size = counters[i] if i < len(counters) else (0, 0)
        text = rule_text(rule, family) if isinstance(rule, Rule) else str(rule)
        rows.append({"text": text, "packets": packets, "bytes": size})
    return {
        "name": name,
        "family": int(family),
        "direction": direction.value,
        "rules": rows,
    }
