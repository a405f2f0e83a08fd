"""Watches: resume, selectors, bookmarks, WatchList, compaction; and every fault of `Faults`."""

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import pytest

CM = "/api/v1/namespaces/default/configmaps"
WAIT_S = 5


def config(name, **labels):
    return {"metadata": {"name": name, "labels": labels}}


class Lines:
    def __init__(self, response):
        self.response = response

    async def next(self):
        async with asyncio.timeout(WAIT_S):
            line = await self.response.content.readline()
        return json.loads(line) if line else None

    async def brief(self, count):
        found = []
        for _ in range(count):
            event = await self.next()
            found.append((event["type"], event["object"]["metadata"].get("name")))
        return found


@asynccontextmanager
async def watch(api, query, path=CM):
    timeout = aiohttp.ClientTimeout(total=None)
    url = f"{api.url}{path}?watch=1&{query}"
    async with api.session.get(url, timeout=timeout) as response:
        yield Lines(response)


async def test_a_watch_from_a_version_sends_only_what_came_after(api, server):
    await api.post(CM, config("a"))
    rv = server.store.resource_version
    await api.post(CM, config("b"))
    await api.delete(f"{CM}/a")
    async with watch(api, f"resourceVersion={rv}") as lines:
        assert await lines.brief(2) == [("ADDED", "b"), ("DELETED", "a")]
        await api.patch(f"{CM}/b", {"data": {"x": "1"}})
        event = await lines.next()
    assert event["type"] == "MODIFIED"
    assert event["object"]["kind"] == "ConfigMap"
    assert event["object"]["metadata"]["resourceVersion"] == str(server.store.resource_version)


async def test_a_deletion_carries_the_version_of_the_deletion(api, server):
    await api.post(CM, config("a"))
    async with watch(api, f"resourceVersion={server.store.resource_version}") as lines:
        await api.delete(f"{CM}/a")
        event = await lines.next()
    assert event["object"]["metadata"]["resourceVersion"] == str(server.store.resource_version)


@pytest.mark.parametrize("query", ["", "resourceVersion=0"])
async def test_a_watch_without_a_version_begins_with_the_state(api, query):
    await api.post(CM, config("a"))
    async with watch(api, query) as lines:
        assert await lines.brief(1) == [("ADDED", "a")]


async def test_what_starts_or_stops_to_match_is_added_or_deleted(api, server):
    async with watch(
        api, f"resourceVersion={server.store.resource_version}&labelSelector=x=1"
    ) as lines:
        await api.post(CM, config("a"))
        await api.post(CM, config("b", x="1"))
        await api.patch(f"{CM}/a", {"metadata": {"labels": {"x": "1"}}})
        await api.patch(f"{CM}/a", {"data": {"k": "v"}})
        await api.patch(f"{CM}/a", {"metadata": {"labels": {"x": "2"}}})
        await api.delete(f"{CM}/a")
        await api.delete(f"{CM}/b")
        found = [await lines.next() for _ in range(5)]
    brief = [(one["type"], one["object"]["metadata"]["name"]) for one in found]
    assert brief == [
        ("ADDED", "b"),
        ("ADDED", "a"),
        ("MODIFIED", "a"),
        ("DELETED", "a"),
        ("DELETED", "b"),
    ]
    versions = [int(one["object"]["metadata"]["resourceVersion"]) for one in found]
    assert versions == sorted(versions)


async def test_bookmarks_tell_the_version_and_come_only_when_allowed(api, server):
    rv = server.store.resource_version
    other = "/api/v1/namespaces/default/secrets"
    async with watch(api, f"resourceVersion={rv}&allowWatchBookmarks=true") as lines:
        await api.post(other, config("unrelated"))
        event = await lines.next()
        while event["object"]["metadata"]["resourceVersion"] == str(rv):
            event = await lines.next()
    assert event["type"] == "BOOKMARK"
    assert event["object"]["metadata"]["resourceVersion"] == str(server.store.resource_version)
    async with watch(api, f"resourceVersion={rv}&timeoutSeconds=1") as lines:
        assert await lines.next() is None


async def test_a_watch_list_ends_its_initial_events_with_a_bookmark(api, server):
    await api.post(CM, config("a"))
    query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    async with watch(api, query) as lines:
        assert await lines.brief(1) == [("ADDED", "a")]
        mark = await lines.next()
        assert mark["type"] == "BOOKMARK"
        metadata = mark["object"]["metadata"]
        assert metadata["annotations"] == {"k8s.io/initial-events-end": "true"}
        assert metadata["resourceVersion"] == str(server.store.resource_version)
        await api.post(CM, config("b"))
        assert await lines.brief(1) == [("ADDED", "b")]


