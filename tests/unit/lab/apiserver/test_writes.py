"""Create, update, patch and delete: identity, concurrency, deletion in steps, the answers' shapes."""

import asyncio
import re

import pytest

from netpol.lab.apiserver import ADMIN, ApiError, ApiServer
from tests.unit.lab.apiserver.helpers import pod

CM = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"


def config(name, **data):
    return {"metadata": {"name": name}, "data": data}


async def test_create_gives_identity_and_answers_201(api):
    answer = await api.post(CM, config("a", x="1"))
    assert answer.status == 201
    meta = answer.body["metadata"]
    assert (answer.body["kind"], answer.body["apiVersion"]) == ("ConfigMap", "v1")
    assert re.fullmatch(r"[0-9a-f-]{36}", meta["uid"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", meta["creationTimestamp"])
    assert meta["namespace"] == "default"


async def test_generate_name_adds_a_suffix(api):
    answer = await api.post(CM, {"metadata": {"generateName": "job-"}})
    assert re.fullmatch(r"job-[a-z0-9]{5}", answer.body["metadata"]["name"])


@pytest.mark.parametrize(
    ("request_", "status", "reason", "message"),
    [
        (("GET", f"{CM}/x", None), 404, "NotFound", 'configmaps "x" not found'),
        (("DELETE", f"{CM}/x", None), 404, "NotFound", 'configmaps "x" not found'),
        (("PUT", f"{CM}/x", config("x")), 404, "NotFound", 'configmaps "x" not found'),
        (("POST", CM, config("there")), 409, "AlreadyExists", 'configmaps "there" already exists'),
        (
            ("POST", "/api/v1/namespaces/no/configmaps", config("x")),
            404,
            "NotFound",
            'namespaces "no" not found',
        ),
        (
            ("GET", "/api/v1/nothings", None),
            404,
            "NotFound",
            "could not find the requested resource",
        ),
        (("POST", f"{CM}/x", config("x")), 405, "MethodNotAllowed", "does not allow this method"),
        (("PUT", CM, config("x")), 405, "MethodNotAllowed", "does not allow this method"),
        (("PUT", f"{CM}/there", config("b")), 400, "BadRequest", "does not match"),
        (("POST", CM, {"kind": "Secret"}), 400, "BadRequest", "Secret"),
        (("POST", CM, b"{"), 400, "BadRequest", "no JSON"),
        (("POST", CM, {"metadata": {}}), 422, "Invalid", "metadata.name: Required value"),
        (("POST", CM, config("A_b")), 422, "Invalid", "RFC 1123"),
        (("POST", CM, {"data": 3}), 400, "BadRequest", "data: needed an object, got 3"),
    ],
)
async def test_refusals_are_statuses(api, request_, status, reason, message):
    await api.post(CM, config("there"))
    answer = await api.call(*request_)
    assert (answer.status, answer.body["reason"]) == (status, reason)
    assert message in answer.body["message"]
    assert answer.body["kind"] == "Status"
    assert answer.body["status"] == "Failure"
    assert answer.body["code"] == status


async def test_not_found_details_name_the_kind_and_the_group(api):
    path = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/x"
    body = (await api.get(path)).body
    assert body["message"] == 'networkpolicies.networking.k8s.io "x" not found'
    group = "networking.k8s.io"
    assert body["details"] == {"name": "x", "group": group, "kind": "networkpolicies"}


async def test_a_stale_version_is_409_and_a_fresh_one_is_not(api):
    first = (await api.post(CM, config("a"))).body
    changed = await api.put(f"{CM}/a", first | {"data": {"x": "1"}})
    assert changed.status == 200
    stale = await api.put(f"{CM}/a", first | {"data": {"x": "2"}})
    assert (stale.status, stale.body["reason"]) == (409, "Conflict")
    assert "the object has been modified" in stale.body["message"]
    del first["metadata"]["resourceVersion"]
    assert (await api.put(f"{CM}/a", first | {"data": {"x": "3"}})).status == 200
    patch = {"metadata": {"resourceVersion": "1"}, "data": {"x": "4"}}
    assert (await api.patch(f"{CM}/a", patch)).status == 409


async def test_an_equal_object_changes_no_version(api, server):
    first = (await api.post(CM, config("a", x="1"))).body
    rv = server.store.resource_version
    again = await api.put(f"{CM}/a", first)
    assert again.body["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    await api.patch(f"{CM}/a", {"data": {"x": "1"}})
    assert server.store.resource_version == rv


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_dry_run_changes_nothing(api, server, method):
    await api.post(CM, config("a"))
    rv = server.store.resource_version
    path, body, kind = {
        "POST": (CM, config("b"), "application/json"),
        "PUT": (f"{CM}/a", config("a", x="1"), "application/json"),
        "PATCH": (f"{CM}/a", {"data": {"x": "1"}}, "application/merge-patch+json"),
        "DELETE": (f"{CM}/a", None, "application/json"),
    }[method]
    answer = await api.call(method, f"{path}?dryRun=All", body, kind=kind)
    assert answer.status in (200, 201)
    assert server.store.resource_version == rv


async def test_unknown_fields_warn_or_refuse_and_are_not_stored(api):
    odd = config("a") | {"colour": "red"}
    warned = await api.post(CM, odd)
    assert warned.headers["Warning"] == '299 - "unknown field \\"colour\\""'
    assert "colour" not in warned.body
    strict = await api.post(f"{CM}?fieldValidation=Strict", odd)
    assert strict.status == 400
    assert 'unknown field "colour"' in strict.body["message"]
    quiet = await api.put(f"{CM}/a?fieldValidation=Ignore", odd)
    assert "Warning" not in quiet.headers


async def test_status_and_spec_are_written_apart(api):
    await api.post(PODS, pod("a") | {"status": {"phase": "Running"}})
    assert (await api.get(f"{PODS}/a")).body["status"]["phase"] == "Pending"
    body = {
        "status": {"phase": "Running"},
        "metadata": {"labels": {"a": "b"}},
        "spec": {"hostNetwork": True},
    }
    await api.patch(f"{PODS}/a/status", body)
    found = (await api.get(f"{PODS}/a")).body
    assert found["status"]["phase"] == "Running"
    assert found["metadata"]["labels"] == {"a": "b"}  # of the core kinds, as the real server does
    assert "hostNetwork" not in found["spec"]
    assert found["metadata"]["generation"] == 1
    await api.patch(f"{PODS}/a", {"status": {"phase": "Failed"}})
    assert (await api.get(f"{PODS}/a/status")).body["status"]["phase"] == "Running"


async def test_the_generation_counts_changes_of_the_spec(api):
    base = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"
    await api.post(base, {"metadata": {"name": "p"}, "spec": {"podSelector": {}}})
    labelled = await api.patch(f"{base}/p", {"metadata": {"labels": {"a": "b"}}})
    assert labelled.body["metadata"]["generation"] == 1
    changed = await api.patch(f"{base}/p", {"spec": {"policyTypes": ["Egress"]}})
    assert changed.body["metadata"]["generation"] == 2


async def test_a_pod_with_a_node_goes_in_two_steps(api):
    await api.post(PODS, pod("a", node="n1"))
    marked = await api.delete(f"{PODS}/a")
    meta = marked.body["metadata"]
    assert marked.body["kind"] == "Pod"
    assert meta["deletionGracePeriodSeconds"] == 30
    assert (await api.get(f"{PODS}/a")).body["metadata"]["deletionTimestamp"]
    gone = await api.delete(f"{PODS}/a?gracePeriodSeconds=0")
    assert gone.status == 200
    assert (await api.get(f"{PODS}/a")).status == 404


@pytest.mark.parametrize("phase", ["Pending", "Succeeded"])
async def test_a_pod_without_a_node_or_finished_goes_at_once(api, server, phase):
    await api.post(PODS, pod("a", node="" if phase == "Pending" else "n1"))
    body = {"status": {"phase": phase}}
    server.store.patch("pods", "a", "default", body=body, subresource="status")
    await api.delete(f"{PODS}/a")
    assert (await api.get(f"{PODS}/a")).status == 404


async def test_a_binding_gives_a_pod_its_node_once(api):
    await api.post(PODS, pod("a"))
    binding = {"kind": "Binding", "apiVersion": "v1", "target": {"kind": "Node", "name": "n1"}}
    assert (await api.post(f"{PODS}/a/binding", binding)).status == 400
    binding["metadata"] = {"name": "a"}
    assert (await api.post(f"{PODS}/a/binding", binding)).status == 201
    assert (await api.get(f"{PODS}/a")).body["spec"]["nodeName"] == "n1"
    assert (await api.post(f"{PODS}/a/binding", binding)).status == 409


async def test_finalizers_hold_an_object(api):
    held = config("a")
    held["metadata"]["finalizers"] = ["example.com/hold"]
    await api.post(CM, held)
    assert (await api.delete(f"{CM}/a")).body["kind"] == "ConfigMap"
    assert (await api.get(f"{CM}/a")).body["metadata"]["deletionTimestamp"]
    await api.patch(f"{CM}/a", {"metadata": {"finalizers": None}})
    assert (await api.get(f"{CM}/a")).status == 404


async def test_preconditions_of_a_deletion_are_checked(api):
    await api.post(CM, config("a"))
    refused = await api.delete(f"{CM}/a", {"preconditions": {"uid": "other"}})
    assert refused.status == 409
    assert (await api.get(f"{CM}/a")).status == 200


async def test_a_deletion_answers_with_a_status_that_has_the_uid(api):
    created = (await api.post(CM, config("a"))).body
    answer = (await api.delete(f"{CM}/a")).body
    assert (answer["kind"], answer["status"]) == ("Status", "Success")
    assert answer["details"]["uid"] == created["metadata"]["uid"]


async def test_a_collection_is_deleted_by_selector(api):
    for name in "abc":
        await api.post(CM, config(name))
    await api.patch(f"{CM}/b", {"metadata": {"labels": {"keep": "1"}}})
    await api.delete(f"{CM}?labelSelector=!keep")
    left = (await api.get(CM)).body["items"]
    assert [one["metadata"]["name"] for one in left] == ["b"]


async def test_a_namespace_goes_after_its_contents(api):
    space = "/api/v1/namespaces"
    await api.post(space, {"metadata": {"name": "x"}})
    await api.post(f"{space}/x/configmaps", config("a"))
    await api.post(f"{space}/x/pods", pod("p", node="n1"))
    assert (await api.delete(f"{space}/x")).status == 200
    found = (await api.get(f"{space}/x")).body
    assert found["status"]["phase"] == "Terminating"
    assert (await api.get(f"{space}/x/configmaps/a")).status == 404
    refused = await api.post(f"{space}/x/configmaps", config("b"))
    assert (refused.status, refused.body["reason"]) == (403, "Forbidden")
    assert refused.body["details"]["causes"][0]["reason"] == "NamespaceTerminating"
    await api.delete(f"{space}/x/pods/p?gracePeriodSeconds=0")
    assert (await api.get(f"{space}/x")).status == 404


async def test_anonymous_and_unknown_users_are_kept_out(tmp_path):
    import aiohttp

    server = ApiServer(tokens={"t": ADMIN})
    async with server, aiohttp.ClientSession() as session:
        for header, status in [({}, 403), ({"Authorization": "Bearer no"}, 401)]:
            async with session.get(server.url + CM, headers=header) as response:
                assert response.status == status
        async with session.get(server.url + "/readyz") as response:
            assert await response.text() == "ok"
        header = {"Authorization": "Bearer t"}
        async with session.get(server.url + CM, headers=header) as response:
            assert response.status == 200
        token = server.token_for("kube-system", "agent")
        header = {"Authorization": f"Bearer {token}"}
        async with session.get(server.url + CM, headers=header) as response:
            body = await response.json()
    assert response.status == 403
    assert body["message"] == (
        'configmaps is forbidden: User "system:serviceaccount:kube-system:agent" cannot list '
        'resource "configmaps" in API group "" in the namespace "default"'
    )


def test_what_the_store_hands_out_is_a_copy(store):
    made = store.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}})
    made["data"] = {"x": "1"}
    assert "data" not in store.get("configmaps", "a", "default")
    assert store.update(made)["metadata"]["resourceVersion"] != "0"
    assert store.get("configmaps", "a", "default")["data"] == {"x": "1"}


def test_the_store_refuses_what_the_api_refuses(store):
    with pytest.raises(ApiError) as refusal:
        store.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": "no"})
    assert refusal.value.code == 400
    with pytest.raises(ApiError) as refusal:
        store.create({"apiVersion": "example.com/v1", "kind": "No", "metadata": {"name": "a"}})
    assert refusal.value.code == 404


async def test_many_pods_by_http(api):
    gate = asyncio.Semaphore(16)

    async def one(number):
        async with gate:
            return (await api.post(PODS, pod(f"p{number}"))).status

    assert set(await asyncio.gather(*(one(number) for number in range(500)))) == {201}
    assert len((await api.get(PODS)).body["items"]) == 500
