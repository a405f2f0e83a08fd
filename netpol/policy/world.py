"""A snapshot of the cluster as policy sees it: who has which address, who is isolated by what.

Immutable once built (it only caches); the incremental twin for the node's agent is `policy.graph`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from netpol.model.flow import Party, PartyKind
from netpol.model.ids import Direction, ObjectKey
from netpol.model.labels import NAMESPACE_NAME_LABEL, labels
from netpol.model.net import Family, family_of
from netpol.model.objects import Endpoint, EndpointSlice, Namespace, Node, Service
from netpol.model.policy import CompiledPolicy


def ownership(pod: Endpoint) -> tuple[str, str]:
    """Order of claims when two live pods report one address: the younger pod has it (row 38)."""
    return pod.created, pod.uid


class World:
    """Namespaces, pods, policies, nodes and services at one moment."""

    def __init__(
        self,
        *,
        namespaces: Mapping[str, Namespace],
        pods: Mapping[ObjectKey, Endpoint],
        policies: Mapping[ObjectKey, CompiledPolicy],
        nodes: Mapping[str, Node],
        services: Mapping[ObjectKey, Service],
        slices: tuple[EndpointSlice, ...],
    ) -> None:
        self.namespaces, self.pods, self.policies = namespaces, pods, policies
        self.nodes, self.services, self.slices = nodes, services, slices
        self._labels = {n.name: dict(n.labels) for n in namespaces.values()}
        self._by_namespace: dict[str, list[CompiledPolicy]] = {}
        for policy in sorted(policies.values(), key=lambda p: p.key):
            self._by_namespace.setdefault(policy.key.namespace, []).append(policy)
        self._owners: dict[bytes, Endpoint] = {}
        self._hosts: dict[bytes, str] = {}
        for node in nodes.values():
            self._hosts.update(dict.fromkeys(node.addresses, node.name))
        for pod in pods.values():
            if pod.policed:
                for address in pod.addresses:
                    other = self._owners.get(address)
                    if other is None or ownership(other) < ownership(pod):
                        self._owners[address] = pod
            elif pod.live:
                for address in pod.addresses:
                    self._hosts.setdefault(address, pod.node)
        self._service_addresses = {a: s for s in services.values() for a in s.cluster_ips}
        self._isolating: dict[tuple[ObjectKey, Direction], tuple[CompiledPolicy, ...]] = {}

    @classmethod
    def build(
        cls,
        *,
        namespaces: Iterable[Namespace] = (),
        pods: Iterable[Endpoint] = (),
        policies: Iterable[CompiledPolicy] = (),
        nodes: Iterable[Node] = (),
        services: Iterable[Service] = (),
        slices: Iterable[EndpointSlice] = (),
    ) -> World:
        """Make a world out of objects; of equal keys the last counts."""
        return cls(
            namespaces={n.name: n for n in namespaces},
            pods={p.key: p for p in pods},
            policies={p.key: p for p in policies},
            nodes={n.name: n for n in nodes},
            services={s.key: s for s in services},
            slices=tuple(slices),
        )

    def pod(self, key: ObjectKey) -> Endpoint | None:
        """A pod by name, whatever its phase."""
        return self.pods.get(key)

    def namespace(self, name: str) -> Namespace:
        """A namespace by name; an unknown one has only the label that the API server would add."""
        known = self.namespaces.get(name)
        return known or Namespace(name=name, labels=labels({NAMESPACE_NAME_LABEL: name}))

    def namespace_labels(self, name: str) -> Mapping[str, str]:
        """Labels of a namespace as a mapping."""
        known = self._labels.get(name)
        return known if known is not None else {NAMESPACE_NAME_LABEL: name}

    def owner(self, address: bytes) -> Endpoint | None:
        """The pod that policy sees behind an address."""
        return self._owners.get(address)

    def owned(self, pod: Endpoint) -> tuple[bytes, ...]:
        """The addresses of a pod that are its own: none that a younger pod took over."""
        return tuple(a for a in pod.addresses if self._owners.get(a) is pod)

    def party(self, address: bytes) -> Party:
        """Who is behind an address: a pod, a node, a Service or somebody outside."""
        pod = self._owners.get(address)
        if pod is not None:
            return Party(PartyKind.POD, address, str(pod.key), pod, pod.node)
        node = self._hosts.get(address)
        if node is not None:
            return Party(PartyKind.NODE, address, node, node=node)
        service = self._service_addresses.get(address)
        if service is not None:
            return Party(PartyKind.SERVICE, address, str(service.key))
        return Party(PartyKind.EXTERNAL, address, "")

    def pod_party(self, pod: Endpoint, family: Family | None = None) -> Party | None:
        """A pod as one end of a connection, by its first address (of a family).

        None when it has no such address of its own.
        """
        if not pod.live:
            return None
        for address in pod.addresses:
            if family is None or family_of(address) is family:
                if pod.host_network:
                    return Party(PartyKind.NODE, address, pod.node, node=pod.node)
                if self._owners.get(address) is pod:
                    return Party(PartyKind.POD, address, str(pod.key), pod, pod.node)
        return None

    def isolating(self, pod: Endpoint, direction: Direction) -> tuple[CompiledPolicy, ...]:
        """The policies that select a pod and isolate it in a direction, by name."""
        at = (pod.key, direction)
        cached = self._isolating.get(at)
        if cached is None:
            have = dict(pod.labels)
            cached = self._isolating[at] = tuple(
                p
                for p in self._by_namespace.get(pod.key.namespace, ())
                if direction in p.isolates and pod.policed and p.subject.matches(have)
            )
        return cached
