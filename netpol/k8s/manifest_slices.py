"""EndpointSlices that the cluster's controller would make for Services with a selector. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import FAMILIES, family_of
from netpol.model.objects import Endpoint, EndpointSlice, Service, ServicePort, SliceEndpoint

Ports = tuple[tuple[str, Protocol, int], ...]

#: Values of spec.trafficDistribution that give endpoints a zone hint.
_ZONAL = ("PreferClose", "PreferSameZone", "PreferSameNode")


def target_number(port: ServicePort, pod: Endpoint) -> int | None:
    """The number on a pod that a Service's port leads to; None when a named target is not there."""
    if isinstance(port.target, int):
        return port.target
    return next(
        (p.number for p in pod.ports if p.name == port.target and p.protocol is port.protocol), None
    )


def derive_slices(
    services: Iterable[Service],
    pods: Iterable[Endpoint],
    given: Iterable[EndpointSlice],
    *,
    zones: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[EndpointSlice]:
    """Make the slices of the Services that have a selector and no slice in `given`.

    Pods whose ports resolve to different numbers stand in different slices, and so do families. Hints
    follow from the Service's trafficDistribution.

    Args:
        services: those that may need some.
        pods: the pods of all namespaces.
        given: slices that are there.
        zones: the zone of each node by its name, "" or absent for none.
    """
    have = {s.service for s in given}
    by_namespace: dict[str, list[Endpoint]] = {}
    for pod in pods:
        if pod.live and pod.addresses:
            by_namespace.setdefault(pod.key.namespace, []).append(pod)
    for service in services:
        if service.key in have or not service.selector or service.type == "ExternalName":
            continue
        yield from _slices(service, by_namespace.get(service.key.namespace, []), zones)


def _slices(
    service: Service, pods: list[Endpoint], zones: Mapping[str, str]
) -> Iterator[EndpointSlice]:
    groups: dict[Ports, list[Endpoint]] = {}
    for pod in pods:
        if set(service.selector) <= set(pod.labels):
            groups.setdefault(_ports(service, pod), []).append(pod)
    number = 0
    for ports, members in groups.items():
        for family in FAMILIES:
            endpoints = tuple(
                _endpoint(service, pod, address, zones.get(pod.node, ""))
                for pod in members
                for address in [a for a in pod.addresses if family_of(a) is family][:1]
            )
            if endpoints:
                yield EndpointSlice(
                    key=ObjectKey(service.key.namespace, f"{service.key.name}-offline-{number}"),
                    service=service.key,
                    address_type=f"IPv{family}",
                    ports=ports,
                    endpoints=endpoints,
                    foreign=service.headless or service.foreign,
                )
                number += 1


def _endpoint(service: Service, pod: Endpoint, address: bytes, zone: str) -> SliceEndpoint:
    by_node = service.traffic_distribution == "PreferSameNode" and not pod.terminating
    by_zone = service.traffic_distribution in _ZONAL and not pod.terminating
    return SliceEndpoint(
        addresses=(address,),
        node=pod.node,
        pod=pod.key,
        ready=not pod.terminating or service.publish_not_ready,
        serving=True,
        terminating=pod.terminating,
        zone=zone,
        for_zones=(zone,) if by_zone and zone else (),
        for_nodes=(pod.node,) if by_node and pod.node else (),
    )


def _ports(service: Service, pod: Endpoint) -> Ports:
    resolved = ((p, target_number(p, pod)) for p in service.ports)
    return tuple((p.name, p.protocol, n) for p, n in resolved if n is not None)
