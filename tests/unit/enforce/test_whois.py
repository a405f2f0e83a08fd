"""Addresses that nobody watches are asked for once, within a rate, and forgotten again."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from netpol.aio.clock import ManualClock
from netpol.enforce.whois import KEEP_S, PodResolver
from netpol.k8s.errors import ApiError
from netpol.model.net import parse_address

WEB = parse_address("10.0.0.1")


def pod(name: str, phase: str, address: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": name},
        "status": {"phase": phase, "podIP": address, "podIPs": [{"ip": address}]},
    }


class Server:
    def __init__(self, *pods: dict[str, Any]) -> None:
        self.pods, self.asked, self.fail = pods, [], False

    async def get(self, path: str, **query: object) -> bytes:
        self.asked.append(query["fieldSelector"])
        if self.fail:
            raise ApiError("down")
        return json.dumps({"kind": "PodList", "apiVersion": "v1", "items": self.pods}).encode()


async def settle(clock: ManualClock, seconds: float) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    await clock.advance(seconds)
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_live_pod_is_found_once_and_an_old_one_with_its_address_is_not() -> None:
    server = Server(pod("old", "Succeeded", "10.0.0.1"), pod("web", "Running", "10.0.0.1"))
    clock, told = ManualClock(), []
    resolver = PodResolver(lambda: server, clock=clock, changed=lambda: told.append(1))
    task = asyncio.create_task(resolver.run())
    for _ in range(3):
        resolver.ask(WEB)
    await settle(clock, 1)
    resolver.ask(WEB)
    await settle(clock, 1)

    assert [p.key.name for p in resolver.pods()] == ["web"]
    assert server.asked == ["status.podIP=10.0.0.1"]
    assert told == [1]

    await settle(clock, KEEP_S)
    assert list(resolver.pods()) == []
    resolver.ask(WEB)
    await settle(clock, 1)
    assert len(server.asked) == 2
    task.cancel()


async def test_a_failing_server_is_asked_again_and_ends_nothing() -> None:
    server, clock = Server(), ManualClock()
    server.fail = True
    resolver = PodResolver(lambda: server, clock=clock, changed=lambda: None)
    task = asyncio.create_task(resolver.run())
    resolver.ask(WEB)
    await settle(clock, 1)
    resolver.ask(WEB)
    await settle(clock, 1)

    assert resolver.failures == 2
    assert not task.done()
    task.cancel()
