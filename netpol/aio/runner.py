"""One worker that is told "something changed" and does the work a bounded number of times.

Events only mark; the runner runs. However many marks arrive, at most one run waits, since a run looks
at the whole state. A mark during a run causes one more run after it, because the run may have looked
before the change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from netpol.aio.backoff import Backoff
from netpol.aio.clock import Clock, SystemClock

Observer = Callable[[Exception], None]


class BoundedRunner:
    """Runs `run` after marks, never more often than every `min_s`, again after failures.

    Invariants: one run at a time; the interval counts from the end of a run, so that a slow run cannot
    take the whole loop; a failed run is retried without a further mark until one succeeds; an exception
    of `run` (or of the observer) never ends the runner, cancellation does.

    After failures the pause grows, but a new mark shortens it to `retry_s`: what changed may well be
    the cure. Retries carry no jitter, since what they talk to is this machine's own kernel.

    Args:
        run: the work; an exception means that it has to be repeated.
        min_s: pause between the end of a run and the next start.
        retry_s: pause after the first failure; doubles with each further one.
        max_s: longest pause after failures.
        on_error: told every failure.
        resync_s: run without a mark when nothing ran for so long; 0 means never.
    """

    def __init__(
        self,
        run: Callable[[], Awaitable[object]],
        *,
        min_s: float = 0.0,
        retry_s: float = 1.0,
        max_s: float = 30.0,
        clock: Clock | None = None,
        on_error: Observer | None = None,
        resync_s: float = 0.0,
    ) -> None:
        self._run, self._min_s, self._resync_s = run, min_s, resync_s
        self._retry_s = max(min_s, retry_s)
        self._clock = clock or SystemClock()
        self._on_error = on_error
        self._backoff = Backoff(
            base_s=self._retry_s, max_s=max(self._retry_s, max_s), uniform=lambda _low, high: high
        )
        self._marked = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.runs = 0
        self.last_error: Exception | None = None

    @property
    def failures(self) -> int:
        """Failures in a row; 0 when the last run succeeded."""
        return self._backoff.failures

    @property
    def pending(self) -> bool:
        """Whether a run waits to start (not counting one that is under way)."""
        return self._marked.is_set() or self.failures > 0

    def mark(self) -> None:
        """Ask for a run. Cheap, idempotent, callable from any callback of the loop."""
        self._marked.set()
        self._idle.clear()

    async def wait_idle(self) -> None:
        """Wait until every mark made so far was answered by a run that succeeded."""
        await self._idle.wait()

    async def run_forever(self) -> None:
        """Serve marks until cancelled."""
        await self._wait_for_mark(self._resync_s or None)
        while True:
            self._marked.clear()
            if await self._attempt():
                if not self._marked.is_set():
                    self._idle.set()
                await self._clock.sleep(self._min_s)
                await self._wait_for_mark(self._resync_s or None)
            else:
                pause_s = self._backoff.failed()
                await self._clock.sleep(self._retry_s)
                await self._wait_for_mark(pause_s - self._retry_s)

    async def _attempt(self) -> bool:
        self.runs += 1
        try:
            await self._run()
        except Exception as e:  # noqa: BLE001 - the runner outlives whatever the work does
            self.last_error = e
            self._idle.clear()
            self._tell(e)
            return False
        self.last_error = None
        self._backoff.reset()
        return True

    def _tell(self, error: Exception) -> None:
        if self._on_error is None:
            return
        try:
            self._on_error(error)
        except Exception as e:  # noqa: BLE001 - a broken observer must not stop the work
            e.add_note(f"while reporting {error!r}")
            self.last_error = e

    async def _wait_for_mark(self, at_most_s: float | None) -> None:
        if self._marked.is_set() or (at_most_s is not None and at_most_s <= 0):
            return
        if at_most_s is None:
            await self._marked.wait()
            return
        mark = asyncio.ensure_future(self._marked.wait())
        timer = asyncio.ensure_future(self._clock.sleep(at_most_s))
        try:
            await asyncio.wait((mark, timer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            mark.cancel()
            timer.cancel()
            await asyncio.gather(mark, timer, return_exceptions=True)
