"""The routes room: keeps BIRD, the overlay and the CNI configuration at what nodes and Services say.

Events only mark; one run plans everything anew, in an order that leaves no route without its tunnel:

    entries of the overlay that are needed  ->  BIRD's configuration  ->  entries that are not any more

Addresses of Services are withdrawn in a lane of its own, which waits for nothing of this. A step that fails
keeps no other from its work. Nothing is written before the caches are in sync; BIRD and its routes go on when
the agent ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.runner import BoundedRunner
from netpol.kernel.fib import way_to
from netpol.kernel.overlay import apply_overlay
from netpol.kernel.route_events import Stirred
from netpol.kernel.routes import Underlay, bird_routes, underlay
from netpol.lib.errors import InputError, KernelError, NetpolError
from netpol.model.net import Prefix
from netpol.model.objects import Node
from routes.bird.engine import BirdEngine, RefusedError
from routes.bird.render import render
from routes.cni import beaten, keep_conflist
from routes.drain import Drain
from routes.egress import EgressOptions
from routes.events import listen
from routes.health import health
from routes.options import RouteOptions
from routes.overlay import LINK_PREFIXES, overlay_of, pod_mtu
from routes.plan import RoutePlan, plan
from routes.rules import RuleDrivers, rules_of
from routes.rules_keeper import RulesKeeper
from routes.show import lookup_document, peers_document, routes_document
from routes.state import Facts, RoutesStatus
from routes.trial import UNDO_S, Ground, Step, Trials, risk, undone
from routes.vips import announced, service_addresses

_log = structlog.get_logger(__name__)
T = TypeVar("T")

#: Nodes come in bursts; a change of endpoints must be announced within a second.
DEBOUNCE_S = 0.1
#: How often everything is compared with what is there, without a change.
RESYNC_S = 30.0
#: After a failure, and not longer: what comes then may be a withdrawal.
RETRY_S = 0.25
#: How often what is on trial, or lasts, is looked at.
TICK_S = 0.5
#: BIRD compares all its routes with the kernel's each time it is asked to.
RESCAN_S = 1.0


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
        self._cni_conf_dir, self._cni_written = cni_conf_dir, cni_written
        self._egress = egress or EgressOptions()
        self.generation = 0
        self._plans: dict[str, tuple[object, RoutePlan]] = {}
        self._me: Node | None = None
        self._link: Underlay | None = None
        self._announced: tuple[object, tuple[Prefix, ...]] | None = None
        self._trials = Trials()
        self._stirred = False
        self._telling = asyncio.Lock()
        self._looked_s = 0.0
        self._clock = clock or SystemClock()
        self._rules = RulesKeeper(rule_drivers, self._clock) if rule_drivers is not None else None
        self._drain = Drain(Path(options.run_dir) / "drain", self._clock)
        self.options = replace(options, drain=self._drain.on)
        self.status = RoutesStatus()
        self.plan: RoutePlan | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="routes")
        self._started = False
        self.runner = BoundedRunner(
            self._run,
            min_s=DEBOUNCE_S,
            retry_s=RETRY_S,
            max_s=30.0,
            clock=self._clock,
            on_error=self._failed,
            resync_s=RESYNC_S,
        )
        self._withdrawals = BoundedRunner(
            self._withdraw, min_s=DEBOUNCE_S, retry_s=RETRY_S, max_s=5.0, clock=self._clock
        )
        self._rescans = BoundedRunner(
            self._engine.rescan, min_s=RESCAN_S, max_s=10.0, clock=self._clock
        )

    # -- marks ------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something that the plan reads is another now."""
        self.generation += 1
        if self._started:
            self._withdrawals.mark()
            self.runner.mark()

    def start(self) -> None:
        """The caches are in sync."""
        self._started = True
        self.runner.mark()

    def drain(self, *, on: bool) -> None:
        """Ask routers outside to take other ways, and DRAIN_S later take Services' addresses back.

        podCIDRs stay announced, since pods run on. A restart of the agent does not end it: a file says so.
        """
        self._drain.turn(on=on)
        self.options = replace(self.options, drain=on)
        self.changed()

    @property
    def ready(self) -> bool:
        """Whether everything was applied once and the last time."""
        return self.status.applied_at_s is not None and not self.status.error

    # -- running ----------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Serve marks and keep BIRD running until cancelled; BIRD goes on. The engine is prepared."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.runner.run_forever(), name="routes runner")
            group.create_task(self._withdrawals.run_forever(), name="routes withdrawals")
            group.create_task(self._rescans.run_forever(), name="routes rescans")
            group.create_task(self._engine.run(), name="bird")
            group.create_task(self._tick(), name="routes ticks")
            events = listen(self._stir, underlay=lambda: self._link.number if self._link else 0)
            group.create_task(events, name="routes events")

    async def _tick(self) -> None:
        """Mark while something is on trial, and when a drain, or a look at the rules, is due."""
        while True:
            await self._clock.sleep(TICK_S)
            if self._drain.comes_due():
                self.changed()
            elif self._trials.running or (self._rules is not None and self._rules.due()):
                self.runner.mark()

    def _stir(self, found: Stirred) -> None:
        """Somebody changed what is ours, or the node's own link."""
        if not self._started:
            return
        if found.routes:
            self._rescans.mark()
        if found.underlay:
            self._link = None
        self._stirred = self._stirred or found.overlay
        if found.underlay or found.overlay:
            self.runner.mark()

    async def _run(self) -> None:
        if not self._started:
            return
        generation, facts = self.generation, self._facts()
        now_s = self._clock.monotonic()
        everything = self.status.error != "" or now_s - self._looked_s >= RESYNC_S
        if everything:
            self._link = None
        everything, self._stirred = everything or self._stirred, False
        faults: list[str] = []
        await self._judge(now_s)
        mine = self._mine(facts, faults)
        link = await self._own_link(mine)
        made, ground, step = self._choose(facts, mine, link, faults)
        self.status.problems = made.problems
        # Before the overlay, whose end takes packets from anybody; and pods leave without BIRD too.
        guarded = await self._guard(made, facts, faults, everything=everything)
        if made is not self.plan or everything:
            await self._routes(made, link, faults, ground=ground, step=step, guarded=guarded)
            self._looked_s = now_s
        elif ground is not None:
            self._trials.stands(ground)
        self.status.on_trial = self._trials.running
        if faults:
            raise KernelError("; ".join(dict.fromkeys(faults)))
        self.status.applied_generation = generation
        self.status.applied_at_s = self._clock.monotonic()
        self.status.error = ""

    async def _judge(self, now_s: float) -> None:
        """What was on trial stays, or is gone back from by the plan that follows."""
        good = await self._trials.judge(now_s)
        if good is None:
            return
        if good:
            await self._engine.confirm()
        else:
            self.status.reverts = self._trials.reverts
            _log.error("undoing a change of routes: what worked did not go on")
        # If BIRD itself went back meanwhile, its configuration is not what we think.
        self._engine.doubt()

    async def _own_link(self, mine: Node) -> Underlay:
        """The link to the other nodes; looked for again when something about it has changed."""
        found = self._link
        if found is None:
            found = self._link = await self._kernel(lambda: underlay(mine.addresses))
        if found is None:
            raise KernelError(f"node {self._node}", needed="a link with an address of its Node")
        return found

    def _choose(
        self, facts: Facts, mine: Node, link: Underlay, faults: list[str]
    ) -> tuple[RoutePlan, Ground | None, Step]:
        """The plan to apply, the ground that it stands on (None for the proven one), and how."""
        options = self._live_options(link)
        made = self._planned("live", facts, mine, options, link)
        ground = Ground(mine, options, risk(made))
        proven = self._trials.proven
        still_there = {*link.addresses, *mine.addresses}
        way_back = proven is not None and still_there.issuperset(proven.node.addresses)
        now_s = self._clock.monotonic()
        step = self._trials.choose(ground, now_s=now_s, way_back=way_back)
        if step is not Step.HOLD or proven is None:
            return made, ground, step
        faults.append(str(undone()))
        return self._planned("proven", facts, *proven.under(mine, options), link), None, step

    def _mine(self, facts: Facts, faults: list[str]) -> Node:
        """The node's own object; the last one while the API has none, since pods run on."""
        found = next((n for n in facts.nodes if n.name == self._node), None)
        if found is not None:
            if self._me is not None and found.addresses != self._me.addresses:
                self._link = None
            self._me = found
            return found
        fault = InputError(f"node {self._node}", needed="a Node object", got="none: routes stay")
        if self._me is None:
            raise fault
        faults.append(str(fault))
        return self._me

    def _planned(
        self, which: str, facts: Facts, mine: Node, options: RouteOptions, link: Underlay
    ) -> RoutePlan:
        """Plan anew; the same plan, itself, where it is made of the same."""
        nodes = (*(n for n in facts.nodes if n.name != self._node), mine)
        vips, services = self._vips(facts), service_addresses(facts.services)
        read = (nodes, options, vips, services, link)
        before = self._plans.get(which)
        if before is not None and before[0] == read:
            return before[1]
        made = plan(nodes, self._node, options, vips=vips, services=services)
        self._plans[which] = (read, made)
        return made

    def _vips(self, facts: Facts) -> tuple[Prefix, ...]:
        """Addresses of Services that are announced now."""
        if self._drain.withdrawn:
            return ()
        read = (facts.services, facts.slices, facts.nodes, self.options)
        if self._announced is None or self._announced[0] != read:
            found = announced(
                facts.services, facts.slices, facts.nodes, node=self._node, options=self.options
            )
            self._announced = (read, found)
        return self._announced[1]

    async def _withdraw(self) -> None:
        """Take back addresses of Services that are not to be announced, whatever else is under way."""
        if self.plan is not None and not {*self.plan.vips} <= {*self._vips(self._facts())}:
            await self._tell_bird(self.plan)

    async def _tell_bird(self, made: RoutePlan, *, undo_s: int = 0) -> None:
        """Have BIRD follow a plan, without addresses that were withdrawn since it was made."""
        async with self._telling:
            live = {*self._vips(self._facts())}
            vips = tuple(v for v in made.vips if v in live)
            told = made if vips == made.vips else replace(made, vips=vips)
            await self._engine.apply(render(told), undo_s=undo_s)
            self.plan = told

    async def _routes(
        self,
        made: RoutePlan,
        link: Underlay,
        faults: list[str],
        *,
        ground: Ground | None,
        step: Step,
        guarded: bool,
    ) -> None:
        """CNI, overlay and BIRD."""
        self._conflist(made, link)
        overlay = overlay_of(made, underlay_mtu=link.mtu)
        make = partial(apply_overlay, overlay, prefixes=LINK_PREFIXES)
        laid = guarded and await self._tried(lambda: make(prune=False), faults)
        if step is Step.TRY and ground is not None:
            healthy = await health(self._engine, made, routes=lambda: self._kernel(bird_routes))
            self._trials.begin(ground, healthy, now_s=self._clock.monotonic())
            try:
                await self._tell_bird(made, undo_s=UNDO_S)
            except RefusedError:
                self._trials.refused()
                raise
        else:
            await self._tell_bird(made)
            if ground is not None:
                self._trials.stands(ground)
        await self._engine.settle()
        if laid:
            await self._tried(lambda: make(prune=True), faults)

    async def _tried(self, work: Callable[[], object], faults: list[str]) -> bool:
        """Whether a step in the kernel succeeded; the others go on without it."""
        try:
            await self._kernel(work)
        except NetpolError as e:
            faults.append(str(e))
            return False
        return True

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
            self.status.conflist_error = beaten(self._cni_conf_dir)
        except NetpolError as e:
            self.status.conflist_error = str(e)

    async def _guard(
        self, made: RoutePlan, facts: Facts, faults: list[str], *, everything: bool
    ) -> bool:
        """Whether the rules are in force."""
        keeper = self._rules
        if keeper is None:
            return True
        said = {n.name: n.masquerade for n in facts.namespaces if n.masquerade is not None}
        nodes = [a for n in facts.nodes for a in n.addresses]
        want = rules_of(made, self._egress, facts.pods, namespaces=said, nodes=nodes)
        return await self._tried(lambda: keeper.keep(want, everything=everything), faults)

    async def _kernel(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _failed(self, error: Exception) -> None:
        self.status.failures += 1
        before, self.status.error = self.status.error, str(error) or type(error).__name__
        if before == self.status.error:
            return  # it was told, and stands in status
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
        if address is None:
            found = routes_document(self.plan, bird, await self._kernel(bird_routes))
        else:
            way = await self._kernel(partial(way_to, address))
            found = lookup_document(self.plan, address, bird, way)
        return {"node": self._node, **found}

    def close(self) -> None:
        """Let go; BIRD, routes and rules stay."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._rules is not None:
            self._rules.close()
