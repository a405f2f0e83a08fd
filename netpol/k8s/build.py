"""Wire objects to model values: pure, and never failing.

A wire object has the right structure already; what is left to doubt is its texts. An address that
does not parse, a protocol or a port number that does not exist is left out and named as a `Problem`;
all else of the object counts. Services and their slices are `build_services`'.
"""

from __future__ import annotations

import sys
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
from netpol.model.ids import ObjectKey
from netpol.model.labels import NAMESPACE_NAME_LABEL, Labels, labels
from netpol.model.net import Prefix, parse_prefix
from netpol.model.networkpolicy import NetworkPolicy, NetworkPolicySpec
from netpol.model.objects import ContainerPort, Endpoint, Namespace, Node
from netpol.model.policy import Problem

#: The taint of a node that the cluster's autoscaler is about to remove.
AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"

_EMPTY_SPEC = NetworkPolicySpec()


# Pods of one workload have equal labels and ports and start in the same second: one value serves
# them all. The bound keeps a cluster of singletons from paying for an index that never hits.
@lru_cache(maxsize=4096)
def _shared_labels(value: Labels) -> Labels:
    return value


@lru_cache(maxsize=4096)
def _shared_ports(value: tuple[ContainerPort, ...]) -> tuple[ContainerPort, ...]:
    return value


def pod(key: ObjectKey, meta: wire.SwitchedMeta, obj: wire.WirePod, problems: Problems) -> Endpoint:
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
        created=shared_text(meta.creation_timestamp or ""),
        masquerade=_masquerade(meta, problems),
    )


def _masquerade(meta: wire.SwitchedMeta, problems: Problems) -> bool | None:
    """The annotation netpol.io/masquerade; None where it says nothing."""
    text = meta.annotations.masquerade if meta.annotations else None
    if text is None:
        return None
    if text not in ("true", "false"):
        field = "metadata.annotations[netpol.io/masquerade]"
        problems.append(Problem(field, 'needed "true" or "false"'))
        return None
    return text == "true"


def _pod_addresses(status: wire.WirePodStatus, problems: Problems) -> tuple[bytes, ...]:
    # The API keeps podIPs[0] == podIP; a manifest by hand may have only one of the two.
    texts = [entry.ip for entry in status.pod_ips or ()]
    if any(texts):
        return read_addresses(texts, "status.podIPs", problems)
    return read_addresses((status.pod_ip,), "status.podIP", problems)


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
                protocol = read_protocol(port.protocol, where, problems)
                number = read_port(port.container_port, f"{where}.containerPort", problems)
                if protocol is not None and number is not None:
                    ports.append(ContainerPort(sys.intern(port.name or ""), protocol, number))
    return _shared_ports(tuple(ports)) if ports else ()


def namespace(
    key: ObjectKey, meta: wire.SwitchedMeta, _obj: wire.WireNamespace, problems: Problems
) -> Namespace:
    """A Namespace; the label that the API server would add is there in any case."""
    mine = {**(meta.labels or {}), NAMESPACE_NAME_LABEL: key.name}
    return Namespace(
        name=key.name,
        uid=meta.uid or "",
        labels=labels(mine),
        masquerade=_masquerade(meta, problems),
    )


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
        addresses=read_addresses(texts, "status.addresses", problems),
        pod_cidrs=tuple(cidrs),
        annotations=own_annotations(meta),
        created=meta.creation_timestamp or "",
        leaving=bool(meta.deletion_timestamp)
        or any(taint.key == AUTOSCALER_TAINT for taint in spec.taints or ()),
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
