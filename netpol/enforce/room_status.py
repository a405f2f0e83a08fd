"""What the policy room tells of itself. Owns no meaning: the room writes, status and metrics read."""

from __future__ import annotations

from dataclasses import dataclass

from netpol.model.net import Family


@dataclass(slots=True)
class RoomStatus:
    """What the room did: for status, metrics and readiness.

    `latency_s` is the last time from an event that the graph was told to the kernel having it; `down`
    names the families that are not up to date.
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
    down: tuple[Family, ...] = ()
