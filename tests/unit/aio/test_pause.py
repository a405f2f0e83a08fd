"""Waiting for an event or a time, whichever comes first."""

from __future__ import annotations

import asyncio
import math

import pytest

from netpol.aio.clock import ManualClock
from netpol.aio.pause import pause


@pytest.mark.parametrize("at_most_s", [5.0, math.inf])
async def test_an_event_ends_it(at_most_s: float) -> None:
    event, clock = asyncio.Event(), ManualClock()
    waiting = asyncio.create_task(pause(event, at_most_s=at_most_s, clock=clock))
    await clock.advance(4)
    assert not waiting.done()
    event.set()
    await clock.settle()
    assert waiting.done()
    assert clock.sleepers == 0


async def test_so_does_its_time_which_may_be_over() -> None:
    event, clock = asyncio.Event(), ManualClock()
    waiting = asyncio.create_task(pause(event, at_most_s=5, clock=clock))
    await clock.advance(5)
    assert waiting.done()
    await asyncio.wait_for(pause(event, at_most_s=-1, clock=clock), 1)
