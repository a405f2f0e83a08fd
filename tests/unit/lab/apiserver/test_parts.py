"""Small parts: ages, cells, tokens and roles, certificates, protobuf, the channels of exec."""

import asyncio
import json
import ssl

import aiohttp
import pytest

from netpol.lab.apiserver import ADMIN, ApiError, ApiServer, Store, User, cells, protobuf, rbac
from netpol.lab.apiserver.auth import service_account
from netpol.lab.apiserver.exec import CLOSE, ERROR, RESIZE, STDERR, STDIN, STDOUT
from tests.unit.lab.apiserver.conftest import connections_closed, local_process, three_lines
from tests.unit.lab.apiserver.helpers import pod


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (660, "11m"),
        (3600 * 3 + 300, "3h5m"),
        (3600 * 9, "9h"),
        (86400 * 3 + 7200, "3d2h"),
        (86400 * 30, "30d"),
        (86400 * 800, "2y"),
    ],
)
def test_ages_as_kubectl_writes_them(seconds, text):
    assert cells.duration(seconds) == text


@pytest.mark.parametrize(
    ("change", "column", "text"),
    [
        ({}, 2, "Pending"),
        ({"metadata": {"name": "a", "deletionTimestamp": "x"}}, 2, "Terminating"),
        ({"status": {"phase": "Failed", "reason": "Evicted"}}, 2, "Evicted"),
        (
            {"status": {"containerStatuses": [{"state": {"waiting": {"reason": "Pulling"}}}]}},
            2,
            "Pulling",
        ),
        ({"status": {"containerStatuses": [{"ready": True, "restartCount": 2}]}}, 1, "1/1"),
        ({"status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "::1"}]}}, 5, "10.0.0.1"),
    ],
)
def test_cells_of_a_pod(change, column, text):
    obj = pod("a") | {"status": {"phase": "Pending"}} | change
    assert cells.pod(obj)[column] == text


def binding(kind, name, role, role_kind="ClusterRole", **meta):
    rbac_api = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{rbac_api}/v1",
        "kind": "RoleBinding" if "namespace" in meta else "ClusterRoleBinding",
        "metadata": {"name": role} | meta,
        "roleRef": {"apiGroup": rbac_api, "kind": role_kind, "name": role},
        "subjects": [{"kind": kind, "name": name}],
    }


def role(name, **rule):
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": name},
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]} | rule],
    }


@pytest.mark.parametrize(
    ("rule", "wanted", "expected"),
    [
        ({}, ("get", "", "pods"), True),
        ({}, ("list", "", "pods"), False),
        ({}, ("get", "", "pods", "status"), False),
        ({"resources": ["pods/status"]}, ("get", "", "pods", "status"), True),
        ({"resources": ["*"]}, ("get", "", "pods", "status"), True),
        ({"resources": ["*/status"]}, ("get", "", "pods", "status"), True),
        ({"apiGroups": ["apps"]}, ("get", "", "pods"), False),
        ({"apiGroups": ["*"], "verbs": ["*"]}, ("delete", "apps", "pods"), True),
        ({"resourceNames": ["web"]}, ("get", "", "pods", "", "x", "web"), True),
        ({"resourceNames": ["web"]}, ("get", "", "pods", "", "x", "db"), False),
    ],
)
def test_rules(store, rule, wanted, expected):
    store.create(role("r", **rule))
    store.create(binding("User", "ann", "r"))
    user = User("ann", frozenset())
    assert rbac.allowed(store, user, rbac.Attributes(*wanted)) is expected
    assert not rbac.allowed(store, User("bob", frozenset()), rbac.Attributes(*wanted))


def test_a_role_binding_reaches_its_namespace_alone(store: Store):
    store.create(role("r"))
    store.create(binding("ServiceAccount", "agent", "r", namespace="kube-system"))
    agent = service_account("kube-system", "agent")
    inside = rbac.Attributes("get", "", "pods", namespace="kube-system")
    assert rbac.allowed(store, agent, inside)
    assert not rbac.allowed(store, agent, inside._replace(namespace="default"))
    assert not rbac.allowed(store, agent, inside._replace(namespace=""))


def test_groups_and_the_roles_that_every_cluster_has(store):
    store.create(binding("Group", "watchers", "view"))
    user = User("ann", frozenset({"watchers"}))
    assert rbac.allowed(store, user, rbac.Attributes("list", "", "pods", namespace="x"))
    assert not rbac.allowed(store, user, rbac.Attributes("list", "", "secrets", namespace="x"))


async def test_tls_is_trusted_by_its_own_ca_and_by_nobody_else():
    server = ApiServer(tls=True, tokens={"t": ADMIN})
    async with server, aiohttp.ClientSession() as session:
        assert server.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cadata=server.ca_pem.decode())
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            async with session.get(f"{url}/version", ssl=context) as response:
                assert (await response.json())["major"] == "1"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get(f"{server.url}/version")
    await connections_closed()  # the server has to see the end of the broken handshake


@pytest.mark.parametrize("body", [b"", b"k8s\x00\xff", b"k8s\x00\x0a\x7f", b"other"])
def test_broken_protobuf_is_400(body):
    with pytest.raises(ApiError) as refusal:
        protobuf.read(body)
    assert refusal.value.code == 400


