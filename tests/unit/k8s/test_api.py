"""The client: every failure is one ApiError, and credentials are found and kept fresh."""

import asyncio
import json
import ssl

import pytest
from aiohttp import web

from netpol.aio.clock import ManualClock
from netpol.k8s import credentials
from netpol.k8s.api import Api
from netpol.k8s.errors import ApiError
from netpol.lab.apiserver import ApiServer
from netpol.lib.errors import InputError


class Echo:
    """Answers with what it was asked, or with the next scripted answer."""

    def __init__(self):
        self.seen, self.script = [], []

    async def handle(self, request):
        body = await request.read()
        self.seen.append((request.method, request.path_qs, dict(request.headers), body))
        if self.script:
            answer = self.script.pop(0)
            return await answer(request) if callable(answer) else answer
        return web.json_response({"kind": "Echo"})

    @property
    def authorization(self):
        return self.seen[-1][2].get("Authorization", "")


@pytest.fixture
async def echo():
    made = Echo()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.02)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    made.host, made.port, made.url = host, port, f"http://{host}:{port}"
    yield made
    await runner.cleanup()


async def test_the_five_verbs(echo):
    async with Api.for_server(echo.url, token="secret") as api:  # noqa: S106
        assert json.loads(await api.get("/api/v1/pods", limit=5, empty="", none=None)) == {
            "kind": "Echo"
        }
        await api.post("/api/v1/events", {"kind": "Event"})
        await api.put("/x", {"a": 1})
        await api.patch("/y", {"b": 2}, fieldManager="me")
        await api.delete("/z")
        assert api.requests == 5
    assert [s[:2] for s in echo.seen] == [
        ("GET", "/api/v1/pods?limit=5"),
        ("POST", "/api/v1/events"),
        ("PUT", "/x"),
        ("PATCH", "/y?fieldManager=me"),
        ("DELETE", "/z"),
    ]
    assert json.loads(echo.seen[1][3]) == {"kind": "Event"}
    assert echo.seen[3][2]["Content-Type"] == "application/merge-patch+json"
    assert {s[2]["Authorization"] for s in echo.seen} == {"Bearer secret"}
    assert echo.seen[0][2]["User-Agent"].startswith("netpol-agent/")


async def test_selectors_are_encoded(echo):
    async with Api.for_server(echo.url) as api:
        await api.get("/p", fieldSelector="spec.nodeName=n 1,status.phase!=Failed")
    assert echo.seen[0][1].startswith("/p?fieldSelector=spec.nodeName%3Dn")


async def test_a_refusal_is_an_api_error_with_the_status(echo):
    status = {"kind": "Status", "code": 403, "reason": "Forbidden", "message": "no pods for you"}
    echo.script = [
        web.json_response(status, status=403),
        web.Response(status=500, text="<html>oops"),
        web.Response(status=429, headers={"Retry-After": "3"}),
        web.Response(status=503, headers={"Retry-After": "86400"}),
        web.json_response({"reason": "Expired"}, status=410),
    ]
    errors = []
    async with Api.for_server(echo.url) as api:
        for _ in range(5):
            with pytest.raises(ApiError) as caught:
                await api.get("/api/v1/pods")
            errors.append(caught.value)
    assert [e.status for e in errors] == [403, 500, 429, 503, 410]
    assert str(errors[0]) == "GET /api/v1/pods; got HTTP 403 Forbidden: no pods for you"
    assert [e.refused for e in errors] == [True, False, False, False, False]
    assert [e.expired for e in errors] == [False, False, False, False, True]
    assert [e.retry_after_s for e in errors] == [None, None, 3.0, 60.0, None]


async def test_transport_failures_are_api_errors(echo):
    async def cut(request):
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"{")
        request.transport.abort()
        return response

    echo.script = [cut]
    async with Api.for_server(echo.url) as api:
        with pytest.raises(ApiError, match="ClientPayloadError") as caught:
            await api.get("/cut")
        assert caught.value.status == 0
    async with Api.for_server("http://127.0.0.1:1") as api:
        with pytest.raises(ApiError, match="ClientConnector"):
            await api.get("/nobody")
    async with Api.for_server(echo.url, token="a\nb") as api:  # noqa: S106
        with pytest.raises(ApiError):
            await api.get("/header")
    async with Api.for_server("nonsense://") as api:
        with pytest.raises(ApiError):
            await api.get("/url")
    async with Api.for_server(f"https://{echo.host}:{echo.port}") as api:
        with pytest.raises(ApiError):
            await api.get("/tls")


async def test_a_watch_yields_chunks_and_is_closed_when_left(echo):
    left = asyncio.Event()

    async def stream(request):
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x\n")
                await asyncio.sleep(0.005)
        except ConnectionError:
            left.set()
            raise

    echo.script = [stream, web.Response(status=410)]
    async with Api.for_server(echo.url) as api:
        async with api.watch("/w", timeout_s=300.4, resourceVersion="7") as chunks:
            assert (await anext(chunks)).startswith(b"x\n")
        async with asyncio.timeout(20):
            await left.wait()
        with pytest.raises(ApiError, match="410"):
            async with api.watch("/w", timeout_s=1.0):
                pass
    assert echo.seen[0][1] == "/w?watch=true&timeoutSeconds=300&resourceVersion=7"


