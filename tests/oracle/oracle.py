"""The slow obvious evaluator: NetworkPolicy's meaning written down a second time.

Owns one question, `allowed`, answered from plain manifests by loops alone. It shares no line with
the product (no import of netpol), so that a mistake has to be made twice to go unseen. It does not
own speed, reasons, or anything about the kernel. Numbers in comments are rows of the semantics table.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
PORT_PROTOCOLS = ("TCP", "UDP", "SCTP")
#: core/v1 IsValidPortName: IANA_SVC_NAME, at most 15 characters.
PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z")


class NoAddressError(LookupError):
    """A pod that cannot take part in a flow: it is unknown, or has no address of the family."""


# -- text to addresses --------------------------------------------------------------------------


def read_address(text: str) -> Address:
    """Read an address; octets with leading zeros are decimal (50), v4-mapped is v4 (51)."""
    if ":" in text:
        address = ipaddress.IPv6Address(text)
        return address.ipv4_mapped or address
    octets = [int(octet) for octet in text.split(".") if re.fullmatch(r"[0-9]+", octet)]
    if len(octets) != 4 or text.count(".") != 3:
        raise ValueError(text)
    return ipaddress.IPv4Address(".".join(map(str, octets)))


def read_network(text: str) -> Network:
    """Read a CIDR; host bits are dropped (50), a block inside ::ffff:0:0/96 is a v4 block (51)."""
    head, slash, tail = text.partition("/")
    if not slash or not re.fullmatch(r"[0-9]+", tail):
        raise ValueError(text)
    length = int(tail)
    if ":" not in head:
        return ipaddress.IPv4Network((int(read_address(head)), length), strict=False)
    network = ipaddress.IPv6Network((int(ipaddress.IPv6Address(head)), length), strict=False)
    if network.prefixlen >= 96 and network.subnet_of(V4_MAPPED):
        low = int(network.network_address) & 0xFFFFFFFF
        return ipaddress.IPv4Network((low, network.prefixlen - 96))
    return network


# -- the world ----------------------------------------------------------------------------------


def items(source: Any) -> list[Any]:
    """A list that may be absent."""
    return list(source or [])


def name_of(thing: Json) -> str:
    return str(thing["metadata"]["name"])


def namespace_of(thing: Json) -> str:
    return str(thing["metadata"].get("namespace") or "default")


def reference(pod: Json) -> str:
    return f"{namespace_of(pod)}/{name_of(pod)}"


def labels_of(thing: Json) -> dict[str, str]:
    return dict(thing["metadata"].get("labels") or {})


def namespace_labels(world: Json, name: str) -> dict[str, str]:
    """Labels of a namespace; its name is always one of them (34)."""
    found: dict[str, str] = {}
    for namespace in items(world.get("namespaces")):
        if name_of(namespace) == name:
            found = labels_of(namespace)
    found["kubernetes.io/metadata.name"] = name
    return found


def live(pod: Json) -> bool:
    """Whether the pod can hold an address: a finished one has given it back (38); terminating counts (39)."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def host_network(pod: Json) -> bool:
    return bool((pod.get("spec") or {}).get("hostNetwork"))


def pod_addresses(pod: Json) -> list[Address]:
    status = pod.get("status") or {}
    texts = [entry["ip"] for entry in items(status.get("podIPs"))]
    if not texts and status.get("podIP"):
        texts = [status["podIP"]]
    return [read_address(text) for text in texts]


def node_addresses(world: Json, node: str) -> list[Address]:
    """The node's own addresses, and those of the hostNetwork pods on it, which share them (79a)."""
    found = []
    for candidate in items(world.get("nodes")):
        if name_of(candidate) == node:
            for entry in items((candidate.get("status") or {}).get("addresses")):
                if entry["type"] not in ("InternalIP", "ExternalIP"):
                    continue
                found.append(read_address(entry["address"]))
    for pod in items(world.get("pods")):
        if host_network(pod) and live(pod) and (pod["spec"].get("nodeName") or "") == node:
            found.extend(pod_addresses(pod))
    return found


