"""A change of the kernel's state as a value: steps in the one order that lets nothing forbidden pass.

    1  map entries of addresses that leave
    2  new sets; members added, but those of addresses whose class changes
    3  tables: new and changed chains, leaves, hooks (one transaction for each family)
    4  members removed
    5  map entries that change class: those that allow less, then those that allow more (see `moves`)
    6  members of the addresses whose class changed
    7  map entries of addresses that appear

Whoever loses something loses it before anybody gains by it. An address that another pod has now is held
from 1 to 7. Between 2 and 4 a set holds old and new
members, which is what the API said before plus what it says now, under the old classes. An address
whose own class changes gets its memberships only under its new class. See docs/adr for the cases.

What nothing leads to any more (chains, sets, numbers) goes later, in a transaction of its own.

The order holds within each family, since a packet meets the sets and the table of its own family alone.
So every step is of one family, and one whose table refuses holds up nothing of the other. Only 1 comes
first for both: it takes away, and is done even for a family that is left out (an address must not hand
its old class to the next pod). So are the parts of the others that can only deny more: see `Plan.behind`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from netpol.enforce.moves import Move
from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    EmptySet,
    HookState,
    SetDump,
    SetOp,
    SetTransaction,
    TableTransaction,
)
from netpol.model.ids import ChainName, Direction, SetName
from netpol.model.net import FAMILIES, Family, Prefix
from netpol.model.ruleset import AddressPort, Chain, Hook, Member, Members, SetKind, SetSpec
from netpol.render import names
from netpol.render.static import TABLE

Step = SetTransaction | TableTransaction

#: The class maps: their entries are what makes a pod's rules take effect.
MAPS = frozenset(names.class_map(d, f) for d in Direction for f in FAMILIES)

#: One entry of a class map.
MapEntry = tuple[SetName, Member]


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps to apply in order, each of one family; stopping a family after any of its own is safe.

    `leaving` says how many of them, from the first, only take entries of leaving addresses away. `behind`
    is what a family gets that is left out, or stopped: members go, and addresses are held that no entry
    tells of, or only that of another pod.
    """

    steps: tuple[Step, ...] = ()
    leaving: int = 0
    behind: Mapping[Family, tuple[SetOp, ...]] = field(default_factory=dict)

    @property
    def touches_tables(self) -> bool:
        """Whether any iptables transaction is in it."""
        return any(isinstance(s, TableTransaction) for s in self.steps)


def family_of_step(step: Step) -> Family:
    """The one family whose packets a step matters to."""
    if isinstance(step, TableTransaction):
        return step.family
    first = step.ops[0]
    return names.family_of_set(first.name) if isinstance(first, DestroySet) else first.spec.family


@dataclass(slots=True)
class SetChange:
    """What happens to one set."""

    spec: SetSpec
    create: bool = False
    size: int = 0
    add: dict[Member, int | None] = field(default_factory=dict)
    delete: list[Member] = field(default_factory=list)
    # No rule that packets reach names the set yet: it is put right before any does.
    fresh: bool = False
    # It was in use before, and has members of then.
    back: bool = False


@dataclass(slots=True)
class _SetOps:
    """Operations on the sets of one family, by their place in the order."""

    leave: list[SetOp] = field(default_factory=list)
    early: list[SetOp] = field(default_factory=list)
    remove: list[SetOp] = field(default_factory=list)
    tighten: list[SetOp] = field(default_factory=list)
    loosen: list[SetOp] = field(default_factory=list)
    late: list[SetOp] = field(default_factory=list)
    appear: list[SetOp] = field(default_factory=list)
    behind: list[SetOp] = field(default_factory=list)


@dataclass(slots=True)
class TableChange:
    """What happens to the tables of one family.

    `first` is what must happen before the rest, in another table (see `two_tables`).
    """

    replace: dict[ChainName, Chain] = field(default_factory=dict)
    hooks: dict[Hook, ChainName | None] = field(default_factory=dict)
    hook_state: dict[Hook, HookState] = field(default_factory=dict)
    first: tuple[TableTransaction, ...] = ()


