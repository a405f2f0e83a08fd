"""Labels and label selectors (meta/v1 LabelSelector), canonical and hashable.

A selector is a conjunction of requirements. Two selectors that are written differently but demand
the same are equal, so that one selector is one ipset whoever names it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

#: Sorted (key, value) pairs. Interned, because thousands of pods carry the same ones.
Labels = tuple[tuple[str, str], ...]

#: The label that the API server puts on every namespace.
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"


@lru_cache(maxsize=16384)
def _pair(key: str, value: str) -> tuple[str, str]:
    return sys.intern(key), sys.intern(value)


def labels(source: Mapping[str, str] | None) -> Labels:
    """Make canonical labels out of a mapping."""
    if not source:
        return ()
    return tuple(sorted(_pair(k, v) for k, v in source.items()))


class Operator(StrEnum):
    """The operators of a LabelSelectorRequirement."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class Requirement(NamedTuple):
    """One term. `values` is sorted, non-empty for In and NotIn, empty for the other two."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, have: Mapping[str, str]) -> bool:
        """Whether labels satisfy the term; NotIn and DoesNotExist hold for a missing key."""
        value = have.get(self.key)
        match self.operator:
            case Operator.IN:
                return value in self.values
            case Operator.NOT_IN:
                return value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.DOES_NOT_EXIST:
                return value is None

    def __str__(self) -> str:
        match self.operator:
            case Operator.IN if len(self.values) == 1:
                return f"{self.key}={self.values[0]}"
            case Operator.IN:
                return f"{self.key} in ({', '.join(self.values)})"
            case Operator.NOT_IN:
                return f"{self.key} not in ({', '.join(self.values)})"
            case Operator.EXISTS:
                return f"{self.key} exists"
            case Operator.DOES_NOT_EXIST:
                return f"{self.key} does not exist"


class Selector(NamedTuple):
    """A conjunction of requirements, sorted and without repetitions; empty matches everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, have: Mapping[str, str]) -> bool:
        """Whether labels satisfy every requirement."""
        return all(r.matches(have) for r in self.requirements)

    def failing(self, have: Mapping[str, str]) -> Requirement | None:
        """The first requirement that labels do not satisfy."""
        return next((r for r in self.requirements if not r.matches(have)), None)

    def __str__(self) -> str:
        return ", ".join(map(str, self.requirements)) or "everything"


EVERYTHING = Selector()


def selector(requirements: Iterable[Requirement]) -> Selector:
    """Make the canonical selector of some requirements."""
    return Selector(
        tuple(
            sorted(
                {Requirement(r.key, r.operator, tuple(sorted(set(r.values)))) for r in requirements}
            )
        )
    )
