import asyncio

from netpol.aio.clock import ManualClock, SystemClock


async def test_sleepers_wake_in_the_order_of_their_deadlines_and_see_their_own_time():
    clock = ManualClock(start_s=0.0)
    woken = []

    async def sleeper(delay_s):
        await clock.sleep(delay_s)
        woken.append((delay_s, clock.monotonic()))

    tasks = [asyncio.create_task(sleeper(d)) for d in (3.0, 1.0, 2.0)]
    await clock.advance(2.5)
    assert woken == [(1.0, 1.0), (2.0, 2.0)]
    assert clock.monotonic() == 2.5
    assert clock.sleepers == 1
    assert clock.next_deadline_s == 0.5
    await clock.advance(0.5)
    assert woken[-1] == (3.0, 3.0)
    await asyncio.gather(*tasks)
    assert clock.next_deadline_s is None


async def test_one_that_sleeps_again_while_the_clock_advances_wakes_again():
    clock = ManualClock(start_s=0.0)
    ticks = []

    async def ticker():
        while True:
            await clock.sleep(1.0)
            ticks.append(clock.monotonic())

    task = asyncio.create_task(ticker())
    await clock.advance(3.5)
    assert ticks == [1.0, 2.0, 3.0]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert clock.sleepers == 0
    assert clock.next_deadline_s is None
    await clock.advance(10.0)
    assert ticks == [1.0, 2.0, 3.0]


async def test_wall_and_monotonic_move_together():
    clock = ManualClock(start_s=5.0, wall_s=100.0)
    await clock.advance(7.0)
    assert (clock.monotonic(), clock.wall()) == (12.0, 107.0)


async def test_the_system_clock_goes_forward():
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0)
    assert clock.monotonic() >= before
    assert clock.wall() > 1_600_000_000
