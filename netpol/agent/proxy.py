"""The agent's proxy part: what feeds the Tracker and the room, and what shows them.

    Services, EndpointSlices, Nodes --Tracker--> plans --ProxyRoom--> kernel
                                                  |
                         health ports, Events, netpol-ctl services, LoadBalancer addresses

Drivers are parameters, so that all of it runs on fakes; nothing here decides what a Service means.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import structlog
from prometheus_client.core import Metric

from netpol.agent import proxy_node, proxy_view
from netpol.agent.direct import Answers, DirectReturn, Tunnels
from netpol.agent.parts import Standing
from netpol.aio.clock import Clock
from netpol.aio.tasks import TaskSet
from netpol.config import Settings
from netpol.k8s.api import Api
from netpol.k8s.cache import Change, Store
from netpol.k8s.decode import KINDS
from netpol.k8s.events import Complaint, Subject
from netpol.k8s.informers import LOCAL_PODS, InformerSet, pods_on
from netpol.k8s.lease import Elector
from netpol.kernel.kept_sysctls import FILE as SYSCTLS_FILE
from netpol.kernel.kept_sysctls import KeptSysctls, service_sysctls
from netpol.model.ids import ObjectKey, SetName
from netpol.model.net import FAMILIES, Family, Prefix, family_of, format_address, parse_prefix
from netpol.model.objects import Endpoint, EndpointSlice, Node, Service
from netpol.model.pools import parse_range
from netpol.model.ruleset import Members
from proxy import names, rules
from proxy.apply import Drivers
from proxy.changes import Tracker
from proxy.health import HealthEndpoint, HealthPorts, ProxyHealth
from proxy.lbcontroller import LEASE_NAME, LEASE_NAMESPACE, LoadBalancerController
from proxy.ledger_file import LedgerFile
from proxy.plan import Hidden, ProxyOptions
from proxy.rows import ServicePlan
from proxy.status import SyncOptions
from proxy.sync import ProxyRoom
from proxy.work import Static

_log = structlog.get_logger("netpol")

#: The ledger's name in the run folder.
LEDGER_FILE = "ipvs.ledger"


class NodeView(Protocol):
    """What must be known of the node itself."""

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """Its own addresses, those of Services left out."""
        ...

    def pod_ranges(self) -> tuple[Prefix, ...]:
        """Ranges of its pods, as far as it tells itself."""
        ...


class ProxyPart:
    """Services on one node.

    Args:
        applied: told after every apply.
        served: told when IPVS may serve something else.
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
        served: Callable[[], None] = lambda: None,
        sysctls: Callable[[], list[str]] | None = None,
        tunnels: Tunnels | None = None,
        no_direct_return: str = "",
        hidden: Hidden = lambda _: None,
        answers: Answers = lambda _ports, _links: None,
    ) -> None:
        self._settings, self._facts, self._clock = settings, facts, clock
        self.node = settings.node
        self._tell_applied, self._tell_served, self._told = applied, served, told
        run_dir = Path(settings.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._rulesets = rules.rulesets(rules.RuleOptions(settings.service_mask))
        self._forbidden: dict[str, tuple[bytes, ...]] = {
            "api_servers": (),
            "gateways": (),
            "bgp_peers": (),
        }
        self._nodes: Store[Node] | None = None
        self._services: Store[Service] | None = None
        self._tasks: TaskSet | None = None
        self._pods: Store[Endpoint] | None = None
        self._static = self._static_now()
        self._no_direct = no_direct_return or ("" if tunnels else "this agent makes no tunnels")
        self.direct = (
            DirectReturn(tunnels, answers=answers, told=told) if tunnels is not None else None
        )
        self.tracker = Tracker(settings.node, self._options(), hidden=hidden)
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
            self.balancer = balancer = self._balancer(api, services.store)
            services.store.subscribe(balancer.changed)
            tasks.spawn("load balancer addresses", balancer.run_forever())

    def _balancer(self, api: Api, store: Store[Service]) -> LoadBalancerController:
        s = self._settings

        def elector(changed: Callable[[bool], None]) -> Elector:
            return Elector(
                api,
                namespace=LEASE_NAMESPACE,
                name=LEASE_NAME,
                # A process that is started again is another contender: the old one may still write.
                identity=f"{s.node}_{uuid.uuid4()}",
                changed=changed,
                clock=self._clock,
            )

        return LoadBalancerController(
            api,
            store,
            pools=[parse_range(p) for p in s.loadbalancer_pools],
            load_balancer_class=s.loadbalancer_class,
            default_class=s.loadbalancer_default_class,
            elector=elector,
            told=self._told,
            clock=self._clock,
        )

    async def synced(self) -> None:
        """The caches are in sync: the first apply begins."""
        self.in_sync = True
        self._refresh_node()
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
        ranges, pods = self._pod_ranges(), self._pods or ()
        own = {a for pod in pods for a in _addresses(pod)}
        self.room.pods(frozenset(a for a in own if not any(r.contains(a) for r in ranges)))

    def _refresh_node(self) -> None:
        node = self._own_node()
        if self.in_sync:
            self.health.eligible = node is not None and not node.leaving
        self.refresh()

    def refresh(self) -> None:
        """Something is otherwise on the node: its addresses, its pod ranges, who must not be taken."""
        self.tracker.set_options(self._options())
        static = self._static_now()
        if static != self._static:
            self._static = static
            self.room.resync()
        self._tell_pods()
        self.ports.listen_on(self._health_hosts())
        self._ask_flush()

    def forbid(
        self,
        *,
        api_servers: Iterable[bytes] | None = None,
        gateways: Iterable[bytes] | None = None,
        bgp_peers: Iterable[bytes] | None = None,
    ) -> None:
        """Learn of addresses that no Service may take."""
        new = {"api_servers": api_servers, "gateways": gateways, "bgp_peers": bgp_peers}
        found = {name: tuple(sorted(given)) for name, given in new.items() if given is not None}
        if found.items() <= self._forbidden.items():
            return
        self._forbidden |= found
        self.refresh()

    def _own_node(self) -> Node | None:
        key = ObjectKey("", self._settings.node)
        return self._nodes.get(key) if self._nodes is not None else None

    def _options(self) -> ProxyOptions:
        s = self._settings
        return ProxyOptions(
            scheduler=s.ipvs_scheduler,
            nodeport_cidrs=_prefixes(s.nodeport_addresses),
            external_cidrs=_prefixes(s.external_ip_cidr),
            no_direct_return=self._no_direct,
            balancer_pools=tuple(parse_range(p) for p in s.loadbalancer_pools),
            node_addresses=self._facts.addresses,
            service_ranges=_prefixes(s.service_ranges),
            pod_ranges=self._pod_ranges(),
            api_servers=self._forbidden["api_servers"],
            gateways=self._forbidden["gateways"],
            bgp_peers=self._forbidden["bgp_peers"],
        )

    def _pod_ranges(self) -> tuple[Prefix, ...]:
        known, node = self._facts.pod_ranges(), self._own_node()
        return known or (node.pod_cidrs if node is not None else ())

    def _static_now(self) -> Static:
        ranges, node, own = self._pod_ranges(), self._own_node(), self._facts.addresses
        listed = node.addresses if node is not None else ()
        sources: dict[Family, bytes] = {}
        for family in FAMILIES:
            # What the cluster knows the node by comes first, if it stands on the machine.
            choice = [a for a in listed if a in own] or [
                a for a in own if not any(r.contains(a) for r in ranges)
            ]
            found = next((a for a in choice if family_of(a) is family), None)
            if found is not None:
                sources[family] = found
        members: dict[SetName, Members] = {
            names.POD[f].name: {r: None for r in ranges if r.family is f} for f in FAMILIES
        }
        return Static(rulesets=self._rulesets, members=members, sources=sources)

    def _health_hosts(self) -> tuple[str, ...]:
        """Health ports are served on the addresses that NodePorts are."""
        cidrs = _prefixes(self._settings.nodeport_addresses)
        if not cidrs:
            return ()
        own = [a for a in self._facts.addresses if any(c.contains(a) for c in cidrs)]
        return tuple(map(format_address, own)) or ("127.0.0.1",)

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
        if self.room.in_sync:
            self.health.updated()
        self._tell_served()
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
        status = self.room.status
        if status.error:
            return status.error
        if status.applied_at_s is None:
            return ""
        for key, why in self.room.errors.items():
            more = len(self.room.errors) - 1
            others = f" (and {more} more)" if more else ""
            return f"Service {key}: {'; '.join(why)}{others}"
        return None

    def errors(self) -> list[str]:
        """See Part."""
        status = self.room.status
        out = [f"proxy: {status.error}"] if status.error else []
        out += [f"proxy: {fault}" for fault in status.faults]
        for key, why in sorted(self.room.errors.items()):
            what = f"Service {key}" if key.name else "what no Service wants any more"
            out += [f"{what}: {reason}" for reason in why]
        if self.direct is not None:
            out += [f"proxy: {self.direct.error}"] if self.direct.error else []
            out += [f"Service {k}: {why}" for k, v in self.direct.faults.items() for why in v]
        return out + [f"Service {key}: {why}" for key, why in sorted(self.ports.faults.items())]

    def complaints(self) -> Iterator[Complaint]:
        """See Part."""
        for key, plan in sorted(self.refused.items()):
            for refused in plan.refused:
                about = self._subject(key, plan.uid)
                yield Complaint(about, refused.reason, refused.message, of_node=False)
        node = self._settings.node
        for key, why in sorted(self.room.errors.items()):
            if key.name:
                text = f"not served as written on node {node}: {'; '.join(why)}"
                yield Complaint(self._subject(key), "NotApplied", text)
        for key, why in sorted(self.direct.faults.items() if self.direct else ()):
            text = f"on node {node}: {'; '.join(why)}"
            yield Complaint(self._subject(key), "DirectReturn", text)
        for key, fault in sorted(self.ports.faults.items()):
            yield Complaint(self._subject(key), "HealthPort", f"on node {node}: {fault}")
        for key, faults in sorted(self.balancer.faults.items() if self.balancer else ()):
            for refused in faults:
                about = self._subject(key)
                yield Complaint(about, refused.reason, refused.message, of_node=False)

    def _subject(self, key: ObjectKey, uid: str = "") -> Subject:
        service = self._services.get(key) if self._services is not None else None
        return Subject("v1", "Service", key, uid or (service.uid if service else ""))

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


def _prefixes(texts: Iterable[str]) -> tuple[Prefix, ...]:
    return tuple(parse_prefix(t) for t in texts)
