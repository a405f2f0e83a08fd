"""One end of a connection, resolved: the addresses behind a reference, in parts that policy tells apart.

A pod is one part; a Service is one part for each backend and port; a CIDR is one part for each pod,
node and ipBlock boundary inside it, so that the whole block is judged and not one address of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from netpol.ctl.ports import Ports, Span
from netpol.ctl.refs import Ref, RefKind
from netpol.ctl.source import Cluster
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.flow import Party, PartyKind
from netpol.model.ids import ObjectKey
from netpol.model.net import Family, Prefix, family_of, format_address, host_prefix
from netpol.model.objects import Endpoint, EndpointSlice, Service
from netpol.model.policy import BlockPeer
from netpol.policy.world import World

#: Most parts that a CIDR is cut into; beyond that the question is too wide to be answered in time.
PARTS_MAX = 50_000


@dataclass(frozen=True, slots=True)
class Part:
    """Addresses that policy treats alike.

    Attributes:
        party: stands for all of them.
        label: how people name it.
        pod: the pod behind it, also one in the host's network (which no policy sees).
        prefixes: all addresses of the part.
        spans: the ports on it that the question is about, where the end decides that (a Service).
    """

    party: Party
    label: str
    pod: Endpoint | None
    prefixes: tuple[Prefix, ...]
    spans: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class End:
    """A resolved reference. `service` is set when it leads to a Service's backends."""

    label: str
    parts: tuple[Part, ...]
    service: Service | None = None
    is_block: bool = False
    notes: tuple[str, ...] = ()


def families(cluster: Cluster, ref: Ref) -> tuple[Family, ...]:
    """The families in which a reference has addresses, the first one first."""
    match ref.kind:
        case RefKind.POD:
            return _families(find_pod(cluster, ref).addresses)
        case RefKind.NODE:
            return _families(_node_addresses(cluster, ref))
        case RefKind.SERVICE:
            service = find_service(cluster, ref.key, ref.text)
            backends = [
                a for s in _slices(cluster, service) for e in s.endpoints for a in e.addresses
            ]
            return _families([*service.cluster_ips, *backends])
        case RefKind.BLOCK:
            block = ref.block
            return (block.family,) if block else ()


def resolve(cluster: Cluster, ref: Ref, *, family: Family, ports: Iterable[Ports] | None) -> End:
    """Resolve a reference in one family.

    Args:
        cluster: the world.
        ref: the reference.
        family: of the addresses.
        ports: for a destination, what is asked about (empty: everything it declares); None for a
            source.

    Raises:
        NoAnswerError: no such object, or it has no address.
    """
    match ref.kind:
        case RefKind.POD:
            pod = find_pod(cluster, ref)
            return End(str(pod.key), (_pod_part(cluster.world, pod, family),))
        case RefKind.NODE:
            return _node(cluster, ref, family)
        case RefKind.SERVICE:
            service = find_service(cluster, ref.key, ref.text)
            return _service(cluster, service, family=family, ports=ports)
        case RefKind.BLOCK:
            return _block(cluster, ref, ports)


# -- objects ------------------------------------------------------------------------------------


def find_pod(cluster: Cluster, ref: Ref) -> Endpoint:
    """The pod of a reference.

    Raises:
        NoAnswerError: there is none.
    """
    pod = cluster.world.pod(ref.key)
    if pod is None:
        hint = ""
        others = sorted(k.namespace for k in cluster.world.pods if k.name == ref.key.name)
        if others:
            hint = f"there is one in {', '.join(others[:5])}"
        raise NoAnswerError(f"no pod {ref.key}", got=hint)
    return pod


def find_service(cluster: Cluster, key: ObjectKey, text: str) -> Service:
    """A Service by name.

    Raises:
        NoAnswerError: there is none.
    """
    service = cluster.world.services.get(key)
    if service is None:
        raise NoAnswerError(f"no service {key} ({text})")
    return service


