"""Lists: selectors, pages, versions and the two ways of 410."""

import pytest

CM = "/api/v1/namespaces/default/configmaps"


def config(name, **labels):
    return {"metadata": {"name": name, "labels": labels}}


@pytest.fixture
async def five(api):
    for number in range(5):
        labels = {"n": str(number), "odd": "yes"} if number % 2 else {"n": str(number)}
        await api.post(CM, config(f"c{number}", **labels))


async def names(api, query):
    answer = await api.get(f"{CM}?{query}")
    assert answer.status == 200, answer.body
    return [item["metadata"]["name"] for item in answer.body["items"]]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("n=1", ["c1"]),
        ("n==1", ["c1"]),
        ("n!=1", ["c0", "c2", "c3", "c4"]),
        ("n in (1, 2)", ["c1", "c2"]),
        ("n notin (0,1,2)", ["c3", "c4"]),
        ("odd", ["c1", "c3"]),
        ("!odd", ["c0", "c2", "c4"]),
        ("odd=yes,n!=1", ["c3"]),
        ("odd!=yes", ["c0", "c2", "c4"]),
    ],
)
@pytest.mark.usefixtures("five")
async def test_label_selectors(api, selector, expected):
    answer = await api.session.get(api.url + CM, params={"labelSelector": selector})
    found = [item["metadata"]["name"] for item in (await answer.json())["items"]]
    assert found == expected


@pytest.mark.parametrize("query", ["labelSelector=a%20b", "fieldSelector=x", "limit=some"])
async def test_what_cannot_be_parsed_is_400(api, query):
    answer = await api.get(f"{CM}?{query}")
    assert (answer.status, answer.body["reason"]) == (400, "BadRequest")


async def test_pod_fields_select(api, store):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a", "namespace": "default"},
        "spec": {
            "nodeName": "n1",
            "hostNetwork": True,
            "containers": [{"name": "c", "image": "i"}],
        },
    }
    store.create(pod)
    plain = pod | {"metadata": {"name": "b"}, "spec": pod["spec"] | {"hostNetwork": False}}
    del plain["spec"]["nodeName"]
    store.create(plain)
    status = {"status": {"phase": "Running", "podIP": "10.0.0.1"}}
    store.patch("pods", "a", "default", body=status, subresource="status")
    for selector, expected in [
        ("spec.nodeName=n1", ["a"]),
        ("spec.nodeName=", ["b"]),
        ("spec.hostNetwork=false", ["b"]),
        ("status.phase!=Running", ["b"]),
        ("status.podIP=10.0.0.1", ["a"]),
        ("metadata.name=b,metadata.namespace=default", ["b"]),
        ("metadata.namespace=other", []),
    ]:
        found = store.list("pods", field_selector=selector)
        assert [one["metadata"]["name"] for one in found] == expected, selector


async def test_items_of_a_built_in_list_carry_no_kind_and_the_list_does(api, five):
    answer = await api.get(CM)
    assert answer.body["kind"] == "ConfigMapList"
    assert "kind" not in answer.body["items"][0]
    assert answer.body["items"][0]["metadata"]["name"] == "c0"


async def test_pages_show_one_snapshot_whatever_changes_between(api, five):
    first = await api.get(f"{CM}?limit=2")
    assert [one["metadata"]["name"] for one in first.body["items"]] == ["c0", "c1"]
    assert first.body["metadata"]["remainingItemCount"] == 3
    await api.delete(f"{CM}/c3")
    await api.post(CM, config("c2a"))
    await api.patch(f"{CM}/c4", {"data": {"new": "1"}})
    token = first.body["metadata"]["continue"]
    second = await api.get(f"{CM}?limit=2&continue={token}")
    assert [one["metadata"]["name"] for one in second.body["items"]] == ["c2", "c3"]
    rv = first.body["metadata"]["resourceVersion"]
    assert second.body["metadata"]["resourceVersion"] == rv
    third = await api.get(f"{CM}?limit=2&continue={second.body['metadata']['continue']}")
    assert [one["metadata"]["name"] for one in third.body["items"]] == ["c4"]
    assert "data" not in third.body["items"][0]
    assert "continue" not in third.body["metadata"]


