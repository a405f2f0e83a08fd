"""The informer against a server that misbehaves: it converges, repeats nothing, never hot-loops."""

import asyncio
import json
import random
from contextlib import asynccontextmanager

import pytest

from netpol.k8s.api import Api
from netpol.k8s.decode import POD, decode
from netpol.k8s.informer import Informer
from netpol.k8s.watching import Selection, WatchOptions
from netpol.model.ids import ObjectKey
from tests.unit.k8s.badserver import BadServer, FastClock, bookmark, line, pod

QUICK = WatchOptions(page_size=3, initial_idle_s=0.3)
PLAIN = WatchOptions(page_size=3, watch_list=False)


@pytest.fixture
async def server():
    async with BadServer() as made:
        yield made


@asynccontextmanager
async def informing(server, *, options=QUICK, selection=None, clock=None, **api):
    async with Api.for_server(server.url, **api) as client:
        informer = Informer(
            client,
            POD,
            selection=selection,
            options=options,
            clock=clock or FastClock(),
            rng=random.Random(7),
        )
        informer.log = []
        informer.store.subscribe(informer.log.append)
        task = asyncio.create_task(informer.run())
        try:
            yield informer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()


async def until(condition, *, timeout_s=20.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - whatever the condition is about
            await asyncio.sleep(0.002)


def mirrors(informer, server):
    want = {}
    for obj in server.objects.values():
        item = decode(POD, obj)
        want[item.key] = item.value
    return dict(informer.store.objects) == want


async def converged(informer, server):
    await until(lambda: informer.synced and mirrors(informer, server))
    for change in informer.log:
        assert change.before != change.after
    state = {}
    for change in informer.log:  # every change follows from the one before it
        assert state.get(change.key) == change.before
        state[change.key] = change.after
    assert {k: v for k, v in state.items() if v is not None} == dict(informer.store.objects)


def fill(server, count, *, start=0):
    for i in range(start, start + count):
        server.put(pod(f"p{i}", ip=f"10.0.0.{i + 1}"))


# The normal course -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [QUICK, PLAIN], ids=["watch list", "paged list"])
async def test_it_lists_and_then_follows(server, options):
    fill(server, 8)
    async with informing(server, options=options) as informer:
        await informer.wait_synced()
        await converged(informer, server)
        fill(server, 2, start=20)
        server.delete("p3")
        await converged(informer, server)
        status = informer.status()
        assert (status.kind, status.objects, status.errors, status.failures) == ("Pod", 9, 0, 0)
        assert status.resource_version == str(server.rv)
    assert len(server.watches) == 1
    assert len(server.lists) == (0 if options is QUICK else 3)


async def test_a_list_is_paged_and_a_watch_resumes_from_it(server):
    fill(server, 7)
    async with informing(server, options=PLAIN) as informer:
        await informer.wait_synced()
        await until(lambda: server.watches)
    assert [q["limit"] for q in server.lists] == ["3", "3", "3"]
    (watch,) = server.watches
    assert watch["resourceVersion"] == "107"
    assert watch["allowWatchBookmarks"] == "true"
    assert 270 <= int(watch["timeoutSeconds"]) <= 540


async def test_a_server_without_watch_list_is_listed_and_not_asked_again(server):
    server.watch_list = False
    fill(server, 4)
    async with informing(server) as informer:
        await converged(informer, server)
        await until(lambda: server.open)
        server.compact()
        server.drop_all()
        fill(server, 1, start=9)
        server.compact()
        await converged(informer, server)
        assert informer.errors == 2, "the break and the 410"
    assert server.hits["422"] == 1


async def test_a_server_that_ignores_the_question_for_initial_events_is_listed(server):
    server.watch_faults.append("silent")
    fill(server, 4)
    async with informing(server) as informer:
        await converged(informer, server)
    assert server.hits["silent"] == 1
    assert server.lists


async def test_a_bookmark_moves_the_resume_point_without_a_change(server):
    fill(server, 1)
    async with informing(server) as informer:
        await converged(informer, server)
        server.rv += 500
        server.inject(bookmark(server.rv))
        await until(lambda: informer.status().resource_version == str(server.rv))
        server.drop_all()
        await until(lambda: len(server.watches) == 2)
        assert server.watches[1]["resourceVersion"] == str(server.rv)
        assert len(informer.log) == 1


async def test_optional_fields_are_dropped_when_the_server_refuses_them(server):
    server.refused_fields = "spec.hostNetwork"
    fill(server, 2)
    selection = Selection(
        fields=("status.phase!=Failed",), optional_fields=("spec.hostNetwork=false",)
    )
    async with informing(server, selection=selection) as informer:
        await converged(informer, server)
        await until(lambda: server.open)
    assert server.watches[-1]["fieldSelector"] == "status.phase!=Failed"
    assert len(server.lists) <= 2


async def test_retarget_widens_and_narrows_without_touching_what_is_in_both(server):
    fill(server, 2)
    server.put(pod("far", node="n2"))
    local = Selection(fields=("spec.nodeName=n1",))
    async with informing(server, selection=local) as informer:
        await informer.wait_synced()
        assert len(informer.store) == 2
        informer.retarget(Selection())
        assert not informer.synced
        assert informer.store.synced
        await converged(informer, server)
        assert [c.key.name for c in informer.log] == ["p0", "p1", "far"]
        informer.retarget(Selection())
        assert informer.synced, "the same selection is no change"
        informer.retarget(local)
        await informer.wait_synced()
        assert [c.key.name for c in informer.log] == ["p0", "p1", "far", "far"]
        server.put(pod("far", node="n2", labels={"new": "label"}))
        fill(server, 1, start=5)
        await until(lambda: len(informer.store) >= 3)


async def test_on_synced_is_told_each_time_and_may_fail(server):
    async with informing(server) as informer:
        told = []

        def broken():
            raise RuntimeError("mine")

        informer.on_synced(broken)
        informer.on_synced(lambda: told.append(1))
        await informer.wait_synced()
        informer.retarget(Selection(fields=("spec.nodeName=n1",)))
        await informer.wait_synced()
        assert told == [1, 1]


# Faults that pass --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["cut", "end", "drop", "empty", "500", "503", "gone", "410", "garbage", "duplicate"]
)
@pytest.mark.parametrize("options", [QUICK, PLAIN], ids=["watch list", "paged list"])
async def test_it_converges_after(server, fault, options):
    fill(server, 4)
    async with informing(server, options=options) as informer:
        await converged(informer, server)
        server.watch_faults.extend([fault] * 3)
        server.drop_all()
        for i in range(12):
            server.put(pod(f"p{i % 6}", ip="10.0.1.1", labels={"turn": str(i)}))
            if i % 4 == 3:
                server.delete(f"p{i % 6}")
            await asyncio.sleep(0.01)
        while server.watch_faults:
            if (
                fault == "duplicate"
            ):  # does not end the watch, so that the next fault is not reached
                server.drop_all()
            await asyncio.sleep(0.01)
        await converged(informer, server)
    assert server.hits[fault] == 3
    assert len(server.watches) + len(server.lists) < 20