def owner(world: Json, address: Address) -> Json | None:
    """The pod that policy sees behind an address: live, not in the host's network; the newest wins (38)."""
    found: list[Json] = [
        pod
        for pod in items(world.get("pods"))
        if live(pod) and not host_network(pod) and address in pod_addresses(pod)
    ]
    found.sort(
        key=lambda p: (p["metadata"].get("creationTimestamp") or "", p["metadata"].get("uid") or "")
    )
    return found[-1] if found else None


class End(NamedTuple):
    """One end of a flow."""

    address: Address
    pod: Json | None


class Probe(NamedTuple):
    """The connection that is judged."""

    src: End
    dst: End
    protocol: str
    port: int | None


def ends(world: Json, src: str, dst: str, family: int | None) -> tuple[End, End]:
    """Both ends, in one family: the destination's first address that the source can speak to."""

    def choices(text: str) -> list[Address]:
        if "/" not in text:
            return [read_address(text)]
        for pod in items(world.get("pods")):
            if reference(pod) == text:
                addresses = pod_addresses(pod)
                if not addresses and host_network(pod):
                    addresses = node_addresses(world, pod["spec"].get("nodeName") or "")
                return addresses
        raise NoAddressError(text)

    for to in choices(dst):
        for source in choices(src):
            if source.version == to.version and family in (None, to.version):
                return End(source, owner(world, source)), End(to, owner(world, to))
    raise NoAddressError(f"{src} -> {dst}")


# -- selectors ----------------------------------------------------------------------------------


class Broken(NamedTuple):
    """A requirement that the API would refuse (32, 33)."""


def requirement_holds(requirement: Json, have: dict[str, str]) -> bool | Broken:
    key, operator = requirement.get("key") or "", requirement.get("operator")
    values = items(requirement.get("values"))
    if operator == "In" and values:
        return key in have and have[key] in values
    if operator == "NotIn" and values:
        return key not in have or have[key] not in values
    if operator == "Exists" and not values:
        return key in have
    if operator == "DoesNotExist" and not values:
        return key not in have
    return Broken()


def selector_terms(selector: Json, have: dict[str, str]) -> Iterator[bool | Broken]:
    for key, value in (selector.get("matchLabels") or {}).items():
        yield key in have and have[key] == value
    for requirement in items(selector.get("matchExpressions")):
        yield requirement_holds(requirement, have)


def peer_selector_matches(selector: Json, have: dict[str, str]) -> bool:
    """Fail closed: a broken requirement makes the peer match nobody (33)."""
    return all(term is True for term in selector_terms(selector, have))


def subject_matches(policy: Json, pod: Json) -> bool:
    """Fail closed: a broken requirement is left out, so that more is isolated (33)."""
    if namespace_of(pod) != namespace_of(policy) or not live(pod) or host_network(pod):
        return False  # 12, 80
    selector = policy["spec"].get("podSelector") or {}  # 3
    return all(term is not False for term in selector_terms(selector, labels_of(pod)))


def subject_broken(policy: Json) -> bool:
    selector = policy["spec"].get("podSelector") or {}
    return any(isinstance(term, Broken) for term in selector_terms(selector, {}))


# -- one policy ---------------------------------------------------------------------------------


def isolates(policy: Json, direction: str) -> bool:
    spec = policy["spec"]
    types = items(spec.get("policyTypes"))
    if not types:  # 4, 5, 6
        return direction == "Ingress" or len(items(spec.get("egress"))) > 0
    if any(kind not in ("Ingress", "Egress") for kind in types):
        return True  # 98
    return direction in types  # 97


def block_matches(block: Json, address: Address) -> bool:
    try:
        cidr = read_network(block.get("cidr") or "")
        excepts = [read_network(text) for text in items(block.get("except"))]
    except ValueError:
        return False
    for hole in excepts:  # 45
        if hole.version != cidr.version or hole.prefixlen <= cidr.prefixlen:
            return False
        if hole.network_address not in cidr:
            return False
    if address.version != cidr.version or address not in cidr:  # 47
        return False
    return not any(address in hole for hole in excepts)  # 42


