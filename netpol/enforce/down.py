"""Families whose rules cannot be applied for now: why, and when each is tried again.

Owns no work. While a family is down the other goes on without it; what was applied of it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netpol.aio.backoff import Backoff
from netpol.model.net import Family

#: The first pause, and the longest; as of a room that fails as a whole.
RETRY_S, RETRY_MAX_S = 0.5, 30.0
#: A try that hangs until its timeout must not take the kernel's thread from the other family: the pause
#: is this many times as long as the try was.
REST_PER_WORK = 4.0


def _no_jitter(_low: float, high: float) -> float:
    """It is this machine's own kernel that is asked again, by nobody else."""
    return high


@dataclass(slots=True)
class _State:
    error: Exception
    retry_at_s: float = 0.0
    backoff: Backoff = field(
        default_factory=lambda: Backoff(base_s=RETRY_S, max_s=RETRY_MAX_S, uniform=_no_jitter)
    )


class DownFamilies:
    """Counts the failures of each family. Times are of one monotonic clock."""

    def __init__(self) -> None:
        self._states: dict[Family, _State] = {}

    def __bool__(self) -> bool:
        return bool(self._states)

    @property
    def errors(self) -> dict[Family, Exception]:
        """The families that are down, and why."""
        return {f: s.error for f, s in self._states.items()}

    def resting(self, now_s: float) -> dict[Family, Exception]:
        """Those that are not to be tried yet."""
        return {f: s.error for f, s in self._states.items() if s.retry_at_s > now_s}

    def pause_s(self, now_s: float) -> float | None:
        """Until the next is to be tried; None when none is down."""
        if not self._states:
            return None
        return max(0.0, min(s.retry_at_s for s in self._states.values()) - now_s)

    def tried(
        self,
        failed: Mapping[Family, Exception],
        *,
        rested: Mapping[Family, Exception],
        now_s: float,
        took_s: float,
    ) -> None:
        """Take in what became of a try.

        Args:
            failed: the families that failed, those that rested left out.
            rested: families that were left alone.
            now_s: when it ended.
            took_s: how long it took.
        """
        before = self._states
        self._states = {f: before[f] for f in rested if f in before}
        for family, error in failed.items():
            state = before.get(family) or _State(error)
            state.error = error
            state.retry_at_s = now_s + max(state.backoff.failed(), REST_PER_WORK * took_s)
            self._states[family] = state

    def clear(self) -> None:
        """All are to be tried."""
        self._states = {}


def fault_text(errors: Mapping[Family, Exception]) -> str:
    """What is wrong, family by family; "" when nothing is."""
    return "; ".join(
        f"IPv{int(f)}: {str(e) or type(e).__name__}" for f, e in sorted(errors.items())
    )
