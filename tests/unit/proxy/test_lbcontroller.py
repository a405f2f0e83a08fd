"""LoadBalancer addresses over real HTTP: two agents, one leader, and nobody else's status touched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from netpol.k8s.api import Api
from netpol.k8s.cache import Store
from netpol.k8s.decode import SERVICE
from netpol.k8s.errors import ApiError
from netpol.k8s.informers import InformerSet
from netpol.k8s.lease import Elector, LeaseTimes
from netpol.lab.apiserver import ApiServer
from netpol.model.ids import ObjectKey
from netpol.model.objects import Service
from netpol.model.pools import parse_range
from proxy.lbcontroller import LEASE_NAME, LEASE_NAMESPACE, LoadBalancerController

FAST = LeaseTimes(duration_s=1, renew_within_s=0.7, renew_every_s=0.1, follow_every_s=0.1)
OURS = "netpol.io/loadbalancer"
POOLS = ("192.0.2.1-192.0.2.9",)


def service(
    name: str, *, of_class: str = OURS, annotations: dict[str, str] | None = None, **spec: Any
) -> dict[str, Any]:
    more = {"loadBalancerClass": of_class} if of_class else {}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "annotations": annotations or {}},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80}], **more, **spec},
    }


class Cluster:
    """An API server and the controllers of some nodes."""

    def __init__(self, server: ApiServer, api: Api) -> None:
        self.server, self.api = server, api
        self.controllers: list[LoadBalancerController] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.watches: list[InformerSet] = []
        self.stores: list[Store[Service]] = []

    def join(self, *, pools: tuple[str, ...] = POOLS, default_class: bool = False) -> int:
        watches = InformerSet(self.api)
        informer = watches.start(SERVICE)
        number = len(self.controllers)

        def elector(changed: Callable[[bool], None]) -> Elector:
            return Elector(
                self.api,
                namespace=LEASE_NAMESPACE,
                name=LEASE_NAME,
                identity=f"n{number}",
                times=FAST,
                changed=changed,
            )

        made = LoadBalancerController(
            self.api,
            informer.store,
            pools=[parse_range(p) for p in pools],
            load_balancer_class=OURS,
            default_class=default_class,
            elector=elector,
        )
        informer.store.subscribe(made.changed)
        self.watches.append(watches)
        self.stores.append(informer.store)
        self.controllers.append(made)
        self.tasks.append(asyncio.create_task(made.run_forever()))
        return number

    async def kill(self, number: int) -> None:
        """End a node's controller without a word."""
        made = self.controllers[number]
        made.elector._release = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
        self.tasks[number].cancel()
        await asyncio.gather(self.tasks[number], return_exceptions=True)

    async def create(self, obj: dict[str, Any]) -> None:
        await self.api.post("/api/v1/namespaces/default/services", obj)

    async def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.api.get(self.path(name)))
        return found

    @staticmethod
    def path(name: str) -> str:
        return f"/api/v1/namespaces/default/services/{name}"

    async def addresses(self) -> dict[str, list[str]]:
        items = json.loads(await self.api.get("/api/v1/services"))["items"]
        return {
            i["metadata"]["name"]: [
                e.get("ip") or e.get("hostname")
                for e in (i.get("status") or {}).get("loadBalancer", {}).get("ingress") or ()
            ]
            for i in items
        }

    async def until(self, wanted: dict[str, list[str]]) -> None:
        async with asyncio.timeout(20):
            while not wanted.items() <= (await self.addresses()).items():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    @property
    def leader(self) -> int:
        (number,) = [n for n, c in enumerate(self.controllers) if c.elector.leading]
        return number

    async def settled(self) -> None:
        async with asyncio.timeout(20):
            while not any(c.elector.leading for c in self.controllers):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    async with ApiServer() as server, Api.for_server(server.url) as api:
        made = Cluster(server, api)
        yield made
        for task in made.tasks:
            task.cancel()
        await asyncio.gather(*made.tasks, return_exceptions=True)
        for watches in made.watches:
            await watches.close()


async def test_services_of_our_class_get_addresses_and_give_them_back() -> None:
    async with cluster() as c:
        await c.create(service("a"))
        c.join()
        await c.until({"a": ["192.0.2.1"]})
        entry = (await c.get("a"))["status"]["loadBalancer"]["ingress"][0]
        assert entry == {"ip": "192.0.2.1", "ipMode": "VIP"}

        await c.create(service("b", annotations={"netpol.io/loadbalancer-ips": "192.0.2.7"}))
        await c.create(service("c", loadBalancerIP="192.0.2.8"))
        await c.until({"b": ["192.0.2.7"], "c": ["192.0.2.8"]})

        await c.api.delete(c.path("a"))
        await c.create(service("d"))
        await c.until({"d": ["192.0.2.1"]})
        change = {"spec": {"type": "ClusterIP", "loadBalancerClass": None, "loadBalancerIP": None}}
        await c.api.patch(c.path("c"), change)
        await c.until({"c": []})
        await c.create(service("e", annotations={"netpol.io/loadbalancer-ips": "192.0.2.8"}))
        await c.until({"e": ["192.0.2.8"]})


async def test_two_hundred_at_once_and_a_leader_that_dies_in_the_middle() -> None:
    async with cluster() as c:
        pools = ("198.51.100.0/24",)
        c.join(pools=pools)
        c.join(pools=pools)
        await c.settled()
        creating = asyncio.gather(*(c.create(service(f"s{n}")) for n in range(200)))
        async with asyncio.timeout(20):
            while sum(k.writes for k in c.controllers) < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await c.kill(c.leader)
        await creating
        async with asyncio.timeout(40):
            while True:
                found = await c.addresses()
                given = [a for name, got in found.items() if name.startswith("s") for a in got]
                assert len(given) == len(set(given))
                if len(given) == 200:
                    break
                await asyncio.sleep(0.1)