def peer_matches(world: Json, policy: Json, peer: Json, other: End) -> bool:
    pods, namespaces = peer.get("podSelector"), peer.get("namespaceSelector")
    block = peer.get("ipBlock")
    if block is not None:
        if pods is not None or namespaces is not None:
            return False  # 29
        return block_matches(block, other.address)
    if pods is None and namespaces is None:
        return False  # 23
    if other.pod is None:
        return False  # 24, 79, 81
    home = namespace_of(other.pod)
    if namespaces is None:
        if home != namespace_of(policy):
            return False  # 28
    elif not peer_selector_matches(namespaces, namespace_labels(world, home)):
        return False
    return pods is None or peer_selector_matches(pods, labels_of(other.pod))


def declared_ports(pod: Json, name: str, protocol: str) -> set[int]:
    """Numbers behind a port name: containers', and restartable init containers' (72, 73)."""
    containers = items(pod["spec"].get("containers"))
    for container in items(pod["spec"].get("initContainers")):
        if container.get("restartPolicy") == "Always":
            containers.append(container)
    found = set()
    for container in containers:
        for port in items(container.get("ports")):
            if port.get("name") == name and (port.get("protocol") or "TCP") == protocol:
                found.add(port["containerPort"])
    return found


def port_matches(entry: Json, target: Json | None, protocol: str, number: int | None) -> bool:
    wanted = entry.get("protocol")
    if wanted is None:
        wanted = "TCP"  # 55, 57
    if wanted not in PORT_PROTOCOLS or wanted != protocol:
        return False  # 59, 61
    port, last = entry.get("port"), entry.get("endPort")
    if port is None:
        return last is None  # 56, 63
    if isinstance(port, str):
        if last is not None or not PORT_NAME.match(port):
            return False  # 63, 74
        return target is not None and number in declared_ports(target, port, protocol)  # 65-72
    if not 1 <= port <= 65535:
        return False  # 74
    if last is None:
        return number == port
    if not port <= last <= 65535:
        return False  # 63
    return number is not None and port <= number <= last  # 62


def policy_allows(world: Json, policy: Json, direction: str, probe: Probe) -> bool:
    if subject_broken(policy):
        return False  # 33
    other = probe.src if direction == "Ingress" else probe.dst
    for rule in items(policy["spec"].get(direction.lower())):
        peers = items(rule.get("from" if direction == "Ingress" else "to"))
        ports = items(rule.get("ports"))
        matching = [p for p in peers if peer_matches(world, policy, p, other)]
        if peers and not matching:
            continue  # 22, 27
        target = probe.dst.pod
        if direction == "Egress" and peers and all(p.get("ipBlock") for p in matching):
            target = None  # 68: an ipBlock leads to no pod that could name the port
        if not ports or any(port_matches(p, target, probe.protocol, probe.port) for p in ports):
            return True  # 54, 58
    return False


# -- the answer ---------------------------------------------------------------------------------


def direction_allows(world: Json, direction: str, probe: Probe) -> bool:
    subject = probe.dst.pod if direction == "Ingress" else probe.src.pod
    if subject is None:
        return True
    isolating = [
        policy
        for policy in items(world.get("policies"))
        if isolates(policy, direction) and subject_matches(policy, subject)
    ]
    if not isolating:
        return True  # 1
    return any(policy_allows(world, policy, direction, probe) for policy in isolating)  # 13


def allowed(
    world: Json, src: str, dst: str, protocol: str, port: int | None, *, family: int | None = None
) -> bool:
    """Whether a new connection may be made.

    Args:
        world: lists of manifests under "namespaces", "pods", "policies" and "nodes".
        src: a pod as "namespace/name", or an address.
        dst: likewise.
        protocol: TCP, UDP, SCTP, ICMP or ICMPv6.
        port: the destination's; None for ICMP.
        family: 4 or 6, to choose among the addresses of dual-stack pods.

    Raises:
        NoAddressError: a pod is unknown or has no address that fits.
    """
    source, target = ends(world, src, dst, family)
    if source.address == target.address or (source.pod is not None and source.pod is target.pod):
        return True  # 76
    probe = Probe(source, target, protocol, port)
    if not direction_allows(world, "Egress", probe):
        return False  # 17
    if target.pod is not None:
        home = target.pod["spec"].get("nodeName") or ""
        if home and source.address in node_addresses(world, home):
            return True  # 78, 79a
    return direction_allows(world, "Ingress", probe)
