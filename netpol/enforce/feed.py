"""From the caches to the graph: which stores feed it, and when the cluster's pods are watched at all.

The node's own pods come from a watch of their own, always. All other pods come from a second watch that
runs only while a policy of a local pod has pod peers, since on most nodes of a large cluster that watch
is nearly all of the cost.
"""

from __future__ import annotations

from collections.abc import Callable

from netpol.k8s.cache import Change
from netpol.model.ids import ObjectKey
from netpol.model.networkpolicy import NetworkPolicy
from netpol.model.objects import Endpoint, Namespace
from netpol.model.policy import CompiledPolicy, Problem
from netpol.policy.compile import compile_policy
from netpol.policy.graph import Graph


class Feed:
    """Subscribers for the stores of one node's agent.

    Attributes:
        compiled: every policy with its meaning, for explanations.
        problems: by policy, what the API server would have refused.
    """

    def __init__(
        self,
        graph: Graph,
        changed: Callable[[], None],
        *,
        cluster: Callable[[ObjectKey], Endpoint | None] = lambda _: None,
    ) -> None:
        """Args: cluster: what the watch of the cluster's pods has under a name."""
        self._graph, self._changed, self._cluster = graph, changed, cluster
        self._local: set[ObjectKey] = set()
        self.compiled: dict[ObjectKey, CompiledPolicy] = {}
        self.problems: dict[ObjectKey, tuple[Problem, ...]] = {}

    def namespace(self, change: Change[Namespace]) -> None:
        """A namespace came, changed or went."""
        if change.after is not None:
            self._graph.upsert_namespace(change.after)
        else:
            self._graph.remove_namespace(change.key.name)
        self._changed()

    def policy(self, change: Change[NetworkPolicy]) -> None:
        """A policy came, changed or went."""
        self.problems.pop(change.key, None)
        if change.after is None:
            self.compiled.pop(change.key, None)
            self._graph.remove_policy(change.key)
        else:
            policy = compile_policy(change.after)
            self.compiled[change.key] = policy
            if policy.problems:
                self.problems[change.key] = policy.problems
            self._graph.upsert_policy(policy)
        self._changed()

    def local_pod(self, change: Change[Endpoint]) -> None:
        """A pod of this node came, changed or went.

        What this watch has stands before what the other says of the same name; when it loses a pod, a
        successor on another node may be known already.
        """
        if change.after is not None:
            self._local.add(change.key)
            self._graph.upsert_pod(change.after)
            self._changed()
            return
        self._local.discard(change.key)
        gone = change.before.uid if change.before else ""
        other = self._cluster(change.key)
        if other is not None and other.node != self._graph.node and other.uid != gone:
            self._graph.upsert_pod(other)
        else:
            self._graph.remove_pod(change.key)
        self._changed()

    def cluster_pod(self, change: Change[Endpoint]) -> None:
        """A pod anywhere came, changed or went; those of this node are the other watch's business."""
        if change.key in self._local:
            return
        if change.after is not None and change.after.node != self._graph.node:
            self._graph.upsert_pod(change.after)
        else:
            self._graph.remove_pod(change.key)
        self._changed()
