"""The log and the snapshots against plain copies, over random histories."""

import asyncio
import random
import time

import pytest

from netpol.lab.apiserver import ApiError, CompactedError, Store
from netpol.lab.apiserver.history import Key
from netpol.lab.apiserver.resources import Kinds
from tests.unit.lab.apiserver.helpers import pod

SPACES = ("default", "kube-public")


def config(name, namespace, **labels):
    meta = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}


def change(store, chance):
    """Make one random change; return None when it changed nothing."""
    name, namespace = f"c{chance.randrange(8)}", chance.choice(SPACES)
    try:
        match chance.randrange(3):
            case 0:
                store.create(config(name, namespace, x=str(chance.randrange(3))))
            case 1:
                body = {"metadata": {"labels": {"x": str(chance.randrange(3))}}}
                store.patch("configmaps", name, namespace, body=body)
            case _:
                store.delete("configmaps", name, namespace)
    except ApiError as refusal:
        if refusal.code not in (404, 409):
            raise


def state(store):
    return {
        (one["metadata"]["namespace"], one["metadata"]["name"]): one
        for one in store.list("configmaps")
    }


@pytest.mark.parametrize("seed", range(5))
def test_every_snapshot_is_the_state_of_its_time(seed):
    chance = random.Random(seed)
    store = Store(history=40)
    shelf = store.history.shelf(Kinds().named("configmaps"))
    known = {store.resource_version: state(store)}
    for _ in range(300):
        change(store, chance)
        known[store.resource_version] = state(store)
        assert sorted(shelf.entries) == shelf.now(0).keys
        for space in SPACES:
            assert shelf.counts[space] == sum(key[0] == space for key in shelf.entries)
    refused = 0
    for rv, expected in known.items():
        try:
            snapshot = shelf.at(rv)
        except CompactedError:
            refused += 1
            assert rv < shelf.compacted_rv
            continue
        found = {key: snapshot.entries[key].obj() for key in snapshot.keys}
        assert found == {Key(*key): obj for key, obj in expected.items()}
    assert 0 < refused < len(known)


@pytest.mark.parametrize("selector", ["", "x=1", "x!=1"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_mirror_of_a_watch_equals_a_list(seed, selector):
    chance = random.Random(seed)
    store = Store()
    mirror, wrong = {}, []

    async def follow():
        async for kind, obj in store.watch("configmaps", label_selector=selector):
            key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
            if (kind == "ADDED") is (key in mirror):
                wrong.append((kind, key))
            if kind == "DELETED":
                del mirror[key]
            else:
                mirror[key] = obj

    task = asyncio.create_task(follow())
    for _ in range(300):
        change(store, chance)
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    expected = store.list("configmaps", label_selector=selector)
    assert list(mirror)
    assert not wrong
    assert {key: mirror[key] for key in sorted(mirror)} == {
        (one["metadata"]["namespace"], one["metadata"]["name"]): one for one in expected
    }


async def test_a_reader_that_is_too_slow_is_told(store):
    stream = store.watch("configmaps", resource_version=store.resource_version)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    for shelf in store.history.shelves():
        if shelf.resource.key == "configmaps":
            store.create(config("a", "default"))
            shelf.compact(store.resource_version)
    with pytest.raises(CompactedError):
        await reading


def test_a_big_namespace_is_emptied_in_bounded_time(store):
    store.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "big"}})
    for number in range(2000):
        store.create(pod(f"p{number}"), namespace="big")
    began = time.monotonic()
    assert store.delete("namespaces", "big").gone
    assert time.monotonic() - began < 3
    assert store.list("pods", namespace="big") == []
