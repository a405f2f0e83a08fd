"""Python's collector of garbage while an agent starts, and afterwards.

What is loaded at start stays, nearly all of it. A full collection looks at it again each time it has grown by
a quarter, and the loop stands still meanwhile: 0.1 s with 10,000 Services. So there is none until the start
is over, and what is there by then is not looked at any more. Young garbage goes as always.
"""

from __future__ import annotations

import asyncio
import gc

#: A start that does not come to its end must not cost more and more memory.
LONGEST_REST_S = 60.0
#: So many collections of middle-aged objects come before a full one: never.
_NEVER = 1 << 30


class Collector:
    """The collector of this process; for the loop's thread."""

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def rest(self) -> None:
        """A start begins."""
        self._before = gc.get_threshold()
        gc.set_threshold(*self._before[:2], _NEVER)
        self._timer = asyncio.get_running_loop().call_later(LONGEST_REST_S, self.started)

    def started(self) -> None:
        """The start is over; may be said again and again."""
        if self._timer is None or self._before is None:
            return
        self._timer.cancel()
        self._timer = None
        gc.freeze()
        gc.set_threshold(*self._before)
