"""The proxy's room: applies plans to the kernel when told, looks for drift, drains, tries again.

Owns when something is done; what is done, `proxy.apply` knows. Nothing is written before `start` was told
that the caches are in sync; what a former agent left stays in force until then and is taken over.

A run does what changed, at the cost of what changed. After a failure of the run itself, and when a look
finds drift, the next run looks at everything. What the kernel refuses of a Service is an error of that
Service: the others go on, and it is tried again at growing intervals after reading it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.pause import pause
from netpol.aio.runner import BoundedRunner
from netpol.lib.errors import NetpolError
from netpol.model.ids import ObjectKey
from netpol.model.ipvs import ServerId
from proxy.apply import Applier, Drivers, ServedChange
from proxy.desired import Change, Desired
from proxy.due import Due
from proxy.ledger_file import LedgerFile
from proxy.look import Look, Touched
from proxy.lower import PODS, KernelPart, lower, lower_pods
from proxy.marks import MarkKey, Marks
from proxy.rows import ServicePlan
from proxy.status import Live, RoomStatus, SyncOptions
from proxy.work import Static

_log = structlog.get_logger(__name__)
T = TypeVar("T")

#: More Services than these are lowered where that holds nobody up.
LOWER_AT_ONCE = 100


class ProxyRoom:
    """Applies plans of Services to the kernel.

    Args:
        ledger: the ledger's file, not loaded yet.
        static: tells rules, sets and sources anew, at every look at everything.
        sysctls: keeps the node's settings, and tells why it cannot.
        applied: told after every run.
        served: told what IPVS serves otherwise; None where that must be looked at.
    """

    def __init__(
        self,
        drivers: Drivers,
        *,
        ledger: LedgerFile,
        static: Callable[[], Static],
        options: SyncOptions,
        sysctls: Callable[[], Sequence[str]] = tuple,
        clock: Clock | None = None,
        applied: Callable[[], None] = lambda: None,
        served: Callable[[ServedChange | None], None] = lambda _: None,
    ) -> None:
        self._options = options
        self._drivers, self._static, self._sysctls = drivers, static, sysctls
        self._tell_applied, self._tell_served = applied, served
        self._clock = clock or SystemClock()
        self._applier = Applier(drivers, ledger, grace_s=self._options.drain_s, clock=self._clock)
        self._desired = Desired()
        self._marks = Marks(self._options.mark_mask)
        self._pending: dict[ObjectKey, ServicePlan | None] = {}
        self._pods: frozenset[bytes] = frozenset()
        self._pods_moved = False
        self._faulty: dict[ObjectKey, ServicePlan] = {}  # lacked something that may be there later
        self.status = RoomStatus()
        self.generation = 0
        self.runner = BoundedRunner(
            self._run, min_s=0.0, retry_s=0.5, max_s=30.0, clock=self._clock, on_error=self._failed
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proxy-kernel")
        self._look_thread = ThreadPoolExecutor(1, thread_name_prefix="proxy-look")
        self._eyes = Look(self._desired, self._applier, drivers, run=self._looking)
        self._touched = Touched()  # since the last look began
        self._lock = asyncio.Lock()  # one at a time: a run, a drain, a retry
        self._started = self._loaded = False
        self._unsure = True  # what the kernel has is not known
        self._asked = False  # somebody wants everything compared
        self._upheavals = (
            0  # how often so much came that a look which is under way would be in its way
        )
        self._told_at_s: float | None = None
        self._due = Due()
        self._wake = asyncio.Event()

    # -- marks ------------------------------------------------------------------------------

    def changed(self, plans: Mapping[ObjectKey, ServicePlan | None]) -> None:
        """Some Services are planned otherwise; None is a Service that is gone."""
        if not plans:
            return
        self._pending.update(plans)
        self._mark()

    def pods(self, addresses: frozenset[bytes]) -> None:
        """Pods on this node that are outside of the ranges that `static` tells."""
        if addresses != self._pods:
            self._pods, self._pods_moved = addresses, True
            self._mark()

    def _mark(self) -> None:
        self.generation += 1
        if self._told_at_s is None:
            self._told_at_s = self._clock.monotonic()
        if self._started:
            self.runner.mark()

    def start(self) -> None:
        """The caches are in sync: from now on the plans are what the kernel must be."""
        self._started = True
        self.runner.mark()

    def resync(self) -> None:
        """Compare everything with the kernel at the next run; rules and sources are told anew."""
        self._asked = True
        if self._started:
            self.runner.mark()

    @property
    def waiting_since_s(self) -> float | None:
        """Since when a change waits that no run has begun with; None where none does."""
        return self._told_at_s

    @property
    def _dirty(self) -> bool:
        return self._unsure or self._asked

    @property
    def errors(self) -> Mapping[ObjectKey, Sequence[str]]:
        """What is refused, by Service."""
        return self.status.errors

    @property
    def ready(self) -> bool:
        """Whether everything was applied once and nothing is refused."""
        status = self.status
        return status.applied_at_s is not None and not status.error and not status.errors

    @property
    def in_sync(self) -> bool:
        """Whether the kernel was told everything that the room was, and nothing is to be compared."""
        status = self.status
        applied = status.applied_at_s is not None and status.applied_generation == self.generation
        return applied and not status.error and not self._asked

    # -- running ----------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Serve marks, look, drain and try again until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.runner.run_forever(), name="proxy runner")
            group.create_task(self._housekeeping(), name="proxy housekeeping")

    async def _run(self) -> None:
        if not self._started:
            return
        async with self._lock:
            generation, told_at_s = self.generation, self._told_at_s
            self._told_at_s = None
            if self._dirty:
                await self._reconcile()
            elif self._pending or self._pods_moved:
                await self._changes()
            self.status.applied_generation = generation
            self.status.applied_at_s = now_s = self._clock.monotonic()
            if told_at_s is not None:
                self.status.latency_s = now_s - told_at_s
            self.status.error = ""
            self._due.applied(now_s)
            self._done()

    def _done(self) -> None:
        """Something was applied: tell, and see what is due when."""
        applier, status = self._applier, self.status
        status.operations = applier.ops
        status.services = len(self._desired.parts) - (PODS in self._desired.parts)
        status.servers, status.vips = len(self._desired.servers), len(self._desired.vips)
        status.draining = len(applier.drains)
        status.foreign = applier.foreign
        status.errors = self._errors()
        self._due.stands(
            self._clock.monotonic(),
            troubled=bool(applier.troubles),
            draining=bool(applier.drains.ids),
        )
        self._wake.set()
        self._tell_applied()

    def _errors(self) -> dict[ObjectKey, list[str]]:
        errors = self._applier.troubles.by_service(self._desired)
        for service in self._faulty:
            errors.setdefault(service, []).extend(self._desired.parts[service].faults)
        return errors

    async def _reconcile(self) -> None:
        self.status.reconciles += 1
        self._unsure, self._asked = True, False
        if not self._loaded:
            marks, others = await self.kernel(self._applier.load)
            self._marks.adopt(marks)
            self._marks.ban(others)
            self._loaded = True
        await self._take_over()
        static = self._static()
        self.status.applies += 1
        self.status.repaired = await self.kernel(
            lambda: self._applier.reconcile(self._desired, static)
        )
        await self.kernel(self._settings)
        used = {key for part in self._desired.parts.values() for key in part.marks}
        self._release(key for key in list(self._marks.used) if key not in used)
        self._unsure = False
        self._tell_served(None)

    async def _changes(self) -> None:
        services = self._faulty.keys() | self._pending.keys()
        before = {key for service in services for key in self._marks_of(service)}
        change = await self._take_over()
        if not change.empty:
            self._unsure = True  # until it went through, nobody knows what the kernel has
            self._touched.note(change)
            self.status.applies += 1
            await self.kernel(lambda: self._applier.change(change, self._desired))
            self._unsure = False
            self._tell_served(self._applier.served(change.servers, self._desired))
        self._release(before - {key for service in services for key in self._marks_of(service)})

    async def _take_over(self) -> Change:
        """Have what came, and what had not all that it needs, as what is wanted from now on."""
        plans: dict[ObjectKey, ServicePlan | None] = {**self._faulty, **self._pending}
        parts: dict[ObjectKey, KernelPart | None] = {}
        pods = self._pods
        if self._pods_moved:
            parts[PODS] = lower_pods(pods)

        def work() -> Change:
            for service, plan in plans.items():
                parts[service] = None if plan is None else lower(plan, self._marks.assign)
            return self._desired.change(parts)

        if len(plans) <= LOWER_AT_ONCE:
            change = work()
        else:
            self._upheavals += 1
            change = await self.kernel(work)
        # Only now: what could not be taken over stays.
        self._pending = {s: p for s, p in self._pending.items() if p is not plans.get(s, s)}
        self._pods_moved = self._pods is not pods
        faulty = (s for s, part in parts.items() if part is not None and part.faults)
        self._faulty = {s: plan for s in faulty if (plan := plans[s]) is not None}
        return change

    def _marks_of(self, service: ObjectKey) -> tuple[MarkKey, ...]:
        part = self._desired.parts.get(service)
        return () if part is None else part.marks

    def _release(self, keys: Iterable[MarkKey]) -> None:
        """Marks that nobody wants are free, but for those whose server could not be deleted."""
        for key in keys:
            value = self._marks.value(key)
            if value and ServerId.by_mark(key.family, value) not in self._applier.troubles.servers:
                self._marks.release((key,))

    def _settings(self) -> None:
        """The node's settings and IPVS's own (blocking)."""
        options = self._options
        if options.tcp_s or options.tcp_fin_s or options.udp_s:
            self._drivers.ipvs.set_timeouts(
                tcp_s=options.tcp_s, tcp_fin_s=options.tcp_fin_s, udp_s=options.udp_s
            )
        self.status.faults = self._node_faults()

    def _node_faults(self) -> tuple[str, ...]:
        """What the node lacks (blocking)."""
        ledger = self._applier.ledger_fault
        return (*([ledger] if ledger else ()), *self._sysctls())

    async def kernel(self, work: Callable[[], T]) -> T:
        """Run blocking work where all work with the kernel runs: in one thread, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _failed(self, error: Exception) -> None:
        self._unsure = True
        self.status.failures += 1
        self.status.error = str(error) or type(error).__name__
        known = isinstance(error, NetpolError)
        _log.error("apply failed", error=self.status.error, exc_info=None if known else error)

    # -- looks, drains, retries -------------------------------------------------------------

    async def _housekeeping(self) -> None:
        while True:
            self._wake.clear()
            due_s = self._due.next_s
            await self._pause(due_s - self._clock.monotonic())
            if self._dirty and not self._wake.is_set():
                await self._pause(1.0)  # the runner repairs first
            if self._dirty or self._clock.monotonic() < due_s:
                continue
            try:
                await self._serve_due()
            except Exception as e:  # noqa: BLE001 - what fails here must not end the room
                self._failed(e)
                self.runner.mark()

    async def _pause(self, at_most_s: float) -> None:
        """Sleep, but not past the next apply."""
        await pause(self._wake, at_most_s=at_most_s, clock=self._clock)

    async def _serve_due(self) -> None:
        """Do what is due: a look holds nobody up, all else is done alone."""
        now_s = self._clock.monotonic()
        if self._due.retry_at_s <= now_s:
            await self._retry()
        elif self._due.drain_at_s <= now_s:
            await self._drain()
        else:
            await self._look()

    async def _retry(self) -> None:
        """Read back what was refused, and try again."""
        async with self._lock:
            if self._dirty:
                return
            self._unsure = True
            self._touched.retry(self._applier.troubles)
            await self.kernel(lambda: self._applier.retry(self._desired))
            self._unsure = False
            self._tell_served(None)
            self._done()

    async def _drain(self) -> None:
        """Delete what drained."""
        begin_s = self._clock.monotonic()
        async with self._lock:
            if self._dirty:
                return
            gone = await self.kernel(self._applier.drained)
            if gone.delete or gone.over:
                self._unsure = True
                self._touched.servers.update(id_ for id_, _ in (*gone.delete, *gone.over))
                await self.kernel(lambda: self._applier.end(gone))
                self._unsure = False
                ended = {id_ for id_, _ in (*gone.delete, *gone.over)}
                self._tell_served(self._applier.served(ended, self._desired))
                self._done()
        draining = bool(self._applier.drains.ids)
        self._due.drained(begin_s, self._clock.monotonic(), draining=draining)

    async def _look(self) -> None:
        """Compare everything with the kernel; what differs, the next run changes."""
        async with self._lock:  # nothing is under way when it begins
            begin_s, begun = self._clock.monotonic(), (self.status.reconciles, self._upheavals)
            self._touched = Touched()

        def still() -> bool:
            status = self.status
            now = (status.reconciles, self._upheavals)
            return not self._asked and not status.error and now == begun

        words = await self._eyes.drift(self._static(), touched=self._touched, still=still)
        if words:
            self.status.drifts += 1
            self.status.drift = words
            _log.warning("drift", what=words)
            self.resync()
        self.status.faults = await self._looking(self._node_faults)
        self._due.looked(begin_s, self._clock.monotonic())

    async def _looking(self, work: Callable[[], T]) -> T:
        """Run blocking work that an apply must not wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._look_thread, work)

    # -- answers ----------------------------------------------------------------------------

    async def live(self, service: ObjectKey) -> Live | None:
        """A Service as the kernel has it now; None where none is applied."""
        part = self._desired.parts.get(service)
        if part is None:
            return None
        errors = tuple(self.status.errors.get(service, ()))
        return await self.kernel(lambda: self._applier.live(part, errors))

    def close(self) -> None:
        """Release the kernel thread and the sockets; what is in the kernel stays."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._look_thread.shutdown(wait=False, cancel_futures=True)
        self._applier.close()
