"""The same questions to the store in process and to the one over HTTP get the same answers."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from netpol.lab.apiserver import ADMIN, ApiError, ApiServer, CompactedError, Store
from netpol.lab.apiserver.history import Key
from netpol.lab.objectstore import ObjectStore
from netpol.lab.remotestore import RemoteStore
from netpol.lab.tide import Tide

Obj = dict[str, Any]


async def connections_closed() -> None:
    """Wait until the loop watches no socket but its own, so that none is left to the collector."""
    async with asyncio.timeout(20):
        while len(asyncio.get_running_loop()._selector.get_map()) > 1:  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextmanager
def serving() -> Iterator[ApiServer]:
    """An API server in a thread of its own: plain calls block the test's loop."""
    server = ApiServer(tokens={"token": ADMIN}, tls=True)
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    def work() -> None:
        loop.run_until_complete(server.start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(server.stop())
        loop.run_until_complete(connections_closed())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(20)
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)


def remote(server: ApiServer) -> RemoteStore:
    port = urlsplit(server.url).port
    assert port is not None
    context = ssl.create_default_context(cadata=server.ca_pem.decode())
    return RemoteStore(
        connect=lambda: socket.create_connection(("127.0.0.1", port)),
        unconnected=lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        port=port,
        context=context,
        token="token",  # noqa: S106
    )


@pytest.fixture(params=["in process", "remote"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[ObjectStore]:
    if request.param == "in process":
        yield Store()
        return
    with serving() as server:
        found = remote(server)
        try:
            yield found
        finally:
            await found.close()


def pod(name: str, **spec: Any) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"containers": [{"name": "c", "image": "x"}], **spec},
    }


NODE: Obj = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node1"},
    "status": {"addresses": [{"type": "InternalIP", "address": "172.30.0.11"}]},
}


async def test_objects_are_created_read_changed_and_deleted(store: ObjectStore) -> None:
    store.create(pod("b"), manager="lab")
    store.create(pod("a"))

    found = store.list("pods")
    assert [one["metadata"]["name"] for one in found] == ["a", "b"]
    assert {(one["apiVersion"], one["kind"]) for one in found} == {("v1", "Pod")}
    store.patch("pods", "a", "default", body={"metadata": {"labels": {"app": "other"}}})
    assert store.get("pods", "a", "default")["metadata"]["labels"] == {"app": "other"}
    assert len(store.list("pods", namespace="default", label_selector="app=b")) == 1
    assert store.list("pods", namespace="kube-system") == []
    store.delete("pods", "a", "default")
    with pytest.raises(ApiError) as caught:
        store.get("pods", "a", "default")
    assert caught.value.code == 404


async def test_a_nodes_status_is_kept(store: ObjectStore) -> None:
    store.create(NODE, keep_status=True)

    assert store.get("nodes", "node1")["status"]["addresses"] == NODE["status"]["addresses"]


async def test_a_pods_status_is_written_and_an_old_writer_is_refused(store: ObjectStore) -> None:
    store.create(pod("a"))
    first = store.get("pods", "a", "default")
    store.update(first | {"status": {"phase": "Running"}}, subresource="status")

    assert store.get("pods", "a", "default")["status"]["phase"] == "Running"
    with pytest.raises(ApiError) as caught:
        store.update(first | {"status": {"phase": "Failed"}}, subresource="status")
    assert caught.value.code == 409


async def test_a_pod_is_bound_once_and_deleted_in_two_steps(store: ObjectStore) -> None:
    made = store.create(pod("a"))
    store.bind(Key("default", "a"), "node1")
    assert store.get("pods", "a", "default")["spec"]["nodeName"] == "node1"
    assert len(store.list("pods", field_selector="spec.nodeName=")) == 0
    with pytest.raises(ApiError) as caught:
        store.bind(Key("default", "a"), "node2")
    assert caught.value.code == 409

    store.delete("pods", "a", "default")
    assert "deletionTimestamp" in store.get("pods", "a", "default")["metadata"]
    with pytest.raises(ApiError) as caught:
        store.delete("pods", "a", "default", grace_period_s=0, uid="another")
    assert caught.value.code == 409
    store.delete("pods", "a", "default", grace_period_s=0, uid=made["metadata"]["uid"])
    assert store.list("pods") == []


async def test_what_is_refused_says_why(store: ObjectStore) -> None:
    with pytest.raises(ApiError) as caught:
        store.create(pod("Not_A_Name"))
    assert caught.value.code == 422
    assert "Not_A_Name" in caught.value.message


async def test_a_watch_begins_with_what_is_there(store: ObjectStore) -> None:
    store.create(pod("a"))
    changes = store.watch("pods")
    kind, obj = await anext(changes)
    assert (kind, obj["metadata"]["name"]) == ("ADDED", "a")
    store.create(pod("b"))
    kind, obj = await anext(changes)
    assert (kind, obj["metadata"]["name"]) == ("ADDED", "b")
    store.delete("pods", "a", "default")
    kind, obj = await anext(changes)
    assert (kind, obj["metadata"]["name"]) == ("DELETED", "a")
    await changes.aclose()  # type: ignore[attr-defined]


async def test_a_watch_from_a_version_leaves_out_what_was_before(store: ObjectStore) -> None:
    store.create(pod("a"))
    version = store.resource_version
    changes = store.watch("pods", resource_version=version)
    store.create(pod("b"))
    kind, obj = await anext(changes)
    assert (kind, obj["metadata"]["name"]) == ("ADDED", "b")
    await changes.aclose()  # type: ignore[attr-defined]


async def test_what_a_definition_defines_can_be_created_behind_it(store: ObjectStore) -> None:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"plural": "things", "singular": "thing", "kind": "Thing", "listKind": "ThingList"}
    store.create(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "things.example.com"},
            "spec": {
                "group": "example.com",
                "scope": "Namespaced",
                "names": names,
                "versions": [version],
            },
        }
    )
    thing = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "t"}}
    store.create(thing)

    assert [one["kind"] for one in store.list("things.example.com")] == ["Thing"]


async def test_a_version_that_is_gone_is_told_to_the_reader() -> None:
    with serving() as server:
        store = remote(server)
        try:
            store.create(pod("a"))
            server.compact()
            with pytest.raises(CompactedError):
                await anext(store.watch("pods", resource_version=1))
        finally:
            await store.close()


async def test_a_server_that_went_is_an_error_and_one_that_closed_an_idle_connection_is_not() -> (
    None
):
    with serving() as server:
        store = remote(server)
        store.create(pod("a"))
        store._connection.sock.shutdown(socket.SHUT_RDWR)
        assert len(store.list("pods")) == 1
    with pytest.raises(ApiError) as caught:
        store.list("pods")
    assert caught.value.code == 503
    await store.close()


async def test_the_tide_answers_when_it_has_seen_all_that_was_written() -> None:
    with serving() as server:
        store = remote(server)
        tide = Tide(store)
        following = asyncio.create_task(tide.run())
        line = {"kind": "Pod", "selection": "spec.nodeName=n1"}
        try:
            for number in range(20):
                made = store.create(pod(f"a{number}", nodeName="n1"))
                store.create(pod(f"b{number}", nodeName="n2"))
                needed = await tide.horizon()
                assert needed(line) == int(made["metadata"]["resourceVersion"])
                store.delete("pods", f"a{number}", "default", grace_period_s=0)
                needed = await tide.horizon()
                assert needed(line) > int(made["metadata"]["resourceVersion"])
                assert needed({"kind": "NetworkPolicy", "selection": "all"}) == 0
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await store.close()