async def test_reordered_deliveries_do_not_bring_an_old_state_back(server):
    fill(server, 2)
    async with informing(server) as informer:
        await converged(informer, server)
        server.watch_faults.append("reorder")
        server.drop_all()
        for turn in range(5):  # all in one batch, delivered backwards and then once more in order
            server.put(pod("p0", labels={"turn": str(turn)}))
        server.delete("p1")
        await until(lambda: server.hits["reorder"] == 1)
        await converged(informer, server)
        assert informer.store.get(ObjectKey("a", "p0")).labels == (("turn", "4"),)
        turns = [c.after.labels for c in informer.log if c.key.name == "p0" and c.after]
        assert len(turns) == 2, "no older state was delivered after the newest"


async def test_old_events_delivered_again_after_a_relist_are_dropped(server):
    fill(server, 3)
    old = json.loads(json.dumps(server.objects["a", "p0"]))
    gone = json.loads(json.dumps(server.objects["a", "p1"]))
    server.put(pod("p0", labels={"state": "new"}))
    server.delete("p1")
    async with informing(server, options=PLAIN) as informer:
        await converged(informer, server)
        await until(lambda: server.open)
        before = len(informer.log)
        server.inject(line("MODIFIED", old) + line("ADDED", gone) + line("ADDED", old))
        fill(server, 1, start=7)
        await converged(informer, server)
        assert [c.key.name for c in informer.log[before:]] == ["p7"]
        assert informer.store.stale == 3
        assert informer.status().resource_version == str(server.rv)


async def test_a_relist_deletes_what_went_meanwhile_and_repeats_nothing(server):
    fill(server, 6)
    async with informing(server, options=PLAIN) as informer:
        await converged(informer, server)
        server.watch_faults.append("500")
        server.drop_all()
        server.delete("p1")
        server.delete("p2")
        server.put(pod("p3", labels={"x": "y"}))
        server.compact()
        await converged(informer, server)
        assert sorted(c.key.name for c in informer.log[6:]) == ["p1", "p2", "p3"]
    assert server.hits["gone"] == 1


