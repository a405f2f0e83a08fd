"""Time as a constructor parameter, so that tests of waits take no time.

`SystemClock` is the real one. `ManualClock` stands still until it is advanced, and then wakes sleepers
in the order of their deadlines, as they would have woken.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """What code that waits or measures needs."""

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean anything."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch, for stamps that people read."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Wait; at least one turn of the loop even for 0."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """Seconds since some start; those count that the machine slept, since others went on meanwhile."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        """Wait on the event loop."""
        await asyncio.sleep(delay_s)


#: How many turns of the loop `ManualClock.settle` gives to others. Chains of callbacks are short; a
#: turn costs microseconds.
_SETTLE_TURNS = 50


class ManualClock:
    """A clock for tests. `advance` moves it and lets everyone who wakes run."""

    def __init__(self, *, start_s: float = 1000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._now = start_s
        self._wall_offset = wall_s - start_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        """The time it was advanced to."""
        return self._now

    def wall(self) -> float:
        """The same moment since the epoch."""
        return self._now + self._wall_offset

    async def sleep(self, delay_s: float) -> None:
        """Wait until the clock was advanced past the deadline."""
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + delay_s, next(self._order), woken))
        await woken

    @property
    def sleepers(self) -> int:
        """How many tasks wait on this clock."""
        return sum(not woken.done() for _, _, woken in self._sleepers)

    @property
    def next_deadline_s(self) -> float | None:
        """Seconds until the first sleeper wakes, or None when nobody sleeps."""
        while self._sleepers and self._sleepers[0][2].done():
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] - self._now if self._sleepers else None

    async def settle(self) -> None:
        """Let every task run until it waits for something again."""
        for _ in range(_SETTLE_TURNS):
            await asyncio.sleep(0)

    async def advance(self, delay_s: float) -> None:
        """Move the clock, stopping at each deadline on the way so that sleepers see their own time."""
        await self.settle()
        end = self._now + delay_s
        while self._sleepers and self._sleepers[0][0] <= end:
            deadline, _, woken = heapq.heappop(self._sleepers)
            self._now = max(self._now, deadline)
            if not woken.done():  # a cancelled sleeper stays in the heap
                woken.set_result(None)
            await self.settle()
        self._now = max(self._now, end)
        await self.settle()
