"""A policy with its meaning worked out: what `policy.compile` makes and every reader uses.

"Any" is its own value (`None` for peers and ports); an empty tuple means *nothing matches*, which is
what is left of a rule whose every peer or port was invalid. The two must never be confused (row 36).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from netpol.model.ids import Direction, ObjectKey, Protocol
from netpol.model.labels import Selector
from netpol.model.net import Prefix


class PortRange(NamedTuple):
    """Ports first..last (inclusive) of one protocol."""

    protocol: Protocol
    first: int
    last: int


class PortName(NamedTuple):
    """A named port, to be resolved on each destination pod by name and protocol."""

    protocol: Protocol
    name: str


PortMatch = PortRange | PortName


class PodPeer(NamedTuple):
    """Pods matching `pods` in one namespace (scope: its name) or in those matching a selector.

    Also the identity of an address set: equal peers share one.
    """

    scope: str | Selector
    pods: Selector


class BlockPeer(NamedTuple):
    """An ipBlock: the CIDR and excepts as read, and the disjoint prefixes that remain."""

    cidr: Prefix
    excepts: tuple[Prefix, ...]
    prefixes: tuple[Prefix, ...]


class InvalidPeer(NamedTuple):
    """A peer that the API would refuse: matches nothing, and says why."""

    reason: str


PolicyPeer = PodPeer | BlockPeer | InvalidPeer


class RuleRef(NamedTuple):
    """One rule of one policy; `number` counts from 0 as in spec.ingress[number]."""

    policy: ObjectKey
    direction: Direction
    number: int


class PolicyRule(NamedTuple):
    """One rule: allowed when a peer matches and a port matches."""

    peers: tuple[PolicyPeer, ...] | None
    ports: tuple[PortMatch, ...] | None


class Problem(NamedTuple):
    """Something that the API would refuse: field path and what was expected."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A NetworkPolicy with every default applied and every invalid part closed.

    Attributes:
        key: namespace and name.
        subject: selects the pods of `key.namespace` that it isolates.
        isolates: directions in which it isolates them.
        ingress: rules, meaningful only when INGRESS is in `isolates` (else empty).
        egress: likewise for EGRESS.
        problems: what the API server would have refused.
    """

    key: ObjectKey
    uid: str
    subject: Selector
    isolates: frozenset[Direction]
    ingress: tuple[PolicyRule, ...]
    egress: tuple[PolicyRule, ...]
    problems: tuple[Problem, ...] = ()

    def rules(self, direction: Direction) -> tuple[PolicyRule, ...]:
        """The rules of one direction."""
        return self.ingress if direction is Direction.INGRESS else self.egress
