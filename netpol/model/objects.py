"""What netpol keeps of Pods, Namespaces and Nodes: what a room reads, nothing else.

`msgspec.Struct` without garbage-collector tracking, since there can be 100,000 of them.
Equality ignores nothing: resourceVersion and status noise are simply not kept.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.labels import Labels
from netpol.model.net import Prefix


class ContainerPort(NamedTuple):
    """A port that a container declares (core/v1 ContainerPort); `name` may be ""."""

    name: str
    protocol: Protocol
    number: int


class Endpoint(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What policy needs of a Pod.

    `addresses` are packed, first the primary one, as status.podIPs. `ports` hold those of the
    containers and of restartable init containers. `created` is the creation time as the API writes it
    (RFC 3339, sorts as text).
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

    @property
    def live(self) -> bool:
        """Whether the pod can hold its addresses: not Succeeded, not Failed (row 38)."""
        return self.phase not in ("Succeeded", "Failed")

    @property
    def policed(self) -> bool:
        """Whether policy sees the pod as subject and peer: live and not in the host's network."""
        return self.live and not self.host_network


class Namespace(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A Namespace: name, uid and labels (kubernetes.io/metadata.name always among them)."""

    name: str
    uid: str = ""
    labels: Labels = ()


class Node(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A Node: its addresses (InternalIP first, then ExternalIP) and podCIDRs."""

    name: str
    uid: str = ""
    labels: Labels = ()
    addresses: tuple[bytes, ...] = ()
    pod_cidrs: tuple[Prefix, ...] = ()


class ServicePort(NamedTuple):
    """A port of a Service; `target` is a number or the name of a container port."""

    name: str
    protocol: Protocol
    port: int
    target: int | str
    node_port: int = 0


class Service(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What explain and the lab need of a Service (the proxy will keep more)."""

    key: ObjectKey
    uid: str = ""
    type: str = "ClusterIP"
    cluster_ips: tuple[bytes, ...] = ()
    selector: Labels = ()
    ports: tuple[ServicePort, ...] = ()


class SliceEndpoint(NamedTuple):
    """One endpoint of an EndpointSlice; ready and serving as written, absent meaning true."""

    addresses: tuple[bytes, ...]
    node: str
    pod: ObjectKey | None
    ready: bool
    serving: bool
    terminating: bool


class EndpointSlice(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """An EndpointSlice (discovery.k8s.io/v1) of the Service `service`."""

    key: ObjectKey
    uid: str = ""
    service: ObjectKey = ObjectKey("", "")
    ports: tuple[tuple[str, Protocol, int], ...] = ()
    endpoints: tuple[SliceEndpoint, ...] = ()
