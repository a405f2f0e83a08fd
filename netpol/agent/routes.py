"""The agent's routes part: what feeds the room, and what shows it.

    Nodes, Services, EndpointSlices, local Pods --RoutesRoom--> overlay, BIRD, CNI, masquerade

BIRD goes on when the agent ends. Nothing here decides what is routed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.core import Metric

from netpol.admin.health import counter, gauge
from netpol.agent.parts import Standing
from netpol.aio.clock import Clock
from netpol.aio.tasks import TaskSet
from netpol.config import Settings
from netpol.k8s import informers
from netpol.k8s.cache import Change, Store
from netpol.k8s.decode import KINDS
from netpol.k8s.events import Complaint
from netpol.kernel.drivers import Variant
from netpol.kernel.routes import bird_routes
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.lib.errors import InputError, NetpolError
from netpol.model.ids import ROUTES
from netpol.model.net import Prefix, parse_address, parse_prefix
from netpol.model.pools import parse_range
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine
from routes.egress import EgressOptions
from routes.options import Encapsulation, OverlayMode, RouteOptions
from routes.peers_watch import PeersFile
from routes.rules import RuleDrivers
from routes.state import Facts
from routes.sync import RoutesRoom
from routes.vips import ready_here

_log = structlog.get_logger(__name__)

_LOCAL_PODS = informers.LOCAL_PODS
#: How often the file of peers and the files with passwords are read; a kubelet takes a minute to change them.
PEERS_EVERY_S = 3.0


class RoutesPart:
    """Routes on one node."""

    name = "routes"

    def __init__(
        self,
        settings: Settings,
        *,
        variant: Variant,
        clock: Clock,
        cni_written: Callable[[], None],
        peers_read: Callable[[Iterable[bytes]], None] = lambda _: None,
    ) -> None:
        """Args: cni_written: called when the CNI configuration was changed.

        peers_read: told the addresses of the routers that all nodes peer with, whenever they are others.
        """
        self._settings, self._clock, self._peers_read = settings, clock, peers_read
        path = settings.bgp_peers_file
        self._peers = PeersFile(path, flag="--bgp-peers-file") if path else None
        self._synced = False
        self._stores: dict[str, Store[Any]] = {}
        self.engine = BirdEngine(
            BirdDaemon(Folder(Path(settings.run_dir) / "bird"), external=settings.bird_external),
            has_routes=_has_routes,
            clock=clock,
        )
        self.room = RoutesRoom(
            self.engine,
            node=settings.node,
            options=route_options(settings),
            facts=self._facts,
            cni_conf_dir=Path(settings.cni_conf_dir) if settings.write_cni else None,
            cni_written=cni_written,
            egress=EgressOptions(
                enabled=True,
                by_default=settings.masquerade,
                exclude=_prefixes(settings.masquerade_exclude),
            ),
            rule_drivers=RuleDrivers(
                NetlinkSets(owner=ROUTES), RestoreTables(variant, owner=ROUTES)
            ),
            clock=clock,
        )

    def _facts(self) -> Facts:
        def of(name: str) -> tuple[Any, ...]:
            return tuple(self._stores[name])

        return Facts(
            nodes=of("nodes"),
            services=of("services"),
            slices=of("endpointslices"),
            pods=of(_LOCAL_PODS),
            namespaces=of("namespaces"),
        )

    # -- start and stop ---------------------------------------------------------------------

    async def prepare(self) -> None:
        """Find a BIRD that runs, and read the peers.

        What is missing is told in status, and looked for again: policy must not wait for it.
        """
        try:
            await self.engine.prepare()
        except NetpolError as e:
            _log.error("routes wait for BIRD", error=str(e))
        self._read_peers()

    def start(self, watches: informers.InformerSet, tasks: TaskSet) -> None:
        """Start the watches that nobody else has started, and all that runs for ever."""
        pods = informers.pods_on(self._settings.node)
        for informer in (
            watches.share(KINDS["Node"]),
            watches.share(KINDS["Service"]),
            watches.share(KINDS["EndpointSlice"]),
            watches.share(KINDS["Namespace"]),
            watches.share(KINDS["Pod"], name=_LOCAL_PODS, selection=pods),
        ):
            self._stores[informer.name] = informer.store
        for name, store in self._stores.items():
            store.subscribe(self._slice_changed if name == "endpointslices" else self._changed)
        tasks.spawn("routes room", self.room.run_forever())
        if self._peers is not None:
            tasks.spawn("peers file", self._follow_peers())

    async def _follow_peers(self) -> None:
        while True:
            await self._clock.sleep(PEERS_EVERY_S)
            self._read_peers()

    def _read_peers(self) -> None:
        """Take over what the files say. Without any good peers nothing is applied: BIRD may have some."""
        file = self._peers
        if file is None or not file.look():
            return
        if file.fault:
            _log.error("the file of peers is not followed", error=file.fault)
        peers = file.peers
        if peers is not None and peers != self.room.options.peers:
            self.room.options = replace(self.room.options, peers=peers)
            self._peers_read([p.address for p in peers])
            self.room.changed()
        self._begin()

    def _begin(self) -> None:
        if self._synced and (self._peers is None or self._peers.peers is not None):
            self.room.start()

    @property
    def _peers_fault(self) -> str:
        return self._peers.fault if self._peers is not None else ""

    def _changed(self, _: Change[Any]) -> None:
        self.room.changed()

    def _slice_changed(self, change: Change[Any]) -> None:
        """Of a whole cluster's endpoints only this counts: whether a Service has a ready one here."""
        node = self._settings.node
        before, after = (ready_here((s,) if s else (), node) for s in (change.before, change.after))
        if before != after:
            self.room.changed()

    def synced(self) -> None:
        """The caches are in sync: the first apply begins."""
        self._synced = True
        self._begin()

    async def stop(self) -> None:
        """Let go; BIRD and routes stay. Tasks are ended by who started them."""
        await self.engine.close()
        self.room.close()

    # -- what it shows ----------------------------------------------------------------------

    def standing(self) -> Standing:
        """See Part."""
        status = self.room.status
        return Standing(
            self.room.generation,
            status.applied_generation,
            self.room.ready and status.applied_generation == self.room.generation,
            status.applied_at_s,
        )

    def fault(self) -> str | None:
        """See Part."""
        status = self.room.status
        if status.error:
            return status.error
        if status.applied_at_s is None:
            return self._peers_fault
        return self.engine.status.error or None

    def errors(self) -> list[str]:
        """See Part."""
        status = self.room.status
        return [f"routes: {e}" for e in (*self._faults(), *status.problems)]

    def _faults(self) -> list[str]:
        status, bird = self.room.status, self.engine.status
        found = (status.error, bird.error, bird.beside, status.conflist_error, self._peers_fault)
        return [e for e in found if e]

    def document(self) -> dict[str, Any]:
        """See Part."""
        status, bird = self.room.status, self.engine.status
        return {
            "bird": bird.version,
            "running": bird.running,
            "sessions": bird.sessions,
            "established": bird.established,
            "applies": bird.applies,
            "reverts": status.reverts,
            "onTrial": status.on_trial,
            "starts": bird.starts,
            "failures": status.failures,
            "draining": self.room.options.drain,
            "errors": self._faults(),
        }

    def metrics(self) -> Iterable[Metric]:
        """See Part."""
        status, bird = self.room.status, self.engine.status
        yield gauge("routes_bird_running", "1 while BIRD answers", bird.running)
        yield gauge("routes_sessions", "BGP sessions that should be", bird.sessions)
        yield gauge("routes_sessions_established", "Those that are up", bird.established)
        yield gauge(
            "routes_problems", "Nodes and peers not followed as written", len(status.problems)
        )
        yield counter("routes_applies", "Configurations that BIRD took over", bird.applies)
        yield counter("routes_failures", "Applies that failed and were repeated", status.failures)
        yield counter(
            "routes_reverts", "Changes undone because routes did not go on", status.reverts
        )
        yield counter("routes_bird_starts", "Times BIRD was started", bird.starts)

    def complaints(self) -> Iterator[Complaint]:
        """See Part: what is wrong with nodes stands in status; no user's object is concerned."""
        return iter(())

    # -- what it answers --------------------------------------------------------------------

    async def peers_op(self, _: dict[str, Any]) -> dict[str, Any]:
        """Answer `peers`."""
        return await self.room.peers()

    async def routes_op(self, args: dict[str, Any]) -> dict[str, Any]:
        """Answer `routes`; with {"address": ADDRESS} where packets to it go."""
        text = args.get("address")
        if text is None:
            return await self.room.routes()
        try:
            address = parse_address(str(text))
        except ValueError as e:
            raise InputError("routes", needed="an IP address", got=repr(text)) from e
        return await self.room.routes(address)

    async def drain_op(self, args: dict[str, Any]) -> dict[str, Any]:
        """Answer `drain`: {"on": true} asks routers outside to take other ways."""
        self.room.drain(on=bool(args.get("on")))
        return {"node": self._settings.node, "draining": self.room.options.drain}


