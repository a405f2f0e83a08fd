"""Does a peer match a party, does a port match: the predicates below every judgement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol as TypingProtocol

from netpol.model.flow import Party, PartyKind
from netpol.model.ids import Protocol
from netpol.model.objects import Endpoint
from netpol.model.policy import BlockPeer, InvalidPeer, PodPeer, PolicyPeer, PortMatch, PortRange


class NamespaceLabels(TypingProtocol):
    """Whoever knows the labels of namespaces."""

    def namespace_labels(self, name: str) -> Mapping[str, str]:
        """Labels of a namespace, kubernetes.io/metadata.name among them even if it is unknown."""
        ...


def peer_matches(peer: PolicyPeer, party: Party, namespaces: NamespaceLabels) -> bool:
    """Whether a rule's peer covers the other end of a connection."""
    match peer:
        case PodPeer():
            return (
                party.kind is PartyKind.POD
                and party.endpoint is not None
                and pod_matches(peer, party.endpoint, namespaces)
            )
        case BlockPeer():
            return any(p.contains(party.address) for p in peer.prefixes)
        case InvalidPeer():
            return False


def pod_matches(peer: PodPeer, pod: Endpoint, namespaces: NamespaceLabels) -> bool:
    """Whether a selector peer covers a pod that policy sees."""
    if isinstance(peer.scope, str):
        if pod.key.namespace != peer.scope:
            return False
    elif not peer.scope.matches(namespaces.namespace_labels(pod.key.namespace)):
        return False
    return peer.pods.matches(dict(pod.labels))


def port_matches(
    match: PortMatch, protocol: Protocol, port: int | None, destination: Endpoint | None
) -> bool:
    """Whether a rule's port covers the destination port; names are looked up on the destination."""
    if protocol is not match.protocol or port is None:
        return False
    if isinstance(match, PortRange):
        return match.first <= port <= match.last
    return destination is not None and port in named_ports(destination, protocol, match.name)


def named_ports(pod: Endpoint, protocol: Protocol, name: str) -> tuple[int, ...]:
    """The numbers that a pod's containers give a port name, for one protocol."""
    return tuple(sorted({p.number for p in pod.ports if p.name == name and p.protocol is protocol}))
