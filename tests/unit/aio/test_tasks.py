import asyncio

import pytest
from structlog.testing import capture_logs

from netpol.aio.tasks import TaskSet, cancel, spawn


async def forever():
    await asyncio.Event().wait()


async def fails():
    raise OSError("no such device")


async def returns():
    return 1


@pytest.mark.parametrize(("work", "said"), [(fails, "no such device"), (returns, "it returned")])
async def test_the_death_of_an_eternal_task_is_logged_and_reported(work, said):
    deaths = []
    with capture_logs() as logs:
        task = spawn("audit", work(), on_death=lambda name, error: deaths.append((name, error)))
        await asyncio.wait((task,))
        await asyncio.sleep(0)
    (entry,) = logs
    assert (entry["event"], entry["task"], entry["error"]) == ("task died", "audit", said)
    assert [name for name, _ in deaths] == ["audit"]


async def test_a_cancelled_task_did_not_die():
    deaths = []
    with capture_logs() as logs:
        task = spawn("audit", forever(), on_death=lambda *a: deaths.append(a))
        await asyncio.sleep(0)
        await cancel(task, None)
    assert task.cancelled()
    assert (logs, deaths) == ([], [])


async def test_a_task_set_knows_the_living_and_the_dead():
    reported = []
    tasks = TaskSet(on_death=lambda *death: reported.append(death[0]))
    tasks.spawn("good", forever())
    with capture_logs():
        await asyncio.wait((tasks.spawn("bad", fails()),))
        await asyncio.sleep(0)
    assert tasks.alive == ("good",)
    assert tasks.deaths == {"bad": "no such device"}
    assert reported == ["bad"]
    with pytest.raises(RuntimeError, match="running already"):
        tasks.spawn("good", forever())
    await tasks.cancel("good")
    assert tasks.alive == ()
    tasks.spawn("good", forever())
    await tasks.cancel()
    assert tasks.alive == ()