def assemble(
    *,
    sets: Iterable[SetChange],
    tables: Mapping[Family, TableChange],
    moved: Mapping[MapEntry, Move],
    recreated: frozenset[Prefix] = frozenset(),
    strangers: Collection[Prefix] = frozenset(),
    held_mark: int = 0,
    open_marks: Collection[int] = (),
    crossing: bool = False,
) -> Plan:
    """Put changes in order.

    Args:
        sets: changes of sets, the class maps among them (their `add` holds new and changed entries).
        tables: changes of tables.
        moved: map entries that exist and change, and how.
        recreated: host prefixes that another pod holds now: they are held, then appear.
        strangers: host prefixes whose entry may be of another pod than the one that has it now; it
            changes like any other, but does not stay where a family is left out.
        held_mark: the mark of a held address.
        open_marks: marks of addresses that nothing isolates.
        crossing: members that a set gains wait until all sets have lost theirs (see `moves.crosses`).
    """
    by_family = {f: _SetOps() for f in FAMILIES}
    moving = {m.address for _, m in moved if isinstance(m, Prefix)}
    for item in sets:
        spec = item.spec
        ops = by_family[spec.family]
        if item.create:
            ops.early.append(CreateSet(spec, max(item.size, len(item.add))))
        if spec.name in MAPS:
            if item.delete:
                ops.leave.append(DeleteMembers(spec, item.delete))
            other: Members = {m: held_mark for m in item.add if m in recreated}
            if other:
                ops.leave.append(AddMembers(spec, other))
            how = {m: moved[spec.name, m] for m in item.add if (spec.name, m) in moved}
            less: Members = {
                m: item.add[m] if move is Move.TIGHTEN else held_mark
                for m, move in how.items()
                if move is not Move.LOOSEN
            }
            if less:
                ops.tighten.append(AddMembers(spec, less))
            more: Members = {m: item.add[m] for m, move in how.items() if move is not Move.TIGHTEN}
            if more:
                ops.loosen.append(AddMembers(spec, more))
            fresh = {m: v for m, v in item.add.items() if m not in how}
            if fresh:
                ops.appear.append(AddMembers(spec, fresh))
            held: Members = {m: held_mark for m, v in fresh.items() if v not in open_marks}
            unsure: Members = {m: held_mark for m in how if m in strangers}
            if held or unsure:
                ops.behind.append(AddMembers(spec, {**held, **unsure}))
            continue
        if item.back:
            ops.early.append(EmptySet(spec))
            ops.behind.append(EmptySet(spec))
        if item.delete:
            ops.behind.append(DeleteMembers(spec, item.delete))
        if item.fresh:
            if item.add:
                ops.early.append(AddMembers(spec, item.add))
            continue
        late = {m: v for m, v in item.add.items() if crossing or address_of(spec, m) in moving}
        at_once = {m: v for m, v in item.add.items() if m not in late}
        if at_once:
            ops.early.append(AddMembers(spec, at_once))
        if late:
            ops.late.append(AddMembers(spec, late))
        if item.delete:
            ops.remove.append(DeleteMembers(spec, item.delete))
    steps: list[Step] = []

    def put(*groups: list[SetOp]) -> None:
        found = tuple(op for group in groups for op in group)
        if found:
            steps.append(SetTransaction(found))

    for ops in by_family.values():
        put(ops.leave)
    leaving = len(steps)
    for family, ops in by_family.items():
        put(ops.early)
        table = tables.get(family, TableChange())
        steps += table.first
        if table.replace or table.hooks:
            steps.append(
                TableTransaction(
                    TABLE,
                    family,
                    replace=table.replace,
                    hooks=table.hooks,
                    hook_state=table.hook_state,
                )
            )
        put(ops.remove, ops.tighten, ops.loosen, ops.late, ops.appear)
    return Plan(tuple(steps), leaving, {f: tuple(ops.behind) for f, ops in by_family.items()})


def address_of(spec: SetSpec, member: Member) -> bytes | None:
    """The pod address that a member of a peer set speaks of; None for prefixes and pairs."""
    if spec.kind is SetKind.HASH_IP and isinstance(member, bytes):
        return member
    if isinstance(member, AddressPort):
        return member.address
    return None


def garbage(
    *,
    chains: Mapping[Family, Iterable[ChainName]],
    replace: Mapping[Family, Mapping[ChainName, Chain]],
    sets: Iterable[SetName],
) -> Plan:
    """What removes chains that nothing leads to, then the sets that only they named.

    Args:
        chains: chains to delete.
        replace: chains that lose their jumps to those (trees), as they should be.
        sets: sets to destroy.
    """
    gone: dict[Family, list[SetOp]] = {f: [] for f in FAMILIES}
    for name in sets:
        gone[names.family_of_set(name)].append(DestroySet(name))
    steps: list[Step] = []
    for family in FAMILIES:
        doomed, rest = tuple(chains.get(family, ())), replace.get(family, {})
        if doomed or rest:
            steps.append(TableTransaction(TABLE, family, replace=rest, delete=doomed))
        if gone[family]:
            steps.append(SetTransaction(tuple(gone[family])))
    return Plan(tuple(steps))


def set_changes(
    desired: Mapping[SetName, tuple[SetSpec, Members]], actual: Mapping[SetName, SetDump]
) -> list[SetChange]:
    """Compare wanted sets with dumped ones; sets that are not wanted are left for the garbage."""
    out: list[SetChange] = []
    for name, (spec, members) in desired.items():
        dump = actual.get(name)
        if dump is None:
            out.append(SetChange(spec, create=True, size=len(members), add=dict(members)))
            continue
        have = dump.members
        if have == members:
            continue
        add = {m: v for m, v in members.items() if m not in have or have[m] != v}
        delete = [m for m in have if m not in members]
        out.append(SetChange(spec, add=add, delete=delete))
    return out


def set_differences(
    desired: Mapping[SetName, tuple[SetSpec, Members]], actual: Mapping[SetName, SetDump]
) -> list[str]:
    """The same comparison in words."""
    out = []
    for change in set_changes(desired, actual):
        what = "is gone" if change.create else f"has {len(change.delete)} members too many"
        missing = "" if change.create else f", {len(change.add)} missing"
        out.append(f"set {change.spec.name} {what}{missing}")
    return out
