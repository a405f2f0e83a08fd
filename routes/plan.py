"""What one node routes and with whom it speaks BGP, as a value: nodes and settings in, `RoutePlan` out.

Decides who peers with whom, what may be learnt from each, and which nodes are reached through a tunnel.
How BIRD is told is `routes.bird.render`; addresses of Services come as `vips` from their own module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from netpol.model.net import (
    FAMILIES,
    Family,
    Prefix,
    collapse,
    family_of,
    format_address,
    host_prefix,
    masked,
)
from netpol.model.objects import Node
from routes.annotations import NodeBgp
from routes.members import NEVER, Member, members_of, overlap, router_id
from routes.options import (
    Community,
    Encapsulation,
    ExternalPeer,
    OverlayMode,
    RouteOptions,
)

#: The subnet around a node's address where nobody names any: IPv6's is always this (RFC 4291 section 2.5.4).
_USUAL = {Family.V4: 24, Family.V6: 64}


@dataclass(frozen=True, slots=True)
class NodePeer:
    """Another node that we speak BGP with.

    Attributes:
        accept: exactly the blocks that are learnt from it.
        client: whether we reflect routes to it, as of this cluster.
        reflects: whether it reflects routes to us.
        six: IPv4 is told with next hops of IPv6 (RFC 8950), since one of the two has no IPv4 address.
    """

    node: str
    address: bytes
    asn: int
    accept: tuple[Prefix, ...]
    client: bool = False
    reflects: bool = False
    six: bool = False


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A node whose pods are reached by encapsulation: its address and the MAC of its VXLAN link."""

    node: str
    address: bytes
    mac: bytes


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is added to what external peers are told."""

    communities: tuple[Community, ...] = ()
    prepend: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """All that one node's BGP engine does.

    Attributes:
        addresses: the node's own, one for each family it has.
        own_pods: its podCIDRs, which it announces.
        guarded: what nobody may take from it: its podCIDRs, also one that is another node's by right, since
            its pods have addresses of it.
        vips: addresses of Services that external peers are told.
        pods: podCIDRs of all nodes.
        owners: of each other node, the next hop of a family and its podCIDRs of it.
        protected: blocks that a router outside may not announce, nor a part or a whole of.
        tunnels: nodes behind the overlay; `tunnel_all` says that no other way may be taken.
        on_link: whether nodes without a tunnel are reached over their subnet; else by any route.
        local_addresses: where sessions with routers outside are bound; other nodes know `addresses` alone.
        problems: annotations and objects that are not followed, in words.
    """

    node: str
    options: RouteOptions
    asn: int
    router_id: bytes
    addresses: Mapping[Family, bytes]
    own_pods: tuple[Prefix, ...] = ()
    guarded: tuple[Prefix, ...] = ()
    vips: tuple[Prefix, ...] = ()
    pods: tuple[Prefix, ...] = ()
    owners: tuple[tuple[bytes, tuple[Prefix, ...]], ...] = ()
    peers: tuple[NodePeer, ...] = ()
    external: tuple[ExternalPeer, ...] = ()
    announcement: Announcement = Announcement()
    cluster_id: bytes | None = None
    protected: tuple[Prefix, ...] = ()
    tunnels: tuple[Tunnel, ...] = ()
    local_addresses: tuple[bytes, ...] = ()
    problems: tuple[str, ...] = field(default=(), compare=False)

    @property
    def bound(self) -> bool:
        """Whether BIRD listens at chosen addresses only."""
        return bool(self.local_addresses)


def plan(
    nodes: Iterable[Node],
    name: str,
    options: RouteOptions,
    *,
    vips: Iterable[Prefix] = (),
    services: Iterable[Prefix] = (),
) -> RoutePlan:
    """Plan for the node `name`, which must be among the nodes.

    Args:
        nodes: all of the cluster.
        name: of the node.
        options: the cluster's settings.
        vips: addresses of Services that routers outside are told.
        services: all addresses of Services, which no router outside may announce.

    Raises:
        KeyError: it is not.
    """
    problems: list[str] = []
    members = members_of(nodes, name, options, problems)
    me = members[name]
    if not me.addresses:
        problems.append(f"node {name} has no address: it speaks no BGP")
    asn = me.bgp.asn or options.asn
    pods = tuple(p for m in members.values() for p in m.pods)
    others = [m for m in members.values() if m is not me]
    mesh = tuple(_mesh(me, others, options, asn, problems))
    problems += _apart(me, others, mesh, options)
    external = _external(me, asn, options, mesh, problems)
    announced = _announced(vips, external)
    if not me.node.pod_cidrs:
        problems.append(f"node {name} has no podCIDR: it announces none")
    return RoutePlan(
        node=name,
        options=options,
        asn=asn,
        router_id=router_id(me, members.values(), problems),
        addresses=me.addresses,
        own_pods=me.pods,
        guarded=me.claimed,
        vips=announced,
        pods=tuple(sorted(set(pods))),
        owners=tuple(_owners(others)),
        peers=mesh,
        external=external,
        announcement=Announcement(me.bgp.communities, me.bgp.prepend),
        cluster_id=me.bgp.reflector_cluster,
        protected=_protected(
            me,
            members.values(),
            external,
            options,
            vips=(*announced, *_reachable(services, external)),
        ),
        tunnels=tuple(_tunnels(me, others, options)),
        local_addresses=me.bgp.local_addresses,
        problems=tuple(problems),
    )


def _mesh(
    me: Member,
    others: Iterable[Member],
    options: RouteOptions,
    asn: int,
    problems: list[str],
) -> Iterable[NodePeer]:
    """The nodes that we peer with.

    A client of a reflector (RFC 4456) speaks with the reflectors of its cluster alone; reflectors with
    everybody, each other included; other nodes with everybody but clients. Both ends decide the same.
    """
    others = list(others)
    client = me.bgp.client_cluster
    if client is not None and not any(_reflection(o.bgp, me.bgp) for o in others):
        problems.append(
            f"node {me.node.name} is a client of reflector {format_address(client)}, and no node is one"
        )
    reflected = tuple(sorted({p for o in others for p in o.pods}))
    for other in others:
        if not other.addresses:
            problems.append(f"node {other.node.name} has no address: no BGP with it")
            continue
        family = next((f for f in FAMILIES if f in me.addresses and f in other.addresses), None)
        if family is None:
            problems.append(f"node {other.node.name} has no address of a family that this node has")
            continue
        address = other.addresses[family]
        if address == me.addresses[family]:
            problems.append(f"node {other.node.name} has the address of this node: no BGP with it")
            continue
        theirs = other.bgp.asn or options.asn
        serves, served = _reflection(me.bgp, other.bgp), _reflection(other.bgp, me.bgp)
        if (serves or served) and theirs != asn:
            # RFC 4456 is about one AS.
            problems.append(
                f"node {other.node.name}: a reflector and its client need one AS, got {theirs} and {asn}"
            )
            continue
        if not (serves or served) and not (options.mesh and _meshed(me.bgp, other.bgp)):
            continue
        reflects = served or other.bgp.reflector_cluster is not None
        yield NodePeer(
            node=other.node.name,
            address=address,
            asn=theirs,
            accept=reflected if reflects else other.pods,
            client=serves,
            reflects=reflects,
            six=family is Family.V6,
        )


def _apart(
    me: Member, others: Iterable[Member], peers: Iterable[NodePeer], options: RouteOptions
) -> Iterable[str]:
    """Pods of a family that we have too, and no way to them: what BGP cannot help."""
    with_six = {p.node for p in peers if p.six}
    reflected = any(p.reflects for p in peers)
    ours = {p.family for p in me.pods}
    for other in others:
        if not me.addresses.keys() & other.addresses.keys():
            continue  # said already: there is no session
        for family in sorted(ours & {p.family for p in other.pods}):
            if family in me.addresses and family in other.addresses:
                continue
            at = f"node {other.node.name}: IPv{family.value} pods are not reached: "
            if family is Family.V6 or not (
                Family.V6 in me.addresses and Family.V6 in other.addresses
            ):
                yield f"{at}one of the nodes has no IPv{family.value} address"
            elif other.node.name not in with_six and reflected:
                yield f"{at}no reflector tells IPv4 by IPv6, as nodes without an IPv4 address need"
            elif options.encapsulation is Encapsulation.IPIP and _tunnelled(me, other, options):
                yield f"{at}ipip carries no IPv4 between IPv6 addresses (vxlan does)"


def _tunnelled(me: Member, other: Member, options: RouteOptions) -> bool:
    return any(True for _ in _tunnels(me, [other], options))


def _reflection(server: NodeBgp, client: NodeBgp) -> bool:
    """Whether one reflects to the other."""
    return (
        server.reflector_cluster is not None and client.client_cluster == server.reflector_cluster
    )


def _meshed(one: NodeBgp, two: NodeBgp) -> bool:
    """Whether two nodes that do not reflect to each other are in the mesh."""
    return one.client_cluster is None and two.client_cluster is None


def _external(
    me: Member,
    asn: int,
    options: RouteOptions,
    mesh: Iterable[NodePeer],
    problems: list[str],
) -> tuple[ExternalPeer, ...]:
    """Global peers and the node's own, which replace a global one of the same address and port."""
    everywhere = [
        replace(p, imports=replace(p.imports, reject=(*p.imports.reject, *me.bgp.reject)))
        for p in options.peers
    ]
    found = {(p.address, p.port): p for p in (*everywhere, *me.bgp.peers)}
    nodes = {p.address: p.node for p in mesh}
    out: list[ExternalPeer] = []
    for peer in found.values():
        family, shown = family_of(peer.address), format_address(peer.address)
        if family not in me.addresses and peer.local_address is None:
            problems.append(f"peer {shown}: this node has no IPv{family.value}")
        elif peer.address in me.addresses.values():
            problems.append(f"peer {shown}: this is the node itself")
        elif peer.address in nodes:
            problems.append(f"peer {shown}: this is node {nodes[peer.address]}, a peer already")
        elif peer.reflector and peer.asn != asn:
            problems.append(f"peer {shown}: a reflector has the AS of the node ({asn})")
        else:
            out.append(peer)
    return tuple(sorted(out, key=lambda p: (p.address, p.port)))