async def test_an_error_of_the_reader_of_a_watch_stays_its_own(echo):
    echo.script = [web.Response(body=b"x\n")]
    async with Api.for_server(echo.url) as api:
        with pytest.raises(ValueError, match="mine"):  # noqa: PT012
            async with api.watch("/w", timeout_s=1.0) as chunks:
                async for _ in chunks:
                    raise ValueError("mine")


async def test_a_token_file_is_read_again_each_minute_and_after_a_401(echo, tmp_path):
    file, clock = tmp_path / "token", ManualClock()
    file.write_text("one\n")
    async with Api.for_server(echo.url, token_file=file, clock=clock) as api:
        await api.get("/")
        file.write_text("two")
        await api.get("/")
        assert echo.authorization == "Bearer one"
        await clock.advance(61.0)
        await api.get("/")
        assert echo.authorization == "Bearer two"
        file.write_text("three")
        echo.script = [web.Response(status=401)]
        with pytest.raises(ApiError):
            await api.get("/")
        await api.get("/")
        assert echo.authorization == "Bearer three"


async def test_in_cluster_configuration(echo, tmp_path):
    token, ca = tmp_path / "token", tmp_path / "ca.crt"
    places = {"token_file": token, "ca_file": ca}
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(echo.port)}
    with pytest.raises(InputError, match="in-cluster"):
        Api.in_cluster(environ={}, **places)
    with pytest.raises(InputError, match="token file does not exist"):
        Api.in_cluster(environ=environ, **places)
    token.write_text("one\n")
    ca.write_text("no certificate")
    with pytest.raises(ApiError, match="TLS settings"):
        Api.in_cluster(environ=environ, **places)
    # The rest of the way on plain HTTP, since a certificate adds nothing here.
    ca.write_text("x")
    configuration, source = credentials.in_cluster(clock=ManualClock(), environ=environ, **places)
    assert configuration.host == f"https://127.0.0.1:{echo.port}"
    configuration.host, configuration.ssl_ca_cert = echo.url, None
    async with Api(credentials.Found(configuration, source)) as api:
        await api.get("/")
    assert echo.authorization == "Bearer one"


async def test_a_kubeconfig(echo, tmp_path):
    file = tmp_path / "config"
    file.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                "clusters": [{"name": "k", "cluster": {"server": echo.url}}],
                "users": [{"name": "u", "user": {"token": "kube"}}],
            }
        )
    )
    async with await Api.from_kubeconfig(file) as api:
        assert api.url == echo.url
        await api.get("/")
    assert echo.authorization.split() == ["Bearer", "kube"]
    with pytest.raises(InputError, match="cannot be used"):
        await Api.from_kubeconfig(file, context="another")
    for text in ("[]", "a: [", "", "\x00"):
        file.write_text(text)
        with pytest.raises(InputError, match="cannot be used"):
            await Api.from_kubeconfig(file)
    with pytest.raises(InputError, match="cannot be used"):
        await Api.from_kubeconfig(tmp_path / "nowhere")


async def test_a_kubeconfig_is_read_again_after_a_401_but_not_all_the_time(echo, tmp_path):
    file, clock = tmp_path / "config", ManualClock()

    def write(token):
        user = {"name": "u", "user": {"token": token}}
        context = {"name": "c", "context": {"cluster": "k", "user": "u"}}
        cluster = {"name": "k", "cluster": {"server": echo.url}}
        file.write_text(
            json.dumps(
                {
                    "current-context": "c",
                    "contexts": [context],
                    "clusters": [cluster],
                    "users": [user],
                }
            )
        )

    async def refused(api):
        echo.script = [web.Response(status=401)]
        with pytest.raises(ApiError):
            await api.get("/")

    write("one")
    async with await Api.from_kubeconfig(file, clock=clock) as api:
        await api.get("/")
        write("two")
        await refused(api)
        await api.get("/")
        assert echo.authorization == "Bearer two"
        write("three")
        await refused(api)
        await api.get("/")
        assert echo.authorization == "Bearer two", "within 30 s it is not read again"
        await clock.advance(31.0)
        file.write_text("{")
        await refused(api)
        await clock.advance(31.0)
        write("three")
        await refused(api)
        await api.get("/")
        assert echo.authorization == "Bearer three"


async def test_a_rotated_ca_is_read_again(tmp_path):
    ca, clock = tmp_path / "ca.crt", ManualClock()
    async with ApiServer(tls=True) as old, ApiServer(tls=True) as new:
        ca.write_bytes(old.ca_pem)
        async with Api.for_server(new.url, ca_file=ca, clock=clock) as api:
            with pytest.raises(ApiError, match="certificate"):
                await api.get("/version")
            ca.write_bytes(new.ca_pem)
            await clock.advance(31.0)
            with pytest.raises(ApiError, match="certificate"):
                await api.get("/version")
            assert b"gitVersion" in await api.get("/version")


async def test_explicit_tls_settings(tmp_path):
    with pytest.raises(InputError, match="needed a file"):
        Api.for_server("https://x", ca_file=tmp_path / "nowhere")
    async with Api.for_server("https://x", verify=False) as api:
        assert api._client.rest_client.ssl_context.verify_mode is ssl.CERT_NONE
