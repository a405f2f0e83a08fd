"""What a room does between applies comes in its time, also on a node that is never quiet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from netpol.enforce import upkeep
from netpol.enforce.upkeep import Upkeep
from netpol.kernel.drivers import TableError, TableTransaction
from netpol.model.ids import ChainName, ObjectKey
from netpol.model.net import Family, parse_address
from netpol.model.ruleset import Drop, Jump, Rule
from netpol.render.options import NONE
from netpol.render.static import TABLE
from tests import builders as make
from tests.unit.enforce.rooms import Scene, until

#: Events come faster than any look goes into sets, or garbage goes.
RESTLESS_S = 0.02


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    scene.pod("web", 2, role="web")
    scene.pod("db", 3, role="db")
    scene.policy("web", make.pods(role="db"))
    return scene


@contextlib.asynccontextmanager
async def restless(scene: Scene, *, writes: bool) -> AsyncIterator[None]:
    """Pods of other nodes come and go all the time; with `writes`, one that is a peer."""

    async def churn() -> None:
        number = 0
        while True:
            number += 1
            scene.pod(f"far{number % 2}", 40 + number % 2, role="db" if writes else "far")
            scene.graph.remove_pod(ObjectKey("a", f"far{(number + 1) % 2}"))
            scene.tell()
            await asyncio.sleep(RESTLESS_S)

    task = asyncio.create_task(churn())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("when", ["while it applies", "while it reads"])
async def test_what_changes_during_a_comparison_is_for_the_next(scene: Scene, when: str) -> None:
    """An address of the node's own that comes just then is not forgotten."""
    options = [scene.options]
    scene.renew = lambda: options[0]
    news: list[bool] = []

    def come() -> None:
        if news:
            news.clear()
            own = (*scene.options.own_addresses, parse_address("10.0.1.77"))
            options[0] = replace(scene.options, own_addresses=own)
            loop.call_soon_threadsafe(scene.room.resync)

    loop = asyncio.get_running_loop()

    def refuses(tx: TableTransaction) -> None:
        del tx
        if when == "while it applies":
            come()

    def read() -> dict[object, object]:
        if when == "while it reads":
            come()
        return dump()

    dump = scene.sets.dump
    scene.sets.dump = lambda names=None: read() if names is None else dump(names)  # type: ignore[method-assign]
    scene.tables.refuses = refuses
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        scene.tables.table(TABLE, Family.V4).chains[ChainName("KNP-OK")] = [Rule(Drop())]
        news.append(True)
        room.resync()
        assert await until(lambda: scene.number(77, Family.V4) == NONE), room.status


@pytest.mark.parametrize("writes", [True, False])
async def test_garbage_goes_though_events_never_rest(scene: Scene, writes: bool) -> None:
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        chain = scene.chain("web")
        scene.policy("other", make.pods(role="db"), role="db")
        async with restless(scene, writes=writes):
            scene.graph.remove_policy(ObjectKey("a", "web"))
            assert await scene.told()
            await until(lambda: False, 0.3)
            scene.clock.skipped_s += upkeep.GARBAGE_AT_MOST_S
            gone = lambda: chain not in scene.tables.table(TABLE, Family.V4).chains  # noqa: E731
            assert await until(gone, 3.0), room.status


@pytest.mark.parametrize("writes", [True, False])
async def test_members_are_compared_though_events_never_rest(scene: Scene, writes: bool) -> None:
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        (peers,) = scene.sets_with("10.0.1.3")
        async with restless(scene, writes=writes):
            del scene.sets.state[peers].members[parse_address("10.0.1.3")]
            await until(lambda: False, 0.3)
            scene.clock.skipped_s += upkeep.COMPARE_AT_MOST_S
            assert await until(lambda: scene.sets_with("10.0.1.3") == [peers], 3.0), room.status


async def test_garbage_that_others_refer_to_is_left_alone(scene: Scene) -> None:
    """For a while: not compared, refused and compared again without end."""
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        chain = scene.chain("web")
        table = scene.tables.table(TABLE, Family.V4)
        table.chains[ChainName("OTHERS")] = [Rule(Jump(chain))]
        scene.graph.remove_policy(ObjectKey("a", "web"))
        assert await scene.told()

        def tries() -> int:
            tried = [t for t in scene.tables.tried if t.family is Family.V4]
            return sum(chain in t.delete for t in tried)

        assert await until(lambda: tries() == 1), room.status
        before = room.status.reconciles
        for _ in range(3):  # as often as it would be tried if it were quiet
            scene.clock.skipped_s += upkeep.GARBAGE_AFTER_S
            assert not await until(lambda: tries() > 1, 1.0)
        assert room.status.reconciles <= before + 1
        assert room.ready
        # Drift is seen meanwhile, and when others let go, it goes.
        scene.tables.table(TABLE, Family.V4).chains[ChainName("KNP-OK")] = [Rule(Drop())]
        assert await until(lambda: room.status.drifts == 1), room.status
        del scene.tables.table(TABLE, Family.V4).chains[ChainName("OTHERS")]
        scene.clock.skipped_s += upkeep.GARBAGE_REST_S
        gone = lambda: chain not in scene.tables.table(TABLE, Family.V4).chains  # noqa: E731
        assert await until(gone), room.status


