"""Random changes under random faults: the mirror equals the server's state in the end.

Each run must have met every kind of fault, else it proves nothing; and a cache with a known defect must
fail the very same run (negative control).
"""

import asyncio
import random
from collections import Counter

import pytest

from netpol.k8s.api import Api
from netpol.k8s.cache import Change, Store
from netpol.k8s.decode import POD, decode
from netpol.k8s.informer import Informer
from netpol.k8s.watching import WatchOptions
from tests.unit.k8s.badserver import BadServer, FastClock, pod

FAULTS = ("500", "410", "gone", "empty", "cut", "end", "drop", "garbage", "duplicate", "reorder")
LIST_FAULTS = ("500", "garbage")
STEPS = 400
NAMES = [f"p{i}" for i in range(25)]


class DeletesNothing(Store):
    """The defect that a relist is there to prevent: what went unseen stays."""

    def finish_listing(self, unseen, resource_version):
        return super().finish_listing(set(), resource_version)


class TakesAnything(Store):
    """The defect that versions are compared for."""

    def _is_stale(self, key, version, *, listed):
        return False


class Chaos:
    """One run."""

    def __init__(self, server, rng, *, stamped):
        self.server, self.rng, self.stamped = server, rng, stamped
        self.uids = Counter()

    def mutate(self):
        server, rng = self.server, self.rng
        name = rng.choice(NAMES)
        if ("a", name) in server.objects and rng.random() < 0.4:
            server.delete(name)
            if rng.random() < 0.5:
                self.uids[name] += 1
                server.put(self.made(name))
        else:
            for _ in range(rng.choice((1, 1, 3))):  # several in one batch, as a starting pod has
                server.put(self.made(name))

    def made(self, name):
        rng = self.rng
        bad = rng.random() < 0.05
        obj = pod(
            name,
            uid=f"{name}-{self.uids[name]}",
            ip=f"10.0.0.{rng.randrange(1, 5)}",
            labels={"v": str(rng.randrange(3))},
        )
        if self.stamped:
            # It grows with every change of any object.
            obj["metadata"]["labels"]["stamp"] = str(self.server.rv + 1)
        if bad:
            obj["spec"]["containers"] = "unreadable"
            self.server.hits["unreadable"] += 1
        return obj

    async def run(self):
        server, rng = self.server, self.rng
        for _ in range(STEPS):
            self.mutate()
            roll = rng.random()
            if roll < 0.10:
                server.watch_faults.append(rng.choice(FAULTS))
                server.drop_all()
            elif roll < 0.14:
                server.list_faults.append(rng.choice(LIST_FAULTS))
                server.compact()
                server.drop_all()
            elif roll < 0.15:
                server.expire_continue = 1
            if rng.random() < 0.3:
                await asyncio.sleep(0.001)
        for fault in FAULTS:  # those that chance left out
            for _ in range(200):
                if server.hits[fault]:
                    break
                if not server.watch_faults:
                    server.watch_faults.append(fault)
                server.drop_all()
                for _ in range(4):
                    self.mutate()
                await asyncio.sleep(0.005)
        server.watch_faults.clear()
        server.list_faults.clear()
        # The last changes happen unseen: their log is gone before the client can ask.
        server.drop_all()
        self.settle()
        server.compact()

    def settle(self):
        """Put every object in a readable state, or delete it."""
        for name in NAMES:
            self.server.put(pod(name, uid=f"{name}-{self.uids[name]}", ip="10.0.0.9"))
            if self.rng.random() < 0.5:
                self.server.delete(name)


async def scenario(seed, store, *, watch_list, patience_s=20.0, stamped=False):
    changes = []
    store.subscribe(changes.append)
    async with BadServer() as server, Api.for_server(server.url) as api:
        informer = Informer(
            api,
            POD,
            store=store,
            options=WatchOptions(page_size=4, watch_list=watch_list),
            clock=FastClock(),
            rng=random.Random(seed),
        )
        task = asyncio.create_task(informer.run())
        try:
            await Chaos(server, random.Random(seed), stamped=stamped).run()
            want = {}
            for obj in server.objects.values():
                item = decode(POD, obj)
                want[item.key] = item.value
            for _ in range(int(patience_s / 0.005)):
                if dict(store.objects) == want and informer.synced:
                    break
                await asyncio.sleep(0.005)
            return dict(store.objects) == want, changes, server, informer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("watch_list", [True, False], ids=["watch list", "paged list"])
@pytest.mark.parametrize("seed", range(3))
async def test_the_mirror_equals_the_server_after_chaos(seed, watch_list):
    store = Store("pods")
    same, changes, server, informer = await scenario(
        seed, store, watch_list=watch_list, stamped=seed == 2
    )
    assert same
    missed = {*FAULTS, "unreadable"} - set(server.hits)
    assert not missed, "the run did not exercise these"
    if not watch_list:
        assert server.hits["continue expired"]
    assert informer.lists > 3
    assert len(server.lists) + len(server.watches) < 3 * STEPS
    assert not _went_back(changes)
    state = {}
    for change in changes:
        assert isinstance(change, Change)
        assert change.before != change.after
        assert state.get(change.key) == change.before
        if change.before is not None and change.after is not None:
            assert change.before.uid == change.after.uid
        state[change.key] = change.after


@pytest.mark.parametrize("defect", [DeletesNothing, TakesAnything])
async def test_the_same_run_finds_a_defective_cache(defect):
    found = 0
    for seed in range(8):
        same, changes, _, _ = await scenario(
            seed, defect("pods"), watch_list=False, patience_s=0.5, stamped=True
        )
        found += not same or _went_back(changes)
        if found == 2:
            return
    pytest.fail("a defective cache was taken for a good one")


def _went_back(changes):
    """Whether an older state of an object was delivered after a newer one."""
    newest = Counter()
    for change in changes:
        stamp = int(dict(change.after.labels).get("stamp", 0)) if change.after else 0
        if stamp and stamp < newest[change.key]:
            return True
        newest[change.key] = max(stamp, newest[change.key])
    return False
