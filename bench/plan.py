"""Services planned and compared in memory: all of them, and one whose endpoints change."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

from bench import services
from bench.measure import Row, median, settle, timed
from netpol.k8s.decode import decode_object
from netpol.model.ids import ObjectKey
from netpol.model.net import parse_address
from netpol.model.objects import EndpointSlice, Node, Service
from proxy.changes import Tracker
from proxy.desired import Desired
from proxy.lower import lower
from proxy.rows import ServicePlan

FEW, MANY, ENDPOINTS = 100, 10_000, 10
ROUNDS, CHANGES = 3, 4_000

Objects = list[tuple[Service, EndpointSlice]]
Plans = dict[ObjectKey, ServicePlan | None]


def plan() -> Iterator[Row]:
    """10,000 Services with ten endpoints each, and one endpoint among 100 and among 10,000."""
    few, many = _objects(FEW), _objects(MANY)
    settle()
    plans: Plans = {}
    took = [timed(lambda: plans.update(_tracker(many).flush())) for _ in range(ROUNDS)]
    note = f"{MANY:,} Services x {ENDPOINTS} endpoints, cold"
    yield Row("proxy.plan_10k.s", min(took), "s", note=note)
    took = [timed(lambda: _diff(plans)) for _ in range(ROUNDS)]
    note = (
        "the same lowered to servers, addresses and members, compared with nothing and with itself"
    )
    yield Row("proxy.diff_10k.s", min(took), "s", note=note)
    small, large = _changes(few), _changes(many)
    yield Row(
        "proxy.plan_endpoint.us",
        large * 1e6,
        "us",
        baseline=small * 1e6,
        target=1.2,
        by_ratio=True,
        note=f"an endpoint goes: event to plan among {MANY:,} Services; baseline: among {FEW}",
    )


def _objects(number: int) -> Objects:
    made: Objects = []
    for n in range(number):
        service = decode_object("Service", services.service_json(n))
        piece = decode_object("EndpointSlice", services.slice_json(n, ENDPOINTS))
        assert isinstance(service, Service)
        assert isinstance(piece, EndpointSlice)
        made.append((service, piece))
    return made


def _tracker(objects: Objects) -> Tracker:
    tracker = Tracker(services.NODE)
    address = parse_address(services.NODE_ADDRESS)
    tracker.node(None, Node(name=services.NODE, addresses=(address,)))
    for service, piece in objects:
        tracker.service(None, service)
        tracker.slice(None, piece)
    return tracker


def _diff(plans: Plans) -> None:
    desired = Desired()
    for expected in (True, False):
        parts = {k: lower(p, lambda _key: 1) for k, p in plans.items() if p is not None}
        changed = desired.change(parts)
        assert bool(changed.servers) is expected


def _changes(objects: Objects) -> float:
    """Seconds from an event to the plan, the median."""
    tracker = _tracker(objects)
    tracker.flush()
    took: list[float] = []
    fewer = [
        decode_object("EndpointSlice", services.slice_json(n, ENDPOINTS, without=3))
        for n in range(FEW)
    ]
    gc.collect()
    gc.disable()
    for step in range(CHANGES):
        n = step % FEW
        _, piece = objects[n]
        other = fewer[n]
        assert isinstance(other, EndpointSlice)
        begin = time.perf_counter()
        tracker.slice(piece, other)
        changed = tracker.flush()
        took.append(time.perf_counter() - begin)
        assert len(changed) == 1
        tracker.slice(other, piece)
        tracker.flush()
    gc.enable()
    return median(took)
