"""Wire objects to model values: pure, and never failing.

A wire object has the right structure already; what is left to doubt is its texts. An address that
does not parse, a protocol or a port number that does not exist is left out and named as a `Problem`;
all else of the object counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache

from netpol.k8s import wire
from netpol.model.ids import PORT_MAX, PORT_MIN, PORT_PROTOCOLS, ObjectKey, Protocol
from netpol.model.labels import NAMESPACE_NAME_LABEL, Labels, labels
from netpol.model.net import Prefix, parse_address, parse_prefix
from netpol.model.networkpolicy import NetworkPolicy, NetworkPolicySpec
from netpol.model.objects import (
    ANNOTATION_PREFIXES,
    ContainerPort,
    Endpoint,
    EndpointSlice,
    Ingress,
    Namespace,
    Node,
    Service,
    ServicePort,
    SliceEndpoint,
)
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

Problems = list[Problem]

_PROTOCOLS = {p.value: p for p in PORT_PROTOCOLS}
_EMPTY_SPEC = NetworkPolicySpec()


# Pods of one workload have equal labels and ports and start in the same second: one value serves
# them all. The bound keeps a cluster of singletons from paying for an index that never hits.
@lru_cache(maxsize=4096)
def _shared_labels(value: Labels) -> Labels:
    return value


@lru_cache(maxsize=4096)
def _shared_ports(value: tuple[ContainerPort, ...]) -> tuple[ContainerPort, ...]:
    return value


@lru_cache(maxsize=4096)
def _shared_text(value: str) -> str:
    return value


@lru_cache(maxsize=4096)
def _shared_texts(value: tuple[str, ...]) -> tuple[str, ...]:
    return value


@lru_cache(maxsize=4096)
def _shared_slice_ports(
    value: tuple[tuple[str, Protocol, int], ...],
) -> tuple[tuple[str, Protocol, int], ...]:
    return value


def pod(key: ObjectKey, meta: wire.Meta, obj: wire.WirePod, problems: Problems) -> Endpoint:
    """A Pod. `phase` is "" when status says nothing; the caller knows what that means."""
    spec, status = obj.spec, obj.status
    phase = node = ""
    host_network = False
    addresses: tuple[bytes, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    if status is not None:
        phase = status.phase or ""
        addresses = _pod_addresses(status, problems)
    if spec is not None:
        node = sys.intern(spec.node_name or "")
        host_network = bool(spec.host_network)
        ports = _container_ports(spec, problems)
    return Endpoint(
        key=key,
        uid=meta.uid or "",
        labels=_shared_labels(labels(meta.labels)),
        node=node,
        phase=sys.intern(phase),
        addresses=addresses,
        ports=ports,
        host_network=host_network,
        terminating=bool(meta.deletion_timestamp),
        created=_shared_text(meta.creation_timestamp or ""),
    )


def _pod_addresses(status: wire.WirePodStatus, problems: Problems) -> tuple[bytes, ...]:
    # The API keeps podIPs[0] == podIP; a manifest by hand may have only one of the two.
    texts = [entry.ip for entry in status.pod_ips or ()]
    if any(texts):
        return _addresses(texts, "status.podIPs", problems)
    return _addresses((status.pod_ip,), "status.podIP", problems)


def _container_ports(spec: wire.WirePodSpec, problems: Problems) -> tuple[ContainerPort, ...]:
    ports: list[ContainerPort] = []
    for field, containers, restartable in (
        ("spec.containers", spec.containers, False),
        ("spec.initContainers", spec.init_containers, True),
    ):
        for i, container in enumerate(containers or ()):
            if restartable and container.restart_policy != "Always":
                continue  # runs to its end before the pod serves anything
            for j, port in enumerate(container.ports or ()):
                where = f"{field}[{i}].ports[{j}]"
                protocol = _protocol(port.protocol, where, problems)
                number = _port_number(port.container_port, f"{where}.containerPort", problems)
                if protocol is not None and number is not None:
                    ports.append(ContainerPort(sys.intern(port.name or ""), protocol, number))
    return _shared_ports(tuple(ports)) if ports else ()


def namespace(
    key: ObjectKey, meta: wire.Meta, _obj: wire.WireNamespace, _problems: Problems
) -> Namespace:
    """A Namespace; the label that the API server would add is there in any case."""
    mine = {**(meta.labels or {}), NAMESPACE_NAME_LABEL: key.name}
    return Namespace(name=key.name, uid=meta.uid or "", labels=labels(mine))


def node(key: ObjectKey, meta: wire.Meta, obj: wire.WireNode, problems: Problems) -> Node:
    """A Node: InternalIPs before ExternalIPs, other address types (names) left out."""
    listed = (obj.status.addresses if obj.status else None) or []
    texts = [
        entry.address
        for wanted in ("InternalIP", "ExternalIP")
        for entry in listed
        if entry.type == wanted
    ]
    spec = obj.spec or wire.WireNodeSpec()
    cidrs: list[Prefix] = []
    for text in spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else []):
        try:
            cidrs.append(parse_prefix(text))
        except ValueError as e:
            problems.append(Problem("spec.podCIDRs", str(e)))
    return Node(
        name=key.name,
        uid=meta.uid or "",
        labels=labels(meta.labels),
        addresses=_addresses(texts, "status.addresses", problems),
        pod_cidrs=tuple(cidrs),
        annotations=_annotations(meta),
        created=meta.creation_timestamp or "",
    )


def network_policy(
    key: ObjectKey, meta: wire.Meta, obj: wire.WireNetworkPolicy, _problems: Problems
) -> NetworkPolicy:
    """A NetworkPolicy; what its spec means, and what is wrong with it, is `policy.compile`'s."""
    return NetworkPolicy(
        key=key,
        uid=meta.uid or "",
        spec=obj.spec or _EMPTY_SPEC,
        created=meta.creation_timestamp or "",
    )


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
        cluster_ips=_addresses([t for t in texts if t != HEADLESS], "spec.clusterIPs", problems),
        selector=labels(spec.selector),
        ports=_service_ports(spec, problems),
        headless=HEADLESS in texts,
        foreign=_foreign(meta),
        external_name=(spec.external_name or "") if kind == "ExternalName" else "",
        external_ips=_addresses(spec.external_ips or (), "spec.externalIPs", problems),
        ingress=_ingress(obj.status, problems),
        internal_local=_local(spec.internal_traffic_policy, "internalTrafficPolicy", problems),
        external_local=_local(spec.external_traffic_policy, "externalTrafficPolicy", problems),
        traffic_distribution=sys.intern(spec.traffic_distribution or ""),
        affinity_s=_affinity(spec, problems),
        source_ranges=ranges,
        source_ranges_unread=unread,
        load_balancer_class=sys.intern(spec.load_balancer_class or ""),
        requested_ip=spec.load_balancer_ip or "",
        health_port=spec.health_check_node_port or 0,
        publish_not_ready=bool(spec.publish_not_ready_addresses),
        annotations=_annotations(meta),
        created=_shared_text(meta.creation_timestamp or ""),
        terminating=bool(meta.deletion_timestamp),
    )


