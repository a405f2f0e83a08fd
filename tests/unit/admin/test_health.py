"""Health is served to whoever asks, over either family."""

from __future__ import annotations

import asyncio
import socket

import pytest

from netpol.admin.health import EVERYWHERE, HealthServer, gauge
from netpol.lib.errors import InputError


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


async def get(address: str, port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return (await reader.read()).decode()
    finally:
        writer.close()
        await writer.wait_closed()


def server(*, has_ipv6: bool = True) -> HealthServer:
    return HealthServer(
        alive=lambda: None,
        ready=lambda: "policy: no",
        metrics=lambda: [gauge("x", "y", 1)],
        has_ipv6=lambda: has_ipv6,
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_the_default_address_is_every_address_of_both_families(address: str) -> None:
    health, port = server(), free_port()
    await health.start(EVERYWHERE, port)
    try:
        assert (await get(address, port, "/healthz")).startswith("HTTP/1.1 200")
        not_ready = await get(address, port, "/readyz")
        assert not_ready.startswith("HTTP/1.1 503")
        assert not_ready.endswith("policy: no\n")
        assert "netpol_x 1.0" in await get(address, port, "/metrics")
    finally:
        await health.stop()


async def test_without_ipv6_it_is_served_over_ipv4() -> None:
    health, port = server(has_ipv6=False), free_port()
    await health.start(EVERYWHERE, port)
    try:
        assert (await get("127.0.0.1", port, "/healthz")).startswith("HTTP/1.1 200")
        with pytest.raises(ConnectionRefusedError):
            await get("::1", port, "/healthz")
    finally:
        await health.stop()


@pytest.mark.parametrize(("host", "other"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
async def test_one_address_is_one_address(host: str, other: str) -> None:
    health, port = server(), free_port()
    await health.start(host, port)
    try:
        assert (await get(host, port, "/healthz")).startswith("HTTP/1.1 200")
        with pytest.raises(ConnectionRefusedError):
            await get(other, port, "/healthz")
    finally:
        await health.stop()


@pytest.mark.parametrize("taken", ["127.0.0.1", "::"])
async def test_an_address_that_is_taken_is_said(taken: str) -> None:
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, 0), family=family) as other:
        health, port = server(), other.getsockname()[1]
        with pytest.raises(InputError, match="--health-addr"):
            await health.start(EVERYWHERE, port)
        await health.stop()