async def _has_routes() -> bool:
    return bool(await asyncio.to_thread(bird_routes))


def route_options(settings: Settings) -> RouteOptions:
    """The room's options out of the agent's settings; those of its file of peers come later."""
    s = settings
    return RouteOptions(
        asn=s.bgp_asn,
        cluster_cidrs=_prefixes(s.cluster_cidr),
        service_cidrs=_prefixes(s.service_ranges),
        vip_cidrs=(
            *_prefixes(s.external_ip_cidr),
            *(block for text in s.loadbalancer_pools for block in _blocks(text)),
        ),
        subnets=_prefixes(s.node_subnets),
        overlay=OverlayMode(s.overlay),
        encapsulation=Encapsulation(s.encapsulation),
        accept=tuple(Encapsulation(e) for e in s.overlay_accept),
        mesh=s.bgp_mesh,
        advertise_pod_cidr=s.advertise_pod_cidr,
        advertise_cluster_ip=s.advertise_cluster_ip,
        advertise_external_ip=s.advertise_external_ip,
        advertise_load_balancer_ip=s.advertise_load_balancer_ip,
        hold_s=s.bgp_hold_time,
        keepalive_s=s.bgp_keepalive_time,
        graceful_restart=s.bgp_graceful_restart,
        listen_port=s.bgp_port,
        run_dir=str(Path(s.run_dir) / "bird"),
    )


def _prefixes(texts: Iterable[str]) -> tuple[Prefix, ...]:
    return tuple(parse_prefix(t) for t in texts)


def _blocks(pool: str) -> tuple[Prefix, ...]:
    """A CIDR as it is; FIRST-LAST as the blocks that hold exactly these addresses."""
    return parse_range(pool).blocks() if "-" in pool else (parse_prefix(pool),)