def _node_addresses(cluster: Cluster, ref: Ref) -> tuple[bytes, ...]:
    name = ref.key.name
    node = cluster.world.nodes.get(name)
    if node is None and name not in cluster.node_names:
        raise NoAnswerError(f"no node {name}")
    own = node.addresses if node else ()
    hosted = [
        a
        for p in cluster.world.pods.values()
        if p.host_network and p.node == name and p.live
        for a in p.addresses
    ]
    addresses = tuple(dict.fromkeys([*own, *hosted]))
    if not addresses:
        raise NoAnswerError(f"node {name} has no address", needed="a Node object with addresses")
    return addresses


def _node(cluster: Cluster, ref: Ref, family: Family) -> End:
    addresses = [a for a in _node_addresses(cluster, ref) if family_of(a) is family]
    if not addresses:
        raise NoAnswerError(f"node {ref.key.name} has no IPv{int(family)} address")
    address = addresses[0]
    party = Party(PartyKind.NODE, address, ref.key.name, node=ref.key.name)
    part = Part(party, f"node/{ref.key.name}", None, (host_prefix(address),))
    return End(part.label, (part,))


def _pod_part(world: World, pod: Endpoint, family: Family) -> Part:
    party = world.pod_party(pod, family)
    if party is None:
        if not pod.live:
            raise NoAnswerError(f"pod {pod.key} has ended ({pod.phase}): it has no address")
        if not any(family_of(a) is family for a in pod.addresses):
            raise NoAnswerError(f"pod {pod.key} has no IPv{int(family)} address")
        raise NoAnswerError(f"pod {pod.key}: a younger pod has its address")
    label = f"{pod.key} (host network)" if pod.host_network else str(pod.key)
    return Part(party, label, pod, (host_prefix(party.address),))


def address_part(cluster: Cluster, address: bytes) -> Part:
    """Whoever has an address now."""
    party = cluster.world.party(address)
    label = format_address(address)
    if party.kind is PartyKind.POD:
        label = party.name
    elif party.kind is PartyKind.NODE:
        label = f"node/{party.name} ({label})" if party.name else label
    return Part(party, label, party.endpoint, (host_prefix(address),))


def _families(addresses: Iterable[bytes]) -> tuple[Family, ...]:
    return tuple(dict.fromkeys(family_of(a) for a in addresses))


# -- Services -----------------------------------------------------------------------------------


def _slices(cluster: Cluster, service: Service) -> Iterator[EndpointSlice]:
    return (s for s in cluster.world.slices if s.service == service.key)


def _service(
    cluster: Cluster, service: Service, *, family: Family, ports: Iterable[Ports] | None
) -> End:
    label = f"svc/{service.key}"
    headless = service.key in cluster.headless
    asked = list(ports) if ports is not None else None
    merged: dict[bytes, tuple[Part, list[Span]]] = {}
    for piece in _slices(cluster, service):
        spans = _backend_spans(service, piece, asked, headless=headless)
        for endpoint in piece.endpoints:
            if not (endpoint.ready or (endpoint.serving and endpoint.terminating)):
                continue
            for address in endpoint.addresses[:1]:
                if family_of(address) is family:
                    _, found = merged.setdefault(
                        address, (_backend(cluster, address, endpoint.pod), [])
                    )
                    found.extend(s for s in spans if s not in found)
    if not merged:
        raise NoAnswerError(f"service {service.key} has no ready IPv{int(family)} backend")
    if asked is not None and not any(spans for _, spans in merged.values()):
        wanted = ", ".join(p.text for p in asked)
        listed = ", ".join(f"{p.port}/{p.protocol}" for p in service.ports) or "none"
        raise NoAnswerError(
            f"service {service.key} has no port {wanted}", got=f"its ports: {listed}"
        )
    parts = tuple(
        Part(p.party, p.label, p.pod, p.prefixes, tuple(spans) if asked is not None else None)
        for p, spans in merged.values()
    )
    return End(label, parts, service=service)


def _backend(cluster: Cluster, address: bytes, pod: ObjectKey | None) -> Part:
    part = address_part(cluster, address)
    found = cluster.world.pod(pod) if pod else None
    if found is not None and found.host_network:
        return Part(part.party, f"{found.key} (host network)", found, part.prefixes)
    return part


