"""Health ports over real sockets: what load balancers get to read."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from netpol.aio.clock import ManualClock
from netpol.aio.http import SmallServer, listening_sockets
from netpol.lib.errors import InputError
from netpol.model.ids import ObjectKey
from proxy.health import STALE_S, HealthEndpoint, HealthPorts, ProxyHealth

WEB, API = ObjectKey("shop", "web"), ObjectKey("shop", "api")


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def ask(port: int, path: str = "/", *, host: str = "127.0.0.1", verb: str = "GET") -> Reply:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"{verb} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(10):
        raw = await reader.read()
    writer.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return Reply(int(first.split()[1]), dict(x.split(": ", 1) for x in lines), body)


def free_port() -> int:
    (one,) = listening_sockets(("127.0.0.1",), 0)
    with one:
        return int(one.getsockname()[1])


@asynccontextmanager
async def running(**more: Any) -> AsyncIterator[HealthPorts]:
    ports = HealthPorts(**{"healthy": lambda: True, **more})
    task = asyncio.create_task(ports.run_forever())
    yield ports
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# -- of a Service -------------------------------------------------------------------------------


async def test_a_service_with_endpoints_here_is_healthy_as_kube_proxy_says_it() -> None:
    port = free_port()
    async with running() as ports:
        ports.update(WEB, port=port, local_ready=2)
        await ports.wait_idle()
        reply = await ask(port, "/healthz")

    assert reply.status == 200
    assert reply.json == {
        "service": {"namespace": "shop", "name": "web"},
        "localEndpoints": 2,
        "serviceProxyHealthy": True,
    }
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["X-Load-Balancing-Endpoint-Weight"] == "2"


async def test_every_path_and_both_families_get_the_same_answer_and_head_gets_no_body() -> None:
    port = free_port()
    async with running() as ports:
        ports.update(WEB, port=port, local_ready=1)
        await ports.wait_idle()
        one, two = await ask(port, "/"), await ask(port, "/any?x=1", host="::1")
        head = await ask(port, verb="HEAD")
        post = await ask(port, verb="POST")

    assert one == two
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(one.body))
    assert post.status == 405


@pytest.mark.parametrize(("count", "healthy"), [(0, True), (3, False), (0, False)])
async def test_without_endpoints_or_with_a_sick_proxy_it_is_503(count: int, healthy: bool) -> None:
    port = free_port()
    async with running(healthy=lambda: healthy) as ports:
        ports.update(WEB, port=port, local_ready=count)
        await ports.wait_idle()
        reply = await ask(port)

    assert reply.status == 503
    assert reply.json["localEndpoints"] == count
    assert reply.json["serviceProxyHealthy"] is healthy


async def test_a_count_changes_at_once_and_ports_come_and_go() -> None:
    first, second = free_port(), free_port()
    async with running() as ports:
        ports.update(WEB, port=first, local_ready=1)
        await ports.wait_idle()
        ports.update(WEB, port=first, local_ready=0)
        assert (await ask(first)).status == 503

        ports.update(WEB, port=second, local_ready=1)
        ports.update(API, port=0, local_ready=0)
        await ports.wait_idle()
        assert (await ask(second)).status == 200
        with pytest.raises(ConnectionRefusedError):
            await ask(first)

        ports.update(WEB, port=0, local_ready=0)
        await ports.wait_idle()
        with pytest.raises(ConnectionRefusedError):
            await ask(second)
        assert ports.listening == {}


async def test_a_port_that_is_taken_is_told_once_and_had_when_it_is_free() -> None:
    told: list[tuple[ObjectKey, str]] = []
    clock = ManualClock()
    (holder,) = listening_sockets(("127.0.0.1",), 0)
    port, other = holder.getsockname()[1], free_port()
    async with running(told=lambda key, why: told.append((key, why)), clock=clock) as ports:
        ports.listen_on(("127.0.0.1",))
        ports.update(WEB, port=port, local_ready=1)
        ports.update(API, port=other, local_ready=1)
        await clock.advance(5)
        assert (await ask(other)).status == 200  # the fault is one Service's alone
        assert told == [(WEB, f"healthCheckNodePort {port}: Address already in use")]
        assert ports.faults.keys() == {WEB}

        holder.close()
        await clock.advance(60)
        assert (await ask(port)).status == 200
        assert ports.faults == {}


async def test_it_listens_on_the_addresses_it_is_told_to() -> None:
    port = free_port()
    async with running() as ports:
        ports.listen_on(("127.0.0.1",))
        ports.update(WEB, port=port, local_ready=1)
        await ports.wait_idle()
        with pytest.raises(ConnectionRefusedError):
            await ask(port, host="127.0.0.2")
        ports.listen_on(("127.0.0.2",))
        await ports.wait_idle()
        assert (await ask(port, host="127.0.0.2")).status == 200
        with pytest.raises(ConnectionRefusedError):
            await ask(port)


# -- of the proxy -------------------------------------------------------------------------------


async def test_healthz_and_livez_over_a_socket() -> None:
    health = ProxyHealth(clock=ManualClock())
    health.updated()
    endpoint = HealthEndpoint(health)
    await endpoint.start("127.0.0.1:0")
    reply, live = await ask(endpoint.port, "/healthz"), await ask(endpoint.port, "/livez")
    missing = await ask(endpoint.port, "/other")
    with pytest.raises(InputError, match="--proxy-health-addr"):
        await HealthEndpoint(health).start(f"127.0.0.1:{endpoint.port}")
    await endpoint.stop()

    assert reply.status == live.status == 200
    assert reply.json["lastUpdated"] == reply.json["currentTime"] == "2023-11-14T22:13:20Z"
    assert reply.json["nodeEligible"] is True
    assert "nodeEligible" not in live.json
    assert missing.status == 404


def status(health: ProxyHealth) -> tuple[int, int]:
    return health.answer("/healthz").status, health.answer("/livez").status


async def test_what_waits_too_long_makes_it_unhealthy_until_it_is_applied() -> None:
    clock = ManualClock()
    health = ProxyHealth(clock=clock)
    assert status(health) == (200, 200)  # starting
    await clock.advance(STALE_S)
    assert status(health) == (503, 503)  # never came to an apply
    health.updated()
    await clock.advance(10 * STALE_S)
    assert status(health) == (200, 200)  # nothing to do is no fault

    health.queued()
    await clock.advance(STALE_S / 2)
    health.queued()  # a later change does not hide that the first one waits
    await clock.advance(STALE_S / 2)
    assert status(health) == (503, 503)
    stale = json.loads(health.answer("/healthz").body)
    assert stale["lastUpdated"] < stale["currentTime"]
    assert stale["status"]["IPv6"]["healthy"] is False


def test_a_node_that_goes_is_not_eligible_but_its_proxy_lives() -> None:
    health = ProxyHealth(clock=ManualClock())
    health.updated()
    health.eligible = False

    assert status(health) == (503, 200)


# -- the small server ---------------------------------------------------------------------------


async def test_nonsense_and_silence_do_no_harm() -> None:
    server = SmallServer(ProxyHealth(clock=ManualClock()).answer)
    await server.open(("127.0.0.1",), 0)
    for junk in (b"\x16\x03\x01\x00", b"A" * 20_000, b"GET\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", server.port)) as one:
            one.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(one, junk)
            await asyncio.sleep(0.01)
    assert (await ask(server.port, "/livez")).status == 200
    idle = socket.create_connection(("127.0.0.1", server.port))
    await asyncio.sleep(0.01)
    await server.close()
    with idle, pytest.raises(ConnectionRefusedError):
        await ask(server.port)


async def test_changes_that_never_cease_are_no_illness_but_one_that_waits_is() -> None:
    clock = ManualClock()
    health = ProxyHealth(clock=clock)
    for _ in range(100):
        await clock.advance(2)
        health.queued()
        health.updated(clock.monotonic() - 1)  # another one came meanwhile, as always
        assert health.healthy()
    await clock.advance(STALE_S - 1.5)
    assert health.healthy()
    await clock.advance(1)
    assert not health.healthy()
