"""The proxy part as a whole: Services made over the real API come to IPVS, on fakes of the kernel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import services as samples
from netpol.admin.server import AdminServer
from netpol.agent.parts import Standing
from netpol.agent.proxy import PLAN_AT_ONCE, ProxyPart
from netpol.aio.clock import SystemClock
from netpol.aio.tasks import TaskSet
from netpol.config import Settings
from netpol.ctl.main import main
from netpol.k8s.api import Api
from netpol.k8s.decode import decode_object
from netpol.k8s.informers import InformerSet
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.kernel.testing_ipvs import FakeFlows, FakeIpvs, FakeVips
from netpol.lab.apiserver import ApiServer
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.ids import SERVICES, ObjectKey, Protocol
from netpol.model.ipvs import AddReal, ForwardMethod, RealServer, ServerId, VirtualServer
from netpol.model.net import Family, Prefix, parse_address, parse_prefix
from netpol.model.objects import EndpointSlice, Service
from proxy import names
from proxy.apply import Drivers
from proxy.sync import LOWER_AT_ONCE
from tests.unit.proxy.test_health import ask, free_port

NODE = "n1"
VIP = "10.96.7.7"


def bench_services(number: int) -> list[tuple[Service, EndpointSlice]]:
    """Services of one endpoint each."""
    made = []
    for n in range(number):
        service = decode_object("Service", samples.service_json(n))
        piece = decode_object("EndpointSlice", samples.slice_json(n, 1))
        assert isinstance(service, Service)
        assert isinstance(piece, EndpointSlice)
        made.append((service, piece))
    return made


class Kernel:
    """Fakes of all that the proxy changes."""

    def __init__(self) -> None:
        self.ipvs, self.vips, self.flows = FakeIpvs(), FakeVips(), FakeFlows()
        self.sets = FakeSets(owner=SERVICES)
        self.tables = FakeTables(sets=self.sets, owner=SERVICES)

    def drivers(self) -> Drivers:
        return Drivers(
            ipvs=self.ipvs,
            vips=self.vips,
            sets=self.sets,
            tables=self.tables,
            flows=self.flows,
            eyes=self.ipvs,
        )

    def backends(self, address: str, port: int) -> list[str] | None:
        """The real servers of a virtual one; None where there is none."""
        family = Family.V6 if ":" in address else Family.V4
        id_ = ServerId(family, Protocol.TCP, parse_address(address), port)
        found = self.ipvs.state.get(id_)
        if found is None:
            return None
        return sorted(
            f"{'.'.join(map(str, r.address))}:{r.port}"
            for r, s in found.reals.items()
            if s.config.weight
        )


class Facts:
    """The node, as far as it tells itself."""

    def __init__(self) -> None:
        self.addresses: tuple[bytes, ...] = (parse_address("192.0.2.1"),)
        self.ranges: tuple[Prefix, ...] = ()

    def pod_ranges(self) -> tuple[Prefix, ...]:
        return self.ranges


class World:
    """A part that runs against an API server."""

    def __init__(self, part: ProxyPart, api: Api, kernel: Kernel, facts: Facts) -> None:
        self.part, self.api, self.kernel, self.facts = part, api, kernel, facts
        self.told = self.served = self.applied = 0

    async def create(self, path: str, obj: dict[str, Any]) -> None:
        await self.api.post(path, obj)

    async def service(self, name: str = "web", **spec: Any) -> None:
        body = {"clusterIP": VIP, "ports": [{"port": 80, "targetPort": 8080}], **spec}
        await self.create(
            "/api/v1/namespaces/default/services",
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": body},
        )

    async def endpoints(self, *addresses: str, name: str = "web", node: str = NODE) -> None:
        await self.create(
            "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{name}-{addresses[0].replace('.', '-')}",
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"port": 8080}],
                "endpoints": [{"addresses": [a], "nodeName": node} for a in addresses],
            },
        )

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - whatever the condition is about
                await asyncio.sleep(0.01)

    async def events(self) -> dict[str, str]:
        items = json.loads(await self.api.get("/api/v1/events"))["items"]
        return {i["reason"]: i["message"] for i in items}

    async def ask_services(self, name: str = "") -> list[Any]:
        return [item async for item in self.part.services_op({"service": name})]


def node_object(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE},
        "spec": {"podCIDRs": ["10.244.1.0/24"], "podCIDR": "10.244.1.0/24", **spec},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    }


@asynccontextmanager
async def world(
    tmp_path: Path, *, kernel: Kernel | None = None, start: bool = True, **settings: Any
) -> AsyncIterator[World]:
    kernel, facts = kernel or Kernel(), Facts()
    async with ApiServer() as server, Api.for_server(server.url) as api:
        await api.post("/api/v1/nodes", node_object())
        given = Settings(
            node=NODE,
            proxy=True,
            run_dir=str(tmp_path / "run"),
            proxy_health_addr="127.0.0.1:0",
            **{"service_ranges": ("10.96.0.0/12",), **settings},
        )
        holder: list[World] = []

        def count(name: str) -> Callable[[], None]:
            def told() -> None:
                setattr(holder[0], name, getattr(holder[0], name) + 1)

            return told

        part = ProxyPart(
            given,
            drivers=kernel.drivers(),
            facts=facts,
            clock=SystemClock(),
            applied=count("applied"),
            served=lambda _: count("served")(),
            told=count("told"),
            sysctls=list,
        )
        made = World(part, api, kernel, facts)
        holder.append(made)
        tasks, watches = TaskSet(), InformerSet(api)
        await part.listen(api)
        part.start(api, watches, tasks)
        await watches.wait_synced()
        try:
            if start:
                await part.synced()
                await made.until(lambda: part.standing().applied_at_s is not None)
            yield made
        finally:
            await tasks.cancel()
            await watches.close()
            await part.stop()
        assert not tasks.deaths


async def test_services_of_the_api_come_to_ipvs_and_go(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.service()
        await w.until(lambda: w.kernel.backends(VIP, 80) == [])
        await w.endpoints("10.244.1.5", "10.244.1.6")
        await w.until(lambda: w.kernel.backends(VIP, 80) == ["10.244.1.5:8080", "10.244.1.6:8080"])
        assert parse_address(VIP) in (w.kernel.vips.dump() or ())
        assert w.part.standing().in_sync
        assert w.part.fault() is None
        assert w.served
        await w.api.delete("/api/v1/namespaces/default/services/web")
        await w.until(lambda: w.kernel.backends(VIP, 80) is None)
        await w.until(lambda: parse_address(VIP) not in (w.kernel.vips.dump() or ()))


async def test_nothing_is_written_before_the_caches_are_in_sync(tmp_path: Path) -> None:
    async with world(tmp_path, start=False) as w:
        await w.service()
        await w.until(lambda: w.part._services and ObjectKey("default", "web") in w.part._services)
        await asyncio.sleep(0.1)
        assert w.kernel.ipvs.applied == []
        assert w.part.fault() == ""
        assert w.part.standing() == Standing(0, 0, False, None)
        with pytest.raises(NoAnswerError):
            await w.ask_services()
        await w.part.synced()
        await w.until(lambda: w.kernel.backends(VIP, 80) == [])


async def test_a_restart_takes_over_what_is_there(tmp_path: Path) -> None:
    kernel = Kernel()
    async with world(tmp_path, kernel=kernel) as w:
        await w.service()
        await w.endpoints("10.244.1.5")
        await w.until(lambda: kernel.backends(VIP, 80) == ["10.244.1.5:8080"])
    kernel.ipvs.applied.clear()
    async with world(tmp_path, kernel=kernel, start=False) as w:
        await w.service()
        await w.endpoints("10.244.1.5")
        await w.until(lambda: w.part.tracker.pending)
        await asyncio.sleep(0.2)
        await w.part.synced()
        await w.until(lambda: w.part.standing().in_sync)
        touched = [op for op in kernel.ipvs.applied if VIP in str(op)]
        assert touched == []
        assert kernel.backends(VIP, 80) == ["10.244.1.5:8080"]


async def test_pod_ranges_and_sources_follow_the_node(tmp_path: Path) -> None:
    pod = names.POD[Family.V4].name

    def ranges(w: World) -> set[object]:
        return set(w.kernel.sets.dump([pod])[pod].members)

    async with world(tmp_path) as w:
        await w.until(lambda: ranges(w) == {parse_prefix("10.244.1.0/24")})
        assert w.part._static.sources == {Family.V4: parse_address("192.0.2.1")}
        w.facts.ranges = (parse_prefix("10.9.0.0/16"),)
        w.part.refresh()
        await w.until(lambda: ranges(w) == {parse_prefix("10.9.0.0/16")})


async def test_pods_of_this_node_outside_of_its_ranges_count_as_its_pods(tmp_path: Path) -> None:
    def members(w: World, family: Family) -> set[object]:
        name = names.POD[family].name
        return set(w.kernel.sets.dump([name])[name].members)

    async def pod(w: World, name: str, *addresses: str, node: str = NODE, **spec: Any) -> None:
        path = "/api/v1/namespaces/default/pods"
        body = {"nodeName": node, "containers": [{"name": "c", "image": "i"}], **spec}
        meta = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
        await w.create(path, {**meta, "spec": body})
        ips = [{"ip": a} for a in addresses]
        status = {"phase": "Running", "podIP": addresses[0], "podIPs": ips}
        await w.api.patch(f"{path}/{name}/status", {"status": status})

    ranges = {parse_prefix("10.244.1.0/24")}
    async with world(tmp_path) as w:
        await w.until(lambda: members(w, Family.V4) == ranges)
        reconciles = w.part.room.status.reconciles
        await pod(w, "host", "192.0.2.1", hostNetwork=True)
        await pod(w, "elsewhere", "10.50.0.8", node="n2")
        await pod(w, "inside", "10.244.1.9")
        await pod(w, "outside", "10.50.0.7", "fd00::7")
        await w.until(lambda: members(w, Family.V6) == {parse_prefix("fd00::7/128")})
        assert members(w, Family.V4) == ranges | {parse_prefix("10.50.0.7/32")}
        assert w.part.standing().in_sync
        # A pod that comes or goes costs its member, not a look at everything.
        assert w.part.room.status.reconciles == reconciles
        assert w.part.room.status.services == 0
        w.part.room.resync()
        await w.until(lambda: w.part.room.status.reconciles > reconciles and w.part.room.in_sync)
        assert w.part.room.status.repaired == ""
        await w.api.delete("/api/v1/namespaces/default/pods/outside", gracePeriodSeconds=0)
        await w.until(lambda: members(w, Family.V4) == ranges and not members(w, Family.V6))


async def test_a_refused_address_is_told_by_an_event_of_its_service(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.service(externalIPs=["192.0.2.1", "198.51.100.7"])
        await w.until(lambda: w.kernel.backends("198.51.100.7", 80) is not None)
        assert w.kernel.backends("192.0.2.1", 80) is None  # the node's own
        (complaint,) = w.part.complaints()
        assert complaint.about[:3] == ("v1", "Service", ObjectKey("default", "web"))
        assert complaint.about.uid
        assert "192.0.2.1" in complaint.message
        assert w.told
        assert w.part.document()["refused_services"].keys() == {"default/web"}
        assert w.part.fault() is None  # no error of this node


async def test_routers_and_gateways_cannot_be_taken(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        addresses = {"bgp_peers": "198.51.100.1", "gateways": "198.51.100.2"}
        w.part.forbid(**{k: [parse_address(a)] for k, a in addresses.items()})
        await w.service(externalIPs=[*addresses.values(), "198.51.100.3"])
        await w.until(lambda: w.kernel.backends("198.51.100.3", 80) is not None)
        assert [w.kernel.backends(a, 80) for a in addresses.values()] == [None, None]
        w.part.forbid(gateways=[])
        await w.until(lambda: w.kernel.backends("198.51.100.2", 80) is not None)


async def test_no_tunnel_leads_to_pods_that_have_no_end_of_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.api.post(
            "/api/v1/namespaces/default/services",
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web", "annotations": {"netpol.io/service.dsr": "tunnel"}},
                "spec": {
                    "clusterIP": VIP,
                    "externalIPs": ["198.51.100.7"],
                    "ports": [{"port": 80}],
                },
            },
        )
        await w.endpoints("10.244.1.5")
        await w.until(lambda: w.kernel.backends("198.51.100.7", 80) == ["10.244.1.5:8080"])
        ops = [op for op in w.kernel.ipvs.applied if isinstance(op, AddReal)]
        assert {op.config.forward for op in ops} == {ForwardMethod.NAT}
        assert [c.reason for c in w.part.complaints()] == ["DirectReturnRefused"]


async def test_what_the_kernel_refuses_is_an_error_of_that_service_alone(tmp_path: Path) -> None:
    kernel = Kernel()
    foreign = ServerId(Family.V4, Protocol.TCP, parse_address(VIP), 80)
    kernel.ipvs.put(VirtualServer(foreign), {})
    async with world(tmp_path, kernel=kernel) as w:
        await w.service()
        await w.service("other", clusterIP="10.96.7.8")
        await w.until(lambda: kernel.backends("10.96.7.8", 80) is not None)
        await w.until(w.part.fault)
        assert "default/web" in (w.part.fault() or "")
        assert any("default/web" in e for e in w.part.errors())
        reasons = {(c.about.key.name, c.reason) for c in w.part.complaints()}
        assert reasons == {("web", "NotApplied")}
        assert w.part.document()["foreign_servers"] == 1
        values = {m.name: m.samples[0].value for m in w.part.metrics()}
        assert values["netpol_proxy_errors"] == 1
        assert values["netpol_proxy_foreign"] == 1


async def test_health_ports_and_healthz_follow_services_and_the_node(tmp_path: Path) -> None:
    port = free_port()
    async with world(tmp_path) as w:
        await w.create(
            "/api/v1/namespaces/default/services",
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web"},
                "spec": {
                    "type": "LoadBalancer",
                    "externalTrafficPolicy": "Local",
                    "healthCheckNodePort": port,
                    "clusterIP": VIP,
                    "ports": [{"port": 80, "targetPort": 8080}],
                },
            },
        )
        await w.endpoints("10.244.1.5", "10.244.1.6")
        await w.until(lambda: w.part.ports.listening)
        await w.until(lambda: w.kernel.backends(VIP, 80))
        reply = await ask(port)
        assert (reply.status, reply.json["localEndpoints"]) == (200, 2)
        health = w.part.endpoint.port
        assert (await ask(health, "/healthz")).status == 200
        taint = [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]
        await w.api.patch(f"/api/v1/nodes/{NODE}", {"spec": {"taints": taint}})
        await w.until(lambda: not w.part.health.eligible)
        assert (await ask(health, "/healthz")).status == 503
        assert (await ask(health, "/livez")).status == 200


async def test_addresses_are_given_and_served(tmp_path: Path) -> None:
    async with world(tmp_path, loadbalancer_pools=("198.51.100.9-198.51.100.9",)) as w:
        await w.service(type="LoadBalancer", loadBalancerClass="netpol.io/loadbalancer")
        await w.endpoints("10.244.1.5")
        await w.until(lambda: w.kernel.backends("198.51.100.9", 80) == ["10.244.1.5:8080"])
        assert w.part.document()["load_balancer"]["leading"]
        await w.service(
            "more",
            clusterIP="10.96.7.9",
            type="LoadBalancer",
            loadBalancerClass="netpol.io/loadbalancer",
        )
        await w.until(lambda: list(w.part.complaints()))
        assert [c.reason for c in w.part.complaints()] == ["PoolExhausted"]


async def test_services_are_shown_as_planned_and_as_the_kernel_has_them(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.service()
        await w.endpoints("10.244.1.5")
        await w.until(lambda: w.kernel.backends(VIP, 80) == ["10.244.1.5:8080"])
        head, *items = await w.ask_services()
        assert head == {"node": NODE, "in_sync": True}
        found = {i["plan"]["service"][1]: i for i in items}
        (server,) = found["web"]["live"]["servers"]
        assert server["present"]
        assert server["address"] == VIP
        (real,) = server["reals"]
        assert real["address"] == "10.244.1.5"
        assert (real["weight"], real["active"], real["draining_s"]) == (1, 0, None)
        _, one = await w.ask_services("default/web")
        assert one["plan"] == found["web"]["plan"]
        with pytest.raises(NoAnswerError, match="no service default/none"):
            await w.ask_services("default/none")


async def test_the_command_line_shows_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ctl(*words: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(main, ["services", "--socket", str(socket), *words])
        return code, *capsys.readouterr()

    socket = tmp_path / "agent.sock"
    async with world(tmp_path) as w:
        admin = AdminServer(str(socket), {"services": w.part.services_op})
        await admin.start()
        await w.service()
        await w.endpoints("10.244.1.5")
        await w.endpoints("10.244.1.6")
        await w.until(lambda: len(w.kernel.backends(VIP, 80) or ()) == 2)
        id_ = ServerId(Family.V4, Protocol.TCP, parse_address(VIP), 80)
        leaving = RealServer(parse_address("10.244.1.6"), 8080)
        w.kernel.ipvs.connect(id_, leaving, active=3)
        slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
        for gone in ("web-10-244-1-5", "web-10-244-1-6"):
            await w.api.delete(f"{slices}/{gone}")
        await w.endpoints("10.244.1.7")
        await w.until(lambda: w.kernel.backends(VIP, 80) == ["10.244.1.7:8080"])
        # The one that was idle goes as soon as that is seen.
        await w.until(lambda: len(w.kernel.ipvs.state[id_].reals) == 2)

        code, out, err = await ctl("web", "-o", "json")
        assert (code, err) == (0, "")
        (row,) = json.loads(out)["services"]
        assert row["backends"] == [
            {
                "address": "10.244.1.7",
                "port": 8080,
                "weight": 1,
                "active": 0,
                "inactive": 0,
                "state": "serving",
            },
            {
                "address": "10.244.1.6",
                "port": 8080,
                "weight": 0,
                "active": 3,
                "inactive": 0,
                "state": "draining",
            },
        ]
        code, out, _ = await ctl()
        assert "on node n1: " in out.splitlines()[0]
        assert "10.244.1.6:8080 (drains, active 3" in out
        assert (await ctl("none"))[0] == 3
        assert (await ctl("--node", "n1"))[0] == 2
        await admin.close()
    assert (await ctl())[0] == 3

    other = AdminServer(str(socket), {})
    await other.start()
    code, _, err = await ctl()
    await other.close()
    assert code == 3
    assert "needed an agent with --proxy" in err


async def test_an_api_server_inside_the_service_ranges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--api-server"):
        async with world(tmp_path, service_ranges=("127.0.0.0/8",)):
            pytest.fail("it must not start")


async def test_many_services_are_planned_in_parts_and_applied_together(tmp_path: Path) -> None:
    kernel = Kernel()
    async with world(tmp_path, kernel=kernel, start=False) as w:
        services = bench_services(5 * PLAN_AT_ONCE)
        for service, piece in services:
            w.part.tracker.service(None, service)
            w.part.tracker.slice(None, piece)
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while not kernel.ipvs.applied:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        await w.part.synced()
        assert turns >= 4  # others had their turns meanwhile
        assert not kernel.ipvs.applied
        await w.until(lambda: w.part.standing().in_sync)
        await turning
        # The first thing that the kernel was told were all of them.
        assert kernel.ipvs.calls["AddServer"] == len(services) == len(kernel.ipvs.state)
        assert w.part.room.status.applies == 1


async def test_a_look_that_many_changes_overtake_finds_no_drift(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        services = bench_services(LOWER_AT_ONCE + 1)
        for service, _ in services:
            w.part.tracker.service(None, service)
        room, plans = w.part.room, w.part.tracker.flush()
        look = asyncio.create_task(room._look())
        room.changed(plans)
        await asyncio.gather(look, room.runner.wait_idle())
        assert room.status.drifts == 0
        assert room.status.services == len(services)
        for service, _ in services:
            w.part.tracker.service(service, None)
        room.changed(w.part.tracker.flush())
        await room.runner.wait_idle()
        assert w.kernel.ipvs.state == {}