def _service_ports(spec: wire.WireServiceSpec, problems: Problems) -> tuple[ServicePort, ...]:
    ports: list[ServicePort] = []
    for i, port in enumerate(spec.ports or ()):
        where = f"spec.ports[{i}]"
        protocol = _protocol(port.protocol, where, problems)
        number = _port_number(port.port, f"{where}.port", problems)
        if protocol is None or number is None:
            continue
        # 0 and "" are how "not set" is written for an IntOrString.
        target = port.target_port or number
        if isinstance(target, int) and not _port_number(target, f"{where}.targetPort", problems):
            continue
        node_port = port.node_port or 0
        if node_port and _port_number(node_port, f"{where}.nodePort", problems) is None:
            node_port = 0
        name = sys.intern(port.name or "")
        ports.append(ServicePort(name, protocol, number, target, node_port))
    return tuple(ports)


def _foreign(meta: wire.Meta) -> bool:
    return any(label in (meta.labels or ()) for label in FOREIGN_LABELS)


def _annotations(meta: wire.Meta) -> Labels:
    """The annotations that a room may read."""
    given = meta.annotations if isinstance(meta, wire.AnnotatedMeta) else None
    return labels({k: v for k, v in (given or {}).items() if k.startswith(ANNOTATION_PREFIXES)})


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
    """The ranges that can be read, and whether one could not; the API lets blanks around them pass."""
    found: list[Prefix] = []
    unread = False
    for i, text in enumerate(texts):
        try:
            found.append(parse_prefix(text.strip()))
        except ValueError as e:
            unread = True
            problems.append(Problem(f"spec.loadBalancerSourceRanges[{i}]", str(e)))
    return tuple(dict.fromkeys(found)), unread


def _ingress(status: wire.WireServiceStatus | None, problems: Problems) -> tuple[Ingress, ...]:
    balancer = status.load_balancer if status else None
    found: list[Ingress] = []
    for i, entry in enumerate((balancer.ingress if balancer else None) or ()):
        packed = _addresses((entry.ip,), f"status.loadBalancer.ingress[{i}].ip", problems)
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
        protocol = _protocol(port.protocol, where, problems)
        number = 0 if port.port is None else _port_number(port.port, f"{where}.port", problems)
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
        annotations=_annotations(meta),
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
        addresses=_addresses(entry.addresses or (), field, problems),
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
    return _shared_texts(tuple(e.name or "" for e in entries)) if entries else ()


def _addresses(texts: Iterable[str | None], field: str, problems: Problems) -> tuple[bytes, ...]:
    """Parse addresses in order, without repetitions; empty texts mean "none yet"."""
    found: list[bytes] = []
    for text in texts:
        if not text:
            continue
        try:
            packed = parse_address(text)
        except ValueError as e:
            problems.append(Problem(field, str(e)))
            continue
        if packed not in found:
            found.append(packed)
    return tuple(found)


def _protocol(text: str | None, where: str, problems: Problems) -> Protocol | None:
    """The protocol of a declared port; absent means TCP, as the API server defaults it."""
    protocol = _PROTOCOLS.get(text or "TCP")
    if protocol is None:
        problems.append(Problem(f"{where}.protocol", f"{text!r} is not TCP, UDP or SCTP"))
    return protocol


def _port_number(number: int | None, field: str, problems: Problems) -> int | None:
    if number is None or not PORT_MIN <= number <= PORT_MAX:
        problems.append(Problem(field, f"{number} is not a port ({PORT_MIN}-{PORT_MAX})"))
        return None
    return number