def test_protobuf_of_an_unread_kind_says_what_to_do():
    with pytest.raises(ApiError, match="kubectl apply -f -") as refusal:
        protobuf.read(b"k8s\x00\x0a\x0a\x0a\x02v1\x12\x04Node")
    assert refusal.value.code == 415


class TestExec:
    @pytest.fixture
    async def web(self):
        server = ApiServer(exec_hook=local_process, log_hook=three_lines)
        server.store.create(pod("web", node="n1"))
        async with server, aiohttp.ClientSession() as session:
            yield session, f"{server.url}/api/v1/namespaces/default/pods/web"

    async def channels(self, web, command, *, protocol="v5.channel.k8s.io", send=()):
        session, url = web
        query = [("command", part) for part in command]
        query += [(name, "true") for name in ("stdin", "stdout", "stderr")]
        found = {STDOUT: b"", STDERR: b"", ERROR: b""}
        async with (
            asyncio.timeout(10),
            session.ws_connect(f"{url}/exec", params=query, protocols=[protocol]) as socket,
        ):
            assert socket.protocol == protocol
            for data in send:
                await socket.send_bytes(data)
            async for message in socket:
                found[message.data[0]] += message.data[1:]
        return found

    @pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io"])
    async def test_output_and_success(self, web, protocol):
        found = await self.channels(web, ["echo", "a"], protocol=protocol)
        assert found[STDOUT] == b"a\n"
        assert json.loads(found[ERROR]) == {"metadata": {}, "status": "Success"}

    async def test_exit_code_and_errors(self, web):
        found = await self.channels(web, ["sh", "-c", "echo e >&2; exit 7"])
        assert found[STDERR] == b"e\n"
        status = json.loads(found[ERROR])
        assert status["reason"] == "NonZeroExitCode"
        assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]

    async def test_a_signal_is_a_code_above_128(self, web):
        found = await self.channels(web, ["sh", "-c", "kill -9 $$"])
        assert json.loads(found[ERROR])["details"]["causes"][0]["message"] == "137"

    async def test_closing_the_input_lets_the_command_end(self, web):
        send = [bytes((STDIN,)) + b"abc", bytes((RESIZE,)) + b"{}", bytes((CLOSE, STDIN))]
        assert (await self.channels(web, ["cat"], send=send))[STDOUT] == b"abc"

    async def test_a_client_that_goes_away_ends_the_command(self, web, tmp_path):
        session, url = web
        mark = tmp_path / "pid"
        script = f"echo $$ > {mark}; exec sleep 60"
        query = [("command", part) for part in ("sh", "-c", script)] + [("stdout", "true")]
        async with session.ws_connect(f"{url}/exec", params=query, protocols=["v5.channel.k8s.io"]):
            while not (mark.exists() and mark.read_text()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        pid = int(mark.read_text())
        async with asyncio.timeout(5):
            while alive(pid):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    @pytest.mark.parametrize(
        ("path", "status"),
        [
            ("/exec?command=true&stdout=1", 400),
            ("/log?container=other", 400),
            ("/log?tailLines=x", 400),
            ("/portforward", 404),
        ],
    )
    async def test_refusals(self, web, path, status):
        session, url = web
        async with session.get(url + path) as response:
            assert response.status == status

    async def test_a_client_that_leaves_ends_the_log_that_it_followed(self):
        ended = asyncio.Event()

        async def endless(_request):
            try:
                while True:
                    yield b"line\n"
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        server = ApiServer(log_hook=endless)
        server.store.create(pod("web", node="n1"))
        url = "/api/v1/namespaces/default/pods/web/log?follow=true"
        async with server, aiohttp.ClientSession() as session:
            async with session.get(server.url + url) as response:
                assert await response.content.readline() == b"line\n"
                response.close()
            async with asyncio.timeout(5):
                await ended.wait()

    async def test_without_hooks_it_says_so(self, api, server):
        server.store.create(pod("web", node="n1"))
        answer = await api.get("/api/v1/namespaces/default/pods/web/log")
        assert "no hook was given" in answer.body["message"]


def alive(pid):
    import os

    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("path", "accept", "kind"),
    [
        ("/api", "", "APIVersions"),
        ("/apis", "", "APIGroupList"),
        ("/apis/networking.k8s.io", "", "APIGroup"),
        ("/api/v1", "", "APIResourceList"),
        ("/apis/networking.k8s.io/v1", "", "APIResourceList"),
        (
            "/apis",
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            "APIGroupDiscoveryList",
        ),
    ],
)
async def test_discovery_in_both_forms(api, path, accept, kind):
    answer = await api.get(path, headers={"Accept": accept} if accept else None)
    assert answer.body["kind"] == kind


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/livez", "/readyz/ping"])
async def test_health(api, path):
    assert (await api.get(path)).body == "ok"


async def test_yaml_bodies_and_answers(api):
    text = b"{metadata: {name: a}, data: {x: 'on'}}"
    made = await api.post("/api/v1/namespaces/default/configmaps", text, kind="application/yaml")
    assert made.body["data"] == {"x": "on"}
    path = "/api/v1/namespaces/default/configmaps/a"
    read = await api.get(path, headers={"Accept": "application/yaml"})
    assert "kind: ConfigMap" in read.body
