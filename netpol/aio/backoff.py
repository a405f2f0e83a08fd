"""Exponential back-off with full jitter, as state and without sleeping.

Full jitter (uniform between 0 and the bound) spreads a thousand agents that lost the same server.
"""

from __future__ import annotations

import random
from collections.abc import Callable

#: 2**n would overflow a float's exponent after 1,023 failures; the bound is far smaller anyway.
_MAX_DOUBLINGS = 40


class Backoff:
    """Counts failures in a row and says how long to wait after each.

    Args:
        base_s: bound of the first wait; doubles with each failure.
        max_s: the bound never exceeds this.
        uniform: draws between two numbers; tests pass one that returns the upper.
    """

    def __init__(
        self,
        *,
        base_s: float = 0.2,
        max_s: float = 30.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._base_s, self._max_s, self._uniform = base_s, max_s, uniform
        self.failures = 0

    @property
    def bound_s(self) -> float:
        """The longest wait that the next failure can cause."""
        doublings = min(self.failures, _MAX_DOUBLINGS)
        return min(self._max_s, self._base_s * float(2**doublings))

    def failed(self, *, at_least_s: float = 0.0) -> float:
        """Count a failure.

        Args:
            at_least_s: what the other side asked for (Retry-After); the jitter comes on top.

        Returns:
            Seconds to wait before the next attempt.
        """
        bound = self.bound_s
        self.failures += 1
        return at_least_s + self._uniform(0.0, bound)

    def reset(self) -> None:
        """Forget the failures, after real progress."""
        self.failures = 0
