"""The calculation graph of one node: cluster objects in, the changes of desired state out.

    pods, namespaces --> Members --------------------------> members of address sets
         |                  ^
         v                  | which sets are in use
    local pods --> policies that select them --> classes --> which chains, which map entries

Pure and synchronous. Events only update indexes and mark local pods and policies dirty; `flush` works
out what changed since the last flush. Only what this node needs exists here: a policy that selects no
local pod is *known*, but none of its peers is computed.

Pods and namespaces are flushed before policies, in separate deltas, so that no delta mixes a change of
members with a change of rules: every state that the kernel passes through is one that the API had. But
what is new on a pod of this node waits for the news of policies that isolate the pod: none has to be open
for the time between the two, which is long where the kernel refuses the policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from netpol.model.ids import Direction, ObjectKey
from netpol.model.labels import Selector
from netpol.model.objects import Endpoint, Namespace
from netpol.model.policy import CompiledPolicy, PodPeer, PolicyRule, PortName
from netpol.policy.members import (
    ALL_PODS,
    LocalPods,
    Members,
    PortSet,
    SetDelta,
    SetKey,
)


class PolicyId(NamedTuple):
    """A policy as part of a class: its name and whom it isolates.

    A policy that changes its selection is another one: pods move to it one by one, and those that have
    not moved keep the old rules until they do.
    """

    key: ObjectKey
    subject: Selector
    isolates: tuple[Direction, ...]


class ClassKey(NamedTuple):
    """Local pods with the same ordered policies in a direction share a class."""

    direction: Direction
    policies: tuple[PolicyId, ...]


class LocalPod(NamedTuple):
    """What the kernel must know of a pod of this node: its own addresses and its classes.

    A class is None where no policy isolates the pod in that direction.
    """

    key: ObjectKey
    uid: str
    addresses: tuple[bytes, ...]
    ingress: ClassKey | None
    egress: ClassKey | None

    def class_of(self, direction: Direction) -> ClassKey | None:
        """The pod's class in a direction."""
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class GraphDelta:
    """What changed in the desired state.

    Attributes:
        new_sets: sets that came into use; read their members from the graph.
        gone_sets: sets that nothing uses any more.
        set_deltas: changed members of sets that stay.
        policies: active policies that are new or changed; None for those that went out of use.
        pods: local pods that are new or changed, None for those that left.
        before: the local pods named in `pods`, as they were; absent for new ones.
    """

    new_sets: tuple[SetKey, ...] = ()
    gone_sets: tuple[SetKey, ...] = ()
    set_deltas: dict[SetKey, SetDelta] = field(default_factory=dict)
    policies: dict[PolicyId, CompiledPolicy | None] = field(default_factory=dict)
    pods: dict[ObjectKey, LocalPod | None] = field(default_factory=dict)
    before: dict[ObjectKey, LocalPod] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing changed."""
        return not (
            self.new_sets or self.gone_sets or self.set_deltas or self.policies or self.pods
        )


class Graph:
    """The incremental engine of one node."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.members = Members(node)
        self._policies: dict[ObjectKey, CompiledPolicy] = {}
        self._by_namespace: dict[str, dict[ObjectKey, CompiledPolicy]] = {}
        self._queued: dict[ObjectKey, CompiledPolicy | None] = {}
        self._dirty: set[ObjectKey] = set()
        # Local pods with addresses that wait for queued policies.
        self._waiting: set[ObjectKey] = set()
        self._local: dict[ObjectKey, LocalPod] = {}
        self._users: dict[PolicyId, int] = {}
        # Those whose number of users changed since the last flush, in order.
        self._moved: dict[PolicyId, None] = {}
        self._active: dict[PolicyId, CompiledPolicy] = {}
        self._changed: set[PolicyId] = set()

    # -- events -----------------------------------------------------------------------------

    def upsert_pod(self, pod: Endpoint) -> None:
        """A pod came or changed, whatever its phase."""
        before = self.members.pod(pod.key)
        if not pod.policed:
            self.remove_pod(pod.key)
            return
        if before == pod:
            return
        self._mark(before)
        rivals = self._owners_of(pod)
        self.members.put(pod)
        self._mark(pod)
        self._mark_all(rivals)
        if before is not None:
            # An address that the pod gave up may have fallen to another that claims it.
            self._mark_all(self._owners_of(before))

    def remove_pod(self, key: ObjectKey) -> None:
        """A pod is gone."""
        before = self.members.pod(key)
        if before is None:
            return
        self._mark(before)
        self.members.drop(key)
        self._mark_all(self._owners_of(before))

    def upsert_namespace(self, namespace: Namespace) -> None:
        """A namespace came or changed."""
        self.members.put_namespace(namespace)

    def remove_namespace(self, name: str) -> None:
        """A namespace is gone."""
        self.members.drop_namespace(name)

    def upsert_policy(self, policy: CompiledPolicy) -> None:
        """A policy came or changed."""
        self._queued[policy.key] = policy

    def remove_policy(self, key: ObjectKey) -> None:
        """A policy is gone."""
        self._queued[key] = None

    def _owners_of(self, pod: Endpoint) -> list[Endpoint]:
        found = [self.members.owner(a) for a in pod.addresses]
        return [p for p in found if p is not None and p.key != pod.key]

    def _mark(self, pod: Endpoint | None) -> None:
        if pod is not None and (pod.node == self.node or pod.key in self._local):
            self._dirty.add(pod.key)

    def _mark_all(self, pods: Iterable[Endpoint]) -> None:
        for pod in pods:
            self._mark(pod)

    # -- reading ----------------------------------------------------------------------------

    @property
    def local_pods(self) -> dict[ObjectKey, LocalPod]:
        """The pods of this node, as of the last flush."""
        return self._local

    @property
    def active_policies(self) -> dict[PolicyId, CompiledPolicy]:
        """The policies that isolate a local pod, as of the last flush."""
        return self._active

    @property
    def needs_peers(self) -> bool:
        """Whether any policy that isolates a local pod has peers or names on other pods.

        While False, watching the local pods is enough.
        """
        return any(
            not (isinstance(key, PortSet) and isinstance(key.peer, LocalPods))
            for key in self.members.active()
        )

    def isolating(self, address: bytes) -> tuple[str, Direction] | None:
        """The policy that isolates the pod of an address, wherever it is, and a direction; of all events.

        Raises:
            KeyError: no pod is known there.
        """
        pod = self.members.owner(address)
        if pod is None:
            raise KeyError(address)
        here = dict(self._by_namespace.get(pod.key.namespace, {}))
        for key, policy in self._queued.items():
            if key.namespace == pod.key.namespace:
                here.pop(key, None)
                if policy is not None:
                    here[key] = policy
        have = dict(pod.labels)
        for key in sorted(here):
            if here[key].isolates and here[key].subject.matches(have):
                return str(key), min(here[key].isolates)
        return None

    @property
    def pending(self) -> bool:
        """Whether another `flush` would have something to look at."""
        return bool(self._queued or self._dirty)

    # -- flush ------------------------------------------------------------------------------

    def flush(self, *, together: bool = False) -> GraphDelta:
        """What changed: pods and namespaces first, policies with the next call.

        An address that is new to a local pod stays unknown until then, if the policies isolate the pod.

        Args:
            together: all in one delta (start-up, when no rule is in force that could mix).
        """
        deltas = self.members.take_deltas()
        if together or not (deltas or self._dirty):
            self._apply_policies()
        pods, before = self._classify()
        delta = self._settle(deltas)
        return replace(delta, pods=pods, before=before)

    def _apply_policies(self) -> None:
        for key, policy in self._queued.items():
            before = self._policies.get(key)
            if policy == before:
                continue
            for version in (before, policy):
                if version is not None:
                    self._mark_subjects(version)
            local = self._by_namespace.setdefault(key.namespace, {})
            if policy is None:
                self._policies.pop(key, None)
                local.pop(key, None)
            else:
                self._policies[key] = policy
                local[key] = policy
                self._changed.add(_identify(policy))
        self._queued = {}
        self._dirty |= self._waiting
        self._waiting = set()

    def _mark_subjects(self, policy: CompiledPolicy) -> None:
        for pod in self.members.pods_in(policy.key.namespace):
            if pod.node == self.node and policy.subject.matches(dict(pod.labels)):
                self._dirty.add(pod.key)

    def _classify(self) -> tuple[dict[ObjectKey, LocalPod | None], dict[ObjectKey, LocalPod]]:
        """Work out the classes of the dirty local pods; returns those that changed, now and before."""
        out: dict[ObjectKey, LocalPod | None] = {}
        was: dict[ObjectKey, LocalPod] = {}
        for key in self._dirty:
            before = self._local.get(key)
            pod = self.members.pod(key)
            now = None
            if pod is not None and pod.node == self.node:
                now = self._local_pod(pod)
                if self._has_policy_news(pod):
                    now = self._without_new_addresses(now, before)
            if now == before:
                continue
            for local, step in ((now, 1), (before, -1)):
                for identity in _policies_of(local):
                    self._users[identity] = self._users.get(identity, 0) + step
                    self._moved[identity] = None
            if now is None:
                del self._local[key]
            else:
                self._local[key] = now
            out[key] = now
            if before is not None:
                was[key] = before
        self._dirty = set()
        return out, was

    def _has_policy_news(self, pod: Endpoint) -> bool:
        """Whether a policy that is queued isolates a pod, or did so until now."""
        have: dict[str, str] | None = None
        for key, policy in self._queued.items():
            before = self._policies.get(key)
            if key.namespace != pod.key.namespace or policy == before:
                continue
            have = dict(pod.labels) if have is None else have
            for version in (policy, before):
                if version is not None and version.isolates and version.subject.matches(have):
                    return True
        return False

    def _without_new_addresses(self, now: LocalPod, before: LocalPod | None) -> LocalPod | None:
        """A pod with the addresses that it had, and nothing of one that was not there."""
        same = before is not None and before.uid == now.uid
        had = before.addresses if before is not None and same else ()
        kept = tuple(a for a in now.addresses if a in had)
        if kept == now.addresses:
            return now
        self._waiting.add(now.key)
        return now._replace(addresses=kept) if same else None

    def _local_pod(self, pod: Endpoint) -> LocalPod:
        have = dict(pod.labels)
        chosen = [
            policy
            for _, policy in sorted(self._by_namespace.get(pod.key.namespace, {}).items())
            if policy.subject.matches(have)
        ]

        def class_of(direction: Direction) -> ClassKey | None:
            ids = tuple(_identify(p) for p in chosen if direction in p.isolates)
            return ClassKey(direction, ids) if ids else None

        return LocalPod(
            pod.key,
            pod.uid,
            self.members.owned(pod),
            class_of(Direction.INGRESS),
            class_of(Direction.EGRESS),
        )

    def _settle(self, deltas: dict[SetKey, SetDelta]) -> GraphDelta:
        """Bring active policies and sets in line with who uses them."""
        policies: dict[PolicyId, CompiledPolicy | None] = {}
        activate: list[SetKey] = []
        deactivate: list[SetKey] = []
        # Only these can have begun or ceased to be active: the cost is that of the change.
        candidates = {**self._moved, **dict.fromkeys(sorted(self._changed & self._users.keys()))}
        self._moved = {}
        for identity in candidates:
            if self._users[identity]:
                continue
            del self._users[identity]
            old = self._active.pop(identity, None)
            if old is not None:
                deactivate.extend(sets_of(old))
                policies[identity] = None
        for identity in candidates:
            if identity not in self._users or (
                identity in self._active and identity not in self._changed
            ):
                continue
            policy = self._policies.get(identity.key)
            old = self._active.get(identity)
            if policy is None or _identify(policy) != identity or policy == old:
                continue
            activate.extend(sets_of(policy))
            deactivate.extend(sets_of(old) if old else ())
            self._active[identity] = policy
            policies[identity] = policy
        self._changed = set()
        new = self.members.activate(activate)
        gone = self.members.deactivate(deactivate)
        kept = {k: d for k, d in deltas.items() if k not in gone}
        return GraphDelta(tuple(new), tuple(gone), kept, policies)


