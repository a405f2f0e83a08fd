"""A connection to be judged, and the judgement with all its reasons.

`policy.evaluate` makes traces; the command line prints them and audit stores what it needs of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from netpol.model.ids import Direction, ObjectKey, Protocol
from netpol.model.net import Family, format_address
from netpol.model.objects import Endpoint
from netpol.model.policy import RuleRef


class Verdict(StrEnum):
    """Whether a connection passes."""

    ALLOW = "allow"
    DENY = "deny"


class PartyKind(StrEnum):
    """What stands at one end of a connection."""

    POD = "pod"
    NODE = "node"
    SERVICE = "service"
    EXTERNAL = "external"


@dataclass(frozen=True, slots=True)
class Party:
    """One end of a connection: an address and what the cluster knows about it.

    `endpoint` is set for pods that policy sees. A pod in the host's network is a NODE party, since
    nothing on the wire tells it from its node. `node` names the node it runs on, or is "".
    """

    kind: PartyKind
    address: bytes
    name: str
    endpoint: Endpoint | None = None
    node: str = ""

    def __str__(self) -> str:
        if self.kind is PartyKind.EXTERNAL:
            return format_address(self.address)
        return f"{self.kind}/{self.name}" if self.kind is not PartyKind.POD else self.name


@dataclass(frozen=True, slots=True)
class Flow:
    """A new connection from `src` to `dst`; `port` is the destination's, None for ICMP."""

    src: Party
    dst: Party
    protocol: Protocol
    port: int | None

    @property
    def family(self) -> Family:
        """The family of the destination's address."""
        return Family.V4 if len(self.dst.address) == 4 else Family.V6


class TermTrace(NamedTuple):
    """One term of a rule (a peer or a port): whether it matched, and why in words."""

    term: str
    matched: bool
    reason: str


class RuleTrace(NamedTuple):
    """One rule: it matched when a peer and a port did. No peers or ports listed means any."""

    ref: RuleRef
    matched: bool
    peers: tuple[TermTrace, ...]
    ports: tuple[TermTrace, ...]

    @property
    def failed(self) -> tuple[TermTrace, ...]:
        """The terms that kept the rule from matching: those of peers, or of ports, or of both."""
        out: list[TermTrace] = []
        for terms in (self.peers, self.ports):
            if terms and not any(t.matched for t in terms):
                out.extend(terms)
        return tuple(out)


class PolicyTrace(NamedTuple):
    """One policy that isolates the subject in this direction, and what its rules say."""

    policy: ObjectKey
    matched: bool
    rules: tuple[RuleTrace, ...]


class DirectionTrace(NamedTuple):
    """The judgement of one direction.

    `isolating` is empty when the verdict does not come from policies; `reason` says it in words either
    way. `notes` state decisions where the API leaves a case open.
    """

    direction: Direction
    verdict: Verdict
    subject: ObjectKey | None
    reason: str
    isolating: tuple[PolicyTrace, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def allowed_by(self) -> tuple[RuleRef, ...]:
        """The first matching rule of every policy that allows it."""
        return tuple(next(r.ref for r in p.rules if r.matched) for p in self.isolating if p.matched)


class Trace(NamedTuple):
    """The judgement of a flow: both directions must allow."""

    flow: Flow
    verdict: Verdict
    egress: DirectionTrace
    ingress: DirectionTrace
