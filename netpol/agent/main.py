"""The composition root of the agent: settings, connections, caches, rooms, and what shows them.

    API server --watches--> stores --Feed--> Graph --PolicyRoom--> kernel
                                                 |         |
                              admin socket, health, metrics, audit log

Nothing here decides anything about policy; it says who is told what, and in which order things start:
lock, hold (fresh node), caches in sync, first apply, ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog

from netpol import __version__, config
from netpol.admin.health import HealthServer
from netpol.admin.relay import list_handler
from netpol.admin.server import AdminServer
from netpol.agent.report import Report
from netpol.aio.clock import SystemClock
from netpol.aio.tasks import TaskSet
from netpol.audit.attribute import Attributor
from netpol.audit.sink import LineSink
from netpol.audit.worker import AuditWorker
from netpol.config import Settings
from netpol.enforce.events import Complaint, EventTeller, complaints
from netpol.enforce.feed import Feed
from netpol.enforce.node import NodeFacts
from netpol.enforce.view import WorldView
from netpol.enforce.whois import PodResolver
from netpol.enforce.worker import PolicyRoom
from netpol.k8s import informers
from netpol.k8s.api import Api
from netpol.k8s.decode import KINDS
from netpol.k8s.watching import Selection
from netpol.kernel.drivers import TableDriver, Variant
from netpol.kernel.nflog import NflogReader, interface_name
from netpol.kernel.probe import missing_features
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.kernel.variant import detect
from netpol.lib.errors import InputError, KernelMissingError, NetpolError, NoAnswerError
from netpol.model.ids import ObjectKey
from netpol.model.objects import Endpoint
from netpol.policy.graph import Graph

_log = structlog.get_logger("netpol")

#: The watch of the cluster's pods stays this long after the last policy that needs it went.
PEERS_LINGER_S = 60.0
_CLUSTER_PODS = "cluster pods"
_LOCAL_PODS = "local pods"


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
        self.graph = Graph(settings.node)
        if settings.xtables_lockfile:
            os.environ["XTABLES_LOCKFILE"] = settings.xtables_lockfile
        self._facts = NodeFacts(settings)
        self._sets = NetlinkSets(mark_mask=settings.field_mask)
        variant = detect() if settings.iptables == "auto" else Variant(settings.iptables)
        missing = missing_features(variant)
        if missing:
            raise KernelMissingError("this machine", needed="; ".join(missing))
        self._tables = _table_driver(variant)
        self.room = PolicyRoom(
            self.graph,
            sets=self._sets,
            tables=self._tables,
            options=self._facts.options(),
            clock=self._clock,
            before_reconcile=self._facts.options,
            applied=self._applied,
        )
        self.feed = Feed(self.graph, self.room.changed, cluster=self._cluster_pod)
        self._api: Api | None = None
        self._watches: informers.InformerSet | None = None
        self._peers_since_s = 0.0
        self._peers_wake = asyncio.Event()
        self._frozen = False
        self._events: EventTeller | None = None
        self._resolved = 0
        self._resolver = PodResolver(
            lambda: self._api, clock=self._clock, changed=self._address_resolved
        )
        self._view = WorldView(
            namespaces=lambda: self._objects("namespaces"),
            pods=lambda: [
                *self._resolver.pods(),
                *self._objects(_CLUSTER_PODS),
                *self._objects(_LOCAL_PODS),
            ],
            policies=self.feed.compiled.values,
            nodes=lambda: self._objects("nodes"),
            generation=lambda: self.room.generation + self._resolved,
            clock=self._clock,
            unknown=self._unknown,
        )
        self._nflog: NflogReader | None = None
        self._sink: LineSink | None = None
        self._health: HealthServer | None = None
        self.report = Report(
            node=settings.node,
            clock=self._clock,
            room=self.room,
            feed=self.feed,
            facts=self._facts,
            sets=self._sets,
            tables=self._tables,
            watches=lambda: self._watches.status() if self._watches else (),
            lacks_peers=self._lacks_peers,
        )
        self._admin = AdminServer(
            settings.admin_socket,
            {
                "status": self.report.status_op,
                "explain": self.report.explain_op,
                "drops": self.report.drops_op,
                "list": list_handler(lambda: self._api),
            },
        )

    def _applied(self) -> None:
        """Something was applied: whether the cluster's pods are needed may have changed."""
        if not self._frozen:
            # What was loaded at start stays for good; looking at it took 50 ms of a full collection.
            self._frozen = True
            gc.collect()
            gc.freeze()
        self._peers_wake.set()
        if self._events is not None:
            self._events.look()

    def _address_resolved(self) -> None:
        """The audit log knows one pod more."""
        self._resolved += 1
        self._view.expire()

    def _unknown(self, address: bytes) -> None:
        """Somebody unknown was denied; with all pods watched there is nobody to ask for."""
        if self._watches is not None and self._watches.get(_CLUSTER_PODS) is None:
            self._resolver.ask(address)

    def _complaints(self) -> Iterator[Complaint]:
        """What is wrong with policies that this node needs: invalid parts, and the kernel's refusals."""
        active = {i.key for i in self.graph.active_policies}
        return complaints(
            {k: p for k, p in self.feed.problems.items() if k in active},
            self.room.dataplane.refusals.reasons(),
            uid_of=lambda key: p.uid if (p := self.feed.compiled.get(key)) else "",
            node=self.settings.node,
        )

    def _cluster_pod(self, key: ObjectKey) -> Endpoint | None:
        informer = self._watches.get(_CLUSTER_PODS) if self._watches else None
        pod: Endpoint | None = informer.store.get(key) if informer is not None else None
        return pod

    def _objects(self, watch: str) -> list[Any]:
        informer = self._watches.get(watch) if self._watches else None
        return list(informer.store) if informer is not None else []

    # -- start and stop ---------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything in order; returns once the first apply is under way."""
        await self._admin.start()  # first: a second agent of the node ends here
        self._facts.prepare()
        if self.settings.health_addr:
            self._health = HealthServer(
                alive=self.report.alive, ready=self.report.ready, metrics=self.report.metrics
            )
            host, _, port = self.settings.health_addr.rpartition(":")
            await self._health.start(host.strip("[]"), int(port))
        _log.info(
            "starting", version=__version__, node=self.settings.node, **self._facts.describe()
        )
        await self.room.check_mask()
        if not self._facts.has_pods() and await self.room.hold():
            _log.info("fresh node", hold=[str(r) for r in self._facts.options().hold_ranges])
        self._api = await self._connect()
        self._watches = informers.InformerSet(self._api, on_death=self._task_died)
        self._events = teller = EventTeller(
            self._api, node=self.settings.node, find=self._complaints
        )
        self._tasks.spawn("events", teller.run())
        self._tasks.spawn("policy room", self.room.run_forever())
        self._tasks.spawn("start", self._sync_then_run())
        self._tasks.spawn("addresses", self._facts.watch(self.room.resync))
        self._tasks.spawn("ipvs", self._facts.watch_ipvs(self.room.serve))
        self._start_audit()

    def _start_audit(self) -> None:
        """The log of denied packets; without it policy works all the same."""
        if not self.settings.audit_log:
            return
        path = None if self.settings.audit_log == "-" else Path(self.settings.audit_log)
        try:
            self._nflog = nflog = NflogReader(self.settings.nflog_group)
            self._sink = LineSink(path)
        except (NetpolError, OSError) as e:
            self.report.audit_fault = f"audit: {e}"
            _log.error("no audit log", error=str(e))
            return
        self.report.audit = worker = AuditWorker(
            node=self.settings.node,
            attributor=Attributor(
                party=self._view.party,
                resolve=self._view.judge,
                generation=self._view.generation,
            ),
            sink=self._sink,
            missed=lambda: nflog.stats.missed,
            interface_name=interface_name,
        )
        nflog.start()
        self._tasks.spawn("resolver", self._resolver.run())
        self._tasks.spawn("audit", worker.run(nflog.batches()))

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
        """The barrier: all watches that policy needs, then the first apply; then mind the peers."""
        watches = self._watches
        if watches is None:
            raise InputError("the agent was not started")
        pods = watches.start(
            KINDS["Pod"], name=_LOCAL_PODS, selection=informers.pods_on(self.settings.node)
        )
        pods.store.subscribe(self.feed.local_pod)
        namespaces = watches.start(KINDS["Namespace"])
        namespaces.store.subscribe(self.feed.namespace)
        policies = watches.start(KINDS["NetworkPolicy"])
        policies.store.subscribe(self.feed.policy)
        await watches.wait_synced()
        # Classes are known now; whether their policies have peers decides about the great watch.
        self.graph.flush(together=True)
        await self._mind_peers(wait=True)
        self.room.start()
        # For the names in the audit log; policy does not wait for it.
        watches.start(
            KINDS["Node"], selection=Selection(fields=(f"metadata.name={self.settings.node}",))
        )
        _log.info("caches in sync", watches=[w.name for w in watches.status()])
        while True:
            # Woken by every apply; now and then without one, to end a watch that lingers.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._peers_wake.wait(), PEERS_LINGER_S)
            self._peers_wake.clear()
            await self._mind_peers(wait=False)

    async def _mind_peers(self, *, wait: bool) -> None:
        watches = self._watches
        if watches is None:
            return
        running = watches.get(_CLUSTER_PODS) is not None
        now_s = self._clock.monotonic()
        if self.graph.needs_peers:
            self._peers_since_s = now_s
            if not running:
                informer = watches.start(
                    KINDS["Pod"], name=_CLUSTER_PODS, selection=informers.pods_everywhere()
                )
                informer.store.subscribe(self.feed.cluster_pod)
                if wait:
                    await watches.wait_synced()
        elif running and now_s - self._peers_since_s > PEERS_LINGER_S:
            await watches.stop(_CLUSTER_PODS)

    def _lacks_peers(self) -> bool:
        """Whether a policy in force needs the cluster's pods, whose watch was not started yet."""
        if self._watches is None:
            return False
        return self.graph.needs_peers and self._watches.get(_CLUSTER_PODS) is None

    def reopen_logs(self) -> None:
        """Open the audit log anew, after a rotation (SIGHUP)."""
        if self.report.audit is not None:
            self.report.audit.reopen()

    async def stop(self) -> None:
        """End tasks and connections; the kernel's rules stay as they are."""
        await self._tasks.cancel()
        if self._nflog is not None:
            self._nflog.close()
        if self._sink is not None:
            self._sink.close()
        if self._watches is not None:
            await self._watches.close()
        if self._api is not None:
            await self._api.close()
        if self._health is not None:
            await self._health.stop()
        await self._admin.close()
        self._facts.close()
        self.room.close()

    def _task_died(self, name: str, error: BaseException | None) -> None:
        self.report.fatal = f"task {name} died: {error}"
