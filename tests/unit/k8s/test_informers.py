"""The set of watches: barrier, start and stop at run time, status."""

import asyncio

import pytest

from netpol.k8s.api import Api
from netpol.k8s.cache import Store
from netpol.k8s.decode import POD
from netpol.k8s.informers import InformerSet, pods_everywhere, pods_on
from tests.unit.k8s.badserver import BadServer, FastClock, pod


@pytest.fixture
async def server():
    async with BadServer() as made:
        made.put(pod("near", ip="10.0.0.1", node="n1"))
        made.put(pod("far", ip="10.0.0.2", node="n2"))
        yield made


@pytest.fixture
async def api(server):
    async with Api.for_server(server.url) as made:
        yield made


async def test_the_barrier_waits_for_every_watch(server, api):
    async with InformerSet(api, clock=FastClock()) as watches:
        assert watches.synced, "none is wanted"
        await watches.wait_synced()
        local = watches.start(POD, name="local pods", selection=pods_on("n1"))
        everywhere = watches.start(POD, selection=pods_everywhere())
        assert not watches.synced
        async with asyncio.timeout(20):
            await watches.wait_synced()
        assert (len(local.store), len(everywhere.store)) == (1, 2)
        assert [s.name for s in watches.status()] == ["local pods", "pods"]
        assert watches.status()[0].selection == "spec.nodeName=n1"
        assert watches.get("pods") is everywhere


async def test_a_watch_stopped_while_the_barrier_waits_does_not_hold_it(server, api):
    server.always_list = server.always_watch = "503"
    async with InformerSet(api, clock=FastClock()) as watches:
        watches.start(POD)
        barrier = asyncio.create_task(watches.wait_synced())
        await asyncio.sleep(0.05)
        assert not barrier.done()
        await watches.stop("pods")
        async with asyncio.timeout(20):
            await barrier


async def test_a_stopped_watch_empties_its_store_and_can_start_again(server, api):
    store, changes = Store("mine"), []
    store.subscribe(changes.append)
    async with InformerSet(api, clock=FastClock()) as watches:
        watches.start(POD, store=store)
        with pytest.raises(ValueError, match="runs already"):
            watches.start(POD)
        async with asyncio.timeout(20):
            await watches.wait_synced()
        await watches.stop("pods")
        await watches.stop("pods")
        assert [c.after is None for c in changes] == [False, False, True, True]
        assert (watches.get("pods"), watches.status()) == (None, ())
        watches.start(POD, store=store)
        async with asyncio.timeout(20):
            await watches.wait_synced()
        assert len(store) == 2
        await watches.stop("pods", clear=False)
        assert len(store) == 2


async def test_no_task_is_left_behind(server, api):
    before = asyncio.all_tasks()
    async with InformerSet(api, clock=FastClock()) as watches:
        watches.start(POD)
        await watches.wait_synced()
    await asyncio.sleep(0.01)
    ours = [t for t in asyncio.all_tasks() - before if t.get_name().startswith("watch ")]
    assert ours == []