def _owners(others: Iterable[Member]) -> Iterable[tuple[bytes, tuple[Prefix, ...]]]:
    for m in others:
        for family, address in m.addresses.items():
            theirs = tuple(p for p in m.pods if p.family is family)
            if theirs:
                yield address, theirs


def _announced(vips: Iterable[Prefix], external: Iterable[ExternalPeer]) -> tuple[Prefix, ...]:
    """Without what no Service can have: who writes one must not take a router's address from it."""
    peers = {host_prefix(p.address) for p in external}
    return tuple(sorted(v for v in set(vips) - peers if not any(overlap(v, bad) for bad in NEVER)))


def _reachable(services: Iterable[Prefix], external: Iterable[ExternalPeer]) -> Iterable[Prefix]:
    """Addresses of Services to protect; where nothing is learnt from outside there is no need to."""
    return services if any(p.imports.enabled for p in external) else ()


def _protected(
    me: Member,
    members: Iterable[Member],
    external: Iterable[ExternalPeer],
    options: RouteOptions,
    *,
    vips: Iterable[Prefix],
) -> tuple[Prefix, ...]:
    """What the cluster and the node live on: no route from outside may touch it."""
    out = {*NEVER, *options.cluster_cidrs, *options.service_cidrs, *options.vip_cidrs, *vips}
    out |= {*options.subnets, *options.connected, *me.claimed}
    named = {s.family for s in options.subnets}
    for m in members:
        out |= {*m.pods, *(host_prefix(a) for a in m.node.addresses)}
        out |= {masked(a, _USUAL[f]) for f, a in m.addresses.items() if f not in named}
    out |= {host_prefix(a) for a in me.bgp.local_addresses}
    for peer in external:
        out |= {host_prefix(a) for a in (peer.address, peer.local_address) if a is not None}
    # What lies in a block of these is protected by it.
    return tuple(sorted(collapse(out), key=lambda p: (p.family, p.address, p.length)))


