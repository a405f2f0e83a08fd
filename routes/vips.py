"""Which addresses of Services this node announces to routers outside the cluster: pure.

An address whose traffic policy is Local is announced only while a ready endpoint is on this node: whoever
comes to a node without one would be dropped there. What is not a Service's to have (an address of a node, of
the pod ranges, loopback and the like) is never announced.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from netpol.model.ids import ObjectKey
from netpol.model.net import Prefix, host_prefix
from netpol.model.objects import EndpointSlice, Node, Service
from routes.annotations import PREFIXES
from routes.options import RouteOptions


def announced(
    services: Iterable[Service],
    slices: Iterable[EndpointSlice],
    nodes: Iterable[Node],
    *,
    node: str,
    options: RouteOptions,
) -> tuple[Prefix, ...]:
    """Host prefixes to announce, sorted."""
    ready = ready_here(slices, node)
    taken: set[bytes] = set()
    ranges: list[Prefix] = list(options.cluster_cidrs)
    for n in nodes:
        taken.update(n.addresses)
        ranges += n.pod_cidrs
    out = {
        host_prefix(address)
        for service in services
        for address in _of(service, options, ready=service.key in ready)
        if address not in taken and _can_be_announced(address)
    }
    return tuple(sorted(p for p in out if not any(r.contains(p.address) for r in ranges)))


def service_addresses(services: Iterable[Service]) -> tuple[Prefix, ...]:
    """Whatever address a Service has: no router outside may announce it."""
    out: set[bytes] = set()
    for s in services:
        out.update((*s.cluster_ips, *s.external_ips, *(i.address for i in s.ingress if i.address)))
    return tuple(sorted(map(host_prefix, out)))


def ready_here(slices: Iterable[EndpointSlice], node: str) -> frozenset[ObjectKey]:
    """The Services with a ready endpoint on a node."""
    return frozenset(
        s.service for s in slices if any(e.ready and e.node == node for e in s.endpoints)
    )


def _of(service: Service, options: RouteOptions, *, ready: bool) -> Iterator[bytes]:
    if service.foreign or service.type == "ExternalName":
        return
    if _wanted(service, "clusterip", default=options.advertise_cluster_ip) and (
        ready or not service.internal_local
    ):
        yield from service.cluster_ips
    if service.external_local and not ready:
        return
    if _wanted(service, "externalip", default=options.advertise_external_ip):
        yield from service.external_ips
    if _wanted(service, "loadbalancerip", default=options.advertise_load_balancer_ip):
        # The load balancer's own (ipMode Proxy) must get there, not here.
        yield from (i.address for i in service.ingress if i.address and not i.proxied)


def _wanted(service: Service, what: str, *, default: bool) -> bool:
    given = dict(service.annotations)
    for prefix in PREFIXES:
        text = given.get(f"{prefix}service.advertise.{what}")
        if text is not None:
            words = {"true": True, "false": False}
            return words.get(text.strip().lower(), default)
    return default


def _can_be_announced(address: bytes) -> bool:
    ip = ipaddress.ip_address(address)
    return not (ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified)
