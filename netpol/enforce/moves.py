"""In which order entries of the class maps may change: what takes away before what gives.

A flow needs the egress judgement of its source and the ingress judgement of its destination, which are
two entries. If a policy event swaps which of the two denies it, an order by chance would let it pass in
between. So every entry whose new class allows less changes first, then those whose new class allows more;
then each state on the way is below the old one or below the new one. An entry that takes and gives (its
policies were exchanged, not added or removed) denies in between.

What a class allows is compared by the contents of its policy chains: a policy that only changed its
selector is another one by name, but takes nothing from the pods that both versions select.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import Enum

from netpol.enforce.numbers import Numbers
from netpol.model.ids import ChainName, Direction
from netpol.model.net import Family, family_of
from netpol.model.policy import CompiledPolicy
from netpol.model.ruleset import Jump, Rule
from netpol.policy.graph import GraphDelta, rule_sets
from netpol.render import names
from netpol.render.options import NONE, OPEN, OVERFLOW, UNKNOWN


class Move(Enum):
    """How an entry changes: what it allows shrinks, grows, or does both."""

    TIGHTEN = "tighten"
    LOOSEN = "loosen"
    EXCHANGE = "exchange"


#: What a class allows: the contents of its policies' chains, any of which may match; None for all.
#: Without comments, which name the policy: one that replaces another of equal rules takes nothing.
_Allowed = frozenset[tuple[object, ...]] | None

#: An overflow class is found by a set, not by its number: nothing is known of what it allows.
_NOT_KNOWN: _Allowed = frozenset({(OVERFLOW,)})
_NOTHING: _Allowed = frozenset()


class Judgements:
    """What the numbers of one direction and family stand for once a plan's tables are written."""

    def __init__(
        self,
        direction: Direction,
        family: Family,
        numbers: Numbers,
        *,
        chains: Mapping[ChainName, tuple[object, ...]],
        shift: int,
    ) -> None:
        self._chains, self._shift = chains, shift
        self._leaves = numbers.foreign(direction, family)
        for key, number in numbers.used.items():
            if key.direction is direction:
                self._leaves[number] = names.class_chain(key)

    def move(self, old_mark: int, new_mark: int) -> Move:
        """How an entry changes that had one mark and gets another."""
        old, new = self._allowed(old_mark >> self._shift), self._allowed(new_mark >> self._shift)
        if new is None:
            return Move.LOOSEN
        if old is None or new <= old:
            return Move.TIGHTEN
        return Move.LOOSEN if old <= new else Move.EXCHANGE

    def _allowed(self, number: int) -> _Allowed:
        if number in (NONE, OPEN):
            return None
        if number == UNKNOWN or (number not in self._leaves and number != OVERFLOW):
            return _NOTHING
        if number == OVERFLOW:
            return _NOT_KNOWN
        rules = self._chains.get(self._leaves[number], ())
        return frozenset(
            tuple(map(_plain, self._chains.get(r.action.chain, ())))
            for r in rules
            if isinstance(r, Rule) and isinstance(r.action, Jump)
        )


def _plain(rule: object) -> object:
    return replace(rule, comment="") if isinstance(rule, Rule) else rule


def crosses(delta: GraphDelta, policies: Iterable[CompiledPolicy]) -> bool:
    """Whether one end of a flow may gain by a delta what the other end loses by it.

    That takes two pods (a namespace that is labelled anew), and a set that grows in the rules of one
    direction while one shrinks in those of the other. Members usually come before others go, so that
    whoever moves from one set to another loses nothing; here they must come after.
    """
    gains, losses = set(), set()
    addresses: set[bytes] = set()
    for key, change in delta.set_deltas.items():
        for address, (old, new) in change.changes.items():
            addresses.add(address)
            if set(new or ()) - set(old or ()):
                gains.add(key)
            if set(old or ()) - set(new or ()):
                losses.add(key)
    if not gains or not losses or max(Counter(map(family_of, addresses)).values()) < 2:
        return False
    used = {
        d: {k for p in policies for rule in p.rules(d) for k in rule_sets(rule, d)}
        for d in Direction
    }
    ingress, egress = used[Direction.INGRESS], used[Direction.EGRESS]
    return bool((gains & ingress and losses & egress) or (gains & egress and losses & ingress))