async def test_a_new_leader_leaves_what_the_last_one_gave() -> None:
    async with cluster() as c:
        await c.create(service("a"))
        await c.create(service("b"))
        c.join()
        await c.until({"a": ["192.0.2.1"], "b": ["192.0.2.2"]})
        await c.kill(0)
        await c.api.delete(c.path("a"))
        await c.create(service("c"))
        c.join()
        await c.until({"b": ["192.0.2.2"], "c": ["192.0.2.1"]})
        assert c.controllers[1].writes == 1


@pytest.mark.parametrize("default_class", [False, True], ids=["our class only", "default class"])
async def test_statuses_of_other_controllers_are_left_alone(default_class: bool) -> None:
    async with cluster() as c:
        for name, of_class, status in (
            ("other-class", "example.com/lb", [{"ip": "192.0.2.1"}]),
            ("other-host", "", [{"hostname": "lb.example.com"}]),
            ("other-ip", "", [{"ip": "203.0.113.9"}]),
            ("none", "", []),
        ):
            await c.create(service(name, of_class=of_class))
            body = {"status": {"loadBalancer": {"ingress": status}}}
            await c.api.patch(f"{c.path(name)}/status", body)
        await c.create(service("mine"))
        c.join(default_class=default_class)
        # 192.0.2.1 is in our pool, but another controller gave it.
        await c.until({"mine": ["192.0.2.2"], "none": ["192.0.2.3"] if default_class else []})
        found = await c.addresses()
        assert found["other-class"] == ["192.0.2.1"]
        assert found["other-host"] == ["lb.example.com"]
        assert found["other-ip"] == ["203.0.113.9"]


async def test_what_cannot_be_given_is_told_and_given_when_it_can() -> None:
    async with cluster() as c:
        c.join(pools=("192.0.2.1-192.0.2.1",))
        await c.create(service("a"))
        await c.until({"a": ["192.0.2.1"]})
        await c.create(service("b"))
        made = c.controllers[0]
        async with asyncio.timeout(20):
            while not made.faults:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert [f.reason for f in made.faults[ObjectKey("default", "b")]] == ["PoolExhausted"]
        await c.api.delete(c.path("a"))
        await c.until({"b": ["192.0.2.1"]})
        assert not made.faults


async def test_an_address_that_somebody_else_names_is_given_once_it_is_free() -> None:
    async with cluster() as c:
        await c.create(
            service("squatter", of_class="", type="ClusterIP", externalIPs=["192.0.2.5"])
        )
        c.join()
        await c.create(service("a", annotations={"netpol.io/loadbalancer-ips": "192.0.2.5"}))
        made = c.controllers[0]
        async with asyncio.timeout(20):
            while not made.faults:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert [f.reason for f in made.faults[ObjectKey("default", "a")]] == ["AddressTaken"]
        await c.api.patch(c.path("squatter"), {"spec": {"externalIPs": None}})
        await c.until({"a": ["192.0.2.5"]})


async def test_a_status_written_meanwhile_is_not_overwritten_blindly() -> None:
    """The watch has not told yet that somebody else gave the address: the guard does."""
    async with cluster() as c:
        c.join(default_class=True)
        await c.settled()
        made = c.controllers[0]
        await c.watches[0].stop(SERVICE.plural, clear=False)  # blind from here on
        await c.create(service("x", of_class=""))
        stale = json.loads(await c.api.get(c.path("x")))
        body = {"status": {"loadBalancer": {"ingress": [{"hostname": "lb.example.com"}]}}}
        await c.api.patch(f"{c.path('x')}/status", body)
        made._take(json.dumps(stale).encode())
        held = c.stores[0]
        async with asyncio.timeout(20):
            while not held.objects[ObjectKey("default", "x")].ingress:  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # only after it was refused it reads the Service itself
        assert (await c.addresses())["x"] == ["lb.example.com"]
        assert made.writes == 0


async def test_a_refusal_that_nobody_elses_write_explains_is_not_repeated_at_once() -> None:
    async with cluster() as c:
        c.join()
        await c.settled()
        made, patches = c.controllers[0], 0

        async def refuse(path: str, body: dict[str, Any], **_: object) -> bytes:
            nonlocal patches
            patches += 1
            raise ApiError("a webhook says no", status=409)

        real_patch, c.api.patch = c.api.patch, refuse  # type: ignore[method-assign]
        await c.create(service("a"))
        async with asyncio.timeout(20):
            while not made._runner.failures:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        assert patches <= 2
        c.api.patch = real_patch  # type: ignore[method-assign]
        await c.until({"a": ["192.0.2.1"]})


async def test_a_contender_that_dies_takes_the_controller_with_it() -> None:
    """Else nobody would notice that this node can never lead again."""
    async with cluster() as c:

        async def die() -> None:
            raise RuntimeError("a defect")

        watches = InformerSet(c.api)
        made = LoadBalancerController(
            c.api,
            watches.start(SERVICE).store,
            pools=[],
            load_balancer_class=OURS,
            default_class=False,
            elector=lambda _: SimpleNamespace(run_forever=die, leading=False),  # type: ignore[arg-type,return-value]
        )
        with pytest.raises(RuntimeError, match="a defect"):
            await asyncio.wait_for(made.run_forever(), 5)
        await watches.close()