async def test_garbage_goes_in_the_family_that_works(scene: Scene) -> None:
    """A node without IPv6 must not fill its tables, nor run out of numbers."""
    refused = TableError("refused", retryable=False, got="Invalid argument")
    scene.tables.refuses = lambda tx: refused if tx.family is Family.V6 else None
    async with scene.running() as room:
        assert await until(lambda: room.status.down == (Family.V6,)), room.status
        number = scene.number(2, Family.V4)
        chain = scene.chain("web")
        (peers,) = scene.sets_with("10.0.1.3")
        scene.graph.remove_policy(ObjectKey("a", "web"))
        assert await scene.told()
        gone = lambda: chain not in scene.tables.table(TABLE, Family.V4).chains  # noqa: E731
        assert await until(gone), room.status
        assert await until(lambda: peers not in scene.sets.state), room.status
        drifts, reconciles = room.status.drifts, room.status.reconciles
        scene.policy("db", make.pods(role="web"))
        assert await scene.told()
        assert scene.number(3, Family.V4) == number
        assert not await until(lambda: room.status.drifts > drifts, 1.5), room.status.drift
        assert room.status.reconciles <= reconciles + 3, "only the other family is tried again"
        scene.tables.refuses = lambda _: None
        assert await until(lambda: room.in_sync), room.status
        assert scene.number(3, Family.V6) == scene.number(3, Family.V4) is not None


def test_times() -> None:
    times = Upkeep()
    assert not times.must_collect(0.0, there_is=True)
    assert not times.must_collect(upkeep.GARBAGE_AT_MOST_S - 0.1, there_is=True)
    assert times.must_collect(upkeep.GARBAGE_AT_MOST_S, there_is=True)
    assert not times.must_collect(upkeep.GARBAGE_AT_MOST_S, there_is=False)
    assert not times.must_collect(upkeep.GARBAGE_AT_MOST_S, there_is=True), "it is new"
    while not times.members:
        times.looked()
    assert not times.must_collect(40.0, there_is=True)
    times.looked()
    times.looked()
    assert times.must_collect(41.0, there_is=True)
    times.kept_garbage(41.0)
    assert not times.must_collect(41.0 + upkeep.GARBAGE_REST_S - 0.1, there_is=True)
    assert times.must_collect(41.0 + upkeep.GARBAGE_REST_S, there_is=True)
    assert not times.must_compare(1000.0), "nothing was written yet"
    times.compared(1000.0)
    assert not times.must_compare(1000.0 + upkeep.COMPARE_AT_MOST_S - 0.1)
    assert times.must_compare(1000.0 + upkeep.COMPARE_AT_MOST_S)


async def test_tables_that_others_write_are_looked_at_though_no_look_is_due(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all is quiet looks are rare; whoever flushes the tables then is noticed at the next glance."""
    monkeypatch.setattr(upkeep, "GLANCE_S", 0.02)
    async with scene.running() as room:
        room._upkeep.glance_s = 0.02
        assert await until(lambda: room.in_sync), room.status
        room._upkeep.pause_s = upkeep.LAST_CHECK_S / 2
        # The look that is under way waits no longer than this.
        await until(lambda: room._upkeep.pause_s == upkeep.LAST_CHECK_S, 2.0)
        scene.tables.table(TABLE, Family.V4).chains[ChainName("KNP-OK")] = [Rule(Drop())]
        assert await until(lambda: room.status.drifts == 1), room.status


async def test_whoever_undoes_every_repair_is_not_answered_without_end(scene: Scene) -> None:
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        begin, repairs = room.status.reconciles, room.status.drifts
        ends_s = asyncio.get_running_loop().time() + 3.0
        while asyncio.get_running_loop().time() < ends_s:
            scene.tables.table(TABLE, Family.V4).chains[ChainName("KNP-OK")] = [Rule(Drop())]
            await asyncio.sleep(0.01)
        assert room.status.drifts > repairs, "it is still answered"
        # 0.05, 0.1, 0.2, 0.4, 0.8 s, then one a second.
        assert room.status.reconciles - begin <= 8


def test_glances_are_as_rare_as_others_writing_makes_them() -> None:
    times = Upkeep()
    for _ in range(10):
        times.glanced(due=True)
    assert times.glance_s == upkeep.LAST_CHECK_S
    times.glanced(due=False)
    assert times.glance_s == upkeep.LAST_CHECK_S / 2
    times.drifted()
    assert times.glance_s == upkeep.GLANCE_S


def test_after_a_fight_the_first_look_is_soon_again() -> None:
    times = Upkeep()
    for _ in range(10):
        times.drifted()
    times.wrote()
    assert times.pause_s == upkeep.FIGHT_S
    times.right()
    times.wrote()
    assert times.pause_s == upkeep.FIGHT_S, "one look that found nothing is no peace"
    times.looked()
    times.right()
    times.wrote()
    assert times.pause_s == upkeep.FIRST_CHECK_S
