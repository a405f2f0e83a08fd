"""What netpol keeps of Pods, Namespaces, Nodes, Services and EndpointSlices: what a room reads, no more.

`msgspec.Struct` without garbage-collector tracking, since there can be 100,000 of them.
Equality ignores nothing: resourceVersion and status noise are simply not kept.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.labels import Labels
from netpol.model.net import Prefix

#: Annotations that a room reads: ours, and those of kube-router that mean the same. Others are not kept.
ANNOTATION_PREFIXES = ("netpol.io/", "kube-router.io/")


class ContainerPort(NamedTuple):
    """A port that a container declares (core/v1 ContainerPort); `name` may be ""."""

    name: str
    protocol: Protocol
    number: int


class Endpoint(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What policy needs of a Pod.

    `addresses` are packed, first the primary one, as status.podIPs. `ports` hold those of the
    containers and of restartable init containers. `created` is the creation time as the API writes it
    (RFC 3339, sorts as text). `masquerade` is the annotation of that name, None where it is absent.
    """

    key: ObjectKey
    uid: str
    labels: Labels = ()
    node: str = ""
    phase: str = "Running"
    addresses: tuple[bytes, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    host_network: bool = False
    terminating: bool = False
    created: str = ""
    masquerade: bool | None = None

    @property
    def live(self) -> bool:
        """Whether the pod can hold its addresses: not Succeeded, not Failed (row 38)."""
        return self.phase not in ("Succeeded", "Failed")

    @property
    def policed(self) -> bool:
        """Whether policy sees the pod as subject and peer: live and not in the host's network."""
        return self.live and not self.host_network


class Namespace(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A Namespace: name, uid and labels (kubernetes.io/metadata.name always among them).

    `masquerade` is the annotation of that name, for its pods that have none.
    """

    name: str
    uid: str = ""
    labels: Labels = ()
    masquerade: bool | None = None


#: The label that says where a node is (core/v1 LabelTopologyZone).
ZONE_LABEL = "topology.kubernetes.io/zone"


class Node(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A Node: its addresses (InternalIP first, then ExternalIP) and podCIDRs.

    `annotations` are those under ANNOTATION_PREFIXES; `created` as in `Endpoint`. One that is `leaving` is
    being deleted, or the cluster's autoscaler is about to.
    """

    name: str
    uid: str = ""
    labels: Labels = ()
    addresses: tuple[bytes, ...] = ()
    pod_cidrs: tuple[Prefix, ...] = ()
    annotations: Labels = ()
    created: str = ""
    leaving: bool = False

    def __repr__(self) -> str:
        """Without annotations: they may hold passwords of BGP peers."""
        return f"Node({self.name!r}, uid={self.uid!r})"

    @property
    def zone(self) -> str:
        """The zone of the node, "" for none."""
        return next((v for k, v in self.labels if k == ZONE_LABEL), "")


class ServicePort(NamedTuple):
    """A port of a Service; `target` is a number or the name of a container port."""

    name: str
    protocol: Protocol
    port: int
    target: int | str
    node_port: int = 0


class Ingress(NamedTuple):
    """One entry of status.loadBalancer.ingress.

    `address` is b"" where there is only a host name. A `proxied` address (ipMode Proxy) is the load
    balancer's own: packets to it must get there, so no node takes it on.
    """

    address: bytes
    hostname: str = ""
    proxied: bool = False


class Service(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What explain, the lab and the proxy need of a Service; absent fields as the API defaults them.

    Attributes:
        headless: clusterIP None.
        foreign: labelled for another proxy, or as headless, which kube-proxy does not look at either.
        internal_local, external_local: the traffic policies are Local.
        affinity_s: seconds of session affinity by client address, 0 for none.
        source_ranges: spec.loadBalancerSourceRanges that could be read.
        source_ranges_unread: one of them could not.
        annotations: those of netpol and kube-router alone.
        requested_ip: spec.loadBalancerIP as written.
        created: the creation time as the API writes it (RFC 3339, sorts as text).
    """

    key: ObjectKey
    uid: str = ""
    type: str = "ClusterIP"
    cluster_ips: tuple[bytes, ...] = ()
    selector: Labels = ()
    ports: tuple[ServicePort, ...] = ()
    headless: bool = False
    foreign: bool = False
    external_name: str = ""
    external_ips: tuple[bytes, ...] = ()
    ingress: tuple[Ingress, ...] = ()
    internal_local: bool = False
    external_local: bool = False
    traffic_distribution: str = ""
    affinity_s: int = 0
    source_ranges: tuple[Prefix, ...] = ()
    source_ranges_unread: bool = False
    load_balancer_class: str = ""
    requested_ip: str = ""
    health_port: int = 0
    publish_not_ready: bool = False
    annotations: Labels = ()
    created: str = ""
    terminating: bool = False

    @property
    def outside_addresses(self) -> tuple[bytes, ...]:
        """Addresses outside the cluster that lead to the Service, whoever takes them on."""
        return self.external_ips + tuple(i.address for i in self.ingress if i.address)


class SliceEndpoint(NamedTuple):
    """One endpoint of an EndpointSlice; ready and serving as written, absent meaning true.

    `for_zones` and `for_nodes` are its hints: where it should be used.
    """

    addresses: tuple[bytes, ...]
    node: str
    pod: ObjectKey | None
    ready: bool
    serving: bool
    terminating: bool
    zone: str = ""
    for_zones: tuple[str, ...] = ()
    for_nodes: tuple[str, ...] = ()


class EndpointSlice(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """An EndpointSlice (discovery.k8s.io/v1) of the Service `service`.

    Attributes:
        address_type: IPv4, IPv6 or FQDN; "" in a manifest that does not say it.
        ports: name, protocol, number; number 0 is one that was not given.
        foreign: labelled for another proxy, or as that of a headless Service.
        annotations: those of netpol alone.
    """

    key: ObjectKey
    uid: str = ""
    service: ObjectKey = ObjectKey("", "")
    address_type: str = ""
    ports: tuple[tuple[str, Protocol, int], ...] = ()
    endpoints: tuple[SliceEndpoint, ...] = ()
    foreign: bool = False
    annotations: Labels = ()