async def test_an_object_created_again_under_the_same_name_is_a_delete_and_an_add(server):
    fill(server, 1)
    async with informing(server) as informer:
        await converged(informer, server)
        server.watch_faults.append("500")
        server.drop_all()
        server.delete("p0")
        server.put(pod("p0", uid="second", ip="10.0.0.1"))
        server.compact()  # the deletion itself is never seen
        await converged(informer, server)
        shapes = [(c.before and c.before.uid, c.after and c.after.uid) for c in informer.log]
        assert shapes == [(None, "uid-p0"), ("uid-p0", None), (None, "second")]


async def test_an_expired_continue_token_starts_the_list_again_in_one_piece(server):
    server.expire_continue = 1
    fill(server, 8)
    async with informing(server, options=PLAIN) as informer:
        await converged(informer, server)
    assert ["limit" in q for q in server.lists] == [True, True, False]


async def test_a_list_from_a_server_that_lags_is_refused_once_then_believed(server):
    fill(server, 3)
    async with informing(server, options=PLAIN) as informer:
        await converged(informer, server)
        server.lag = 50
        server.watch_faults.append("410")
        server.drop_all()
        await until(lambda: "older than" in informer.last_error)
        server.lag = 0
        await until(lambda: informer.status().resource_version and server.open)
        await converged(informer, server)
        # And now a restored etcd: everything, numbers too, is as it was long ago.
        server.watch_faults.append("410")
        server.rv, server.floor = 10, 10
        server.log.clear()
        server.objects.clear()
        fill(server, 1, start=50)
        server.drop_all()
        await converged(informer, server)
        assert informer.status().resource_version == "11"


# Objects that are not as they should be ----------------------------------------------------------


async def test_an_object_that_cannot_be_read_keeps_its_last_good_value(server):
    fill(server, 2)
    async with informing(server) as informer:
        await converged(informer, server)
        good = informer.store.get(ObjectKey("a", "p0"))
        bad = pod("p0")
        bad["metadata"]["labels"] = ["not", "a", "map"]
        server.put(bad)
        fill(server, 1, start=5)
        await until(lambda: len(informer.store) == 3)
        status = informer.status()
        assert informer.store.get(ObjectKey("a", "p0")) is good
        assert list(status.rejected) == ["a/p0"]
        assert "metadata.labels" in status.rejected["a/p0"]
        assert status.errors == 1
        assert status.resource_version == str(server.rv)
        # A list that cannot read it either does not delete it.
        server.watch_faults.append("410")
        server.drop_all()
        await until(lambda: len(server.watches) >= 3 and informer.status().errors >= 3)
        assert informer.store.get(ObjectKey("a", "p0")) is good
        server.put(pod("p0", labels={"now": "good"}))
        await converged(informer, server)
        assert informer.status().rejected == {}


@pytest.mark.parametrize("options", [QUICK, PLAIN], ids=["watch list", "paged list"])
async def test_an_unreadable_object_in_a_list_costs_only_itself(server, options):
    fill(server, 4)
    bad = pod("bad")
    bad["spec"]["containers"] = "none"
    server.put(bad)
    async with informing(server, options=options) as informer:
        await informer.wait_synced()
        assert len(informer.store) == 4
        assert list(informer.status().rejected) == ["a/bad"]
        server.delete("bad")
        await converged(informer, server)
        await until(lambda: informer.status().rejected == {})


async def test_the_unreadable_successor_of_an_object_ends_it(server):
    fill(server, 1)
    async with informing(server) as informer:
        await converged(informer, server)
        bad = pod("p0", uid="second")
        bad["metadata"]["labels"] = 5
        server.put(bad)
        await until(lambda: len(informer.store) == 0)


async def test_an_unreadable_deletion_deletes(server):
    fill(server, 2)
    async with informing(server) as informer:
        await converged(informer, server)
        server.objects["a", "p0"]["metadata"]["labels"] = 5
        server.delete("p0")
        await converged(informer, server)


async def test_a_deletion_without_a_name_is_followed_by_a_list(server):
    fill(server, 2)
    async with informing(server) as informer:
        await converged(informer, server)
        del server.objects["a", "p0"]
        server.inject(line("DELETED", {"metadata": {"name": 5}}))
        await converged(informer, server)
        assert "without a name" in informer.last_error


async def test_addresses_that_do_not_parse_are_reported_by_name(server):
    server.put(pod("p0", ip="10.0.0.999"))
    async with informing(server) as informer:
        await informer.wait_synced()
        assert list(informer.status().incomplete) == ["a/p0"]
        assert informer.store.get(ObjectKey("a", "p0")).addresses == ()
        fill(server, 1)
        await until(lambda: informer.status().incomplete == {})