async def test_an_expired_continue_token_is_410_and_offers_an_inconsistent_one(api, server, five):
    first = await api.get(f"{CM}?limit=2")
    await api.delete(f"{CM}/c3")
    server.compact()
    expired = await api.get(f"{CM}?limit=2&continue={first.body['metadata']['continue']}")
    assert (expired.status, expired.body["reason"]) == (410, "Expired")
    token = expired.body["metadata"]["continue"]
    assert await names(api, f"continue={token}") == ["c2", "c4"]


async def test_a_bogus_continue_token_is_400(api):
    assert (await api.get(f"{CM}?limit=2&continue=bogus")).status == 400


async def test_exact_versions_are_served_until_they_are_compacted(api, server, five):
    rv = server.store.resource_version
    await api.delete(f"{CM}/c0")
    exact = f"resourceVersion={rv}&resourceVersionMatch=Exact"
    assert len(await names(api, exact)) == 5
    assert len(await names(api, f"resourceVersion={rv}&resourceVersionMatch=NotOlderThan")) == 4
    assert len(await names(api, f"resourceVersion={rv}&limit=9")) == 5
    server.compact("configmaps")
    answer = await api.get(f"{CM}?{exact}")
    assert (answer.status, answer.body["reason"]) == (410, "Expired")
    assert answer.body["code"] == 410


async def test_a_version_of_the_future_is_504(api):
    answer = await api.get(f"{CM}?resourceVersion=999999")
    assert (answer.status, answer.body["reason"]) == (504, "Timeout")
    assert answer.body["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"


@pytest.mark.parametrize(
    "query",
    [
        "resourceVersionMatch=Exact",
        "resourceVersion=0&resourceVersionMatch=Exact",
        "resourceVersion=1&resourceVersionMatch=Odd",
    ],
)
async def test_a_match_without_sense_is_422(api, query):
    assert (await api.get(f"{CM}?{query}")).status == 422


async def test_version_0_ignores_the_limit(api, five):
    assert len(await names(api, "limit=2&resourceVersion=0")) == 5


async def test_big_lists_are_compressed_when_the_client_reads_gzip(api):
    await api.post(CM, {"metadata": {"name": "big"}, "data": {"x": "y" * 200_000}})
    plain = await api.get(CM, headers={"Accept-Encoding": "identity"})
    packed = await api.get(CM, headers={"Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in plain.headers
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.body == plain.body


async def test_table_and_metadata_forms(api, five):
    table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    answer = await api.get(f"{CM}?includeObject=None", headers={"Accept": table})
    assert answer.body["kind"] == "Table"
    assert [one["name"] for one in answer.body["columnDefinitions"]] == ["Name", "Data", "Age"]
    assert answer.body["rows"][0]["cells"][:2] == ["c0", 0]
    partial = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
    answer = await api.get(CM, headers={"Accept": partial})
    assert answer.body["kind"] == "PartialObjectMetadataList"
    assert answer.body["items"][0].keys() == {"kind", "apiVersion", "metadata"}
    only_protobuf = "application/vnd.kubernetes.protobuf"
    assert (await api.get(CM, headers={"Accept": only_protobuf})).status == 406
    both = {"Accept": f"{only_protobuf},application/json"}
    assert (await api.get(CM, headers=both)).body["kind"] == "ConfigMapList"


async def test_both_versions_of_events_show_one_store(api):
    event = {
        "metadata": {"name": "e"},
        "involvedObject": {"kind": "Pod", "name": "web", "namespace": "default"},
        "reason": "Started",
        "message": "it runs",
    }
    assert (await api.post("/api/v1/namespaces/default/events", event)).status == 201
    new = "/apis/events.k8s.io/v1/namespaces/default/events"
    found = (await api.get(f"{new}?fieldSelector=regarding.name=web")).body["items"][0]
    assert (found["regarding"]["name"], found["note"]) == ("web", "it runs")
    second = {"metadata": {"name": "f"}, "regarding": {"name": "db"}, "note": "new form"}
    assert (await api.post(new, second)).body["note"] == "new form"
    old = "/api/v1/events?fieldSelector=involvedObject.name=db"
    assert (await api.get(old)).body["items"][0]["message"] == "new form"
