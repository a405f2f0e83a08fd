"""When the proxy's room looks at the kernel, looks after what drains, and tries again what was refused.

Times are those of the room's clock; the room asks what is due and says what it did.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from netpol.aio.backoff import Backoff

#: After a write the kernel is read back at growing intervals, since whoever undoes us does it soon.
FIRST_LOOK_S = 0.05
LAST_LOOK_S = 30.0
#: Looks take at most this part of the time. They share the processor with changes, and long ones, of large
#: tables, must be so seldom that hardly any change meets one.
LOOK_SHARE, LONG_LOOK_SHARE, LONG_LOOK_S = 0.1, 0.01, 0.2
#: How often it is looked whether draining backends are idle.
DRAIN_LOOK_S = 1.0
#: What was refused is tried again after this, then after twice as long, and so on.
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
NEVER = float("inf")


def _retries() -> Backoff:
    return Backoff(base_s=FIRST_RETRY_S, max_s=LAST_RETRY_S, uniform=lambda _low, high: high)


@dataclass(slots=True)
class Due:
    """When what is due."""

    look_at_s: float = NEVER
    drain_at_s: float = NEVER
    retry_at_s: float = NEVER
    _gap_s: float = FIRST_LOOK_S
    _rested_at_s: float = 0.0  # no look before
    _retries: Backoff = field(default_factory=_retries)

    @property
    def next_s(self) -> float:
        """When the next one is due."""
        return min(self.look_at_s, self.drain_at_s, self.retry_at_s)

    def applied(self, now_s: float) -> None:
        """Something was applied: a look follows."""
        self._gap_s = FIRST_LOOK_S
        # A look slows changes down: however many come, it keeps its share.
        self.look_at_s = max(now_s + FIRST_LOOK_S, self._rested_at_s)

    def stands(self, now_s: float, *, troubled: bool, draining: bool) -> None:
        """How it is after something was done: whether something is refused, and something drains."""
        if not troubled:
            self._retries.reset()
            self.retry_at_s = NEVER
        elif self.retry_at_s <= now_s or self.retry_at_s == NEVER:
            self.retry_at_s = now_s + self._retries.failed()
        if not draining:
            self.drain_at_s = NEVER
        elif self.drain_at_s == NEVER:
            self.drain_at_s = now_s + DRAIN_LOOK_S

    def drained(self, begin_s: float, now_s: float, *, draining: bool) -> None:
        """It was looked after what drains."""
        next_s = now_s + max(DRAIN_LOOK_S, (now_s - begin_s) / LOOK_SHARE)
        self.drain_at_s = next_s if draining else NEVER

    def looked(self, begin_s: float, now_s: float) -> None:
        """A look at everything ended."""
        took_s = now_s - begin_s
        self._gap_s = min(self._gap_s * 2, LAST_LOOK_S)
        share = LONG_LOOK_SHARE if took_s > LONG_LOOK_S else LOOK_SHARE
        self._rested_at_s = now_s + took_s / share
        self.look_at_s = max(now_s + self._gap_s, self._rested_at_s)
