"""The README's table of figures: what bench/results.json says, for people. Nothing in it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Mapping[str, Any]]

HEADING = "\n## Numbers\n"
#: Rows of the results that the README quotes, and what it calls them.
LINES = {
    "policy.pod_join.p99_ms": "a pod joins or leaves: event to kernel, 99 of 100; no iptables call",
    "policy.policy_change.p99_ms": "a policy of all 110 pods changes: event to kernel, 99 of 100",
    "policy.cold_start.s": "start: lists received to first apply",
    "selectors.full.ms": "all selectors computed again",
    "packet.new_connection": "what a new connection costs more, 250 pods with a policy each, against "
    "kube-router's layout of rules (nft)",
    "packet.new_connection.legacy": "the same on legacy tables",
    "packet.established": "a packet of an established connection, 50 policies, against no rules (nft)",
    "ipset.load_50k": "50,000 entries into a set, against `ipset restore`",
    "audit.packets_per_s": "denied packets explained and logged, one core",
    "explain.p99_ms": "an answer of `explain`, 99 of 100",
    "ipvs.cold": "1,000 Services with 10 endpoints each into IPVS, against `ipvsadm --restore`",
    "ipvs.endpoint": "an endpoint of one of 1,000 Services changes: event to kernel, 99 of 100, against "
    "applying all of them",
    "ipvs.endpoint.growth": "the same among 10,000 Services, against 100; medians",
    "bgp.mesh3.s": "BGP: three nodes start, to all routes in all kernels, 95 of 100",
    "bgp.join.s": "BGP: a fourth node joins, 95 of 100",
    "bgp.add_node.ms": "BGP: one more node beside 1,000 peers: rendered and configured",
    "memory.pods_10k.mb": "memory of the agent, 10,000 pods",
    "memory.pods_100k.mb": "memory of the agent, 100,000 pods",
}
#: The table's own lines within the README's section.
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def table(results: Results) -> str:
    """The table, each line with its end."""
    lines = ["| what | result | target |", "|---|---|---|"]
    lines += [
        f"| {text} | {_result(results[i])} | {_target(results[i])} |" for i, text in LINES.items()
    ]
    return "".join(f"{line}\n" for line in lines)


def renewed(readme: str, results: Results) -> str:
    """The README with the table of these results.

    Raises:
        ValueError: it has no section of figures with one table.
    """
    before, heading, rest = readme.partition(HEADING)
    section, next_heading, after = rest.partition("\n## ")
    new, tables = _TABLE.subn(lambda _: table(results), section)
    if not heading or tables != 1:
        raise ValueError(f"README: needed one table below {HEADING.strip()!r}, got {tables}")
    return before + heading + new + next_heading + after


def _result(row: Mapping[str, Any]) -> str:
    text = _amount(row["value"], row["unit"])
    if row["target"].endswith("x"):
        text = f"{_short(row['ratio'])}x ({text} : {_amount(row['baseline'], row['unit'])})"
    return text if row["met"] else f"{text}: missed"


def _target(row: Mapping[str, Any]) -> str:
    sign, amount, *unit = row["target"].split(" ", 2)
    shown = f"{float(amount):,g} {unit[0]}" if unit else amount
    return f"{sign.replace('<=', '≤').replace('>=', '≥')} {shown}"


def _amount(value: float, unit: str) -> str:
    return f"{_short(value)} {unit.replace('us', 'µs')}"


def _short(value: float) -> str:
    """Three significant digits, with commas and without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.10f}".rstrip("0").rstrip(".")
