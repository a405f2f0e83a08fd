"""The agent's policy part: the graph, its room, what feeds and what watches it, and the audit log.

    watches --Feed--> Graph --PolicyRoom--> kernel --NFLOG--> AuditWorker

Nothing here decides anything about policy; it says who is told what, and in which order things start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.core import Metric

from netpol.admin.health import counter, gauge
from netpol.agent.parts import Standing
from netpol.aio.clock import Clock
from netpol.aio.tasks import TaskSet
from netpol.audit.attribute import Attributor
from netpol.audit.record import encode_line
from netpol.audit.sink import LineSink
from netpol.audit.worker import AuditWorker
from netpol.config import Settings
from netpol.enforce.events import complaints
from netpol.enforce.feed import Feed
from netpol.enforce.live import live_view
from netpol.enforce.node import NodeFacts
from netpol.enforce.view import WorldView
from netpol.enforce.whois import PodResolver
from netpol.enforce.worker import PolicyRoom
from netpol.k8s import informers
from netpol.k8s.api import Api
from netpol.k8s.decode import KINDS
from netpol.k8s.events import Complaint
from netpol.kernel.drivers import TableDriver
from netpol.kernel.nflog import NflogReader, interface_name
from netpol.kernel.sets import NetlinkSets
from netpol.lib.errors import NetpolError, NoAnswerError
from netpol.model.ids import ObjectKey
from netpol.model.net import format_address
from netpol.model.objects import Endpoint
from netpol.policy.graph import Graph

_log = structlog.get_logger("netpol")

#: The watch of the cluster's pods stays this long after the last policy that needs it went.
PEERS_LINGER_S = 60.0
_CLUSTER_PODS = "cluster pods"
_LOCAL_PODS = informers.LOCAL_PODS


class PolicyPart:
    """Policy on one node.

    Args:
        applied: told after every apply.
        all_pods: whether somebody else needs to know all pods of the cluster.
        isolation: told when other pods may be isolated than before.
    """

    name = "policy"

    def __init__(
        self,
        settings: Settings,
        *,
        facts: NodeFacts,
        tables: TableDriver,
        clock: Clock,
        applied: Callable[[], None],
        all_pods: Callable[[], bool] = lambda: False,
        isolation: Callable[[], None] = lambda: None,
    ) -> None:
        self._all_pods, self._tell_isolation = all_pods, isolation
        self._settings, self._facts, self._clock = settings, facts, clock
        self._tell_applied = applied
        self._tables = tables
        self._sets = NetlinkSets(mark_mask=settings.field_mask)
        self.graph = Graph(settings.node)
        self.room = PolicyRoom(
            self.graph,
            sets=self._sets,
            tables=tables,
            options=facts.options(),
            clock=clock,
            before_reconcile=facts.options,
            applied=self._applied,
        )
        self.feed = Feed(self.graph, self._fed, cluster=self._cluster_pod)
        self._api: Api | None = None
        self._watches: informers.InformerSet | None = None
        self._peers_since_s = 0.0
        self._peers_wake = asyncio.Event()
        self._applied_once = asyncio.Event()
        self._resolved = 0
        self._resolver = PodResolver(lambda: self._api, clock=clock, changed=self._address_resolved)
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
            clock=clock,
            unknown=self._unknown,
        )
        self._nflog: NflogReader | None = None
        self._sink: LineSink | None = None
        self._audit: AuditWorker | None = None
        self._audit_fault = ""

    def _fed(self) -> None:
        self.room.changed()
        self._tell_isolation()

    def need_peers(self) -> None:
        """Somebody may need to know all pods from now on."""
        if self._lacks_peers():
            self._peers_wake.set()

    def hidden(self, address: bytes) -> str | None:
        """Why policy would not see what a tunnel brings to a pod; "" for a pod that is not known (yet).

        A packet in a tunnel is not judged, and an answer with a Service's address looks like any packet:
        neither may lead to, or come from, a pod that is isolated.
        """
        try:
            found = self.graph.isolating(address)
        except KeyError:
            return ""
        if found is None:
            return None
        policy, direction = found
        return f"policy {policy} isolates endpoint {format_address(address)} ({direction})"

    # -- who asks whom ----------------------------------------------------------------------

    def _applied(self) -> None:
        """Something was applied: whether the cluster's pods are needed may have changed."""
        self._applied_once.set()
        self._peers_wake.set()
        self._tell_applied()

    def _address_resolved(self) -> None:
        """The audit log knows one pod more."""
        self._resolved += 1
        self._view.expire()

    def _unknown(self, address: bytes) -> None:
        """Somebody unknown was denied; with all pods watched there is nobody to ask for."""
        if self._watches is not None and self._watches.get(_CLUSTER_PODS) is None:
            self._resolver.ask(address)

    def _cluster_pod(self, key: ObjectKey) -> Endpoint | None:
        informer = self._watches.get(_CLUSTER_PODS) if self._watches else None
        pod: Endpoint | None = informer.store.get(key) if informer is not None else None
        return pod

    def _objects(self, watch: str) -> list[Any]:
        informer = self._watches.get(watch) if self._watches else None
        return list(informer.store) if informer is not None else []

    # -- start and stop ---------------------------------------------------------------------

    async def hold(self) -> None:
        """Before anything is known: compare the mark field, and hold the pods of a fresh node.

        Raises:
            InputError: rules in force use another mark field.
        """
        await self.room.check_mask()
        if not self._facts.has_pods() and await self.room.hold():
            _log.info("fresh node", hold=[str(r) for r in self._facts.options().hold_ranges])

    def start(self, api: Api, watches: informers.InformerSet, tasks: TaskSet) -> None:
        """Start the watches and all that runs for ever; `synced` goes on from there."""
        self._api, self._watches = api, watches
        pods = watches.start(
            KINDS["Pod"], name=_LOCAL_PODS, selection=informers.pods_on(self._settings.node)
        )
        pods.store.subscribe(self.feed.local_pod)
        namespaces = watches.start(KINDS["Namespace"])
        namespaces.store.subscribe(self.feed.namespace)
        policies = watches.start(KINDS["NetworkPolicy"])
        policies.store.subscribe(self.feed.policy)
        tasks.spawn("policy room", self.room.run_forever())
        tasks.spawn("ipvs", self._facts.watch_ipvs(self.room.serve))
        self._start_audit(tasks)

    async def synced(self) -> None:
        """The caches are in sync: the first apply begins, with the peers that it needs."""
        # Classes are known now; whether their policies have peers decides about the great watch.
        self.graph.flush(together=True)
        await self._mind_peers(wait=True)
        self.room.start()

    async def first_apply(self, *, at_most_s: float) -> None:
        """Wait for the first apply, or until waiting for it would hurt."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._applied_once.wait(), at_most_s)

    async def mind_peers(self) -> None:
        """Watch the cluster's pods while a policy needs them; until cancelled."""
        while True:
            # Woken by every apply; now and then without one, to end a watch that lingers.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._peers_wake.wait(), PEERS_LINGER_S)
            self._peers_wake.clear()
            await self._mind_peers(wait=False)

    def _start_audit(self, tasks: TaskSet) -> None:
        """The log of denied packets; without it policy works all the same."""
        if not self._settings.audit_log:
            return
        path = None if self._settings.audit_log == "-" else Path(self._settings.audit_log)
        try:
            self._nflog = nflog = NflogReader(self._settings.nflog_group)
            self._sink = LineSink(path)
        except (NetpolError, OSError) as e:
            self._audit_fault = f"audit: {e}"
            _log.error("no audit log", error=str(e))
            return
        self._audit = worker = AuditWorker(
            node=self._settings.node,
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
        tasks.spawn("resolver", self._resolver.run())
        tasks.spawn("audit", worker.run(nflog.batches()))

    async def _mind_peers(self, *, wait: bool) -> None:
        watches = self._watches
        if watches is None:
            return
        running = watches.get(_CLUSTER_PODS) is not None
        now_s = self._clock.monotonic()
        if self.graph.needs_peers or self._all_pods():
            self._peers_since_s = now_s
            if not running:
                informer = watches.start(
                    KINDS["Pod"], name=_CLUSTER_PODS, selection=informers.pods_everywhere()
                )
                informer.store.subscribe(self.feed.cluster_pod)
                if wait:
                    await watches.wait_synced()
        elif running and self.room.dataplane.refusals:
            # Older rules stay in force; who their peers are nobody else would tell.
            self._peers_since_s = now_s
        elif running and now_s - self._peers_since_s > PEERS_LINGER_S:
            await watches.stop(_CLUSTER_PODS)

    def _lacks_peers(self) -> bool:
        """Whether a policy in force needs the cluster's pods, whose watch was not started yet."""
        if self._watches is None:
            return False
        needs = self.graph.needs_peers or self._all_pods()
        return needs and self._watches.get(_CLUSTER_PODS) is None

    def reopen_logs(self) -> None:
        """Open the audit log anew, after a rotation (SIGHUP)."""
        if self._audit is not None:
            self._audit.reopen()

    def close(self) -> None:
        """Release sockets and threads; the kernel's rules stay as they are."""
        if self._nflog is not None:
            self._nflog.close()
        if self._sink is not None:
            self._sink.close()
        self.room.close()

    # -- what it shows ----------------------------------------------------------------------

    def standing(self) -> Standing:
        """See Part."""
        status = self.room.status
        return Standing(
            self.room.generation,
            status.applied_generation,
            self.room.in_sync and not self._lacks_peers(),
            status.applied_at_s,
        )

    def fault(self) -> str | None:
        """See Part."""
        if self.room.status.error:
            return self.room.status.error
        return None if self.room.ready else ""

    def errors(self) -> list[str]:
        """See Part."""
        refused = self.room.dataplane.refusals.reasons()
        out = [e for e in (self.room.status.error, self._audit_fault) if e]
        if self.room.dataplane.reject_fault:
            out.append(f"denied packets are dropped: {self.room.dataplane.reject_fault}")
        return out + [f"policy {key} is refused: {why}" for key, why in sorted(refused.items())]

    def complaints(self) -> Iterator[Complaint]:
        """What is wrong with policies that this node needs: invalid parts, and the kernel's refusals."""
        active = {i.key for i in self.graph.active_policies}
        return complaints(
            {k: p for k, p in self.feed.problems.items() if k in active},
            self.room.dataplane.refusals.reasons(),
            uid_of=lambda key: p.uid if (p := self.feed.compiled.get(key)) else "",
            node=self._settings.node,
        )

    def document(self) -> dict[str, Any]:
        """See Part."""
        room = self.room.status
        latency_s = room.latency_s
        refused = self.room.dataplane.refusals.reasons()
        return {
            **self.room.dataplane.counts(),
            **self._deny_mode(),
            "last_apply_ms": None if latency_s is None else round(latency_s * 1000, 2),
            "applies": room.applies,
            "reconciles": room.reconciles,
            "table_transactions": room.table_transactions,
            "drifts": room.drifts,
            "last_drift": room.drift,
            "failures": room.failures,
            "families_down": [f"IPv{family}" for family in room.down],
            "errors": [room.error] if room.error else [],
            "refused_policies": {str(k): why for k, why in sorted(refused.items())},
            "invalid_policies": {
                str(k): [f"{p.field}: {p.message}" for p in v]
                for k, v in sorted(self.feed.problems.items())
            },
        }

    def _deny_mode(self) -> dict[str, str]:
        """What becomes of denied packets, and why that is not what was asked for."""
        plane = self.room.dataplane
        why = {"deny_fallback": plane.reject_fault} if plane.reject_fault else {}
        return {"deny_with": plane.options.deny_with.value, **why}

    def metrics(self) -> Iterable[Metric]:
        """See Part."""
        room = self.room.status
        yield gauge("generation", "Changes seen by the policy graph", self.room.generation)
        yield gauge("applied_generation", "Changes that are in the kernel", room.applied_generation)
        for name, value in self.room.dataplane.counts().items():
            yield gauge(f"policy_{name}", f"Number of {name} of the policy dataplane", value)
        yield counter("applies", "Plans applied to the kernel", room.applies)
        yield counter("apply_failures", "Applies that failed and were repeated", room.failures)
        yield counter(
            "reconciles", "Full comparisons with the kernel that were applied", room.reconciles
        )
        yield counter(
            "table_transactions", "Plans with iptables transactions", room.table_transactions
        )
        yield counter("drifts", "Times the kernel was found changed by somebody else", room.drifts)
        yield gauge(
            "families_down",
            "IP families whose rules are not up to date while the other's are",
            len(room.down),
        )
        yield gauge(
            "refused_policies",
            "Policies that the kernel does not take",
            len(self.room.dataplane.refusals.reasons()),
        )
        yield gauge(
            "invalid_policies",
            "Policies with parts that the API would refuse",
            len(self.feed.problems),
        )

    # -- what it answers --------------------------------------------------------------------

    async def drops_op(self, args: dict[str, Any]) -> AsyncIterator[Any]:
        """Recent denied packets, then (with follow) those to come."""
        if self._audit is None:
            raise NoAnswerError("drops", needed="an agent with --audit-log", got=self._audit_fault)
        if not args.get("follow"):
            for record in self._audit.recent():
                yield json.loads(encode_line(record))
            return
        async for record in self._audit.follow(past=True):
            yield json.loads(encode_line(record))

    async def explain_op(self, args: dict[str, Any]) -> dict[str, Any]:
        """Answer `explain`: what the kernel has for a local pod."""
        namespace, _, name = str(args.get("pod", "")).partition("/")
        pod = self.room.dataplane.graph.local_pods.get(ObjectKey(namespace, name))
        if pod is None:
            needed = f"a pod of node {self._settings.node}"
            raise NoAnswerError(f"pod {namespace}/{name}", needed=needed)
        found = await self.room.kernel(lambda: live_view(pod, self._sets, self._tables))
        standing = self.standing()
        return {
            **found,
            "in_sync": standing.in_sync,
            "generation": standing.applied_generation,
            **self._deny_mode(),
            **({"unpoliced": self._facts.unpoliced} if self._facts.unpoliced else {}),
        }
