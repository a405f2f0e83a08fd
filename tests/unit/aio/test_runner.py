import asyncio
from contextlib import asynccontextmanager

import pytest

from netpol.aio.clock import ManualClock
from netpol.aio.runner import BoundedRunner


class Work:
    """Records when it ran; can take time and can fail."""

    def __init__(self, clock, *, takes_s=0.0):
        self.clock, self.takes_s = clock, takes_s
        self.starts, self.fail_with, self.running, self.overlapped = [], [], False, False

    async def __call__(self):
        self.overlapped |= self.running
        self.running = True
        self.starts.append(self.clock.monotonic())
        try:
            if self.takes_s:
                await self.clock.sleep(self.takes_s)
            if self.fail_with:
                raise self.fail_with.pop(0)
        finally:
            self.running = False


@asynccontextmanager
async def running(runner):
    task = asyncio.create_task(runner.run_forever())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def clock():
    return ManualClock(start_s=0.0)


async def test_nothing_runs_without_a_mark(clock):
    work = Work(clock)
    async with running(BoundedRunner(work, clock=clock)):
        await clock.advance(1000.0)
    assert work.starts == []


async def test_many_marks_are_one_run(clock):
    work = Work(clock)
    runner = BoundedRunner(work, min_s=1.0, clock=clock)
    async with running(runner):
        for _ in range(100):
            runner.mark()
        assert runner.pending
        await clock.advance(10.0)
    assert work.starts == [0.0]
    assert not runner.pending


async def test_a_mark_during_a_run_causes_exactly_one_more(clock):
    work = Work(clock, takes_s=2.0)
    runner = BoundedRunner(work, clock=clock)
    async with running(runner):
        runner.mark()
        await clock.advance(1.0)
        for _ in range(3):
            runner.mark()
        await clock.advance(10.0)
    assert work.starts == [0.0, 2.0]
    assert not work.overlapped


async def test_the_interval_counts_from_the_end_of_a_run(clock):
    work = Work(clock, takes_s=2.0)
    runner = BoundedRunner(work, min_s=5.0, clock=clock)
    async with running(runner):
        for _ in range(20):
            runner.mark()
            await clock.advance(1.0)
    assert work.starts == [0.0, 7.0, 14.0]


async def test_a_mark_after_a_long_rest_runs_at_once(clock):
    work = Work(clock)
    runner = BoundedRunner(work, min_s=5.0, clock=clock)
    async with running(runner):
        runner.mark()
        await clock.advance(100.0)
        runner.mark()
        await clock.advance(0.0)
    assert work.starts == [0.0, 100.0]


async def test_a_failure_is_retried_with_growing_pauses_without_a_mark(clock):
    work = Work(clock)
    work.fail_with = [OSError(str(i)) for i in range(5)]
    seen = []
    runner = BoundedRunner(work, retry_s=1.0, max_s=4.0, clock=clock, on_error=seen.append)
    async with running(runner):
        runner.mark()
        await clock.advance(2.5)
        assert (runner.failures, str(runner.last_error)) == (2, "1")
        assert runner.pending
        await clock.advance(100.0)
        assert (runner.failures, runner.last_error) == (0, None)
    assert work.starts == [0.0, 1.0, 3.0, 7.0, 11.0, 15.0]
    assert [str(e) for e in seen] == ["0", "1", "2", "3", "4"]
    assert runner.runs == 6


async def test_a_mark_cuts_a_long_pause_but_not_below_the_first(clock):
    work = Work(clock)
    work.fail_with = [OSError()] * 50
    runner = BoundedRunner(work, retry_s=1.0, max_s=1000.0, clock=clock)
    async with running(runner):
        runner.mark()
        await clock.advance(40.0)
        assert work.starts == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0]
        runner.mark()  # 9 s into a pause of 32 s
        await clock.advance(0.0)
        assert work.starts[-1] == 40.0
        for _ in range(100):
            runner.mark()
            await clock.advance(0.1)
    assert all(b - a >= 0.999 for a, b in zip(work.starts, work.starts[1:], strict=False))
    assert len(work.starts) >= 15


async def test_the_minimum_interval_also_holds_for_retries(clock):
    work = Work(clock)
    work.fail_with = [OSError()]
    runner = BoundedRunner(work, min_s=5.0, retry_s=1.0, clock=clock)
    async with running(runner):
        runner.mark()
        await clock.advance(30.0)
    assert work.starts == [0.0, 5.0]


async def test_an_observer_that_fails_does_not_end_the_runner(clock):
    work = Work(clock)
    work.fail_with = [OSError("kernel")]

    def observer(error):
        raise RuntimeError("broken")

    runner = BoundedRunner(work, retry_s=1.0, clock=clock, on_error=observer)
    async with running(runner) as task:
        runner.mark()
        await clock.advance(0.5)
        assert "broken" in str(runner.last_error)
        await clock.advance(5.0)
        assert not task.done()
    assert work.starts == [0.0, 1.0]


async def test_wait_idle_ends_only_when_a_run_after_the_last_mark_succeeded(clock):
    work = Work(clock, takes_s=1.0)
    work.fail_with = [OSError()]
    runner = BoundedRunner(work, retry_s=1.0, clock=clock)
    async with running(runner):
        await runner.wait_idle()
        runner.mark()
        waiter = asyncio.create_task(runner.wait_idle())
        await clock.advance(1.5)  # failed at 1.0, runs again at 2.0
        assert not waiter.done()
        await clock.advance(1.0)
        runner.mark()
        await clock.advance(0.6)  # succeeded at 3.0, but a mark came meanwhile
        assert not waiter.done()
        await clock.advance(1.0)
        assert waiter.done()
    assert work.starts == [0.0, 2.0, 3.0]


async def test_resync_runs_without_marks(clock):
    work = Work(clock)
    runner = BoundedRunner(work, resync_s=60.0, clock=clock)
    async with running(runner):
        await clock.advance(90.0)
        runner.mark()
        await clock.advance(100.0)
    assert work.starts == [60.0, 90.0, 150.0]
    assert clock.sleepers == 0


async def test_cancellation_ends_it_also_within_a_run(clock):
    work = Work(clock, takes_s=5.0)
    runner = BoundedRunner(work, clock=clock)
    async with running(runner) as task:
        runner.mark()
        await clock.advance(1.0)
    assert task.cancelled()
    assert not work.running
