"""The composition root of the agent: settings, connections, caches, parts, and what shows them.

    API server --watches--> stores --> policy part, proxy part --> kernel
                                            |
                              admin socket, health, metrics, Events

It says in which order things start: lock, hold (fresh node), caches in sync, first apply, ready. What a
part is made of stands in its own module.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from netpol import __version__, config
from netpol.admin.health import HealthServer
from netpol.admin.relay import list_handler
from netpol.admin.server import AdminServer, Handler
from netpol.agent.garbage import Collector
from netpol.agent.lacking import refuse_lacking
from netpol.agent.parts import Part
from netpol.agent.policy import PolicyPart
from netpol.agent.report import Report
from netpol.aio.clock import SystemClock
from netpol.aio.tasks import TaskSet
from netpol.config import Settings
from netpol.enforce.node import NodeFacts
from netpol.k8s import informers
from netpol.k8s.api import Api
from netpol.k8s.decode import KINDS
from netpol.k8s.events import Complaint, EventTeller
from netpol.k8s.watching import Selection
from netpol.kernel.drivers import TableDriver, Variant
from netpol.kernel.tables import RestoreTables
from netpol.kernel.variant import detect
from netpol.lib.errors import InputError, NetpolError, NoAnswerError
from netpol.model.ruleset import AddressPort
from netpol.render.options import AnswerLink

if TYPE_CHECKING:
    from netpol.agent.proxy import ProxyPart
    from netpol.agent.routes import RoutesPart
    from netpol.kernel.dsr import PodLink
    from proxy.apply import ServedChange

_log = structlog.get_logger("netpol")

#: The admin operations of each part.
_OPERATIONS = {
    "--policy": ("explain", "drops"),
    "--proxy": ("services",),
    "--routes": ("peers", "routes", "drain"),
}
#: How long the other parts wait for policy's first apply; if that fails, they go on all the same.
POLICY_FIRST_S = 10.0


def run(argv: Sequence[str]) -> int:
    """Parse settings, run until a signal; returns the exit code."""
    args = config.parser().parse_args(argv)
    if args.version:
        print(f"netpol-agent {__version__}")  # noqa: T201
        return 0
    try:
        settings = config.load(args, os.environ)
        if os.geteuid() != 0:
            raise NoAnswerError("netpol-agent", needed="root", got=f"uid {os.geteuid()}")
        _configure_log(settings)
        asyncio.run(_main(settings))
    except NetpolError as e:
        print(f"netpol-agent: {e}", file=sys.stderr)  # noqa: T201
        return e.exit_code
    return 0


def _configure_log(settings: Settings) -> None:
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


async def _main(settings: Settings) -> None:
    agent = Agent(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, agent.reopen_logs)
    try:
        await agent.start()
        await stop.wait()
        _log.info("stopping", rules="stay in force")
    finally:
        await agent.stop()


def _absent(flag: str) -> Handler:
    """The answer to an operation of a part that is off."""

    async def answer(_: dict[str, Any]) -> None:
        raise NoAnswerError("this node's agent cannot answer that", needed=f"an agent with {flag}")

    return answer


def _table_driver(variant: Variant) -> TableDriver:
    """The driver of a variant: legacy tables are small enough to edit in process."""
    restore = RestoreTables(variant)
    if variant is Variant.NFT:
        return restore
    # Only here: the library loads libiptc and libxtables.
    from netpol.kernel.iptc_tables import IptcTables

    return IptcTables(restore)


class Agent:
    """One node's agent."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._clock = SystemClock()
        self._tasks = TaskSet(on_death=self._task_died)
        if settings.xtables_lockfile:
            os.environ["XTABLES_LOCKFILE"] = settings.xtables_lockfile
        self._facts = NodeFacts(settings)
        variant = detect() if settings.iptables == "auto" else Variant(settings.iptables)
        refuse_lacking(settings, variant, rejects=self._facts.options().rejects)
        self.proxy: ProxyPart | None = None
        self.policy = (
            PolicyPart(
                settings,
                facts=self._facts,
                tables=_table_driver(variant),
                clock=self._clock,
                applied=self._applied,
                all_pods=lambda: self.proxy is not None and self.proxy.wants_direct,
                isolation=self._isolation_changed,
            )
            if settings.policy
            else None
        )
        if settings.proxy:
            self.proxy = self._proxy_part(variant)
        self.routes = self._routes_part(variant) if settings.routes else None
        self._api: Api | None = None
        self._watches: informers.InformerSet | None = None
        self._collector = Collector()
        self._events: EventTeller | None = None
        self._health: HealthServer | None = None
        parts: list[Part] = [
            part for part in (self.policy, self.proxy, self.routes) if part is not None
        ]
        self.report = Report(
            node=settings.node,
            clock=self._clock,
            parts=parts,
            facts=self._facts,
            variant=variant,
            watches=lambda: self._watches.status() if self._watches else (),
        )
        self._admin = AdminServer(settings.admin_socket, self._operations())

    def _proxy_part(self, variant: Variant) -> ProxyPart:
        # Only here: without the proxy none of it is loaded.
        from netpol.agent.proxy import ProxyPart
        from netpol.agent.proxy_node import (
            kernel_drivers,
            missing_for_direct_return,
            pod_tunnels,
        )

        policy = self.policy
        lacks = missing_for_direct_return(variant, judged=policy is not None)
        return ProxyPart(
            self.settings,
            drivers=kernel_drivers(variant, mark_mask=self.settings.service_mask),
            facts=self._facts,
            clock=self._clock,
            applied=self._applied,
            served=self._ipvs_serves,
            told=self._tell,
            tunnels=pod_tunnels(self.settings),
            no_direct_return=lacks,
            hidden=policy.hidden if policy is not None else lambda _: None,
            answers=self._answers,
        )

    def _ipvs_serves(self, services: ServedChange | None) -> None:
        """The proxy changed what IPVS serves: INPUT must let it through to OUTPUT's judgement."""
        if self._facts.ipvs_serves(services) and self.policy is not None:
            self.policy.room.serve()

    def _isolation_changed(self) -> None:
        """Pods or policies changed."""
        if self.proxy is not None:
            self.proxy.recheck_direct()

    def _answers(
        self, ports: Iterable[AddressPort], links: Iterable[tuple[bytes, PodLink]]
    ) -> None:
        """Pods of this node answer with Services' addresses, and policy must know where."""
        where = [AnswerLink(vip, link.name, link.port) for vip, link in links]
        if self._facts.answer_from(ports, where) and self.policy is not None:
            self.policy.room.resync()

    def _routes_part(self, variant: Variant) -> RoutesPart:
        # Only here: without routes none of it is loaded.
        from netpol.agent.routes import RoutesPart

        return RoutesPart(
            self.settings,
            variant=variant,
            clock=self._clock,
            cni_written=self._facts.hasten,
            peers_read=self._forbid_peers,
        )

    def _forbid_peers(self, peers: Iterable[bytes]) -> None:
        """No Service takes the address of a router that nodes speak BGP with."""
        if self.proxy is not None:
            self.proxy.forbid(bgp_peers=peers)

    def _operations(self) -> dict[str, Handler]:
        found: dict[str, Handler] = {
            "status": self.report.status_op,
            "list": list_handler(lambda: self._api),
        }
        found |= {name: _absent(flag) for flag, names in _OPERATIONS.items() for name in names}
        if self.policy is not None:
            found |= {"explain": self.policy.explain_op, "drops": self.policy.drops_op}
        if self.proxy is not None:
            found |= {"services": self.proxy.services_op}
        if self.routes is not None:
            found |= {
                "peers": self.routes.peers_op,
                "routes": self.routes.routes_op,
                "drain": self.routes.drain_op,
            }
        return found

    def _applied(self) -> None:
        """Something was applied."""
        if all(part.standing().applied_at_s is not None for part in self.report.parts):
            self._collector.started()
        if self.policy is not None:
            self.policy.need_peers()
        self._tell()

    def _tell(self) -> None:
        """There may be something new to tell users."""
        if self._events is not None:
            self._events.look()

    def _complaints(self) -> Iterator[Complaint]:
        for part in self.report.parts:
            yield from part.complaints()

    # -- start and stop ---------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything in order; returns once the first apply is under way."""
        self._collector.rest()
        await self._admin.start()  # first: a second agent of the node ends here
        if self.proxy is not None:
            await self.proxy.refuse_another()
        if self.routes is not None:
            await self.routes.prepare()
        self._facts.prepare()
        if self.settings.health_addr:
            self._health = HealthServer(
                alive=self.report.alive, ready=self.report.ready, metrics=self.report.metrics
            )
            host, _, port = self.settings.health_addr.rpartition(":")
            await self._health.start(host.strip("[]"), int(port))
        _log.info(
            "starting",
            version=__version__,
            node=self.settings.node,
            rooms=[part.name for part in self.report.parts],
            **self._facts.describe(),
        )
        if self.policy is not None:
            await self.policy.hold()
        self._api = api = await self._connect()
        if self.proxy is not None:
            await self.proxy.listen(api)
        self._watches = watches = informers.InformerSet(api, on_death=self._task_died)
        self._events = teller = EventTeller(api, node=self.settings.node, find=self._complaints)
        self._tasks.spawn("events", teller.run())
        self._tasks.spawn("addresses", self._facts.watch(self._node_changed))
        if self.policy is not None:
            self.policy.start(api, watches, self._tasks)
        if self.proxy is not None:
            self.proxy.start(api, watches, self._tasks)
        if self.routes is not None:
            self.routes.start(watches, self._tasks)
        self._tasks.spawn("start", self._sync_then_run())

    def _node_changed(self) -> None:
        """An own address, the CNI configuration or a sysctl of the node changed."""
        if self.policy is not None:
            self.policy.room.resync()
        if self.proxy is not None:
            self.proxy.refresh()
        if self.routes is not None:
            self.routes.room.changed()

    async def _connect(self) -> Api:
        s = self.settings
        if s.api_server:
            return Api.for_server(
                s.api_server,
                token_file=Path(s.token_file) if s.token_file else None,
                ca_file=Path(s.ca_file) if s.ca_file else None,
                clock=self._clock,
            )
        if s.kubeconfig:
            return await Api.from_kubeconfig(Path(s.kubeconfig))
        return Api.in_cluster(clock=self._clock)

    async def _sync_then_run(self) -> None:
        """The barrier: all watches that the parts need, then the first apply; then mind the peers."""
        watches = self._watches
        if watches is None:
            raise InputError("the agent was not started")
        await watches.wait_synced()
        if self.policy is not None:
            await self.policy.synced()
            # Policy's rules come first in every hook, and are in force before anything leads here.
            if len(self.report.parts) > 1:
                await self.policy.first_apply(at_most_s=POLICY_FIRST_S)
        if self.proxy is not None:
            await self.proxy.synced()
        if self.routes is not None:
            self.routes.synced()
        if watches.get(KINDS["Node"].plural) is None:
            # For the names in the audit log; policy does not wait for it.
            own = Selection(fields=(f"metadata.name={self.settings.node}",))
            watches.start(KINDS["Node"], selection=own)
        _log.info("caches in sync", watches=[w.name for w in watches.status()])
        if self.policy is None:
            await asyncio.Event().wait()
        else:
            await self.policy.mind_peers()

    def reopen_logs(self) -> None:
        """Open the audit log anew, after a rotation (SIGHUP)."""
        if self.policy is not None:
            self.policy.reopen_logs()

    async def stop(self) -> None:
        """End tasks and connections; what is in the kernel stays as it is."""
        self._collector.started()
        await self._tasks.cancel()
        if self._watches is not None:
            await self._watches.close()
        if self.proxy is not None:
            await self.proxy.stop()
        if self.routes is not None:
            await self.routes.stop()
        if self._api is not None:
            await self._api.close()
        if self._health is not None:
            await self._health.stop()
        await self._admin.close()
        self._facts.close()
        if self.policy is not None:
            self.policy.close()

    def _task_died(self, name: str, error: BaseException | None) -> None:
        self.report.fatal = f"task {name} died: {error}"
