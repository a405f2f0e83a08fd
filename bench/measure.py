"""What a row of the results is, and how times become one figure."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Row:
    """One figure of the results.

    `baseline` is what it is compared with, in the same unit, and `ratio` is value / baseline; both are
    None where a figure stands alone. `target` is the most that the value may be, or the ratio where
    there is one and `by_ratio` says so; a target of None is a figure for information.
    """

    id: str
    value: float
    unit: str
    baseline: float | None = None
    target: float | None = None
    by_ratio: bool = False
    at_least: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if not self.baseline else self.value / self.baseline

    @property
    def met(self) -> bool | None:
        measured = self.ratio if self.by_ratio else self.value
        if self.target is None or measured is None:
            return None
        return measured >= self.target if self.at_least else measured <= self.target

    def as_json(self) -> dict[str, Any]:
        """The row as results.json has it."""
        shown = asdict(self)
        sign = ">=" if self.at_least else "<="
        target = None
        if self.target is not None:
            target = f"{sign} {self.target:g}{'x' if self.by_ratio else f' {self.unit}'}"
        return {
            "id": self.id,
            "value": _rounded(self.value),
            "unit": self.unit,
            "baseline": _rounded(self.baseline),
            "ratio": _rounded(self.ratio),
            "target": target,
            "met": self.met,
            "note": shown["note"],
        }


def _rounded(value: float | None) -> float | None:
    """Four significant digits: more is noise."""
    if value is None or value == 0:
        return value
    return round(value, max(0, 3 - math.floor(math.log10(abs(value)))))


def p99(samples: Sequence[float]) -> float:
    """The 99th percentile: the smallest sample that 99 of 100 do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * 0.99) - 1)]


def median(samples: Sequence[float]) -> float:
    """The middle sample."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]


def spread(samples: Sequence[float], unit: str = "ms") -> str:
    """Median, 99th percentile and maximum, for notes."""
    return (
        f"n={len(samples)} median {median(samples):.3g} p99 {p99(samples):.3g} "
        f"max {max(samples):.3g} {unit}"
    )


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(calls: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """The minimum of several measurements of each call, in turn, each round in another order."""
    rng = random.Random(1)
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        order = list(calls)
        rng.shuffle(order)
        for name in order:
            best[name] = min(best[name], calls[name]())
    return best


def settle() -> None:
    """Garbage of the set-up is not what is measured."""
    gc.collect()


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows for people."""
    head = ("id", "value", "unit", "baseline", "ratio", "target", "met")
    lines = [head] + [
        tuple(
            {None: "-", True: "yes", False: "NO"}.get(row[c], str(row[c]))
            if not isinstance(row[c], float)
            else f"{row[c]:g}"
            for c in head
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
