"""What a delta of the graph changes in the sets of local pods: class maps, and sets of overflow classes.

Which of these changes come first is decided in `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from netpol.enforce.plan import MAPS, MapEntry, SetChange
from netpol.kernel.drivers import SetDump
from netpol.model.ids import SetName
from netpol.model.net import FAMILIES, Prefix, host_prefix
from netpol.model.ruleset import Member, SetSpec
from netpol.policy.graph import ClassKey, GraphDelta, LocalPod
from netpol.render import classes
from netpol.render.options import RenderOptions

#: The change of a set in the plan that is being made; made on first use.
At = Callable[[SetSpec], SetChange]


def pod_entries(
    delta: GraphDelta,
    at: At,
    *,
    recreated: Collection[Prefix],
    numbers: Mapping[ClassKey, int],
    options: RenderOptions,
) -> dict[MapEntry, tuple[int, int]]:
    """Add and delete the entries of local pods.

    Args:
        delta: what changed.
        at: where changes are put down.
        recreated: host prefixes that another pod has now (`new_holders`).
        numbers: of the classes.
        options: how entries are rendered.

    Returns:
        The map entries that change, with their marks before and after; not those of a new holder.
    """
    old: dict[SetSpec, dict[Member, int | None]] = {}
    new: dict[SetSpec, dict[Member, int | None]] = {}
    for key, pod in delta.pods.items():
        for side, version in ((old, delta.before.get(key)), (new, pod)):
            if version is None:
                continue
            for family in FAMILIES:
                for spec, members in classes.pod_set_members(
                    version, numbers, options, family
                ).values():
                    side.setdefault(spec, {}).update(members)
    moved: dict[MapEntry, tuple[int, int]] = {}
    for spec in {*old, *new}:
        had, want = old.get(spec, {}), new.get(spec, {})
        for member, value in want.items():
            again = member in recreated
            if had.get(member, -1) != value or again:
                at(spec).add[member] = value
                if spec.name in MAPS and member in had and not again:
                    moved[spec.name, member] = (had[member] or 0, value or 0)
        for member in had:
            if member not in want:
                at(spec).delete.append(member)
    return moved


def new_holders(delta: GraphDelta, holders: dict[bytes, str]) -> set[Prefix]:
    """Addresses that one local pod gave up and another has now.

    Args:
        delta: what changed.
        holders: the uid of the pod that has an address; brought up to date.
    """
    recreated: set[Prefix] = set()
    for key in delta.pods:
        old = delta.before.get(key)
        for address in old.addresses if old else ():
            if holders.get(address) == (old.uid if old else ""):
                del holders[address]
    given_up = {a for k in delta.pods if (o := delta.before.get(k)) for a in o.addresses}
    for key, pod in delta.pods.items():
        if pod is None:
            continue
        old = delta.before.get(key)
        for address in pod.addresses:
            holders[address] = pod.uid
            same = old is not None and old.uid == pod.uid and address in old.addresses
            if address in given_up and not same:
                recreated.add(Prefix(address, len(address) * 8))
    return recreated


def changed_entries(
    changes: Iterable[SetChange], have: Mapping[SetName, SetDump], strangers: Collection[Prefix]
) -> tuple[dict[MapEntry, tuple[int, int]], frozenset[Prefix]]:
    """What becomes of the entries of class maps that the kernel has.

    Returns:
        Those that change, with their marks before and after; and the strangers among their addresses, who
        are not in the first.
    """
    moved: dict[MapEntry, tuple[int, int]] = {}
    recreated: set[Prefix] = set()
    for change in changes:
        name = change.spec.name
        if name not in MAPS or name not in have:
            continue
        marks = have[name].members
        for member in change.add.keys() & marks.keys():
            if isinstance(member, Prefix) and member in strangers:
                recreated.add(member)
            else:
                moved[name, member] = (marks[member] or 0, change.add[member] or 0)
    return moved, frozenset(recreated)


def strangers_of(pods: Iterable[LocalPod], holders: Mapping[bytes, str]) -> set[Prefix]:
    """Addresses, as host prefixes, that these pods were not known to have."""
    return {
        host_prefix(address)
        for pod in pods
        for address in pod.addresses
        if holders.get(address) != pod.uid
    }
