"""`explain` for people: the answer first, then why, with what did not match and for what reason."""

from __future__ import annotations

from collections.abc import Sequence

from netpol.ctl import explain_doc
from netpol.ctl.ends import End
from netpol.ctl.judge import Finding
from netpol.ctl.output import plural, table, word
from netpol.model.flow import DirectionTrace, PolicyTrace, RuleTrace, Verdict
from netpol.model.ids import Direction
from netpol.model.net import Prefix, format_address

#: Addresses of a part that are listed before "and N more".
_LISTED = 6


def connection(src: End, dst: End, found: Sequence[Finding]) -> str:
    """The text about a connection; its first line is the answer."""
    lines = [_headline(src, dst, found)]
    for f in found:
        if len(found) > 1 or src.is_block or dst.is_block or dst.service or src.service:
            lines.append(f"{word(f.verdict)}  {_ends(src, dst, f)}")
        lines += _direction(f.trace.egress)
        lines += _direction(f.trace.ingress)
    lines += [f"note: {n}" for n in explain_doc.notes(src, dst, found)]
    return "\n".join(lines)


def _headline(src: End, dst: End, found: Sequence[Finding]) -> str:
    verdict = explain_doc.overall(found)
    bad = [f for f in found if f.verdict is Verdict.DENY]
    ports = dict.fromkeys(str(s) for f in (bad or found) for s in f.spans)
    shown = _list(list(ports), ", ")
    head = f"{word(verdict, upper=True)}: {src.label} -> {dst.label}:{shown}"
    if verdict is Verdict.ALLOW:
        return head
    why = dict.fromkeys(_blame(f) for f in bad)
    if len(found) > len(bad):
        head += f" ({plural(len(bad), 'part')} of {len(found)} denied)"
    return f"{head}: {_list(list(why), '; ')}"


def _blame(f: Finding) -> str:
    """What denies, in one clause."""
    sides = [d for d in (f.trace.egress, f.trace.ingress) if d.verdict is Verdict.DENY]
    return " and ".join(f"{d.direction} of {d.subject} by {_names(d)}" for d in sides)


def _names(d: DirectionTrace) -> str:
    return _list([p.policy.name for p in d.isolating], ", ")


def _ends(src: End, dst: End, f: Finding) -> str:
    left = _addresses(f.sources) if src.is_block else f.src.label
    right = _addresses(f.destinations) if dst.is_block else f.dst.label
    return f"{left} -> {right}:{_list([str(s) for s in f.spans], ', ')}"


def _addresses(prefixes: Sequence[Prefix]) -> str:
    return _list([format_address(p.address) if p.is_host else str(p) for p in prefixes], ", ")


def _list(items: Sequence[str], joint: str) -> str:
    if len(items) <= _LISTED:
        return joint.join(items)
    return f"{joint.join(items[:_LISTED])} and {len(items) - _LISTED} more"


def _direction(d: DirectionTrace) -> list[str]:
    gap = " " * (
        len(Verdict.ALLOW) + 2 - len(d.verdict)
    )  # beside colour codes, which have no width
    lines = [f"  {d.direction:<8} {word(d.verdict)}{gap}{d.reason}"]
    for policy in d.isolating:
        lines += _policy(policy, d.direction)
    return lines


def _policy(p: PolicyTrace, direction: Direction) -> list[str]:
    if not p.rules:
        return [f"    {p.policy}: no {direction} rule, so it allows nothing"]
    lines = [f"    {p.policy}: {'allows it' if p.matched else 'no rule matches'}"]
    for rule in p.rules:
        lines.append(f"      {explain_doc.rule_name(rule.ref)}: {_outcome(rule)}")
        rows: list[list[str]] = []
        side = "from" if direction is Direction.INGRESS else "to"
        if rule.peers:
            rows += [[side, t.term, "yes" if t.matched else "no", t.reason] for t in rule.peers]
        else:
            rows.append([side, "anyone", "yes", "the rule names no peer"])
        if rule.ports:
            rows += [["port", t.term, "yes" if t.matched else "no", t.reason] for t in rule.ports]
        else:
            rows.append(["port", "any", "yes", "the rule names no port"])
        lines += table(rows, indent="        ")
    return lines


def _outcome(rule: RuleTrace) -> str:
    if rule.matched:
        return "matches"
    failed = {id(t) for t in rule.failed}
    sides = [
        name
        for name, terms in (("peer", rule.peers), ("port", rule.ports))
        if terms and all(id(t) in failed for t in terms)
    ]
    return f"does not match ({' and '.join(sides)})" if sides else "does not match"
