"""Which pods match a label selector, by bitset, for terms that somebody asks for.

Pods are small integers (`PodTable`). For every label pair and key that an active selector names there
is a Python int used as a bitset of pods; a selector is then a few ANDs. Only wanted terms are indexed:
labels of high cardinality that no selector names (pod-template-hash) cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netpol.model.labels import Labels, Operator, Requirement, Selector
from netpol.model.objects import Endpoint

#: Positions of the set bits of each byte, for enumeration.
_BIT_POSITIONS = tuple(tuple(i for i in range(8) if byte >> i & 1) for byte in range(256))


def bits_of(members: Iterable[int], size: int) -> int:
    """Make a bitset of `size` bits out of pod numbers."""
    raw = bytearray(size // 8 + 1)
    for number in members:
        raw[number >> 3] |= 1 << (number & 7)
    return int.from_bytes(raw, "little")


def members_of(bits: int) -> Iterator[int]:
    """Enumerate the pod numbers of a bitset, ascending."""
    raw = bits.to_bytes(bits.bit_length() // 8 + 1, "little")
    for base, byte in enumerate(raw):
        if byte:
            for i in _BIT_POSITIONS[byte]:
                yield base * 8 + i


class LabelIndex:
    """Bitsets of pods for the label pairs and keys that active selectors name."""

    def __init__(self, pods: list[Endpoint | None]) -> None:
        """Args: pods: the table of pods that policy sees, by number, shared with its owner."""
        self._pods = pods
        self._pairs: dict[tuple[str, str], int] = {}
        self._keys: dict[str, int] = {}
        self.policed = 0  # all pods that policy sees

    def add(self, number: int, labels: Labels) -> None:
        """A pod that policy sees came, or came back with other labels."""
        bit = 1 << number
        self.policed |= bit
        for pair in labels:
            if pair in self._pairs:
                self._pairs[pair] |= bit
            if pair[0] in self._keys:
                self._keys[pair[0]] |= bit

    def discard(self, number: int, labels: Labels) -> None:
        """A pod with these labels left."""
        keep = ~(1 << number)
        self.policed &= keep
        for pair in labels:
            if pair in self._pairs:
                self._pairs[pair] &= keep
            if pair[0] in self._keys:
                self._keys[pair[0]] &= keep

    def want(self, selectors: Iterable[Selector]) -> None:
        """Index all terms of some selectors, in one pass over the pods."""
        pairs: dict[tuple[str, str], bytearray] = {}
        keys: dict[str, bytearray] = {}
        size = len(self._pods) // 8 + 1
        for term in {r for s in selectors for r in s.requirements}:
            if term.values:
                for value in term.values:
                    if (term.key, value) not in self._pairs:
                        pairs[term.key, value] = bytearray(size)
            elif term.key not in self._keys:
                keys[term.key] = bytearray(size)
        if not pairs and not keys:
            return
        for number, pod in enumerate(self._pods):
            if pod is None:
                continue
            for pair in pod.labels:
                if pair in pairs:
                    pairs[pair][number >> 3] |= 1 << (number & 7)
                if pair[0] in keys:
                    keys[pair[0]][number >> 3] |= 1 << (number & 7)
        self._pairs.update((k, int.from_bytes(v, "little")) for k, v in pairs.items())
        self._keys.update((k, int.from_bytes(v, "little")) for k, v in keys.items())

    def forget(self, keep: Iterable[Selector]) -> None:
        """Drop the terms that none of these selectors names."""
        terms = {r for s in keep for r in s.requirements}
        pairs = {(r.key, v) for r in terms for v in r.values}
        keys = {r.key for r in terms if not r.values}
        self._pairs = {k: v for k, v in self._pairs.items() if k in pairs}
        self._keys = {k: v for k, v in self._keys.items() if k in keys}

    def select(self, selector: Selector, base: int) -> int:
        """Those of `base` that match; all terms must have been wanted."""
        for term in selector.requirements:
            if not base:
                break
            base &= self._term(term)
        return base

    def _term(self, term: Requirement) -> int:
        match term.operator:
            case Operator.EXISTS:
                return self._keys[term.key]
            case Operator.DOES_NOT_EXIST:
                return ~self._keys[term.key]
            case Operator.IN | Operator.NOT_IN:
                bits = 0
                for value in term.values:
                    bits |= self._pairs[term.key, value]
                return bits if term.operator is Operator.IN else ~bits
