"""What the agent shows of itself: readiness, the status document, metrics, and the admin operations."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import Metric

from netpol import __version__
from netpol.admin.health import counter, gauge
from netpol.aio.clock import Clock
from netpol.audit.record import encode_line
from netpol.audit.worker import AuditWorker
from netpol.enforce.feed import Feed
from netpol.enforce.live import live_view
from netpol.enforce.node import NodeFacts
from netpol.enforce.worker import PolicyRoom
from netpol.k8s.watching import WatchStatus
from netpol.kernel.drivers import SetDriver, TableDriver
from netpol.lib.errors import NoAnswerError
from netpol.model.ids import ObjectKey


@dataclass(slots=True)
class Report:
    """Reads the rooms; changes nothing.

    Attributes:
        fatal: why the process cannot go on, or "".
        audit_fault: why there is no audit log, or "".
        lacks_peers: whether a policy in force waits for the watch of the cluster's pods.
    """

    node: str
    clock: Clock
    room: PolicyRoom
    feed: Feed
    facts: NodeFacts
    sets: SetDriver
    tables: TableDriver
    watches: Callable[[], tuple[WatchStatus, ...]]
    lacks_peers: Callable[[], bool]
    audit: AuditWorker | None = None
    audit_fault: str = ""
    fatal: str = ""

    def alive(self) -> str | None:
        """Why the process should be restarted, or None."""
        return self.fatal or None

    def ready(self) -> str | None:
        """Why policy is not in force, or None."""
        if self.fatal:
            return self.fatal
        if self.room.status.error:
            return f"policy: {self.room.status.error}"
        if self.facts.blind:
            return self.facts.blind
        if not self.room.ready:
            waiting = [w.name for w in self.watches() if not w.synced]
            return f"not in sync yet: {', '.join(waiting) or 'first apply'}"
        return None

    def status(self) -> dict[str, Any]:
        """The document of `netpol-ctl status`."""
        room = self.room.status
        applied = room.applied_at_s
        refused = self.room.dataplane.refusals.reasons()
        errors = [e for e in (self.fatal, room.error, self.audit_fault, *self.facts.faults()) if e]
        errors += [f"policy {key} is refused: {why}" for key, why in sorted(refused.items())]
        counts = self.room.dataplane.counts()
        return {
            "node": self.node,
            "version": __version__,
            "ready": self.ready() is None,
            "generation": self.room.generation,
            "applied_generation": room.applied_generation,
            "in_sync": self.room.in_sync and not self.lacks_peers(),
            "applied_age_s": None if applied is None else self.clock.monotonic() - applied,
            "iptables": self.tables.variant.value,
            "watches": [
                {
                    "name": w.name,
                    "kind": w.kind,
                    "selection": w.selection,
                    "resource_version": w.resource_version,
                    "synced": w.synced,
                    "objects": w.objects,
                    "errors": w.errors,
                    "last_error": w.last_error,
                    "rejected": w.rejected,
                }
                for w in (self.watches())
            ],
            "rooms": {
                "policy": {
                    **counts,
                    "last_apply_ms": None
                    if room.latency_s is None
                    else round(room.latency_s * 1000, 2),
                    "applies": room.applies,
                    "reconciles": room.reconciles,
                    "table_transactions": room.table_transactions,
                    "drifts": room.drifts,
                    "last_drift": room.drift,
                    "failures": room.failures,
                    "errors": [room.error] if room.error else [],
                    "refused_policies": {str(k): why for k, why in sorted(refused.items())},
                    "invalid_policies": {
                        str(k): [f"{p.field}: {p.message}" for p in v]
                        for k, v in sorted(self.feed.problems.items())
                    },
                }
            },
            "node_facts": self.facts.describe(),
            "errors": errors,
        }

    def metrics(self) -> Iterable[Metric]:
        """Everything that a scrape gets."""
        room = self.room.status
        yield gauge(
            "ready",
            "1 when everything is applied and the last apply succeeded",
            self.ready() is None,
        )
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
            "refused_policies",
            "Policies that the kernel does not take",
            len(self.room.dataplane.refusals.policies),
        )
        yield gauge(
            "invalid_policies",
            "Policies with parts that the API would refuse",
            len(self.feed.problems),
        )
        for watch in self.watches():
            label = watch.name.replace(" ", "_")
            yield counter(
                f"watch_errors_{label}", f"Errors of the watch {watch.name}", watch.errors
            )
            yield gauge(
                f"watch_objects_{label}", f"Objects of the watch {watch.name}", watch.objects
            )

    async def status_op(self, _: dict[str, Any]) -> dict[str, Any]:
        """Answer `status`."""
        return self.status()

    async def drops_op(self, args: dict[str, Any]) -> AsyncIterator[Any]:
        """Recent denied packets, then (with follow) those to come."""
        if self.audit is None:
            raise NoAnswerError("drops", needed="an agent with --audit-log", got=self.audit_fault)
        if not args.get("follow"):
            for record in self.audit.recent():
                yield json.loads(encode_line(record))
            return
        async for record in self.audit.follow(past=True):
            yield json.loads(encode_line(record))

    async def explain_op(self, args: dict[str, Any]) -> dict[str, Any]:
        """Answer `explain`: what the kernel has for a local pod."""
        namespace, _, name = str(args.get("pod", "")).partition("/")
        pod = self.room.dataplane.graph.local_pods.get(ObjectKey(namespace, name))
        if pod is None:
            raise NoAnswerError(f"pod {namespace}/{name}", needed=f"a pod of node {self.node}")
        found = await self.room.kernel(lambda: live_view(pod, self.sets, self.tables))
        return {
            **found,
            "in_sync": self.room.in_sync and not self.lacks_peers(),
            "generation": self.room.status.applied_generation,
        }
