"""The objects as they stand on the wire, cut down to the fields that are read.

Every field has a default and takes null, for three reasons: BOOKMARK and ERROR events carry objects
without most of them, Go reads null as "not set", and manifests written by hand leave things out.
Unknown fields are skipped by the decoder without being built, which is where the speed comes from.
"""

from __future__ import annotations

import msgspec

from netpol.model.networkpolicy import NetworkPolicySpec


class WireStruct(msgspec.Struct, gc=False, rename="camel"):
    """Base: camelCase names, no garbage-collector tracking (a decoded tree has no cycles)."""


class Meta(WireStruct):
    """meta/v1 ObjectMeta."""

    name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    labels: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class AnnotatedMeta(Meta):
    """ObjectMeta of the kinds whose annotations are read (a Pod's can be large and many)."""

    annotations: dict[str, str] | None = None


class WireObject(WireStruct):
    """What all kinds share. `kind` is absent in the items of a list."""

    kind: str | None = None
    metadata: Meta | None = None


class WirePort(WireStruct):
    """core/v1 ContainerPort."""

    name: str | None = None
    container_port: int | None = None
    protocol: str | None = None


class WireContainer(WireStruct):
    """core/v1 Container."""

    ports: list[WirePort] | None = None
    restart_policy: str | None = None


class WirePodSpec(WireStruct):
    """core/v1 PodSpec."""

    node_name: str | None = None
    host_network: bool | None = None
    containers: list[WireContainer] | None = None
    init_containers: list[WireContainer] | None = None


class WirePodIP(WireStruct):
    """core/v1 PodIP."""

    ip: str | None = None


class WirePodStatus(WireStruct):
    """core/v1 PodStatus."""

    phase: str | None = None
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    pod_ips: list[WirePodIP] | None = msgspec.field(default=None, name="podIPs")


class Switches(msgspec.Struct, gc=False):
    """The annotations that are read of a Pod or Namespace; others are passed over without being built."""

    masquerade: str | None = msgspec.field(default=None, name="netpol.io/masquerade")


class SwitchedMeta(Meta):
    """ObjectMeta of a kind that can be many, with the annotations that are read of it."""

    annotations: Switches | None = None


class WirePod(WireObject):
    """core/v1 Pod."""

    metadata: SwitchedMeta | None = None
    spec: WirePodSpec | None = None
    status: WirePodStatus | None = None


class WireNamespace(WireObject):
    """core/v1 Namespace."""

    metadata: SwitchedMeta | None = None


class WireNodeAddress(WireStruct):
    """core/v1 NodeAddress."""

    type: str | None = None
    address: str | None = None


class WireTaint(WireStruct):
    """core/v1 Taint."""

    key: str | None = None


class WireNodeSpec(WireStruct):
    """core/v1 NodeSpec."""

    taints: list[WireTaint] | None = None
    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")


class WireNodeStatus(WireStruct):
    """core/v1 NodeStatus."""

    addresses: list[WireNodeAddress] | None = None


class WireNode(WireObject):
    """core/v1 Node."""

    metadata: AnnotatedMeta | None = None
    spec: WireNodeSpec | None = None
    status: WireNodeStatus | None = None


class WireNetworkPolicy(WireObject):
    """networking/v1 NetworkPolicy; the spec is kept as it is."""

    spec: NetworkPolicySpec | None = None


class WireServicePort(WireStruct):
    """core/v1 ServicePort."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    target_port: int | str | None = None
    node_port: int | None = None


class WireClientIPConfig(WireStruct):
    """core/v1 ClientIPConfig."""

    timeout_seconds: int | None = None


class WireAffinityConfig(WireStruct):
    """core/v1 SessionAffinityConfig."""

    client_ip: WireClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class WireServiceSpec(WireStruct):
    """core/v1 ServiceSpec."""

    type: str | None = None
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    selector: dict[str, str] | None = None
    ports: list[WireServicePort] | None = None
    external_name: str | None = None
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    traffic_distribution: str | None = None
    session_affinity: str | None = None
    session_affinity_config: WireAffinityConfig | None = None
    load_balancer_source_ranges: list[str] | None = None
    load_balancer_class: str | None = None
    load_balancer_ip: str | None = msgspec.field(default=None, name="loadBalancerIP")
    health_check_node_port: int | None = None
    publish_not_ready_addresses: bool | None = None


class WireIngress(WireStruct):
    """core/v1 LoadBalancerIngress."""

    ip: str | None = None
    hostname: str | None = None
    ip_mode: str | None = None


class WireBalancerStatus(WireStruct):
    """core/v1 LoadBalancerStatus."""

    ingress: list[WireIngress] | None = None


class WireServiceStatus(WireStruct):
    """core/v1 ServiceStatus."""

    load_balancer: WireBalancerStatus | None = None


class WireService(WireObject):
    """core/v1 Service."""

    metadata: AnnotatedMeta | None = None
    spec: WireServiceSpec | None = None
    status: WireServiceStatus | None = None


class WireEndpointConditions(WireStruct):
    """discovery/v1 EndpointConditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class WireReference(WireStruct):
    """core/v1 ObjectReference."""

    kind: str | None = None
    namespace: str | None = None
    name: str | None = None


class WireHint(WireStruct):
    """discovery/v1 ForZone and ForNode."""

    name: str | None = None


class WireHints(WireStruct):
    """discovery/v1 EndpointHints."""

    for_zones: list[WireHint] | None = None
    for_nodes: list[WireHint] | None = None


class WireEndpoint(WireStruct):
    """discovery/v1 Endpoint."""

    addresses: list[str] | None = None
    conditions: WireEndpointConditions | None = None
    node_name: str | None = None
    target_ref: WireReference | None = None
    zone: str | None = None
    hints: WireHints | None = None


class WireEndpointPort(WireStruct):
    """discovery/v1 EndpointPort."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class WireEndpointSlice(WireObject):
    """discovery/v1 EndpointSlice."""

    metadata: AnnotatedMeta | None = None
    address_type: str | None = None
    endpoints: list[WireEndpoint] | None = None
    ports: list[WireEndpointPort] | None = None


class ListMeta(WireStruct):
    """meta/v1 ListMeta."""

    resource_version: str | None = None
    continue_: str | None = msgspec.field(default=None, name="continue")


class Status(WireStruct):
    """meta/v1 Status: what the API answers instead of an object when something failed."""

    kind: str | None = None
    code: int | None = None
    reason: str | None = None
    message: str | None = None


class BookmarkMeta(WireStruct):
    """ObjectMeta of a BOOKMARK event."""

    resource_version: str | None = None
    annotations: dict[str, str] | None = None


class Bookmark(WireStruct):
    """The object of a BOOKMARK event."""

    metadata: BookmarkMeta | None = None