async def test_unknown_fields_kinds_and_event_types_change_nothing(server):
    fill(server, 2)
    async with informing(server) as informer:
        await converged(informer, server)
        await until(lambda: server.open)
        foreign = {"kind": "Gizmo", "metadata": {"name": "p0", "namespace": "a", "uid": "other"}}
        server.inject(
            line("ADDED", foreign)
            + line("DELETED", foreign)
            + line("REVISED", pod("p1", labels={"from": "the future"}))
            + b"\n  \n"
        )
        server.put(pod("p9", future={"field": [1, {"deep": None}]}))
        await converged(informer, server)
        assert len(informer.log) == 3
        assert informer.status().errors == 3
    assert len(server.watches) == 1


# Faults that stay: no hot loop -------------------------------------------------------------------


@pytest.mark.parametrize("options", [QUICK, PLAIN], ids=["watch list", "paged list"])
@pytest.mark.parametrize(
    ("on_list", "on_watch"),
    [
        ("", "500"),
        ("500", "500"),
        ("403", "403"),
        ("", "403"),
        ("", "empty"),
        ("", "410"),
        ("", "gone"),
        ("410", "410"),
        ("garbage", "500"),
    ],
)
async def test_a_fault_that_stays_is_met_with_ever_longer_pauses(
    server, on_list, on_watch, options
):
    fill(server, 3)
    server.always_list, server.always_watch = on_list, on_watch
    clock = FastClock()
    async with informing(server, options=options, clock=clock) as informer:
        await until(lambda: clock.monotonic() > 300.0)
        requests = len(server.watches) + len(server.lists)
        assert 8 <= requests <= 120, "300 s at pauses of 15 s on average, up to 2 requests each"
        assert max(clock.pauses) <= 30.0
        assert informer.status().failures >= 8
        server.always_list = server.always_watch = ""
        fill(server, 2, start=10)
        await converged(informer, server)
        fill(server, 1, start=20)
        await until(lambda: informer.status().failures <= 1)


async def test_a_stream_that_replays_the_same_event_is_no_progress(server):
    fill(server, 1)
    async with informing(server, options=PLAIN, clock=(clock := FastClock())) as informer:
        await converged(informer, server)
        await until(lambda: server.open)
        again = line("MODIFIED", server.objects["a", "p0"])
        end_s = clock.monotonic() + 300.0
        while clock.monotonic() < end_s:
            server.inject(again)
            server.drop_all()
            await asyncio.sleep(0.001)
        assert informer.status().failures >= 8
        assert len(informer.log) == 1
    assert len(server.watches) < 120


async def test_nobody_listens_at_all(server):
    url = server.url
    await server._runner.cleanup()
    clock = FastClock()
    async with Api.for_server(url) as api:
        informer = Informer(api, POD, clock=clock, rng=random.Random(1))
        task = asyncio.create_task(informer.run())
        await until(lambda: clock.monotonic() > 300.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert api.requests < 120
        assert "ClientConnector" in informer.last_error
        assert not informer.synced


async def test_the_pause_respects_retry_after(server):
    server.retry_after = "7"
    server.list_faults.append("429")
    clock = FastClock()
    fill(server, 1)
    async with informing(server, options=PLAIN, clock=clock) as informer:
        await converged(informer, server)
        assert 7.0 <= clock.pauses[0] <= 7.2


async def test_it_starts_when_the_server_does(server):
    server.always_list = server.always_watch = "503"
    async with informing(server) as informer:
        await until(lambda: informer.status().failures > 3)
        assert "HTTP 503" in informer.last_error
        server.always_list = server.always_watch = ""
        fill(server, 2)
        await converged(informer, server)


# Credentials -------------------------------------------------------------------------------------


async def test_a_rotated_token_is_read_again(server, tmp_path):
    file = tmp_path / "token"
    file.write_text("one\n")
    server.tokens = {"Bearer one"}
    fill(server, 1)
    async with informing(server, token_file=file) as informer:
        await converged(informer, server)
        server.tokens = {"Bearer two"}
        server.drop_all()
        await until(lambda: "HTTP 401 Unauthorized" in informer.last_error)
        file.write_text("two")
        fill(server, 1, start=5)
        await converged(informer, server)
    assert server.hits["401"] < 60


async def test_a_token_file_that_is_missing_for_a_moment_is_an_error_like_others(server, tmp_path):
    file = tmp_path / "token"
    fill(server, 1)
    async with informing(server, token_file=file) as informer:
        await until(lambda: "token file" in informer.last_error)
        file.write_text("  ")
        await until(lambda: "holds no token" in informer.last_error)
        file.write_text("one")
        await converged(informer, server)
