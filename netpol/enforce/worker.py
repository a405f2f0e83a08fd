"""The policy room: runs the dataplane on marks, checks for drift, keeps the last error for everyone to see.

Owns when something is applied, not what. Nothing is written before `start` was told that the caches are
in sync; what a former agent left in the kernel stays in force until then. Errors never end the room. A
family that fails is tried again by itself while the other goes on; when both fail the runner repeats. Every
repetition begins from a fresh dump of the kernel.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.pause import pause
from netpol.aio.runner import BoundedRunner
from netpol.enforce.dataplane import Dataplane
from netpol.enforce.down import DownFamilies, fault_text
from netpol.enforce.kernel_state import (
    DRIVER_ERRORS,
    StepError,
    attempt,
    dump_kernel,
    dump_tables,
    knows_pods,
    other_mask,
)
from netpol.enforce.look import Look
from netpol.enforce.plan import Plan
from netpol.enforce.reconcile import Reconciler
from netpol.enforce.room_status import RoomStatus
from netpol.enforce.upkeep import Upkeep
from netpol.kernel.drivers import SetDriver, TableDriver
from netpol.lib.errors import InputError, KernelError, NetpolError
from netpol.model.net import FAMILIES, Family
from netpol.policy.graph import Graph
from netpol.render.options import RenderOptions

_log = structlog.get_logger(__name__)
T = TypeVar("T")

#: How often the hold of a fresh node is tried, since another program may have the xtables lock.
HOLD_TRIES, HOLD_RETRY_S = 4, 0.5
#: A refused policy is tried again after this, by a look: not while there is other work.
RETRY_REFUSED_S = 60.0


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
        # Nobody knows what the kernel has; and: somebody asked for a comparison that has not begun.
        self._dirty = True
        self._resync = False
        self._serve_changed = False
        self._refused_since_s: float | None = None
        self._upkeep = Upkeep()
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()  # one planner at a time: run, collect
        self._look_thread = ThreadPoolExecutor(1, thread_name_prefix="look")
        self._eyes = Look(self.dataplane, sets=sets, tables=tables, run=self._looking)
        self._down = DownFamilies()
        self._tried = asyncio.Event()
        self._reconciler = Reconciler(
            self.dataplane, sets=sets, tables=tables, kernel=self.kernel, attempt=self._attempt
        )

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
        """Compare everything with the kernel in a run that begins from now on."""
        self._resync = True
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
            group.create_task(self._reviving(), name="policy reviving")
            group.create_task(self._housekeeping(), name="policy housekeeping")

    async def check_mask(self) -> None:
        """Compare the mark field with that of the rules in force, which stay if they differ.

        Raises:
            InputError: they differ.
        """
        failed: dict[Family, Exception] = {}
        dumps = await self.kernel(lambda: dump_tables(self._tables, failed))
        self._reconciler.unchecked = set(failed)
        for dump in dumps.values():
            fault = other_mask(dump, self.dataplane.options.field_mask)
            if fault:
                raise InputError(fault)

    async def hold(self) -> bool:
        """On a node without a pod of ours, before anything is known: write the empty graph's rules.

        They hold unknown pods, if ranges are given. Where a former agent knew pods, its rules stay in
        force and nothing is written; one that was killed while it held is finished. Returns whether it
        wrote. What the kernel still refuses after some tries is tried again with the first apply.
        """
        wrote = False
        for _ in range(HOLD_TRIES):
            try:
                dump = await self.kernel(lambda: dump_kernel(self._sets, self._tables))
                if knows_pods(dump):
                    return wrote
                self._renew_options()
                plan = self.dataplane.reconcile(dump)
                faults = {**dump.failed, **await self._attempt(plan, dump.failed)}
                wrote |= bool(plan.steps)
                if faults:
                    raise KernelError(fault_text(faults))
            except DRIVER_ERRORS as e:
                self._failed(e)
                await self._clock.sleep(HOLD_RETRY_S)
            else:
                self.status.error = ""
                break
        return wrote

    async def _run(self) -> None:
        if not self._started:
            return
        async with self._lock:
            generation, told_at_s = self.generation, self._told_at_s
            self._told_at_s = None
            applies, reconciles = self.status.applies, self.status.reconciles
            # While something is refused, every run looks at everything: what is kept depends on it.
            if self._must_reconcile:
                await self._reconcile()
            else:
                await self._changes()
                if self._serve_changed:
                    await self._serve()
        self.status.applied_generation = generation
        self.status.applied_at_s = now_s = self._clock.monotonic()
        if told_at_s is not None:
            self.status.latency_s = now_s - told_at_s
        self.status.error = fault_text(self._down.errors)
        if not self.dataplane.refusals:
            self._refused_since_s = None
        elif self._refused_since_s is None:
            self._refused_since_s = now_s
        if reconciles != self.status.reconciles:
            self._upkeep.compared(now_s)
        if (applies, reconciles) != (self.status.applies, self.status.reconciles):
            self._upkeep.wrote()
            self._wake.set()
        self._tell_applied()

    async def _reconcile(self) -> None:
        self.status.reconciles += 1
        # What is asked for, or changes, from here on is for the next run.
        self._resync = False
        self._renew_options()
        self._dirty = True
        began_s = self._clock.monotonic()
        resting = self._down.resting(began_s)
        try:
            failed = await self._reconciler.run(resting)
            if len(failed) == len(FAMILIES):
                self._down.clear()
                raise KernelError(fault_text(failed))
            new = {f: e for f, e in failed.items() if f not in resting}
            now_s = self._clock.monotonic()
            self._down.tried(new, rested=resting, now_s=now_s, took_s=now_s - began_s)
            for error in new.values():
                self._count(error)
        finally:
            self.status.down = tuple(self._down.errors)
            self._tried.set()
        self._dirty = False

    @property
    def _must_reconcile(self) -> bool:
        revival_due = self._down.pause_s(self._clock.monotonic()) == 0
        return self._unsure or bool(self.dataplane.refusals) or revival_due

    @property
    def _unsure(self) -> bool:
        return self._dirty or self._resync

    async def _reviving(self) -> None:
        """Have families that are down tried again, each in its time."""
        while True:
            self._tried.clear()
            pause_s = self._down.pause_s(self._clock.monotonic())
            if pause_s == 0:
                self.runner.mark()
                pause_s = None
            at_most_s = math.inf if pause_s is None else pause_s
            await pause(self._tried, at_most_s=at_most_s, clock=self._clock)

    async def _changes(self) -> None:
        # Pods, then policies (see Graph.flush). Nothing is awaited between the two: pods that come all the
        # time keep no policy waiting, and nobody sees a pod that waits for one.
        plans: list[Plan] = []
        for _ in range(2):
            delta = self._graph.flush()
            if not delta.empty:
                self._dirty = True  # until the plans went through, nobody knows what the kernel has
                plans.append(self.dataplane.change(delta))
        for plan in plans:
            if not await self._apply(plan):
                return
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
        if await self._apply(self.dataplane.serve(served)):
            self._dirty = False

    def _renew_options(self) -> None:
        self._serve_changed = False
        if self._options is not None:
            self.dataplane.options = self._options()

    async def _apply(self, plan: Plan) -> bool:
        """Apply a change; where that fails, compare everything at once, and return False."""
        stopped = await self._attempt(plan, self._down.errors)
        for error in stopped.values():
            self._count(error)
        if stopped:
            await self._reconcile()
        return not stopped

    async def _attempt(self, plan: Plan, skip: Collection[Family]) -> dict[Family, StepError]:
        if not plan.steps and not any(plan.behind.get(f) for f in skip):
            return {}
        self.status.applies += 1
        self.status.table_transactions += plan.touches_tables
        return await self.kernel(lambda: attempt(plan, self._sets, self._tables, skip=skip))

    async def kernel(self, work: Callable[[], T]) -> T:
        """Run blocking work where all work with the kernel runs: in one thread, one after the other."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work)

    async def _looking(self, work: Callable[[], T]) -> T:
        """Run blocking work that an apply must not wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._look_thread, work)

    def _failed(self, error: Exception) -> None:
        self._dirty = True
        self.status.error = str(error) or type(error).__name__
        self._count(error)

    def _count(self, error: Exception) -> None:
        self.status.failures += 1
        known = isinstance(error, NetpolError | OSError)
        _log.error("apply failed", error=str(error), exc_info=None if known else error)

    # -- drift and garbage ------------------------------------------------------------------

    async def _housekeeping(self) -> None:
        while True:
            self._wake.clear()
            await self._rest()
            never = self.status.applied_at_s is None
            if never or self.runner.failures:
                await pause(self._wake, at_most_s=1.0, clock=self._clock)
                continue
            busy = self._wake.is_set() or self.runner.pending
            try:
                await self._upkeep_turn(busy=busy)
            except Exception as e:  # noqa: BLE001 - a look that fails must not end the room
                known = isinstance(e, NetpolError)
                _log.warning(
                    "looking at the kernel failed", error=str(e), exc_info=None if known else e
                )
                self.resync()
            if not busy:
                self._upkeep.looked()

    async def _upkeep_turn(self, *, busy: bool) -> None:
        """Remove garbage, or look; while the room is busy only if that has waited long enough."""
        now_s = self._clock.monotonic()
        if self._upkeep.must_collect(now_s, there_is=self.dataplane.has_garbage):
            await self._collect()
        elif not busy:
            await self._look()
        elif self._upkeep.must_compare(now_s):
            self.resync()

    async def _rest(self) -> None:
        """Until the next look, which comes sooner when something is applied, or others write tables."""
        until_s = self._clock.monotonic() + self._upkeep.pause_s
        while (left_s := until_s - self._clock.monotonic()) > 0:
            at_most_s = min(left_s, self._upkeep.glance_s)
            await pause(self._wake, at_most_s=at_most_s, clock=self._clock)
            if self._wake.is_set():
                return
            if left_s > self._upkeep.glance_s:
                due = await self._eyes.is_due()
                self._upkeep.glanced(due=due)
                if due:
                    return

    async def _look(self) -> None:
        now_s = self._clock.monotonic()
        if self._refused_since_s is not None and now_s - self._refused_since_s >= RETRY_REFUSED_S:
            self._refused_since_s = None
            self.dataplane.refusals.try_again()
            self.resync()
            return
        generation, applies = self.generation, self.status.applies

        def still() -> bool:
            return (
                not self._unsure
                and not self._lock.locked()
                and self.generation == generation == self.status.applied_generation
                and self.status.applies == applies
            )

        members = self._upkeep.members
        drift = await self._eyes.drift(
            still=still,
            transactions=self.status.table_transactions,
            members=members,
            skip=self._down.errors,
        )
        if drift == "":
            self._upkeep.right()
        if drift:
            self._upkeep.drifted()
            self.status.drifts += 1
            self.status.drift = drift
            _log.warning("drift", what=drift)
            self.resync()
        elif drift is not None and members:
            self._upkeep.compared(now_s)
        elif self._upkeep.must_compare(now_s):
            self.resync()

    async def _collect(self) -> None:
        async with self._lock:
            if self._unsure:
                return
            self._dirty = True
            down = self._down.errors
            kept = await self._attempt(self.dataplane.collect(without=down), down)
            if not kept:
                self._graph.members.compact()
                self._dirty = False
                return
        # Whoever refers to it is not our business; but what was recorded as gone is still there.
        self._upkeep.kept_garbage(self._clock.monotonic())
        _log.warning("garbage stays", error=fault_text({f: e.error for f, e in kept.items()}))
        self.resync()

    def close(self) -> None:
        """Release the kernel thread; rules stay."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._look_thread.shutdown(wait=False, cancel_futures=True)
        self._sets.close()
