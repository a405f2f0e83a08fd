"""What the agent shows of itself as a whole: readiness, the status document, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import Metric

from netpol import __version__
from netpol.admin.health import counter, gauge
from netpol.agent.parts import Part
from netpol.aio.clock import Clock
from netpol.enforce.node import NodeFacts
from netpol.k8s.watching import WatchStatus
from netpol.kernel.drivers import Variant


@dataclass(slots=True)
class Report:
    """Reads the parts; changes nothing.

    Attributes:
        parts: the jobs that are on; the first one's generation is the agent's.
        fatal: why the process cannot go on, or "".
    """

    node: str
    clock: Clock
    parts: Sequence[Part]
    facts: NodeFacts
    variant: Variant
    watches: Callable[[], tuple[WatchStatus, ...]]
    fatal: str = ""

    def alive(self) -> str | None:
        """Why the process should be restarted, or None."""
        return self.fatal or None

    def ready(self) -> str | None:
        """Why something is not in force, or None."""
        if self.fatal:
            return self.fatal
        faults = [(part.name, part.fault()) for part in self.parts]
        for name, fault in faults:
            if fault:
                return f"{name}: {fault}"
        if self.facts.blind:
            return self.facts.blind
        if any(fault is not None for _, fault in faults):
            waiting = [w.name for w in self.watches() if not w.synced]
            return f"not in sync yet: {', '.join(waiting) or 'first apply'}"
        return None

    def status(self) -> dict[str, Any]:
        """The document of `netpol-ctl status`."""
        standings = [part.standing() for part in self.parts]
        applied = [s.applied_at_s for s in standings]
        oldest = min((a for a in applied if a is not None), default=None)
        errors = [self.fatal] if self.fatal else []
        return {
            "node": self.node,
            "version": __version__,
            "ready": self.ready() is None,
            "generation": standings[0].generation,
            "applied_generation": standings[0].applied_generation,
            "in_sync": all(s.in_sync for s in standings),
            "applied_age_s": None
            if oldest is None or None in applied
            else self.clock.monotonic() - oldest,
            "iptables": self.variant.value,
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
                for w in self.watches()
            ],
            "rooms": {part.name: part.document() for part in self.parts},
            "node_facts": self.facts.describe(),
            "errors": [
                *errors,
                *self.facts.faults(),
                *(e for part in self.parts for e in part.errors()),
            ],
        }

    def metrics(self) -> Iterable[Metric]:
        """Everything that a scrape gets."""
        yield gauge(
            "ready",
            "1 when everything is applied and the last apply succeeded",
            self.ready() is None,
        )
        for part in self.parts:
            yield from part.metrics()
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