async def test_watch_list_parameters_without_sense_are_422(api, server):
    assert (await api.get(f"{CM}?watch=1&sendInitialEvents=true")).status == 422
    assert (await api.get(f"{CM}?watch=1&resourceVersionMatch=NotOlderThan")).status == 422
    server.faults.no_watch_list = True
    query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan"
    assert (await api.get(f"{CM}?watch=1&{query}")).status == 422


async def test_an_expired_version_is_an_error_in_a_stream_of_status_200(api, server):
    rv = server.store.resource_version
    await api.post(CM, config("a"))
    server.compact()
    async with watch(api, f"resourceVersion={rv}") as lines:
        assert lines.response.status == 200
        event = await lines.next()
        assert await lines.next() is None
    assert event["type"] == "ERROR"
    assert event["object"]["kind"] == "Status"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")


async def test_the_timeout_ends_a_watch(api):
    async with watch(api, "timeoutSeconds=1") as lines:
        assert await lines.next() is None


async def test_stopping_the_server_ends_its_watches(api, server):
    async with watch(api, "") as lines:
        await server.stop()
        assert await lines.next() is None


async def test_watches_of_the_store_see_the_state_and_then_changes(store):
    store.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}})
    stream = store.watch("configmaps", namespace="default")
    kind, obj = await anext(stream)
    assert (kind, obj["metadata"]["name"]) == ("ADDED", "a")
    store.delete("configmaps", "a", "default")
    kind, _ = await anext(stream)
    assert kind == "DELETED"
    await stream.aclose()


class TestFaults:
    async def test_failing_requests_count_down(self, api, server):
        server.faults.fail_requests = 2
        server.faults.fail_status = 503
        assert [(await api.get(CM)).status for _ in range(3)] == [503, 503, 200]
        assert server.faults.hits["fail_requests"] == 2

    async def test_only_chosen_paths_fail(self, api, server):
        server.faults.fail_requests = 1
        server.faults.fail_paths = "secrets"
        assert (await api.get(CM)).status == 200
        assert (await api.get("/api/v1/secrets")).status == 500

    async def test_410_as_status_and_in_the_stream(self, api, server):
        server.faults.watch_http_410 = 1
        server.faults.watch_gone = 1
        assert (await api.get(f"{CM}?watch=1&resourceVersion=1")).status == 410
        async with watch(api, "") as lines:
            assert (await lines.next())["object"]["code"] == 410

    async def test_an_empty_stream(self, api, server):
        await api.post(CM, config("a"))
        server.faults.watch_empty = 1
        async with watch(api, "") as lines:
            assert await lines.next() is None

    async def test_a_cut_comes_in_the_middle_of_a_line(self, api, server):
        for name in "abc":
            await api.post(CM, config(name))
        server.faults.watch_cut_after, server.faults.watch_cuts = 1, 1
        got = bytearray()

        async def read():
            async with watch(api, "") as lines:
                async for chunk in lines.response.content.iter_any():
                    got.extend(chunk)

        with pytest.raises(aiohttp.ClientPayloadError):
            await read()
        assert got.count(b"\n") == 1
        assert not got.endswith(b"\n")
        assert server.faults.hits["watch_cut_after"] == 1
        async with watch(api, "") as lines:
            assert len(await lines.brief(3)) == 3

    async def test_duplicates_and_garbage(self, api, server):
        server.faults.watch_garbage.append(b'{"type":"MODIFIED"}\n')
        server.faults.watch_duplicate = True
        async with watch(api, f"resourceVersion={server.store.resource_version}") as lines:
            await api.post(CM, config("a"))
            assert await lines.next() == {"type": "MODIFIED"}
            assert await lines.brief(2) == [("ADDED", "a")] * 2

    async def test_a_silent_watch_keeps_its_connection_and_goes_on_later(self, api, server):
        async with watch(api, f"resourceVersion={server.store.resource_version}") as lines:
            server.faults.watch_silent = True
            await api.post(CM, config("a"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await lines.response.content.readline()
            server.faults.watch_silent = False
            assert await lines.brief(1) == [("ADDED", "a")]

    async def test_rotated_tokens(self, api, server):
        server.faults.accepted_tokens = {"new"}
        old, new = ({"Authorization": f"Bearer {one}"} for one in ("old", "new"))
        assert (await api.get(CM, headers=old)).status == 401
        assert (await api.get(CM, headers=new)).status == 200

    async def test_old_servers_do_not_know_the_host_network_field(self, api, server):
        path = "/api/v1/pods?fieldSelector=spec.hostNetwork=false"
        assert (await api.get(path)).status == 200
        server.faults.no_host_network_field = True
        assert (await api.get(path)).status == 400

    async def test_clear_turns_every_knob_back(self, server):
        server.faults.fail_requests = server.faults.watch_gone = 3
        server.faults.latency_s = 1.0
        server.faults.clear()
        assert not server.faults.fail_requests
        assert not server.faults.watch_gone
        assert not server.faults.latency_s
