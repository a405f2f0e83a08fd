"""Who is in each address set: the incremental half of the engine that knows peers, not policies.

Owns pods by number, address ownership, namespaces, and for every *active* set its members as a bitset.
A change touches (set, address) pairs; `take_deltas` compares each touched pair with what it was when it
was first touched, so that a batch that ends where it began emits nothing.

An address belongs to one pod at a time (see `world.ownership`), so no counting of references is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.labels import EVERYTHING, NAMESPACE_NAME_LABEL, Selector
from netpol.model.objects import Endpoint, Namespace
from netpol.model.policy import PodPeer
from netpol.policy.index import LabelIndex, bits_of, members_of
from netpol.policy.match import named_ports, pod_matches
from netpol.policy.world import ownership


class LocalPods(NamedTuple):
    """The peer that covers the pods of this node (destinations of named ingress ports)."""

    what: str = "local pods"


class PortSet(NamedTuple):
    """A set of (address, port): the pods of a peer, each with its own numbers of a port name."""

    peer: PodPeer | LocalPods
    protocol: Protocol
    name: str


#: An address set is named by what it holds.
SetKey = PodPeer | PortSet

#: All pods of the cluster that policy sees.
ALL_PODS = PodPeer(EVERYTHING, EVERYTHING)

#: What a set holds for one address: nothing, the address itself, or ports at it.
Holding = tuple[int, ...] | None
PRESENT: tuple[int, ...] = (0,)


class SetDelta(NamedTuple):
    """What changed in one set: for each address what it held and what it holds now."""

    changes: dict[bytes, tuple[Holding, Holding]]


class Members:
    """Pods, namespaces and the members of active sets."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._numbers: dict[ObjectKey, int] = {}
        self._pods: list[Endpoint | None] = []
        self._free: list[int] = []
        self._by_namespace: dict[str, set[int]] = {}
        self._labels: dict[str, Mapping[str, str]] = {}
        self._index = LabelIndex(self._pods)
        self._owner: dict[bytes, int] = {}
        self._rivals: dict[bytes, set[int]] = {}
        self._local = 0
        self._bits: dict[PodPeer, int] = {}
        self._uses: dict[SetKey, int] = {}
        self._port_sets: dict[PodPeer | LocalPods, set[PortSet]] = {}
        # Active peers by what a pod must have to be in them: (scope or "", key, value or None).
        self._anchors: dict[tuple[str, str, str | None], set[PodPeer]] = {}
        self._touched: dict[SetKey, dict[bytes, Holding]] = {}
        self._scopes: dict[Selector, int] = {}

    # -- reading ----------------------------------------------------------------------------

    def namespace_labels(self, name: str) -> Mapping[str, str]:
        """Labels of a namespace, as `match.NamespaceLabels`."""
        return self._labels.get(name) or {NAMESPACE_NAME_LABEL: name}

    def pods_in(self, namespace: str) -> Iterator[Endpoint]:
        """The pods that policy sees in a namespace."""
        for number in self._by_namespace.get(namespace, ()):
            pod = self._pods[number]
            if pod is not None:
                yield pod

    def pod(self, key: ObjectKey) -> Endpoint | None:
        """A pod that policy sees."""
        number = self._numbers.get(key)
        return None if number is None else self._pods[number]

    def owned(self, pod: Endpoint) -> tuple[bytes, ...]:
        """The addresses of a pod that no younger pod took over."""
        number = self._numbers.get(pod.key)
        return tuple(a for a in pod.addresses if self._owner.get(a) == number)

    def owner(self, address: bytes) -> Endpoint | None:
        """The pod behind an address."""
        number = self._owner.get(address)
        return None if number is None else self._pods[number]

    def holdings(self, key: SetKey) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """All members of an active set: address and ports (or `PRESENT`)."""
        peer = key.peer if isinstance(key, PortSet) else key
        for number in members_of(self._peer_bits(peer)):
            pod = self._pods[number]
            if pod is None:
                continue
            for address in pod.addresses:
                if self._owner.get(address) == number:
                    holding = self._of_pod(key, pod)
                    if holding:
                        yield address, holding

    def active(self) -> Iterable[SetKey]:
        """The sets that somebody uses."""
        return self._uses.keys()

    # -- sets -------------------------------------------------------------------------------

    def activate(self, keys: Iterable[SetKey]) -> list[SetKey]:
        """Count uses of sets; compute the members of those that are new. Returns the new ones."""
        new: dict[SetKey, None] = {}
        peers: dict[PodPeer, None] = {}
        for key in keys:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] > 1:
                continue
            new[key] = None
            peer = key
            if isinstance(key, PortSet):
                self._port_sets.setdefault(key.peer, set()).add(key)
                if isinstance(key.peer, LocalPods):
                    continue
                peer = key.peer
            if isinstance(peer, PodPeer) and peer not in self._bits:
                peers[peer] = None
        self._compute(peers)
        return list(new)

    def deactivate(self, keys: Iterable[SetKey]) -> list[SetKey]:
        """Uncount uses; forget the sets that nobody uses any more. Returns those."""
        gone: list[SetKey] = []
        for key in keys:
            self._uses[key] -= 1
            if self._uses[key]:
                continue
            del self._uses[key]
            gone.append(key)
            self._touched.pop(key, None)
            peer = key.peer if isinstance(key, PortSet) else key
            if isinstance(key, PortSet):
                self._port_sets[peer].discard(key)
            if isinstance(peer, PodPeer) and peer not in self._uses:
                if self._port_sets.get(peer):
                    continue
                self._port_sets.pop(peer, None)
                del self._bits[peer]
                for anchor in _anchors(peer):
                    self._anchors[anchor].discard(peer)
                    if not self._anchors[anchor]:
                        del self._anchors[anchor]
        return gone

    def compact(self) -> None:
        """Forget index terms that no active set names (after many policies went)."""
        self._index.forget(p.pods for p in self._bits)

    def _compute(self, peers: Iterable[PodPeer]) -> None:
        peers = list(peers)
        self._index.want(p.pods for p in peers)
        for peer in peers:
            self._bits[peer] = self._index.select(peer.pods, self._scope_bits(peer.scope))
            for anchor in _anchors(peer):
                self._anchors.setdefault(anchor, set()).add(peer)

    def recompute(self) -> None:
        """Compute all active peers from the index again: the benchmark times it, tests compare it."""
        self._scopes.clear()
        for peer in self._bits:
            self._bits[peer] = self._index.select(peer.pods, self._scope_bits(peer.scope))

    def _scope_bits(self, scope: str | Selector) -> int:
        if isinstance(scope, str):
            return bits_of(self._by_namespace.get(scope, ()), len(self._pods))
        if not scope.requirements:
            return self._index.policed
        cached = self._scopes.get(scope)
        if cached is None:
            numbers = (
                n
                for name, members in self._by_namespace.items()
                if scope.matches(self.namespace_labels(name))
                for n in members
            )
            cached = self._scopes[scope] = bits_of(numbers, len(self._pods))
        return cached

    def _peer_bits(self, peer: PodPeer | LocalPods) -> int:
        return self._local if isinstance(peer, LocalPods) else self._bits[peer]

    # -- pods -------------------------------------------------------------------------------

    def put(self, pod: Endpoint) -> None:
        """A pod that policy sees came or changed."""
        old_number = self._numbers.get(pod.key)
        if old_number is not None:
            old = self._pods[old_number]
            if old is not None and (old.uid, old.created) != (pod.uid, pod.created):
                self.drop(pod.key)
                old_number = None
        number = self._take_number() if old_number is None else old_number
        before = self._pods[number]
        if before is not None:
            self._leave(number, before)
        self._numbers[pod.key] = number
        self._pods[number] = pod
        self._enter(number, pod)

    def drop(self, key: ObjectKey) -> None:
        """A pod is gone, or policy no longer sees it."""
        number = self._numbers.pop(key, None)
        if number is None:
            return
        pod = self._pods[number]
        if pod is not None:
            self._leave(number, pod)
        self._pods[number] = None
        self._free.append(number)

    def _take_number(self) -> int:
        self._scopes.clear()
        if self._free:
            return self._free.pop()
        self._pods.append(None)
        return len(self._pods) - 1

    def _leave(self, number: int, pod: Endpoint) -> None:
        """Take a pod out of everything, touching what it held."""
        sets = [p for p in self._candidates(pod) if self._bits[p] >> number & 1]
        self._touch(pod, number, sets)
        keep = ~(1 << number)
        for peer in sets:
            self._bits[peer] &= keep
        self._local &= keep
        self._index.discard(number, pod.labels)
        mine = self._by_namespace[pod.key.namespace]
        mine.discard(number)
        if not mine:
            del self._by_namespace[pod.key.namespace]
        self._scopes.clear()
        for address in pod.addresses:
            rivals = self._rivals.get(address)
            if rivals is not None:
                rivals.discard(number)
            if self._owner.get(address) == number:
                del self._owner[address]
                if rivals:
                    self._promote(address, rivals)
            if rivals is not None and not rivals:
                del self._rivals[address]

    def _promote(self, address: bytes, rivals: set[int]) -> None:
        """Give a released address to the youngest of those that still claim it."""
        heir = max(rivals, key=lambda n: ownership(p) if (p := self._pods[n]) else ("", ""))
        rivals.discard(heir)
        self._touch_one(heir, address, held=False)
        self._owner[address] = heir

    def _enter(self, number: int, pod: Endpoint) -> None:
        """Put a pod into everything it belongs to."""
        self._by_namespace.setdefault(pod.key.namespace, set()).add(number)
        self._scopes.clear()
        self._index.add(number, pod.labels)
        bit = 1 << number
        if pod.node == self._node:
            self._local |= bit
        for address in pod.addresses:
            self._claim(number, pod, address)
        sets = [p for p in self._candidates(pod) if pod_matches(p, pod, self)]
        self._touch(pod, number, sets, held=False)
        for peer in sets:
            self._bits[peer] |= bit

    def _claim(self, number: int, pod: Endpoint, address: bytes) -> None:
        holder = self._owner.get(address)
        if holder is None or holder == number:
            self._owner[address] = number
            return
        other = self._pods[holder]
        if other is not None and ownership(other) > ownership(pod):
            self._rivals.setdefault(address, set()).add(number)
            return
        self._touch_one(holder, address, held=True)
        self._rivals.setdefault(address, set()).add(holder)
        self._owner[address] = number

    def _candidates(self, pod: Endpoint) -> set[PodPeer]:
        """Active peers that a pod with these labels could be in: looked up by ALL its labels."""
        out: set[PodPeer] = set()
        anchors = self._anchors
        for scope in (pod.key.namespace, ""):
            out |= anchors.get((scope, "", None), _NONE)
            for key, value in pod.labels:
                out |= anchors.get((scope, key, value), _NONE)
                out |= anchors.get((scope, key, None), _NONE)
        return out

    # -- namespaces -------------------------------------------------------------------------

    def put_namespace(self, namespace: Namespace) -> None:
        """A namespace came or its labels changed."""
        self._relabel(namespace.name, dict(namespace.labels))

    def drop_namespace(self, name: str) -> None:
        """A namespace is gone; pods that are still there see only its name."""
        self._relabel(name, None)

    def _relabel(self, name: str, new: Mapping[str, str] | None) -> None:
        old = self.namespace_labels(name)
        self._scopes.clear()
        if new is None:
            self._labels.pop(name, None)
            new = {NAMESPACE_NAME_LABEL: name}
        else:
            self._labels[name] = new
        if old == new or name not in self._by_namespace:
            return
        for peer in self._bits:
            if isinstance(peer.scope, str):
                continue
            was, now = peer.scope.matches(old), peer.scope.matches(new)
            if was != now:
                self._move(peer, name, inside=now)

    def _move(self, peer: PodPeer, namespace: str, *, inside: bool) -> None:
        """A whole namespace enters or leaves the scope of a peer."""
        for number in self._by_namespace[namespace]:
            pod = self._pods[number]
            if pod is None or not peer.pods.matches(dict(pod.labels)):
                continue
            self._touch(pod, number, [peer], held=not inside, local=False)
            if inside:
                self._bits[peer] |= 1 << number
            else:
                self._bits[peer] &= ~(1 << number)

    # -- deltas -----------------------------------------------------------------------------

    def _touch(
        self,
        pod: Endpoint,
        number: int,
        peers: Iterable[PodPeer],
        *,
        held: bool = True,
        local: bool = True,
    ) -> None:
        """Remember what these sets held at the pod's own addresses before a change."""
        own = [a for a in pod.addresses if self._owner.get(a) == number]
        if not own:
            return
        for key in self._keys_at(pod, peers, local=local):
            before = self._of_pod(key, pod) if held else None
            touched = self._touched.setdefault(key, {})
            for address in own:
                touched.setdefault(address, before)

    def _touch_one(self, number: int, address: bytes, *, held: bool) -> None:
        """Ownership of an address moves: remember what it held."""
        pod = self._pods[number]
        if pod is None:
            return
        peers = [p for p in self._candidates(pod) if self._bits[p] >> number & 1]
        for key in self._keys_at(pod, peers, local=True):
            before = self._of_pod(key, pod) if held else None
            self._touched.setdefault(key, {}).setdefault(address, before)

    def _keys_at(self, pod: Endpoint, peers: Iterable[PodPeer], *, local: bool) -> Iterator[SetKey]:
        for peer in peers:
            if peer in self._uses:
                yield peer
            yield from self._port_sets.get(peer, ())
        if local and pod.node == self._node:
            yield from self._port_sets.get(LocalPods(), ())

    def _of_pod(self, key: SetKey, pod: Endpoint) -> Holding:
        if isinstance(key, PortSet):
            return named_ports(pod, key.protocol, key.name) or None
        return PRESENT

    def _now(self, key: SetKey, address: bytes) -> Holding:
        number = self._owner.get(address)
        if number is None:
            return None
        peer = key.peer if isinstance(key, PortSet) else key
        pod = self._pods[number]
        if pod is None or not self._peer_bits(peer) >> number & 1:
            return None
        return self._of_pod(key, pod)

    def take_deltas(self) -> dict[SetKey, SetDelta]:
        """What changed in active sets since the last call, in sets that existed then."""
        out: dict[SetKey, SetDelta] = {}
        for key, touched in self._touched.items():
            changes = {
                address: (before, now)
                for address, before in touched.items()
                if (now := self._now(key, address)) != before
            }
            if changes:
                out[key] = SetDelta(changes)
        self._touched = {}
        return out


_NONE: frozenset[PodPeer] = frozenset()


def _anchors(peer: PodPeer) -> list[tuple[str, str, str | None]]:
    """Under which labels a pod finds a peer: its most telling term, or nothing."""
    scope = peer.scope if isinstance(peer.scope, str) else ""
    for term in sorted(peer.pods.requirements, key=lambda t: (len(t.values) or 99, t.key)):
        if term.operator == "In":
            return [(scope, term.key, v) for v in term.values]
    for term in peer.pods.requirements:
        if term.operator == "Exists":
            return [(scope, term.key, None)]
    return [(scope, "", None)]
