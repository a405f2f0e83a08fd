"""Class numbers: who has which, read back at start, reused only when it is safe.

A number is *used* while a pod has its class, *retiring* when no pod has but a leaf of the tree still
leads from it to the class's chain, and free once a table transaction has removed that leaf. A class that
comes back while retiring gets its own number again.

A number means the same in both families. Where what they have in the kernel disagrees, since one could
not be written for a while, the number is nobody's, and each keeps its leaf until no entry leads there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from netpol.model.ids import ChainName, Direction
from netpol.model.net import Family
from netpol.model.ruleset import Goto, MarkMatch, Rule
from netpol.policy.graph import ClassKey
from netpol.render import names
from netpol.render.options import FIRST_CLASS, RenderOptions


class Numbers:
    """The numbers of one node, each direction for itself."""

    def __init__(self, options: RenderOptions) -> None:
        self._last = (1 << options.width) - 1
        self._used: dict[ClassKey, int] = {}
        self._taken: dict[Direction, set[int]] = {d: set() for d in Direction}
        # Leaves that a former agent left, by number and family, until the tree is written again.
        self._foreign: dict[Direction, dict[int, dict[Family, ChainName]]] = {
            d: {} for d in Direction
        }

    @property
    def used(self) -> Mapping[ClassKey, int]:
        """Numbers of the classes that have one, retiring ones included."""
        return self._used

    def foreign(self, direction: Direction, family: Family) -> dict[int, ChainName]:
        """Leaves of a former agent that no class of ours took over."""
        own = {n for k, n in self._used.items() if k.direction is direction}
        return {
            n: chains[family]
            for n, chains in self._foreign[direction].items()
            if n not in own and family in chains
        }

    def adopt(self, direction: Direction, family: Family, leaves: Mapping[int, ChainName]) -> None:
        """Remember what the kernel's tree says, before any class asks for a number."""
        for number, chain in leaves.items():
            if number >= FIRST_CLASS:
                self._foreign[direction].setdefault(number, {})[family] = chain
                self._taken[direction].add(number)

    def assign(self, key: ClassKey) -> int | None:
        """The number of a class; None where the field has no room (overflow)."""
        number = self._used.get(key)
        if number is not None:
            return number
        chain = names.class_chain(key)
        for candidate, owners in self._foreign[key.direction].items():
            if set(owners.values()) == {chain}:
                self._used[key] = candidate
                return candidate
        taken = self._taken[key.direction]
        for candidate in range(FIRST_CLASS, self._last + 1):
            if candidate not in taken:
                taken.add(candidate)
                self._used[key] = candidate
                return candidate
        return None

    def release(self, keys: Iterable[ClassKey]) -> None:
        """The leaves of these classes are gone from the kernel: their numbers are free."""
        for key in keys:
            number = self._used.pop(key, None)
            if number is not None:
                self._taken[key.direction].discard(number)

    def settle(self) -> None:
        """The tree was written from `used` alone: numbers of foreign leaves are free."""
        for direction in Direction:
            own = {n for k, n in self._used.items() if k.direction is direction}
            self._taken[direction] = own
            self._foreign[direction] = {}


def leaves_of(
    chains: Mapping[ChainName, Iterable[object]], direction: Direction, options: RenderOptions
) -> dict[int, ChainName]:
    """Read the leaves of a tree out of dumped chains: number to chain."""
    root = names.tree_chain(direction)
    out: dict[int, ChainName] = {}
    for name, rules in chains.items():
        if name != root and not name.startswith(f"{root}-"):
            continue
        for rule in rules:
            if (
                isinstance(rule, Rule)
                and isinstance(rule.action, Goto)
                and len(rule.matches) == 1
                and isinstance(match := rule.matches[0], MarkMatch)
                and match.mask == options.field_mask
                and not rule.action.chain.startswith(root)
            ):
                out[match.value >> options.shift] = rule.action.chain
    return out
