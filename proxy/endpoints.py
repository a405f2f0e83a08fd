"""Which endpoints a port of a Service uses on this node, as kube-proxy 1.34 chooses them. Pure.

What is chosen from is read first (`candidates`): the slices of a Service, without repetitions. The choice
is made twice, since a Service can need both: among all endpoints (policy Cluster) and among those of this
node (policy Local). In either:

1. ready endpoints are used; with policy Cluster only those hinted for this node, or else for its zone,
   if every ready endpoint has such a hint and one of them names this node, or its zone;
2. if there is none, endpoints that terminate and still serve are used, whatever their hints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from netpol.model.ids import Protocol
from netpol.model.net import Family, family_of
from netpol.model.objects import EndpointSlice, Node, SliceEndpoint
from proxy.annotations import Weights, slice_weight
from proxy.rows import Backend, Unused

#: Types of slices that hold addresses; "" is a manifest that does not say which.
_ADDRESS_TYPES = {"": None, "IPv4": Family.V4, "IPv6": Family.V6}


class Candidate(NamedTuple):
    """An endpoint at one port."""

    address: bytes
    port: int
    node: str
    local: bool
    ready: bool
    fading: bool  # terminates, and still serves
    terminating: bool
    for_zones: tuple[str, ...]
    for_nodes: tuple[str, ...]
    weight: int
    zone: str

    @property
    def backend(self) -> Backend:
        """As a backend that takes connections."""
        return Backend(self.address, self.port, self.weight)

    @property
    def draining(self) -> Backend:
        """As a backend that takes no new ones."""
        return Backend(self.address, self.port, 0)


class Topology(StrEnum):
    """What hints are followed."""

    NONE = ""
    NODE = "node"
    ZONE = "zone"


@dataclass(frozen=True, slots=True)
class Choice:
    """The endpoints of a port, for either policy; those that drain have weight 0.

    Attributes:
        exists: whether any endpoint could be used somewhere.
        cluster_serves, local_serves: whether one of them takes new connections.
    """

    cluster: tuple[Backend, ...] = ()
    local: tuple[Backend, ...] = ()
    exists: bool = False
    cluster_serves: bool = False
    local_serves: bool = False


def usable(slices: Iterable[EndpointSlice]) -> list[EndpointSlice]:
    """The slices that a proxy looks at, in order of their names."""
    found = [s for s in slices if not s.foreign and s.address_type in _ADDRESS_TYPES]
    found.sort(key=lambda s: s.key)
    return found


def slice_endpoints(piece: EndpointSlice, family: Family) -> Iterable[SliceEndpoint]:
    """The endpoints of a slice in one family; an endpoint's first address is the one that counts."""
    if _ADDRESS_TYPES[piece.address_type] not in (None, family):
        return ()
    width = family.bits // 8
    return (e for e in piece.endpoints if e.addresses and len(e.addresses[0]) == width)


def candidates(
    slices: Sequence[EndpointSlice],
    *,
    port_name: str,
    protocol: Protocol,
    family: Family,
    node: str,
    weights: Weights | None = None,
) -> list[Candidate]:
    """The endpoints of one port in one family, sorted, each address and port once.

    Of an endpoint that stands there twice the first one counts, unless a later one is on this node.

    Args:
        slices: those of the Service, from `usable`.
        port_name: of the Service's port; names and protocols must match.
        protocol: of the port.
        family: of the endpoints.
        node: the name of this node.
        weights: as the Service asks for.
    """
    found: dict[tuple[bytes, int], Candidate] = {}
    for piece in slices:
        numbers = [n for name, proto, n in piece.ports if name == port_name and proto is protocol]
        if not any(numbers):
            continue  # no such port, or one without a number
        common = slice_weight(piece.annotations) if piece.annotations else None
        for entry in slice_endpoints(piece, family):
            address = entry.addresses[0]
            local = entry.node == node != ""
            weight = weights.of(address, entry.pod, entry.node) if weights else None
            for number in numbers:
                at = (address, number)
                if number and (local or at not in found):
                    found[at] = Candidate(
                        address,
                        number,
                        entry.node,
                        local,
                        entry.ready,
                        not entry.ready and entry.serving and entry.terminating,
                        entry.terminating,
                        entry.for_zones,
                        entry.for_nodes,
                        weight or common or 1,
                        entry.zone,
                    )
    return [found[at] for at in sorted(found)]


def topology(found: Sequence[Candidate], node: str, zone: str) -> Topology:
    """Which hints are followed: they must be complete among ready endpoints, and name this place."""
    ready = [c for c in found if c.ready]
    if not ready:
        return Topology.NONE
    if all(c.for_nodes for c in ready) and any(node in c.for_nodes for c in ready):
        return Topology.NODE
    if all(c.for_zones for c in ready) and any(zone in c.for_zones for c in ready):
        return Topology.ZONE
    return Topology.NONE


