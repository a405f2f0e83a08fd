"""Sleeping until something happens, or for a time at most."""

from __future__ import annotations

import asyncio
import math

from netpol.aio.clock import Clock


async def pause(event: asyncio.Event, *, at_most_s: float, clock: Clock) -> None:
    """Wait for an event, but not longer than this; infinity is a time, too."""
    waits: list[asyncio.Future[object]] = [asyncio.ensure_future(event.wait())]
    if at_most_s != math.inf:
        waits.append(asyncio.ensure_future(clock.sleep(max(0.0, at_most_s))))
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