def _identify(policy: CompiledPolicy) -> PolicyId:
    return PolicyId(policy.key, policy.subject, tuple(sorted(policy.isolates)))


def _policies_of(pod: LocalPod | None) -> set[PolicyId]:
    if pod is None:
        return set()
    return {i for c in (pod.ingress, pod.egress) if c is not None for i in c.policies}


def sets_of(policy: CompiledPolicy) -> Iterator[SetKey]:
    """The address sets that a policy's rules need, with repetitions."""
    for direction in sorted(policy.isolates):
        for rule in policy.rules(direction):
            yield from rule_sets(rule, direction)


def rule_sets(rule: PolicyRule, direction: Direction) -> Iterator[SetKey]:
    """The address sets of one rule: of each selector peer, and of each port name."""
    names = [p for p in rule.ports or () if isinstance(p, PortName)]
    numbers = rule.ports is None or len(names) < len(rule.ports)
    pods = [p for p in rule.peers or () if isinstance(p, PodPeer)]
    if direction is Direction.INGRESS:
        for name in names:
            yield PortSet(LocalPods(), name.protocol, name.name)
        if numbers or names:
            yield from pods
        return
    if numbers:
        yield from pods
    for name in names:
        for peer in pods if rule.peers is not None else [ALL_PODS]:
            yield PortSet(peer, name.protocol, name.name)
