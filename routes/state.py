"""What the routes room is told, and what it shows: values."""

from __future__ import annotations

from dataclasses import dataclass

from netpol.model.objects import Endpoint, EndpointSlice, Namespace, Node, Service


@dataclass(frozen=True, slots=True)
class Facts:
    """What the API says, as far as routes are concerned."""

    nodes: tuple[Node, ...] = ()
    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    pods: tuple[Endpoint, ...] = ()
    namespaces: tuple[Namespace, ...] = ()


@dataclass(slots=True)
class RoutesStatus:
    """What status, metrics and readiness show."""

    applied_generation: int = 0
    applied_at_s: float | None = None
    failures: int = 0
    error: str = ""
    conflist_error: str = ""
    on_trial: bool = False
    reverts: int = 0
    problems: tuple[str, ...] = ()
