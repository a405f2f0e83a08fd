"""The routes room: keeps BIRD, the overlay and the CNI configuration at what nodes and Services say.

Events only mark; one run plans everything anew, in an order that leaves no route without its tunnel:

    entries of the overlay that are needed  ->  BIRD's configuration  ->  entries that are not any more

Nothing is written before the caches are in sync; BIRD and its routes go on when the agent ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.runner import BoundedRunner
from netpol.kernel.overlay import IPIP_BYTES, VXLAN_BYTES, apply_overlay
from netpol.kernel.routes import Underlay, bird_routes, underlay
from netpol.lib.errors import InputError, KernelError, NetpolError
from netpol.model.net import Family, Prefix
from netpol.model.objects import Endpoint, EndpointSlice, Namespace, Node, Service
from routes.bird.engine import BirdEngine
from routes.bird.render import render
from routes.cni import keep_conflist
from routes.egress import EgressOptions
from routes.options import Encapsulation, OverlayMode, RouteOptions
from routes.overlay import LINK_PREFIXES, overlay_of
from routes.plan import RoutePlan, plan
from routes.rules import RuleDrivers, keep_rules, rules_of
from routes.show import lookup_document, peers_document, routes_document
from routes.vips import announced, service_addresses

_log = structlog.get_logger(__name__)
T = TypeVar("T")

#: Nodes come in bursts; a change of endpoints must be announced within a second.
DEBOUNCE_S = 0.1
#: Routers outside get this long to take other ways, before addresses of Services are withdrawn.
DRAIN_S = 30.0
#: How often everything is compared with what is there, without a change.
RESYNC_S = 30.0
#: The share of sessions and routes that a risky change must leave.
HEALTHY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Facts:
    """What the API says, as far as routes are concerned."""

    nodes: tuple[Node, ...] = ()
    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    pods: tuple[Endpoint, ...] = ()
    namespaces: tuple[Namespace, ...] = ()


@dataclass(slots=True)
class RoutesStatus:
    """What status, metrics and readiness show."""

    applied_generation: int = 0
    applied_at_s: float | None = None
    failures: int = 0
    error: str = ""
    conflist_error: str = ""
    problems: tuple[str, ...] = ()


class RoutesRoom:
    """Applies a plan of routes to the node."""

    def __init__(
        self,
        engine: BirdEngine,
        *,
        node: str,
        options: RouteOptions,
        facts: Callable[[], Facts],
        cni_conf_dir: Path | None = None,
        cni_written: Callable[[], None] = lambda: None,
        egress: EgressOptions | None = None,
        rule_drivers: RuleDrivers | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Args: facts: gives the caches' contents.

        cni_conf_dir: where the conflist is kept; None to leave the CNI alone.
        cni_written: called when it was changed: policy reads pod ranges there.
        egress: masquerade of what leaves the cluster.
        rule_drivers: the hand in the kernel for masquerade, and for who may send tunnelled packets.
        """
        self._engine, self._node, self._facts = engine, node, facts
        self.options = options
        self._cni_conf_dir, self._cni_written = cni_conf_dir, cni_written
        self._egress, self._rule_drivers = egress or EgressOptions(), rule_drivers
        self.generation = 0
        self._read: object = None
        self._link: Underlay | None = None
        self._ruled: object = None
        self._drains_at_s: float | None = None
        self._drain_file = Path(options.run_dir) / "drain"
        self._looked_s = 0.0
        self._clock = clock or SystemClock()
        self.status = RoutesStatus()
        self.plan: RoutePlan | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="routes")
        self._started = False
        self.runner = BoundedRunner(
            self._run,
            min_s=DEBOUNCE_S,
            retry_s=1.0,
            max_s=30.0,
            clock=self._clock,
            on_error=self._failed,
            resync_s=RESYNC_S,
        )
        began_s = _time_of(self._drain_file)
        if began_s is not None:
            self._set_drain(on=True, for_s=max(0.0, self._clock.wall() - began_s))

    # -- marks ------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something that the plan reads is another now."""
        self.generation += 1
        if self._started:
            self.runner.mark()

    def start(self) -> None:
        """The caches are in sync."""
        self._started = True
        self.runner.mark()

    def drain(self, *, on: bool) -> None:
        """Ask routers outside to take other ways, and DRAIN_S later take Services' addresses back.

        podCIDRs stay announced, since pods run on. A restart of the agent does not end it: a file says so.
        """
        file = self._drain_file
        file.parent.mkdir(parents=True, exist_ok=True)
        if on:
            file.touch()
        else:
            file.unlink(missing_ok=True)
        self._set_drain(on=on)

    def _set_drain(self, *, on: bool, for_s: float = 0.0) -> None:
        """Args: for_s: how long it lasts already: what was withdrawn must not come back by a restart."""
        self._drains_at_s = self._clock.monotonic() + DRAIN_S - for_s if on else None
        self.options = replace(self.options, drain=on)
        self.changed()

    @property
    def _withdrawn(self) -> bool:
        """Whether a drain lasts so long that addresses of Services are no longer announced."""
        at_s = self._drains_at_s
        return at_s is not None and self._clock.monotonic() >= at_s

    @property
    def ready(self) -> bool:
        """Whether everything was applied once and the last time."""
        return self.status.applied_at_s is not None and not self.status.error

    # -- running ----------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Serve marks and keep BIRD running until cancelled; BIRD goes on. The engine is prepared."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.runner.run_forever(), name="routes runner")
            group.create_task(self._engine.run(), name="bird")
            group.create_task(self._end_drains(), name="routes drain")

    async def _end_drains(self) -> None:
        """Mark when a drain comes to take addresses back."""
        told: float | None = None
        while True:
            await self._clock.sleep(1.0)
            if self._withdrawn and told != self._drains_at_s:
                told = self._drains_at_s
                self.changed()

    async def _run(self) -> None:
        if not self._started:
            return
        generation, facts = self.generation, self._facts()
        now_s = self._clock.monotonic()
        everything = self.status.error != "" or now_s - self._looked_s >= RESYNC_S
        made, read = await self._plan(facts)
        self.status.problems = made.problems
        # Before the overlay, whose end takes packets from anybody; and pods leave without BIRD too.
        await self._rules(made, facts, everything=everything)
        if made is not self.plan or everything:
            await self._routes(made)
            self._looked_s, self._read = now_s, read
        self.status.applied_generation = generation
        self.status.applied_at_s = self._clock.monotonic()
        self.status.error = ""

    async def _plan(self, facts: Facts) -> tuple[RoutePlan, object]:
        """Plan anew, and what it was made of; the plan in force, itself, where that is the same."""
        mine = next((n for n in facts.nodes if n.name == self._node), None)
        if mine is None:
            raise InputError(f"node {self._node}", needed="a Node object", got="none: routes stay")
        link = await self._kernel(lambda: underlay(mine.addresses))
        if link is None:
            raise KernelError(f"node {self._node}", needed="a link with an address of its Node")
        options = self._live_options(link)
        vips = (
            ()
            if self._withdrawn
            else announced(
                facts.services, facts.slices, facts.nodes, node=self._node, options=options
            )
        )
        services = service_addresses(facts.services)
        read = (facts.nodes, options, vips, services, link)
        self._link = link
        if self.plan is not None and read == self._read:
            return self.plan, read
        return plan(facts.nodes, self._node, options, vips=vips, services=services), read

    async def _routes(self, made: RoutePlan) -> None:
        """CNI, overlay and BIRD; the plan is in force only when all of it is."""
        link = self._link
        if link is None:
            raise KernelError("routes", needed="the link of the node")
        self._conflist(made, link)
        overlay = overlay_of(made, underlay_mtu=link.mtu)
        make = partial(apply_overlay, overlay, prefixes=LINK_PREFIXES)
        await self._kernel(lambda: make(prune=False))
        healthy = await self._risk(made)
        await self._engine.apply(render(made), healthy=healthy)
        self.plan = made
        await self._kernel(lambda: make(prune=True))

    def _live_options(self, link: Underlay) -> RouteOptions:
        """The settings, and what only the node's own link tells."""
        given = self.options.subnets
        said = {s.family for s in given}
        subnets = given + tuple(s for s in link.subnets if s.family not in said)
        # What the link itself is connected to is protected, whatever subnets somebody named.
        connected = (*link.connected, *link.subnets)
        return replace(self.options, interface=link.name, subnets=subnets, connected=connected)

    def _conflist(self, made: RoutePlan, link: Underlay) -> None:
        """The CNI's part; what is wrong with its file must not stop routes."""
        if self._cni_conf_dir is None:
            return
        self.status.conflist_error = ""
        try:
            if keep_conflist(self._cni_conf_dir, made.own_pods, mtu=pod_mtu(made, link.mtu)):
                _log.info("wrote the CNI configuration", ranges=[str(p) for p in made.own_pods])
                self._cni_written()
        except NetpolError as e:
            self.status.conflist_error = str(e)

    async def _rules(self, made: RoutePlan, facts: Facts, *, everything: bool) -> None:
        drivers = self._rule_drivers
        if drivers is None:
            return
        read = (made, facts.pods, facts.namespaces, facts.nodes)
        if read == self._ruled and not everything:
            return
        self._ruled = None
        said = {n.name: n.masquerade for n in facts.namespaces if n.masquerade is not None}
        nodes = [a for n in facts.nodes for a in n.addresses]
        want = rules_of(made, self._egress, facts.pods, namespaces=said, nodes=nodes)
        await self._kernel(lambda: keep_rules(drivers, want))
        self._ruled = read

    async def _risk(self, made: RoutePlan) -> Callable[[], Awaitable[bool]] | None:
        """A check that what worked goes on, where a change may break all of it at once."""
        if self.plan is None or not risky(self.plan, made):
            return None
        up = {n for n, p in (await self._engine.protocols()).items() if p.established}
        # Routes to nodes that stay; what routers outside announce goes with them, as it should.
        lasting = {p for n in made.peers for p in n.accept}

        async def reached() -> set[Prefix]:
            return {r.prefix for r in await self._kernel(bird_routes) if r.reachable} & lasting

        had = await reached()

        async def healthy() -> bool:
            now = await self._engine.protocols()
            kept = [n for n in up if n in now]
            alive = sum(now[n].established for n in kept)
            have = len(await reached() & had)
            return alive >= len(kept) * HEALTHY_SHARE and have >= len(had) * HEALTHY_SHARE

        return healthy

    async def _kernel(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _failed(self, error: Exception) -> None:
        self.status.failures += 1
        self.status.error = str(error) or type(error).__name__
        known = isinstance(error, NetpolError)
        _log.error("routes failed", error=self.status.error, exc_info=None if known else error)

    # -- reading back -----------------------------------------------------------------------

    async def peers(self) -> dict[str, Any]:
        """Every session, for people."""
        states = await self._engine.protocols()
        return {"node": self._node, "peers": peers_document(self.plan, states)}

    async def routes(self, address: bytes | None = None) -> dict[str, Any]:
        """All routes; or where one address goes."""
        bird = await self._engine.routes(address)
        kernel = await self._kernel(bird_routes)
        found = (
            routes_document(self.plan, bird, kernel)
            if address is None
            else lookup_document(self.plan, address, bird, kernel)
        )
        return {"node": self._node, **found}

    def close(self) -> None:
        """Let go; BIRD, routes and rules stay."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._rule_drivers is not None:
            self._rule_drivers.sets.close()


def _time_of(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def pod_mtu(made: RoutePlan, underlay_mtu: int) -> int:
    """What pods may send: what the link takes, less what the overlay may put before it."""
    if made.options.overlay is OverlayMode.NEVER:
        return underlay_mtu
    family = Family.V4 if Family.V4 in made.addresses else Family.V6
    if made.options.encapsulation is Encapsulation.VXLAN:
        return underlay_mtu - VXLAN_BYTES[family]
    return underlay_mtu - max(IPIP_BYTES[f] for f in made.addresses)


def risky(before: RoutePlan, after: RoutePlan) -> bool:
    """Whether a change touches what all sessions or all routes depend on."""
    return (
        (before.asn, before.router_id, before.addresses, before.local_addresses)
        != (after.asn, after.router_id, after.addresses, after.local_addresses)
        or before.options.overlay is not after.options.overlay
        or before.options.encapsulation is not after.options.encapsulation
        or before.external != after.external
    )
