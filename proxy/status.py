"""What the proxy's room is told and what it tells: its options, its state, one Service as the kernel has it.

Values only; `proxy.sync` fills them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netpol.model.ids import ObjectKey
from netpol.model.ipvs import RealServer, ServerId, ServerState


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How the room works.

    Attributes:
        mark_mask: the field of packet marks for servers by mark.
        drain_s: how long a TCP backend drains at most.
        tcp_s, tcp_fin_s, udp_s: how long IPVS keeps idle connections; 0 leaves a time as it is.
    """

    mark_mask: int
    drain_s: float = 30.0
    tcp_s: int = 0
    tcp_fin_s: int = 0
    udp_s: int = 0


@dataclass(slots=True)
class RoomStatus:
    """What the room did: for status, metrics and readiness.

    Attributes:
        latency_s: the last time from a change of plans to the kernel having it.
        repaired: what the last look at everything changed, in words; "" for nothing.
        error: why the last run failed as a whole, or "".
        errors: what is refused, by Service; what no Service wants any more is under the empty key.
        faults: what the node lacks, in words.
        foreign: servers of IPVS that are somebody else's.
    """

    applied_generation: int = 0
    applied_at_s: float | None = None
    applies: int = 0
    reconciles: int = 0
    operations: int = 0
    drifts: int = 0
    failures: int = 0
    error: str = ""
    drift: str = ""
    repaired: str = ""
    latency_s: float | None = None
    services: int = 0
    servers: int = 0
    vips: int = 0
    draining: int = 0
    errors: dict[ObjectKey, list[str]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    foreign: tuple[ServerId, ...] = ()


@dataclass(frozen=True, slots=True)
class Live:
    """One Service in the kernel, at one look.

    Attributes:
        wanted: its servers.
        states: those that are there, with their connections.
        draining: real servers that drain, by server, and for how many seconds.
    """

    wanted: tuple[ServerId, ...]
    states: Mapping[ServerId, ServerState]
    draining: Mapping[ServerId, Mapping[RealServer, float]]
    errors: tuple[str, ...]
