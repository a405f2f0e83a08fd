"""Leader election over HTTP against the lab's API server, and its rules with a clock that is moved."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from netpol.aio.clock import ManualClock
from netpol.k8s.api import Api
from netpol.k8s.errors import ApiError
from netpol.k8s.lease import Elector, LeaseTimes
from netpol.lab.apiserver import ApiServer

PATH = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
FAST = LeaseTimes(duration_s=1, renew_within_s=0.7, renew_every_s=0.1, follow_every_s=0.1)


class Leases:
    """One Lease with the API server's rule for updates; can be unreachable."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.down = False
        self.calls: list[str] = []

    def _up(self, verb: str) -> None:
        self.calls.append(verb)
        if self.down:
            raise ApiError("unreachable")

    async def get(self, _path: str, **_: object) -> bytes:
        self._up("get")
        if self.lease is None:
            raise ApiError("get", status=404)
        return json.dumps(self.lease).encode()

    async def post(self, _path: str, body: dict[str, Any], **_: object) -> bytes:
        self._up("post")
        if self.lease is not None:
            raise ApiError("post", status=409)
        return self._store(body)

    async def put(self, _path: str, body: dict[str, Any], **_: object) -> bytes:
        self._up("put")
        if self.lease is None:
            raise ApiError("put", status=404)
        if body["metadata"].get("resourceVersion") != str(self.version):
            raise ApiError("put", status=409)
        return self._store(body)

    def _store(self, body: dict[str, Any]) -> bytes:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.lease = body
        return json.dumps(body).encode()

    @property
    def spec(self) -> dict[str, Any]:
        assert self.lease is not None
        spec: dict[str, Any] = self.lease["spec"]
        return spec


def elector(api: Any, identity: str, clock: ManualClock | None = None, **more: Any) -> Elector:
    return Elector(api, namespace="kube-system", name="x", identity=identity, clock=clock, **more)


async def test_the_first_leads_renews_and_is_followed_when_it_is_silent() -> None:
    api, clock = Leases(), ManualClock()
    one, two = elector(api, "one", clock), elector(api, "two", clock)
    first = asyncio.create_task(one.run_forever())
    await clock.settle()
    second = asyncio.create_task(two.run_forever())
    await clock.advance(120)
    assert (one.leading, two.leading) == (True, False)
    assert two.holder == "one"
    assert api.spec["leaseTransitions"] == 0
    begun = api.spec["acquireTime"]
    assert begun == "2023-11-14T22:13:20.000000Z"
    assert api.spec["renewTime"] > begun

    # Killed: it gives nothing back.
    one._release = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    first.cancel()
    for _ in range(120):
        assert not (one.leading and two.leading)
        await clock.advance(1)
    assert (one.leading, two.leading) == (False, True)
    assert api.spec["leaseTransitions"] == 1
    assert api.spec["acquireTime"] > begun
    second.cancel()


async def test_a_leader_that_cannot_renew_stops_before_anybody_may_follow() -> None:
    api, clock = Leases(), ManualClock()
    told: list[bool] = []
    one = elector(api, "one", clock, changed=told.append)
    task = asyncio.create_task(one.run_forever())
    await clock.settle()
    assert told == [True]
    api.down = True
    last = clock.monotonic()
    while one.leading:
        await clock.advance(0.5)
    assert clock.monotonic() - last <= 10.0 < 15.0 - 4.0
    assert told == [True, False]
    api.down = False
    await clock.advance(60)
    assert told == [True, False, True]
    task.cancel()


async def test_a_leader_that_ends_gives_the_lease_back() -> None:
    api, clock = Leases(), ManualClock()
    one, two = elector(api, "one", clock), elector(api, "two", clock)
    first = asyncio.create_task(one.run_forever())
    await clock.settle()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert api.spec["holderIdentity"] == ""
    assert api.spec["leaseDurationSeconds"] == 1
    second = asyncio.create_task(two.run_forever())
    await clock.settle()
    assert two.leading
    second.cancel()


async def test_a_lease_that_is_deleted_is_made_again_or_somebody_else_leads() -> None:
    """Another contender may make it anew, and lead, long before ours would have ended."""
    api, clock = Leases(), ManualClock()
    one, two = elector(api, "one", clock), elector(api, "two", clock)
    task = asyncio.create_task(one.run_forever())
    await clock.settle()
    api.lease = None
    await clock.advance(2.5)
    assert (one.leading, api.spec["holderIdentity"]) == (True, "one")
    api.lease = None
    await two._try()
    assert two.leading
    await clock.advance(2.5)
    assert (one.leading, two.leading) == (False, True)
    task.cancel()


async def test_the_clock_of_another_node_does_not_matter() -> None:
    """Times in the record lie in the past: it counts from when this process first saw it."""
    api, clock = Leases(), ManualClock()
    await api.post(
        "",
        {
            "metadata": {},
            "spec": {
                "holderIdentity": "other",
                "leaseDurationSeconds": 15,
                "renewTime": "2001-01-01T00:00:00.000000Z",
            },
        },
    )
    one = elector(api, "one", clock)
    task = asyncio.create_task(one.run_forever())
    await clock.advance(9)
    assert not one.leading
    await clock.advance(60)
    assert one.leading
    task.cancel()


async def test_followers_ask_seldom() -> None:
    api, clock = Leases(), ManualClock()
    tasks = [asyncio.create_task(elector(api, "one", clock).run_forever())]
    await clock.settle()
    tasks += [asyncio.create_task(elector(api, f"f{n}", clock).run_forever()) for n in range(10)]
    await clock.settle()
    api.calls.clear()
    await clock.advance(100)
    assert api.calls.count("get") <= 10 * 10
    assert 40 <= api.calls.count("put") <= 51  # the leader's renewals read nothing before
    for task in tasks:
        task.cancel()


async def test_two_contenders_over_http_and_one_is_killed() -> None:
    both_led = False
    async with ApiServer() as server, Api.for_server(server.url) as api:
        contenders = [elector(api, f"n{n}", times=FAST) for n in range(2)]
        tasks = [asyncio.create_task(c.run_forever()) for c in contenders]
        async with asyncio.timeout(20):
            while not any(c.leading for c in contenders):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            (leader,) = [n for n, c in enumerate(contenders) if c.leading]
            contenders[leader]._release = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
            tasks[leader].cancel()
            while not contenders[1 - leader].leading:
                both_led |= all(c.leading for c in contenders)
                await asyncio.sleep(0.01)
        lease = json.loads(await api.get(f"{PATH}/x"))
        tasks[1 - leader].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not both_led
    assert lease["spec"]["holderIdentity"] == f"n{1 - leader}"
    assert lease["spec"]["leaseTransitions"] == 1