def choose(found: Sequence[Candidate], *, node: Node, drains: bool) -> Choice:
    """Choose among the endpoints of a port.

    Args:
        found: from `candidates`.
        node: this node.
        drains: whether endpoints that go away are kept with weight 0 beside those that serve.
    """
    if not found:
        return Choice()
    mode = topology(found, node.name, node.zone)
    here = _hinted(mode, node.name, node.zone)
    fades = _fading(mode, node.zone, here) if drains else None
    cluster, cluster_serves = _pick(found, here, fades)
    local_fades = _everywhere if drains else None
    local, local_serves = _pick([c for c in found if c.local], _everywhere, local_fades)
    exists = any(c.ready or c.fading for c in found)
    return Choice(cluster, local, exists, cluster_serves, local_serves)


_Test = Callable[[Candidate], bool]


def _everywhere(_candidate: Candidate) -> bool:
    return True


def _hinted(mode: Topology, node: str, zone: str) -> _Test:
    match mode:
        case Topology.NODE:
            return lambda c: node in c.for_nodes
        case Topology.ZONE:
            return lambda c: zone in c.for_zones
        case Topology.NONE:
            return _everywhere


def _fading(mode: Topology, zone: str, here: _Test) -> _Test:
    """Whether an endpoint that goes away was used here.

    Hints are taken from endpoints that are not ready; it was hinted for where it is.
    """
    if mode is Topology.NODE:
        return lambda c: here(c) if c.for_nodes else c.local
    if mode is Topology.ZONE:
        return lambda c: here(c) if c.for_zones else c.zone in ("", zone)
    return _everywhere


def _pick(
    found: Sequence[Candidate], here: _Test, fades: _Test | None
) -> tuple[tuple[Backend, ...], bool]:
    """The backends of one policy, and whether one of them takes new connections.

    Args:
        found: the endpoints that the policy allows.
        here: whether a ready one is for this place.
        fades: whether one that goes away drains here; None where nothing drains.
    """
    ready = [c for c in found if c.ready and here(c)]
    if not ready:
        fading = tuple(c.backend for c in found if c.fading)
        return fading, bool(fading)
    if fades is not None and len(ready) < len(found):
        fading = tuple(c.draining for c in found if c.fading and fades(c))
        if fading:
            return tuple(sorted((*(c.backend for c in ready), *fading))), True
    return tuple(c.backend for c in ready), True


# -- for people ---------------------------------------------------------------------------------


def unused(
    found: Sequence[Candidate], *, node: Node, port_name: str, local_policies: Sequence[str]
) -> Iterable[Unused]:
    """The endpoints that (some) clients do not reach, and why.

    Args:
        found: from `candidates`.
        node: this node.
        port_name: of the Service's port.
        local_policies: names of the traffic policies that are Local.
    """
    mode = topology(found, node.name, node.zone)
    here = _hinted(mode, node.name, node.zone)
    any_ready = any(c.ready for c in found)
    local_ready = any(c.ready and c.local for c in found)
    for c in found:
        by_local = bool(local_policies) and c.local
        why = ""
        if not c.ready and not c.fading:
            why = "it terminates and serves no more" if c.terminating else "it is not ready"
        elif c.fading and any_ready and not (by_local and not local_ready):
            why = "it terminates, and others are ready"
        elif c.ready and not here(c) and not by_local:
            wanted = c.for_nodes if mode is Topology.NODE else c.for_zones
            why = f"its hint is for {mode.value} {', '.join(wanted)}"
        elif local_policies and not c.local:
            where = "its node is not known" if not c.node else "it is on another node"
            why = f"{where}, and {' and '.join(local_policies)} Local wants those of this node"
        if why:
            yield Unused(port_name, c.address, why)


def mismatched(
    slices: Sequence[EndpointSlice], *, port_name: str, protocol: Protocol, family: Family
) -> Iterable[Unused]:
    """Endpoints whose slices have no such port."""
    shown = f"{port_name}/{protocol}" if port_name else f"unnamed {protocol}"
    for piece in slices:
        if not any(name == port_name and proto is protocol and n for name, proto, n in piece.ports):
            for entry in slice_endpoints(piece, family):
                why = f"its slice {piece.key.name} has no port {shown}"
                yield Unused(port_name, entry.addresses[0], why)


def local_ready(slices: Iterable[EndpointSlice], *, family: Family, node: str) -> set[bytes]:
    """The addresses of ready endpoints on this node: what a health check port counts."""
    return {
        e.addresses[0]
        for piece in slices
        if any(n for _, _, n in piece.ports)
        for e in slice_endpoints(piece, family)
        if e.ready and e.node == node != ""
    }


def families(addresses: Iterable[bytes]) -> dict[Family, bytes]:
    """The first address of each family."""
    found: dict[Family, bytes] = {}
    for address in addresses:
        found.setdefault(family_of(address), address)
    return found
