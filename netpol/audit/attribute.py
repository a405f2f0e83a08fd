"""Why a packet was dropped: prefix and addresses to parties, isolating policies and the nearest rule.

Owns the reasoning and its cache; the evaluator is handed in as a callable, so the answer is computed from
the policies, never guessed from the rule that matched. The world may have moved on since the packet:
then the note says so. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from netpol.audit.packet import Packet
from netpol.audit.record import PartyRecord, RuleRecord, TermRecord
from netpol.model.flow import DirectionTrace, Flow, Party, RuleTrace, Trace, Verdict
from netpol.model.ids import PROTOCOL_NUMBERS, Direction, Protocol
from netpol.model.net import format_address
from netpol.render.logprefix import DropReason, LogPrefix

#: Who is behind an address, as of now.
PartyLookup = Callable[[bytes], Party]
#: The judgement of a flow with its reasons; None when the evaluator cannot tell (not synced).
Resolve = Callable[[Flow], Trace | None]

NOTE_CHANGED = "policy changed since"
NOTE_UNKNOWN = "the policies are not known yet"
NOTE_HELD = "no pod that the node knows has this address"
NOTE_SPOOFED = "no local pod has the source address"

#: Terms of the nearest rule that a record names; a rule may have thousands.
FAILED_MAX = 8
#: Attributions kept; one is a few hundred bytes.
CACHE_MAX = 16384

_PROTOCOLS = {number: protocol for protocol, number in PROTOCOL_NUMBERS.items()}


class FlowKey(NamedTuple):
    """What makes two drops equal for the reasoning: everything but the source port."""

    prefix: LogPrefix
    src: bytes
    dst: bytes
    protocol: int
    dport: int | None
    fault: str


class Attribution(NamedTuple):
    """The answer for one flow key. `generation` is that of the policies it was computed from."""

    src: PartyRecord
    dst: PartyRecord
    policies: tuple[str, ...]
    rule: RuleRecord | None
    note: str
    generation: int


class Attributor:
    """Answers for flow keys, remembering those of the current generation.

    Args:
        party: who is behind an address.
        resolve: judges a flow with reasons.
        generation: number of the policies that `party` and `resolve` answer from.
    """

    def __init__(
        self, *, party: PartyLookup, resolve: Resolve, generation: Callable[[], int]
    ) -> None:
        self._party, self._resolve, self._generation = party, resolve, generation
        self._cache: OrderedDict[FlowKey, Attribution] = OrderedDict()
        self._cached_generation = -1

    def attribute(self, prefix: LogPrefix, packet: Packet) -> Attribution:
        """Explain one packet."""
        generation = self._generation()
        if generation != self._cached_generation:
            self._cache.clear()
            self._cached_generation = generation
        key = FlowKey(prefix, packet.src, packet.dst, packet.protocol, packet.dport, packet.fault)
        known = self._cache.get(key)
        if known is None:
            known = self._cache[key] = self._explain(key, generation)
            if len(self._cache) > CACHE_MAX:
                self._cache.popitem(last=False)
        return known

    def _explain(self, key: FlowKey, generation: int) -> Attribution:
        src, dst = self._party(key.src), self._party(key.dst)
        notes = [key.fault] if key.fault else []
        policies: tuple[str, ...] = ()
        rule: RuleRecord | None = None
        match key.prefix.reason:
            case DropReason.HELD:
                notes.append(NOTE_HELD)
            case DropReason.SPOOFED:
                notes.append(NOTE_SPOOFED)
            case DropReason.DENIED:
                policies, rule, note = self._judge(key, src, dst)
                if note:
                    notes.append(note)
        return Attribution(
            party_record(src),
            party_record(dst),
            policies,
            rule,
            "; ".join(notes),
            generation,
        )

    def _judge(
        self, key: FlowKey, src: Party, dst: Party
    ) -> tuple[tuple[str, ...], RuleRecord | None, str]:
        protocol = _PROTOCOLS.get(key.protocol)
        # No policy can name another protocol; like ICMP it passes only where a rule has no ports.
        judged = protocol or (Protocol.ICMP if len(key.dst) == 4 else Protocol.ICMPV6)
        trace = self._resolve(Flow(src, dst, judged, key.dport))
        if trace is None:
            return (), None, NOTE_UNKNOWN
        ours = trace.egress if key.prefix.direction is Direction.EGRESS else trace.ingress
        policies = tuple(str(p.policy) for p in ours.isolating)
        if ours.verdict is Verdict.ALLOW:
            return policies, None, NOTE_CHANGED
        rule = nearest_rule(ours)
        note = "" if protocol else f"no policy can name IP protocol {key.protocol}"
        return policies, _rule_record(rule) if rule and protocol else None, note


def nearest_rule(trace: DirectionTrace) -> RuleTrace | None:
    """The rule of the isolating policies that came nearest: most halves, then most terms, matched.

    The halves of a rule are its peers and its ports. Of equals the first counts; None without rules.
    """
    best: RuleTrace | None = None
    best_score = (-1, -1)
    for policy in trace.isolating:
        for rule in policy.rules:
            if (score := _nearness(rule)) > best_score:
                best, best_score = rule, score
    return best


def _nearness(rule: RuleTrace) -> tuple[int, int]:
    halves = sum(not terms or any(t.matched for t in terms) for terms in (rule.peers, rule.ports))
    return halves, sum(t.matched for t in (*rule.peers, *rule.ports))


def _rule_record(rule: RuleTrace) -> RuleRecord:
    failed = rule.failed
    shown = tuple(TermRecord(t.term, t.reason) for t in failed[:FAILED_MAX])
    if len(failed) > FAILED_MAX:
        shown += (TermRecord(f"{len(failed) - FAILED_MAX} more", "none matches"),)
    return RuleRecord(
        policy=str(rule.ref.policy),
        direction=str(rule.ref.direction),
        number=rule.ref.number,
        failed=shown,
    )


def party_record(party: Party) -> PartyRecord:
    """The record of one end, without its port."""
    pod = party.endpoint
    return PartyRecord(
        ip=format_address(party.address),
        kind=str(party.kind),
        namespace=pod.key.namespace if pod else "",
        pod=pod.key.name if pod else "",
        uid=pod.uid if pod else "",
        name=party.name,
    )
