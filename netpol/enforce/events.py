"""What there is to tell about policies that are not in force as written.

Two reasons. `Refused` is this node's: the kernel does not take the policy. `Invalid` is the object's, the
same on every node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from netpol.k8s.events import Complaint, Subject
from netpol.model.ids import ObjectKey
from netpol.model.policy import Problem


def complaints(
    problems: Mapping[ObjectKey, tuple[Problem, ...]],
    refused: Mapping[ObjectKey, str],
    *,
    uid_of: Callable[[ObjectKey], str],
    node: str,
) -> Iterator[Complaint]:
    """Everything that there is to tell now."""

    def about(key: ObjectKey) -> Subject:
        return Subject("networking.k8s.io/v1", "NetworkPolicy", key, uid_of(key))

    for key, faults in sorted(problems.items()):
        text = "; ".join(f"{p.field}: {p.message}" for p in faults)
        message = f"not in force as written: {text}"
        yield Complaint(about(key), "Invalid", message, of_node=False)
    for key, why in sorted(refused.items()):
        text = f"not in force on node {node}, the rules before it stay: {why}"
        yield Complaint(about(key), "Refused", text)
