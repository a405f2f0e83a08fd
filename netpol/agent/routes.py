"""The agent's routes part: what feeds the room, and what shows it.

    Nodes, Services, EndpointSlices, local Pods --RoutesRoom--> overlay, BIRD, CNI, masquerade

BIRD goes on when the agent ends. Nothing here decides what is routed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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
from netpol.lib.errors import InputError
from netpol.model.ids import ROUTES
from netpol.model.net import Prefix, parse_address, parse_prefix
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine
from routes.egress import EgressOptions
from routes.options import Encapsulation, OverlayMode, RouteOptions
from routes.peers_file import read_peers
from routes.rules import RuleDrivers
from routes.sync import Facts, RoutesRoom

_LOCAL_PODS = informers.LOCAL_PODS


class RoutesPart:
    """Routes on one node.

    Raises:
        InputError: the file of peers cannot be used.
    """

    name = "routes"

    def __init__(
        self,
        settings: Settings,
        *,
        variant: Variant,
        clock: Clock,
        cni_written: Callable[[], None],
    ) -> None:
        self._settings = settings
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
        """Check that there is a BIRD, and find one that runs.

        Raises:
            KernelMissingError: none, or one that is too old.
        """
        await self.engine.prepare()

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
            informer.store.subscribe(self._changed)
        tasks.spawn("routes room", self.room.run_forever())

    def _changed(self, _: Change[Any]) -> None:
        self.room.changed()

    def synced(self) -> None:
        """The caches are in sync: the first apply begins."""
        self.room.start()

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
            return ""
        return self.engine.status.error or None

    def errors(self) -> list[str]:
        """See Part."""
        status = self.room.status
        found = (status.error, self.engine.status.error, status.conflist_error)
        return [f"routes: {e}" for e in (*found, *status.problems) if e]

    def document(self) -> dict[str, Any]:
        """See Part."""
        status, bird = self.room.status, self.engine.status
        return {
            "bird": bird.version,
            "running": bird.running,
            "sessions": bird.sessions,
            "established": bird.established,
            "applies": bird.applies,
            "reverts": bird.reverts,
            "starts": bird.starts,
            "failures": status.failures,
            "draining": self.room.options.drain,
            "errors": [e for e in (status.error, bird.error, status.conflist_error) if e],
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
        yield counter("routes_reverts", "Changes undone because routes did not go on", bird.reverts)
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
    """The room's options out of the agent's settings.

    Raises:
        InputError: the file of peers cannot be used.
    """
    s = settings
    return RouteOptions(
        asn=s.bgp_asn,
        cluster_cidrs=_prefixes(s.cluster_cidr),
        service_cidrs=_prefixes(s.service_ranges),
        subnets=_prefixes(s.node_subnets),
        overlay=OverlayMode(s.overlay),
        encapsulation=Encapsulation(s.encapsulation),
        mesh=s.bgp_mesh,
        peers=read_peers(s.bgp_peers_file, flag="--bgp-peers-file") if s.bgp_peers_file else (),
        advertise_pod_cidr=s.advertise_pod_cidr,
        advertise_cluster_ip=s.advertise_cluster_ip,
        advertise_external_ip=s.advertise_external_ip,
        advertise_load_balancer_ip=s.advertise_load_balancer_ip,
        hold_s=s.bgp_hold_time,
        graceful_restart=s.bgp_graceful_restart,
        listen_port=s.bgp_port,
        run_dir=str(Path(s.run_dir) / "bird"),
    )


def _prefixes(texts: Iterable[str]) -> tuple[Prefix, ...]:
    return tuple(parse_prefix(t) for t in texts)
