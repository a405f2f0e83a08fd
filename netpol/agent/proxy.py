"""The agent's proxy part: what feeds the Tracker and the room, and what shows them.

    Services, EndpointSlices, Nodes --Tracker--> plans --ProxyRoom--> kernel
                                                  |
                         health ports, Events, netpol-ctl services, LoadBalancer addresses

Drivers are parameters, so that all of it runs on fakes; nothing here decides what a Service means.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.core import Metric

from netpol.agent import proxy_node, proxy_view
from netpol.agent.balancer import make_balancer
from netpol.agent.direct import Answers, DirectReturn, Tunnels
from netpol.agent.parts import Standing
from netpol.agent.surroundings import NodeView, Surroundings
from netpol.aio.clock import Clock
from netpol.aio.tasks import TaskSet
from netpol.config import Settings
from netpol.k8s.api import Api
from netpol.k8s.cache import Change, Store
from netpol.k8s.decode import KINDS
from netpol.k8s.events import Complaint
from netpol.k8s.informers import LOCAL_PODS, InformerSet, pods_on
from netpol.kernel.kept_sysctls import FILE as SYSCTLS_FILE
from netpol.kernel.kept_sysctls import KeptSysctls, service_sysctls
from netpol.model.ids import ObjectKey
from netpol.model.objects import Endpoint, EndpointSlice, Node, Service
from proxy.apply import Drivers, ServedChange
from proxy.changes import Tracker
from proxy.health import HealthEndpoint, HealthPorts, ProxyHealth
from proxy.lbcontroller import LoadBalancerController
from proxy.ledger_file import LedgerFile
from proxy.plan import Hidden
from proxy.rows import ServicePlan
from proxy.status import SyncOptions
from proxy.sync import ProxyRoom

_log = structlog.get_logger("netpol")

#: The ledger's name in the run folder.
LEDGER_FILE = "ipvs.ledger"
#: Services that are planned in one turn of the loop: some milliseconds.
PLAN_AT_ONCE = 100


class ProxyPart:
    """Services on one node.

    Args:
        applied: told after every apply.
        served: told what IPVS serves otherwise, None where that must be looked at.
        told: there may be something new to tell by Events.
        tunnels: makes the ends of direct server return in pods; without it there is none.
        no_direct_return: why there is none, in words.
        hidden: says why such a tunnel must not lead to a pod.
        answers: told where answers of a Service's address may come in.
    """

    name = "proxy"

    def __init__(
        self,
        settings: Settings,
        *,
        drivers: Drivers,
        facts: NodeView,
        clock: Clock,
        applied: Callable[[], None],
        told: Callable[[], None],
        served: Callable[[ServedChange | None], None] = lambda _: None,
        sysctls: Callable[[], list[str]] | None = None,
        tunnels: Tunnels | None = None,
        no_direct_return: str = "",
        hidden: Hidden = lambda _: None,
        answers: Answers = lambda _ports, _links: None,
    ) -> None:
        self._settings, self._clock = settings, clock
        self.node = settings.node
        self._tell_applied, self._told = applied, told
        run_dir = Path(settings.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._nodes: Store[Node] | None = None
        self._services: Store[Service] | None = None
        self._tasks: TaskSet | None = None
        self._pods: Store[Endpoint] | None = None
        no_direct = no_direct_return or ("" if tunnels else "this agent makes no tunnels")
        self._around = Surroundings(settings, facts, self._own_node, no_direct_return=no_direct)
        self._static = self._around.static()
        self.direct = (
            DirectReturn(tunnels, answers=answers, told=told) if tunnels is not None else None
        )
        self.tracker = Tracker(settings.node, self._around.options(), hidden=hidden)
        kept = KeptSysctls(service_sysctls(), run_dir / SYSCTLS_FILE)
        if sysctls is None:
            kept.remember()  # now: policy keeps some of them, too
        self.room = ProxyRoom(
            drivers,
            ledger=LedgerFile(run_dir / LEDGER_FILE),
            static=lambda: self._static,
            options=SyncOptions(
                mark_mask=settings.service_mask,
                drain_s=settings.drain_seconds,
                tcp_s=settings.ipvs_tcp_timeout,
                tcp_fin_s=settings.ipvs_tcp_fin_timeout,
                udp_s=settings.ipvs_udp_timeout,
            ),
            sysctls=sysctls or kept.keep,
            clock=clock,
            applied=self._applied,
            served=served,
        )
        self.health = ProxyHealth(clock=clock)
        self.ports = HealthPorts(
            healthy=self.health.healthy, told=lambda _key, _why: told(), clock=clock
        )
        self.endpoint = HealthEndpoint(self.health)
        self.balancer: LoadBalancerController | None = None
        self.refused: dict[ObjectKey, ServicePlan] = {}
        self.in_sync = self._flush_asked = False

    # -- start and stop ---------------------------------------------------------------------

    @staticmethod
    async def refuse_another() -> None:
        """Make sure that no other proxy serves this node.

        Raises:
            NoAnswerError: one does.
        """
        await proxy_node.refuse_another_proxy()

    async def listen(self, api: Api) -> None:
        """Make sure that the API server can be reached without a proxy, and answer load balancers.

        Raises:
            InputError: it cannot, or the address of --proxy-health-addr cannot be had.
        """
        self.forbid(api_servers=await proxy_node.server_addresses(self._settings, api.url))
        if self._settings.proxy_health_addr:
            await self.endpoint.start(self._settings.proxy_health_addr)

    def start(self, api: Api, watches: InformerSet, tasks: TaskSet) -> None:
        """Start the watches and all that runs for ever; `synced` goes on from there."""
        services = watches.start(KINDS["Service"])
        services.store.subscribe(self._service)
        slices = watches.start(KINDS["EndpointSlice"])
        slices.store.subscribe(self._slice)
        nodes = watches.start(KINDS["Node"])
        nodes.store.subscribe(self._node)
        pods = watches.share(KINDS["Pod"], name=LOCAL_PODS, selection=pods_on(self._settings.node))
        pods.store.subscribe(self._pod)
        self._services, self._nodes, self._pods = services.store, nodes.store, pods.store
        self._tasks = tasks
        tasks.spawn("proxy room", self.room.run_forever())
        tasks.spawn("health ports", self.ports.run_forever())
        tasks.spawn("gateways", proxy_node.watch_gateways(lambda g: self.forbid(gateways=g)))
        if self._settings.loadbalancer_pools:
            self.balancer = balancer = make_balancer(
                self._settings,
                api,
                services.store,
                machines=self._machines,
                told=self._told,
                clock=self._clock,
            )
            services.store.subscribe(balancer.changed)
            tasks.spawn("load balancer addresses", balancer.run_forever())

    def _machines(self) -> frozenset[bytes]:
        """Addresses of nodes, routers and API servers, as far as they are known."""
        nodes = (a for node in self._nodes or () for a in node.addresses)
        return self._around.forbidden.union(nodes)

    async def synced(self) -> None:
        """The caches are in sync: the first apply begins."""
        self.in_sync = self._flush_asked = True
        self._refresh_node()
        while self.tracker.plan_some(PLAN_AT_ONCE):
            await self._clock.sleep(0)
        # Not before all that is there is planned: the room would take down the rest.
        self._flush()
        self.room.start()
        if self.direct is not None and self._tasks is not None:
            self._tasks.spawn("direct server return", self.direct.run_forever())

    async def stop(self) -> None:
        """Stop answering; what is in the kernel stays. Tasks are ended by who started them."""
        await self.endpoint.stop()
        self.room.close()

    # -- from objects to plans --------------------------------------------------------------

    def _service(self, change: Change[Service]) -> None:
        self.tracker.service(change.before, change.after)
        self._ask_flush()

    def _slice(self, change: Change[EndpointSlice]) -> None:
        self.tracker.slice(change.before, change.after)
        self._ask_flush()

    def _node(self, change: Change[Node]) -> None:
        self.tracker.node(change.before, change.after)
        if change.key.name == self._settings.node:
            self._refresh_node()
        self._ask_flush()

    def _pod(self, change: Change[Endpoint]) -> None:
        if _addresses(change.before) != _addresses(change.after):
            self._tell_pods()

    def _tell_pods(self) -> None:
        """Where a CNI gives pods addresses from elsewhere (Calico, ENI), ranges do not say whose they are."""
        ranges, pods = self._around.pod_ranges(), self._pods or ()
        own = {a for pod in pods for a in _addresses(pod)}
        self.room.pods(frozenset(a for a in own if not any(r.contains(a) for r in ranges)))

    def _refresh_node(self) -> None:
        node = self._own_node()
        if self.in_sync:
            self.health.eligible = node is not None and not node.leaving
        self.refresh()

    def refresh(self) -> None:
        """Something is otherwise on the node: its addresses, its pod ranges, who must not be taken."""
        self.tracker.set_options(self._around.options())
        static = self._around.static()
        if static != self._static:
            self._static = static
            self.room.resync()
        self._tell_pods()
        self.ports.listen_on(self._around.health_hosts())
        self._ask_flush()

    def forbid(
        self,
        *,
        api_servers: Iterable[bytes] | None = None,
        gateways: Iterable[bytes] | None = None,
        bgp_peers: Iterable[bytes] | None = None,
    ) -> None:
        """Learn of addresses that no Service may take."""
        if self._around.forbid(api_servers=api_servers, gateways=gateways, bgp_peers=bgp_peers):
            self.refresh()

    def _own_node(self) -> Node | None:
        key = ObjectKey("", self._settings.node)
        return self._nodes.get(key) if self._nodes is not None else None

    @property
    def wants_direct(self) -> bool:
        """Whether a Service wants direct server return."""
        return self.direct is not None and self.tracker.wants_direct

    def recheck_direct(self) -> None:
        """Pods or policies are otherwise: tunnels may have to lead elsewhere."""
        if self.wants_direct:
            self.tracker.recheck_direct()
            self._ask_flush()

    def _ask_flush(self) -> None:
        """Plan soon: what comes in one turn of the loop is planned together."""
        if self.in_sync and not self._flush_asked:
            self._flush_asked = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Plan what must be: much of it a part a turn of the loop, and applied together."""
        loop = asyncio.get_running_loop()
        if self.tracker.plan_some(PLAN_AT_ONCE):
            loop.call_soon(self._flush)
            return
        self._flush_asked = False
        plans = self.tracker.flush()
        if not plans:
            return
        self.health.queued()
        self.room.changed(plans)
        if self.direct is not None:
            self.direct.changed(plans)
        for key, plan in plans.items():
            self._heed(key, plan)
        self._told()

    def _heed(self, key: ObjectKey, plan: ServicePlan | None) -> None:
        """What a plan means beside the kernel."""
        port, ready = (plan.health_port, plan.local_ready) if plan is not None else (0, 0)
        self.ports.update(key, port=port, local_ready=ready)
        if plan is not None and plan.refused:
            self.refused[key] = plan
        else:
            self.refused.pop(key, None)

    def _applied(self) -> None:
        # However fast changes come: only one that waits makes the proxy unhealthy.
        self.health.updated(self.room.waiting_since_s)
        self._tell_applied()

    # -- what it shows ----------------------------------------------------------------------

    def standing(self) -> Standing:
        """See Part."""
        status = self.room.status
        in_sync = self.room.in_sync and not self.tracker.pending
        return Standing(
            self.room.generation, status.applied_generation, in_sync, status.applied_at_s
        )

    def fault(self) -> str | None:
        """See Part."""
        return proxy_view.fault(self)

    def errors(self) -> list[str]:
        """See Part."""
        return proxy_view.errors(self)

    def complaints(self) -> Iterator[Complaint]:
        """See Part."""
        return proxy_view.complaints(self)

    def uid_of(self, key: ObjectKey) -> str:
        """A Service's uid, or ""."""
        service = self._services.get(key) if self._services is not None else None
        return service.uid if service is not None else ""

    def document(self) -> dict[str, Any]:
        """See Part."""
        return proxy_view.document(self)

    def metrics(self) -> Iterable[Metric]:
        """See Part."""
        return proxy_view.metrics(self)

    # -- what it answers --------------------------------------------------------------------

    def services_op(self, args: dict[str, Any]) -> AsyncIterator[Any]:
        """Answer `services`; see proxy_view."""
        return proxy_view.services(self, args)


def _addresses(pod: Endpoint | None) -> tuple[bytes, ...]:
    """Those that are a pod's own."""
    return pod.addresses if pod is not None and pod.policed else ()
