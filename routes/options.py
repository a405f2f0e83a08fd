"""What the routes room is told: the cluster's settings, and those of one BGP peer.

Values only; `routes.annotations` reads those of a node from its annotations, the agent's settings give the
rest. A password never shows in a `repr`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from netpol.model.net import Prefix

#: The AS of a cluster that names none: private (RFC 6996), and kube-router's default.
DEFAULT_ASN = 64512
ASN_MAX = 0xFFFF_FFFF
#: Nobody has these: RFC 7607, RFC 6793 section 9 (AS_TRANS), RFC 7300.
NO_ASNS = (0, 23456, 65535, ASN_MAX)
#: RFC 4271 section 4.2: a hold time is 0 or at least three seconds; without keepalives nobody notices.
HOLD_MIN_S = 3
#: The kernel keeps at most this many characters of a TCP-MD5 key (TCP_MD5SIG_MAXKEYLEN).
PASSWORD_MAX = 80
#: RFC 7348: the port of VXLAN.
VXLAN_PORT = 4789
#: RFC 4271: the port of BGP.
BGP_PORT = 179


class OverlayMode(StrEnum):
    """When pod traffic between nodes is tunnelled."""

    NEVER = "never"
    CROSS_SUBNET = "cross-subnet"
    ALWAYS = "always"


class Encapsulation(StrEnum):
    """How it is tunnelled."""

    VXLAN = "vxlan"
    IPIP = "ipip"


@dataclass(frozen=True, slots=True)
class Community:
    """A BGP community (RFC 1997), or a large one (RFC 8092) where `local` is given."""

    admin: int
    value: int
    local: int | None = None

    def __str__(self) -> str:
        tail = "" if self.local is None else f":{self.local}"
        return f"{self.admin}:{self.value}{tail}"


@dataclass(frozen=True, slots=True)
class ImportPolicy:
    """What is learnt from a peer outside the cluster. What protects the cluster holds whatever stands here.

    Attributes:
        enabled: default is to learn nothing.
        only: blocks whose routes are taken (they and what lies in them); empty for all.
        reject: blocks whose routes are not.
        default_route: whether 0.0.0.0/0 and ::/0 may come.
        limit: routes of a family that are kept at most.
    """

    enabled: bool = False
    only: tuple[Prefix, ...] = ()
    reject: tuple[Prefix, ...] = ()
    default_route: bool = False
    limit: int = 1000


@dataclass(frozen=True, slots=True)
class ExternalPeer:
    """A BGP router outside the mesh of nodes.

    Attributes:
        local_address: source of the session; None for the node's address of the peer's family.
        multihop: routers between, as a TTL; 0 for a peer on a link of the node.
        reflector: it reflects the routes of nodes (RFC 4456): their podCIDRs are learnt from it.
        bfd: whether its death is noticed by BFD (RFC 5880).
        export: blocks of what would be announced that are; empty for all.
        prepend: an AS and how often it is put before the path.
        local_pref: for what is learnt from it.
    """

    address: bytes
    asn: int
    port: int = BGP_PORT
    password: str = field(default="", repr=False)
    local_address: bytes | None = None
    multihop: int = 0
    ttl_security: bool = False
    bfd: bool = False
    graceful_restart: bool = True
    reflector: bool = False
    imports: ImportPolicy = ImportPolicy()
    export: tuple[Prefix, ...] = ()
    communities: tuple[Community, ...] = ()
    prepend: tuple[int, int] | None = None
    local_pref: int | None = None
    med: int | None = None
    hold_s: int = 90
    keepalive_s: int = 0


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """Settings of the whole cluster.

    Attributes:
        interface: the node's link to the others.
        cluster_cidrs: pod ranges that nodes' podCIDRs must lie in; empty for no such bound.
        service_cidrs: ranges that nobody outside may announce.
        vip_cidrs: ranges of external and load balancer addresses, which nobody outside may announce either.
        connected: other networks that the node has a link to, which nobody outside may announce.
        subnets: L2 segments; nodes in the same one reach each other without a router. Empty: all do.
        accept: encapsulations that are taken from nodes besides one's own, while a cluster changes over.
        mesh: whether every node peers with every other.
        peers: routers that every node peers with.
        advertise_pod_cidr: whether they are told this node's podCIDRs.
        advertise_cluster_ip, advertise_external_ip, advertise_load_balancer_ip: which addresses of
            Services they are told; a Service's annotation says otherwise for itself.
        restart_s: how long peers keep our routes while BIRD restarts (RFC 4724).
        drain: announce with the graceful-shutdown community (RFC 8326), to be left alone.
    """

    interface: str = "eth0"
    asn: int = DEFAULT_ASN
    cluster_cidrs: tuple[Prefix, ...] = ()
    service_cidrs: tuple[Prefix, ...] = ()
    vip_cidrs: tuple[Prefix, ...] = ()
    subnets: tuple[Prefix, ...] = ()
    connected: tuple[Prefix, ...] = ()
    overlay: OverlayMode = OverlayMode.CROSS_SUBNET
    encapsulation: Encapsulation = Encapsulation.VXLAN
    accept: tuple[Encapsulation, ...] = ()
    mesh: bool = True
    peers: tuple[ExternalPeer, ...] = ()
    advertise_pod_cidr: bool = True
    advertise_cluster_ip: bool = False
    advertise_external_ip: bool = False
    advertise_load_balancer_ip: bool = False
    hold_s: int = 90
    keepalive_s: int = 0
    graceful_restart: bool = True
    restart_s: int = 120
    listen_port: int = BGP_PORT
    drain: bool = False
    run_dir: str = "/run/netpol/bird"