def _backend_spans(
    service: Service, piece: EndpointSlice, asked: list[Ports] | None, *, headless: bool
) -> list[Span]:
    """The ports on a slice's backends that the asked ports of the Service lead to."""
    if asked is None:
        return []
    if headless and asked and not any(p.name for p in asked):
        # No translation: the client connects to the pod's own port.
        return [Span(p.protocol, p.first, p.last) for p in asked if p.protocol]
    numbers = {(name, protocol): number for name, protocol, number in piece.ports}
    out = []
    for port in service.ports:
        number = numbers.get((port.name, port.protocol))
        if number and (
            not asked or any(_asks(a, port.name, port.protocol, port.port) for a in asked)
        ):
            out.append(Span(port.protocol, number, number))
    return out


def _asks(ports: Ports, name: str, protocol: str, number: int) -> bool:
    if ports.name:
        return ports.name == name and ports.protocol in (None, protocol)
    return ports.protocol == protocol and ports.first <= number <= ports.last


# -- blocks -------------------------------------------------------------------------------------


def _block(cluster: Cluster, ref: Ref, ports: Iterable[Ports] | None) -> End:
    block = ref.block
    if block is None:
        raise InputError(f"not an address: {ref.text!r}")
    world = cluster.world
    if block.is_host and ports is not None:
        party = world.party(block.address)
        key = cluster.external_ips.get(block.address)
        if party.kind is PartyKind.SERVICE:
            ns, _, name = party.name.partition("/")
            key = ObjectKey(ns, name)
        if key is not None and party.kind in (PartyKind.SERVICE, PartyKind.EXTERNAL):
            service = find_service(cluster, key, ref.text)
            end = _service(cluster, service, family=block.family, ports=ports)
            text = f"{format_address(block.address)} is an address of service {key}"
            if party.kind is PartyKind.EXTERNAL:
                text += (
                    "; how an external or load-balancer address is judged from inside the cluster "
                    "is left open by the API: here after translation to the backends"
                )
            return End(f"{ref.text} (svc/{key})", end.parts, service=service, notes=(text,))
    if block.is_host:
        part = address_part(cluster, block.address)
        return End(part.label, (part,))
    parts = tuple(_split(cluster, block))
    return End(ref.text, parts, is_block=True)


def _split(cluster: Cluster, block: Prefix) -> Iterator[Part]:
    """Cut a block wherever policy could tell two of its addresses apart."""
    size = len(block.address)
    bits = size * 8
    start = int.from_bytes(block.address, "big")
    stop = start + (1 << (bits - block.length))
    cuts = {start}
    for piece in _boundaries(cluster.world):
        if piece.family is block.family:
            low = int.from_bytes(piece.address, "big")
            high = low + (1 << (bits - piece.length))
            cuts.update(v for v in (low, high) if start < v < stop)
    if len(cuts) > PARTS_MAX:
        raise InputError(
            f"{block} holds too many pods and policy boundaries",
            needed=f"a block with at most {PARTS_MAX}",
            got=f"{len(cuts)}",
        )
    ordered = [*sorted(cuts), stop]
    for low, high in itertools.pairwise(ordered):
        address = low.to_bytes(size, "big")
        part = address_part(cluster, address)
        yield Part(part.party, part.label, part.pod, tuple(_cover(low, high, size)))


def _boundaries(world: World) -> Iterator[Prefix]:
    blocks: set[Prefix] = set()
    for policy in world.policies.values():
        for rule in (*policy.ingress, *policy.egress):
            for peer in rule.peers or ():
                if isinstance(peer, BlockPeer):
                    blocks.update((peer.cidr, *peer.excepts))
    yield from blocks
    for pod in world.pods.values():
        yield from map(host_prefix, pod.addresses)
    for node in world.nodes.values():
        yield from map(host_prefix, node.addresses)


def _cover(low: int, high: int, size: int) -> Iterator[Prefix]:
    """The fewest prefixes that make up low..high-1."""
    bits = size * 8
    while low < high:
        length = bits - min(
            (low & -low).bit_length() - 1 if low else bits, (high - low).bit_length() - 1
        )
        yield Prefix(low.to_bytes(size, "big"), length)
        low += 1 << (bits - length)
