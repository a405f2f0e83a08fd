"""The collector rests while an agent starts, and works afterwards, whatever became of the start."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from netpol.agent import garbage
from netpol.agent.garbage import Collector


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)
    gc.unfreeze()


async def test_there_is_no_full_collection_until_the_start_is_over(
    thresholds: tuple[int, int, int],
) -> None:
    collector = Collector()
    collector.rest()
    assert gc.get_threshold()[:2] == thresholds[:2]
    assert gc.get_threshold()[2] > 1_000_000
    collector.started()
    assert gc.get_threshold() == thresholds
    frozen = gc.get_freeze_count()
    assert frozen
    kept = [[n] for n in range(1000)]
    collector.started()
    assert gc.get_freeze_count() < frozen + len(kept)


async def test_a_start_without_an_end_gets_it_back(
    monkeypatch: pytest.MonkeyPatch, thresholds: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(garbage, "LONGEST_REST_S", 0.01)
    Collector().rest()
    await asyncio.sleep(0.05)
    assert gc.get_threshold() == thresholds
