"""What the proxy does for a Service, as values: one row for each address and port that can be dialled.

A row is what `netpol-ctl services` prints and what becomes a virtual server of IPVS. Who makes rows is
`proxy.plan`; what they become in the kernel is `proxy.lower`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import Family, Prefix, family_of


class Kind(StrEnum):
    """Where the address of a row comes from."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"


class Action(StrEnum):
    """What happens to a packet of an external client."""

    FORWARD = "forward"
    REJECT = "reject"
    DROP = "drop"


class Backend(NamedTuple):
    """Where packets go; weight 0 drains: connections go on, new ones do not come."""

    address: bytes
    port: int
    weight: int = 1


class RowKey(NamedTuple):
    """What is dialled; no two Services can have the same."""

    address: bytes
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """One address and port of a Service.

    Attributes:
        port: what is dialled; for NodePort the nodePort.
        scheduler, scheduler_flags: as IPVS names and numbers them (SCHED_FLAG_*).
        affinity_s: seconds of session affinity by client address; 0 for none.
        source_ranges: who may dial (LoadBalancer rows only, of the row's family); empty for everybody.
        backends, action: for a client outside the cluster.
        local_client_backends: for pods of this node and the node itself; differs with a Local policy.
        tunnel: direct server return: packets go to the backends in a tunnel, and keep their address.
        ends: endpoints of this node that such tunnels, from any node, may lead to.
    """

    service: ObjectKey
    port_name: str
    kind: Kind
    address: bytes
    port: int
    protocol: Protocol
    scheduler: str = "rr"
    scheduler_flags: int = 0
    affinity_s: int = 0
    source_ranges: tuple[Prefix, ...] = ()
    backends: tuple[Backend, ...] = ()
    local_client_backends: tuple[Backend, ...] = ()
    action: Action = Action.FORWARD
    tunnel: bool = False
    ends: tuple[bytes, ...] = ()

    @property
    def key(self) -> RowKey:
        """What is dialled."""
        return RowKey(self.address, self.protocol, self.port)

    @property
    def family(self) -> Family:
        """The family of the address."""
        return family_of(self.address)

    @property
    def is_vip(self) -> bool:
        """Whether the address is one that this node takes on (a NodePort's is the node's already)."""
        return self.kind is not Kind.NODE_PORT


class Unused(NamedTuple):
    """An endpoint that gets no traffic from a row's clients, and why, in words."""

    port_name: str
    address: bytes
    why: str


class Reason(StrEnum):
    """Why something of a Service is refused, as the reason of an Event."""

    ADDRESS_REFUSED = "AddressRefused"
    ADDRESS_IN_USE = "AddressInUse"
    ANNOTATION_INVALID = "AnnotationInvalid"
    DIRECT_RETURN_REFUSED = "DirectReturnRefused"
    SOURCE_RANGES_INVALID = "SourceRangesInvalid"


class Refused(NamedTuple):
    """A part of a Service that is not served: an Event's reason and its words."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """All that one Service needs.

    Attributes:
        rows: sorted by kind, address, port.
        unused: endpoints without traffic, for people.
        refused: addresses that are not served, each with the reason of its Event.
        health_port: spec.healthCheckNodePort, 0 for none.
        local_ready: distinct ready endpoints on this node, which the health port tells.
        policy_local: whether externalTrafficPolicy is Local.
        skipped: why the Service is not served at all, "" if it is.
    """

    service: ObjectKey
    uid: str = ""
    rows: tuple[ServiceRow, ...] = ()
    unused: tuple[Unused, ...] = ()
    refused: tuple[Refused, ...] = ()
    health_port: int = 0
    local_ready: int = 0
    policy_local: bool = False
    skipped: str = ""
