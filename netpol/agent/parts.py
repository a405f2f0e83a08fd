"""What every job of the agent (policy, proxy) shows of itself, so that one report can show them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from prometheus_client.core import Metric

from netpol.k8s.events import Complaint


class Standing(NamedTuple):
    """How far a part is.

    Attributes:
        generation, applied_generation: what it was told, and what is in the kernel.
        applied_at_s: when it was applied last, by the monotonic clock.
    """

    generation: int
    applied_generation: int
    in_sync: bool
    applied_at_s: float | None


class Part(Protocol):
    """One job of the agent."""

    @property
    def name(self) -> str:
        """Its name in status."""
        ...

    def standing(self) -> Standing:
        """How far it is."""
        ...

    def fault(self) -> str | None:
        """Why its first apply, or the last one, did not succeed; "" where it has not come to one yet."""
        ...

    def errors(self) -> list[str]:
        """All that is wrong now, one line each."""
        ...

    def document(self) -> dict[str, Any]:
        """Its room in the status document."""
        ...

    def metrics(self) -> Iterable[Metric]:
        """Its metrics."""
        ...

    def complaints(self) -> Iterable[Complaint]:
        """What users must be told by Events."""
        ...
