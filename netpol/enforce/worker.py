"""The policy room: runs the dataplane on marks, checks for drift, keeps the last error for everyone to see.

Owns when something is applied, not what. Nothing is written before `start` was told that the caches are
in sync; what a former agent left in the kernel stays in force until then. Errors never end the room: the
runner repeats, and every repetition begins from a fresh dump of the kernel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.runner import BoundedRunner
from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import KernelDump, StepError, dump_kernel, execute
from netpol.enforce.look import Look
from netpol.enforce.plan import Plan
from netpol.kernel.drivers import SetDriver, SetError, TableDriver, TableDump, TableError
from netpol.lib.errors import InputError, NetpolError
from netpol.model.ids import Direction
from netpol.model.net import FAMILIES, Prefix
from netpol.model.ruleset import Rule, SetMark
from netpol.policy.graph import Graph
from netpol.render import names
from netpol.render.options import RenderOptions
from netpol.render.static import TABLE

_log = structlog.get_logger(__name__)
T = TypeVar("T")

#: After a write the kernel is read back at growing intervals, since whoever undoes us does it soon.
FIRST_CHECK_S = 0.05
LAST_CHECK_S = 30.0
#: Deltas that one run takes at most: pods, policies, and what came while a dump was awaited.
FLUSHES_MAX = 6
#: Quiet time before looks go into the members of sets; those before see tables only.
MEMBERS_AFTER_S = 0.4
#: How often the hold of a fresh node is tried, since another program may have the xtables lock.
HOLD_TRIES, HOLD_RETRY_S = 4, 0.5
#: Quiet time before garbage goes: what comes back within it costs nothing.
GARBAGE_AFTER_S = 2.0
#: A refused policy is tried again once the checks are this far apart.
RETRY_REFUSED_S = 25.0


@dataclass(slots=True)
class RoomStatus:
    """What the room did: for status, metrics and readiness.

    `latency_s` is the last time from an event that the graph was told to the kernel having it.
    """

    applied_generation: int = 0
    applied_at_s: float | None = None
    applies: int = 0
    reconciles: int = 0
    table_transactions: int = 0
    drifts: int = 0
    failures: int = 0
    error: str = ""
    drift: str = ""
    latency_s: float | None = None


class PolicyRoom:
    """Applies the graph to the kernel."""

    def __init__(
        self,
        graph: Graph,
        *,
        sets: SetDriver,
        tables: TableDriver,
        options: RenderOptions,
        clock: Clock | None = None,
        before_reconcile: Callable[[], RenderOptions] | None = None,
        applied: Callable[[], None] = lambda: None,
    ) -> None:
        """Args: before_reconcile: gives the options anew (own addresses may have changed).

        applied: told after every successful run.
        """
        self._tell_applied = applied
        self.dataplane = Dataplane(graph, options)
        self.status = RoomStatus()
        self.generation = 0
        self._graph, self._sets, self._tables = graph, sets, tables
        self._clock = clock or SystemClock()
        self._options = before_reconcile
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kernel")
        self.runner = BoundedRunner(
            self._run, min_s=0.0, retry_s=0.5, max_s=30.0, clock=self._clock, on_error=self._failed
        )
        self._started = False
        self._told_at_s: float | None = None
        self._dirty = True
        self._serve_changed = False
        self._check_after_s = FIRST_CHECK_S
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()  # one planner at a time: run, collect
        self._look_thread = ThreadPoolExecutor(1, thread_name_prefix="look")
        self._eyes = Look(self.dataplane, sets=sets, tables=tables, run=self._looking)

    # -- marks ------------------------------------------------------------------------------

    def changed(self) -> None:
        """The graph was told something."""
        self.generation += 1
        if self._told_at_s is None:
            self._told_at_s = self._clock.monotonic()
        if self._started:
            self.runner.mark()

    def start(self) -> None:
        """The caches are in sync: from now on the graph is what the kernel must be."""
        self._started = True
        self._dirty = True
        self.runner.mark()

    def resync(self) -> None:
        """Compare everything with the kernel at the next run."""
        self._dirty = True
        if self._started:
            self.runner.mark()

    def serve(self) -> None:
        """IPVS serves something else; what, `before_reconcile` tells."""
        self._serve_changed = True
        if self._started:
            self.runner.mark()

    @property
    def ready(self) -> bool:
        """Whether everything was applied once and the last apply succeeded."""
        return self.status.applied_at_s is not None and not self.status.error

    @property
    def in_sync(self) -> bool:
        """Whether the kernel has everything that the graph was told."""
        return self.ready and self.status.applied_generation == self.generation

    # -- running ----------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Serve marks, look for drift and remove garbage until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.runner.run_forever(), name="policy runner")
            group.create_task(self._housekeeping(), name="policy housekeeping")

    async def check_mask(self) -> None:
        """Compare the mark field with that of the rules in force, which stay if they differ.

        Raises:
            InputError: they differ.
        """
        tables = await self.kernel(lambda: [self._tables.dump(TABLE, f) for f in FAMILIES])
        for have in tables:
            fault = other_mask(have, self.dataplane.options.field_mask)
            if fault:
                raise InputError(fault)

    async def hold(self) -> bool:
        """On a node without a pod of ours, before anything is known: write the empty graph's rules.

        They hold unknown pods, if ranges are given. Where a former agent knew pods, its rules stay in
        force and nothing is written; one that was killed while it held is finished. Returns whether it
        wrote. What the kernel still refuses after some tries is tried again with the first apply.
        """
        for _ in range(HOLD_TRIES):
            try:
                dump = await self.kernel(lambda: dump_kernel(self._sets, self._tables))
                if _knows_pods(dump):
                    return False
                self._renew_options()
                plan = self.dataplane.reconcile(dump)
                await self._execute(plan)
            except (SetError, TableError, StepError) as e:
                self._failed(e)
                await self._clock.sleep(HOLD_RETRY_S)
            else:
                self.status.error = ""
                return bool(plan.steps)
        return False

    async def _run(self) -> None:
        if not self._started:
            return
        async with self._lock:
            generation, told_at_s = self.generation, self._told_at_s
            self._told_at_s = None
            # While something is refused, every run looks at everything: what is kept depends on it.
            if self._dirty or self.dataplane.refusals:
                await self._reconcile()
            else:
                await self._changes()
                if self._serve_changed:
                    await self._serve()
        self.status.applied_generation = generation
        self.status.applied_at_s = now_s = self._clock.monotonic()
        if told_at_s is not None:
            self.status.latency_s = now_s - told_at_s
        self.status.error = ""
        self._check_after_s = FIRST_CHECK_S
        self._wake.set()
        self._tell_applied()

    async def _reconcile(self) -> None:
        self.status.reconciles += 1
        self._renew_options()
        self._dirty = True
        while True:
            dump = await self.kernel(lambda: dump_kernel(self._sets, self._tables))
            self._graph.flush(together=True)
            try:
                await self._execute(self.dataplane.reconcile(dump))
            except StepError as e:
                active = self._graph.active_policies
                # Each turn leaves a policy out that was not left out before, so this ends.
                known = set(self.dataplane.refusals.policies)
                blamed = self.dataplane.refusals.blame(e.error, e.step, active)
                if not blamed or set(self.dataplane.refusals.policies) == known:
                    raise
                _log.error("policy refused", error=str(e))
                continue
            self._dirty = False
            return

    async def _changes(self) -> None:
        # Pods first, then policies: see Graph.flush. Nothing is awaited between the two (but for a dump,
        # now and then), so that pods that come all the time cannot keep a policy waiting.
        plans: list[Plan] = []
        while not plans or (self._graph.pending and len(plans) < FLUSHES_MAX):
            delta = self._graph.flush()
            if delta.empty:
                if not self._graph.pending:
                    break
                plans.append(Plan())
                continue
            self._dirty = True  # until the plans went through, nobody knows what the kernel has
            back = self.dataplane.returning_sets(delta)
            returning = await self.kernel(partial(self._sets.dump, back)) if back else {}
            plans.append(self.dataplane.change(delta, returning))
        for plan in plans:
            await self._execute(plan)
        if plans:
            self._dirty = False

    async def _serve(self) -> None:
        """Members of the sets that INPUT asks about IPVS: no table, no dump."""
        self._serve_changed = False
        served = self._options().ipvs_services if self._options is not None else None
        if served is None or self.dataplane.options.ipvs_services is None:
            await self._reconcile()  # the rule and its sets come or go
            return
        self._dirty = True
        await self._execute(self.dataplane.serve(served))
        self._dirty = False

    def _renew_options(self) -> None:
        self._serve_changed = False
        if self._options is not None:
            self.dataplane.options = self._options()

    async def _execute(self, plan: Plan) -> None:
        if not plan.steps:
            return
        self.status.applies += 1
        self.status.table_transactions += plan.touches_tables
        await self.kernel(lambda: execute(plan, self._sets, self._tables))

    async def kernel(self, work: Callable[[], T]) -> T:
        """Run blocking work where all work with the kernel runs: in one thread, one after the other."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work)

    async def _looking(self, work: Callable[[], T]) -> T:
        """Run blocking work that an apply must not wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._look_thread, work)

    def _failed(self, error: Exception) -> None:
        self._dirty = True
        self.status.failures += 1
        self.status.error = str(error) or type(error).__name__
        known = isinstance(error, NetpolError)
        _log.error("apply failed", error=self.status.error, exc_info=None if known else error)

    # -- drift and garbage ------------------------------------------------------------------

    async def _housekeeping(self) -> None:
        while True:
            self._wake.clear()
            await self._pause(self._check_after_s)
            if self._wake.is_set() or not self.ready or self.runner.pending:
                if not self.ready:
                    await self._pause(1.0)
                continue
            try:
                await self._look()
            except Exception as e:  # noqa: BLE001 - a look that fails must not end the room
                known = isinstance(e, NetpolError)
                _log.warning(
                    "looking at the kernel failed", error=str(e), exc_info=None if known else e
                )
                self.resync()
            self._check_after_s = min(self._check_after_s * 2, LAST_CHECK_S)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past the next apply."""
        waiter = asyncio.ensure_future(self._wake.wait())
        timer = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait((waiter, timer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
            timer.cancel()
            await asyncio.gather(waiter, timer, return_exceptions=True)

    async def _look(self) -> None:
        if self.dataplane.refusals and self._check_after_s >= RETRY_REFUSED_S:
            self.dataplane.refusals.clear()
            self.resync()
            return
        if self.dataplane.has_garbage and self._check_after_s >= GARBAGE_AFTER_S / 2:
            await self._collect()
            return
        generation, applies = self.generation, self.status.applies

        def still() -> bool:
            return (
                not self._dirty
                and not self._lock.locked()
                and self.generation == generation == self.status.applied_generation
                and self.status.applies == applies
            )

        drift = await self._eyes.drift(
            still=still,
            transactions=self.status.table_transactions,
            members=self._check_after_s >= MEMBERS_AFTER_S,
        )
        if drift:
            self.status.drifts += 1
            self.status.drift = drift
            _log.warning("drift", what=drift)
            self.resync()

    async def _collect(self) -> None:
        async with self._lock:
            if self._dirty:
                return
            self._dirty = True
            await self._execute(self.dataplane.collect())
            self._graph.members.compact()
            self._dirty = False

    def close(self) -> None:
        """Release the kernel thread; rules stay."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._look_thread.shutdown(wait=False, cancel_futures=True)
        self._sets.close()


def other_mask(dump: TableDump, mask: int) -> str | None:
    """Whether the rules in force use another mark field, in words.

    Rules and map entries could not change over together: between the two, numbers would mean nothing.
    """
    for rule in dump.chains.get(names.OK, ()):
        if isinstance(rule, Rule) and isinstance(rule.action, SetMark) and rule.action.mask != mask:
            return (
                f"the rules in force use the mark field {rule.action.mask:#010x}; got --mark-mask "
                f"{mask:#010x}: drain the node, run netpol-ctl cleanup, then start again"
            )
    return None


def _knows_pods(dump: KernelDump) -> bool:
    """Whether a former agent left the entry of a pod: as a source every pod has one, and only pods."""
    maps = (dump.sets.get(names.class_map(Direction.EGRESS, f)) for f in FAMILIES)
    return any(
        isinstance(entry, Prefix) and entry.is_host
        for found in maps
        if found is not None
        for entry in found.members
    )
