"""Services and EndpointSlices: wire objects to model values, with the API's defaults. Pure, as `build`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache

from netpol.k8s import wire
from netpol.k8s.texts import (
    Problems,
    own_annotations,
    read_addresses,
    read_port,
    read_protocol,
    shared_text,
)
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.labels import labels
from netpol.model.net import Prefix, parse_prefix
from netpol.model.objects import EndpointSlice, Ingress, Service, ServicePort, SliceEndpoint
from netpol.model.policy import Problem

#: The label that ties an EndpointSlice to its Service (discovery.k8s.io/v1 LabelServiceName).
SERVICE_NAME_LABEL = "kubernetes.io/service-name"

#: Labels by which an object is none of this proxy's business: it has another proxy, or is headless.
FOREIGN_LABELS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")

#: Seconds of session affinity where none are given (core/v1 DefaultClientIPServiceAffinitySeconds).
AFFINITY_DEFAULT_S = 10800
#: The longest that the API takes (core/v1 MaxClientIPServiceAffinitySeconds).
AFFINITY_MAX_S = 86400

#: spec.clusterIP of a headless Service (core/v1 ClusterIPNone).
HEADLESS = "None"

#: The type of slices that hold host names (discovery/v1 AddressTypeFQDN); a proxy has no use for them.
FQDN = "FQDN"


@lru_cache(maxsize=4096)
def _shared_texts(value: tuple[str, ...]) -> tuple[str, ...]:
    return value


@lru_cache(maxsize=4096)
def _shared_slice_ports(
    value: tuple[tuple[str, Protocol, int], ...],
) -> tuple[tuple[str, Protocol, int], ...]:
    return value


def service(key: ObjectKey, meta: wire.Meta, obj: wire.WireService, problems: Problems) -> Service:
    """A Service; a headless one has no cluster IPs."""
    spec = obj.spec or wire.WireServiceSpec()
    texts = spec.cluster_ips or [spec.cluster_ip or ""]
    ranges, unread = _source_ranges(spec.load_balancer_source_ranges or (), problems)
    kind = spec.type or "ClusterIP"
    return Service(
        key=key,
        uid=meta.uid or "",
        type=sys.intern(kind),
        cluster_ips=read_addresses(
            [t for t in texts if t != HEADLESS], "spec.clusterIPs", problems
        ),
        selector=labels(spec.selector),
        ports=_service_ports(spec, problems),
        headless=HEADLESS in texts,
        foreign=_foreign(meta),
        external_name=(spec.external_name or "") if kind == "ExternalName" else "",
        external_ips=read_addresses(spec.external_ips or (), "spec.externalIPs", problems),
        ingress=_ingress(obj.status, problems),
        internal_local=_local(spec.internal_traffic_policy, "internalTrafficPolicy", problems),
        external_local=_local(spec.external_traffic_policy, "externalTrafficPolicy", problems),
        traffic_distribution=sys.intern(spec.traffic_distribution or ""),
        affinity_s=_affinity(spec, problems),
        source_ranges=ranges,
        source_ranges_unread=unread,
        load_balancer_class=sys.intern(spec.load_balancer_class or ""),
        requested_ip=spec.load_balancer_ip or "",
        health_port=_node_port(spec.health_check_node_port, "spec.healthCheckNodePort", problems),
        publish_not_ready=bool(spec.publish_not_ready_addresses),
        annotations=own_annotations(meta),
        created=shared_text(meta.creation_timestamp or ""),
        terminating=bool(meta.deletion_timestamp),
    )


def _service_ports(spec: wire.WireServiceSpec, problems: Problems) -> tuple[ServicePort, ...]:
    ports: list[ServicePort] = []
    for i, port in enumerate(spec.ports or ()):
        where = f"spec.ports[{i}]"
        protocol = read_protocol(port.protocol, where, problems)
        number = read_port(port.port, f"{where}.port", problems)
        if protocol is None or number is None:
            continue
        # 0 and "" are how "not set" is written for an IntOrString.
        target = port.target_port or number
        if isinstance(target, int) and not read_port(target, f"{where}.targetPort", problems):
            continue
        node_port = _node_port(port.node_port, f"{where}.nodePort", problems)
        name = sys.intern(port.name or "")
        ports.append(ServicePort(name, protocol, number, target, node_port))
    return tuple(ports)


def _node_port(number: int | None, field: str, problems: Problems) -> int:
    """A port on nodes; 0 and absent are "none"."""
    return (read_port(number, field, problems) or 0) if number else 0


def _foreign(meta: wire.Meta) -> bool:
    return any(label in (meta.labels or ()) for label in FOREIGN_LABELS)


def _local(text: str | None, name: str, problems: Problems) -> bool:
    if text not in (None, "", "Cluster", "Local"):
        problems.append(Problem(f"spec.{name}", f"{text!r} is not Cluster or Local"))
    return text == "Local"


def _affinity(spec: wire.WireServiceSpec, problems: Problems) -> int:
    if spec.session_affinity not in (None, "", "None", "ClientIP"):
        wrong = f"{spec.session_affinity!r} is not ClientIP or None"
        problems.append(Problem("spec.sessionAffinity", wrong))
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return AFFINITY_DEFAULT_S
    if not 0 < seconds <= AFFINITY_MAX_S:
        field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        problems.append(Problem(field, f"{seconds} is not in 1..{AFFINITY_MAX_S}"))
        return AFFINITY_DEFAULT_S
    return seconds


def _source_ranges(texts: Iterable[str], problems: Problems) -> tuple[tuple[Prefix, ...], bool]:
    """The ranges that can be read, and whether one could not; the API lets blanks around them pass.

    An empty one is none, as for kube-proxy: it asks for nothing that could be lost.
    """
    found: list[Prefix] = []
    unread = False
    for i, text in enumerate(texts):
        try:
            found.append(parse_prefix(text.strip()))
        except ValueError as e:
            unread = unread or bool(text.strip())
            problems.append(Problem(f"spec.loadBalancerSourceRanges[{i}]", str(e)))
    return tuple(dict.fromkeys(found)), unread


def _ingress(status: wire.WireServiceStatus | None, problems: Problems) -> tuple[Ingress, ...]:
    balancer = status.load_balancer if status else None
    found: list[Ingress] = []
    for i, entry in enumerate((balancer.ingress if balancer else None) or ()):
        packed = read_addresses((entry.ip,), f"status.loadBalancer.ingress[{i}].ip", problems)
        address = packed[0] if packed else b""
        if address or entry.hostname:
            proxied = entry.ip_mode not in (None, "", "VIP")
            found.append(Ingress(address, entry.hostname or "", proxied))
    return tuple(found)


def endpoint_slice(
    key: ObjectKey, meta: wire.Meta, obj: wire.WireEndpointSlice, problems: Problems
) -> EndpointSlice:
    """An EndpointSlice. Its Service has the name "" when the label is missing; port 0 is "all ports".

    Endpoints of the type FQDN are left out.
    """
    address_type = sys.intern(obj.address_type or "")
    ports: list[tuple[str, Protocol, int]] = []
    for i, port in enumerate(obj.ports or ()):
        where = f"ports[{i}]"
        protocol = read_protocol(port.protocol, where, problems)
        number = 0 if port.port is None else read_port(port.port, f"{where}.port", problems)
        if protocol is not None and number is not None:
            ports.append((sys.intern(port.name or ""), protocol, number))
    endpoints = tuple(
        _slice_endpoint(key.namespace, entry, f"endpoints[{i}].addresses", problems)
        for i, entry in enumerate(obj.endpoints or () if address_type != FQDN else ())
    )
    return EndpointSlice(
        key=key,
        uid=meta.uid or "",
        service=ObjectKey(key.namespace, (meta.labels or {}).get(SERVICE_NAME_LABEL, "")),
        address_type=address_type,
        ports=_shared_slice_ports(tuple(ports)),
        endpoints=endpoints,
        foreign=_foreign(meta),
        annotations=own_annotations(meta),
    )


def _slice_endpoint(
    ns: str, entry: wire.WireEndpoint, field: str, problems: Problems
) -> SliceEndpoint:
    reference, conditions = entry.target_ref, entry.conditions or wire.WireEndpointConditions()
    target = None
    if reference is not None and reference.kind == "Pod" and reference.name:
        target = ObjectKey(sys.intern(reference.namespace or ns), reference.name)
    hints = entry.hints or wire.WireHints()
    return SliceEndpoint(
        addresses=read_addresses(entry.addresses or (), field, problems),
        node=sys.intern(entry.node_name or ""),
        pod=target,
        ready=conditions.ready is not False,
        serving=conditions.serving is not False,
        terminating=conditions.terminating is True,
        zone=sys.intern(entry.zone or ""),
        for_zones=_hints(hints.for_zones),
        for_nodes=_hints(hints.for_nodes),
    )


def _hints(entries: list[wire.WireHint] | None) -> tuple[str, ...]:
    return _shared_texts(tuple(e.name for e in entries if e.name)) if entries else ()