def _tunnels(me: Member, others: Iterable[Member], options: RouteOptions) -> Iterable[Tunnel]:
    if options.overlay is OverlayMode.NEVER:
        return
    for other in others:
        for family in FAMILIES:
            mine, theirs = me.addresses.get(family), other.addresses.get(family)
            if mine is None or theirs is None or mine == theirs:
                continue
            if options.overlay is OverlayMode.ALWAYS or not same_subnet(mine, theirs, options):
                yield Tunnel(other.node.name, theirs, vxlan_mac(other.node.name))


def same_subnet(one: bytes, two: bytes, options: RouteOptions) -> bool:
    """Whether two node addresses are on one link, as far as the subnets tell."""
    known = [s for s in options.subnets if s.family is family_of(one)]
    return not known or any(s.contains(one) and s.contains(two) for s in known)


def vxlan_mac(node: str) -> bytes:
    """The MAC of a node's VXLAN link: every node can tell everybody's (locally administered unicast)."""
    return b"\x02" + hashlib.sha256(node.encode()).digest()[:5]


def tunnel_link_local(mac: bytes) -> bytes:
    """The link-local address that belongs to a MAC (modified EUI-64, RFC 4291 appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


__all__ = [
    "Announcement",
    "Encapsulation",
    "NodePeer",
    "RoutePlan",
    "Tunnel",
    "plan",
    "same_subnet",
    "tunnel_link_local",
    "vxlan_mac",
]
