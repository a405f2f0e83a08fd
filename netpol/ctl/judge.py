"""Judges a question of many addresses and ports with few evaluations, and keeps one trace of each kind.

Ports between two boundaries of the policies at hand are judged once, and so are the parts of a CIDR
(`ends`). What gets the same verdicts for the same reasons of direction is one `Finding`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from netpol.ctl.ends import End, Part
from netpol.ctl.ports import Span
from netpol.lib.errors import InputError
from netpol.model.flow import Flow, PartyKind, Trace, Verdict
from netpol.model.ids import Direction
from netpol.model.net import Prefix, collapse
from netpol.model.policy import PortName, PortRange
from netpol.policy.evaluate import evaluate, verdict
from netpol.policy.match import named_ports
from netpol.policy.world import World

#: Most single judgements of one question.
JUDGEMENTS_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """Connections that get the same verdict in the same way; `trace` is of one of them."""

    src: Part
    dst: Part
    sources: tuple[Prefix, ...]
    destinations: tuple[Prefix, ...]
    spans: tuple[Span, ...]
    trace: Trace

    @property
    def verdict(self) -> Verdict:
        """The verdict of all of them."""
        return self.trace.verdict


def findings(world: World, src: End, dst: End, spans: Iterable[Span]) -> list[Finding]:
    """Judge every address and port; the denied ones come first.

    Args:
        world: the cluster.
        src: the source.
        dst: the destination; a part's own spans take the place of `spans`.
        spans: the ports.
    """
    asked = tuple(spans)
    merged: dict[object, list[tuple[Part, Part, tuple[Span, ...], Flow]]] = {}
    count = 0
    for a in src.parts:
        for b in dst.parts:
            by_verdict: dict[tuple[Verdict, ...], tuple[list[Span], Flow]] = {}
            for span in asked if b.spans is None else b.spans:
                for piece in _pieces(world, a, b, span):
                    count += 1
                    if count > JUDGEMENTS_MAX:
                        raise InputError(
                            "the question covers too many connections",
                            needed="narrower ends or ports",
                        )
                    flow = Flow(a.party, b.party, piece.protocol, piece.first)
                    _join(by_verdict.setdefault(_verdicts(world, flow), ([], flow))[0], piece)
            for kinds, (found, flow) in by_verdict.items():
                key = (_identity(src, a), _identity(dst, b), kinds, tuple(found))
                merged.setdefault(key, []).append((a, b, tuple(found), flow))
    out = [
        Finding(
            src=rows[0][0],
            dst=rows[0][1],
            sources=collapse(p for a, _, _, _ in rows for p in a.prefixes),
            destinations=collapse(p for _, b, _, _ in rows for p in b.prefixes),
            spans=rows[0][2],
            trace=evaluate(world, rows[0][3]),
        )
        for rows in merged.values()
    ]
    return sorted(out, key=lambda f: f.verdict is Verdict.ALLOW)


def _identity(end: End, part: Part) -> object:
    """What keeps two parts apart in the answer: in a CIDR only whether somebody known is there."""
    return part.party.kind is PartyKind.EXTERNAL if end.is_block else id(part)


def _verdicts(world: World, flow: Flow) -> tuple[Verdict, ...]:
    """Both directions' verdicts, so that one finding has one reason."""
    whole = verdict(world, flow)
    if whole is Verdict.ALLOW:
        return (whole,)
    trace = evaluate(world, flow)
    return trace.egress.verdict, trace.ingress.verdict


def _join(spans: list[Span], piece: Span) -> None:
    if spans and spans[-1].protocol is piece.protocol and spans[-1].last + 1 == piece.first:
        spans[-1] = Span(piece.protocol, spans[-1].first, piece.last)
    else:
        spans.append(piece)


def _pieces(world: World, src: Part, dst: Part, span: Span) -> Iterator[Span]:
    """Cut a range where a rule of the policies at hand begins or ends."""
    if span.first == span.last:
        yield span
        return
    cuts = {span.first}
    for part, direction in ((src, Direction.EGRESS), (dst, Direction.INGRESS)):
        pod = part.party.endpoint
        for policy in world.isolating(pod, direction) if pod else ():
            for rule in policy.rules(direction):
                for port in rule.ports or ():
                    for low, high in _numbers(port, dst):
                        cuts.update(v for v in (low, high + 1) if span.first < v <= span.last)
    ordered = [*sorted(cuts), span.last + 1]
    for low, high in itertools.pairwise(ordered):
        yield Span(span.protocol, low, high - 1)


def _numbers(port: PortRange | PortName, dst: Part) -> Iterator[tuple[int, int]]:
    if isinstance(port, PortRange):
        yield port.first, port.last
    elif dst.party.endpoint is not None:
        for number in named_ports(dst.party.endpoint, port.protocol, port.name):
            yield number, number
