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
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from netpol.enforce.moves import Move
from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
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
    """Steps to apply in order; stopping after any of them is safe."""

    steps: tuple[Step, ...] = ()

    @property
    def touches_tables(self) -> bool:
        """Whether any iptables transaction is in it."""
        return any(isinstance(s, TableTransaction) for s in self.steps)


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


@dataclass(slots=True)
class TableChange:
    """What happens to the table of one family."""

    replace: dict[ChainName, Chain] = field(default_factory=dict)
    hooks: dict[Hook, ChainName | None] = field(default_factory=dict)
    hook_state: dict[Hook, HookState] = field(default_factory=dict)


def assemble(
    *,
    sets: Iterable[SetChange],
    tables: Mapping[Family, TableChange],
    moved: Mapping[MapEntry, Move],
    recreated: frozenset[Prefix] = frozenset(),
    held_mark: int = 0,
    crossing: bool = False,
) -> Plan:
    """Put changes in order.

    Args:
        sets: changes of sets, the class maps among them (their `add` holds new and changed entries).
        tables: changes of tables.
        moved: map entries that exist and change, and how.
        recreated: host prefixes that another pod holds now: they are held, then appear.
        held_mark: the mark of a held address.
        crossing: members that a set gains wait until all sets have lost theirs (see `moves.crosses`).
    """
    leave: list[SetOp] = []
    early: list[SetOp] = []
    remove: list[SetOp] = []
    tighten: list[SetOp] = []
    loosen: list[SetOp] = []
    late: list[SetOp] = []
    appear: list[SetOp] = []
    moving = {m.address for _, m in moved if isinstance(m, Prefix)}
    for item in sets:
        spec = item.spec
        if item.create:
            early.append(CreateSet(spec, max(item.size, len(item.add))))
        if spec.name in MAPS:
            if item.delete:
                leave.append(DeleteMembers(spec, item.delete))
            other: Members = {m: held_mark for m in item.add if m in recreated}
            if other:
                leave.append(AddMembers(spec, other))
            how = {m: moved[spec.name, m] for m in item.add if (spec.name, m) in moved}
            less: Members = {
                m: item.add[m] if move is Move.TIGHTEN else held_mark
                for m, move in how.items()
                if move is not Move.LOOSEN
            }
            if less:
                tighten.append(AddMembers(spec, less))
            more: Members = {m: item.add[m] for m, move in how.items() if move is not Move.TIGHTEN}
            if more:
                loosen.append(AddMembers(spec, more))
            fresh = {m: v for m, v in item.add.items() if m not in how}
            if fresh:
                appear.append(AddMembers(spec, fresh))
            continue
        if item.fresh:
            if item.delete:
                early.append(DeleteMembers(spec, item.delete))
            if item.add:
                early.append(AddMembers(spec, item.add))
            continue
        held = {m: v for m, v in item.add.items() if crossing or address_of(spec, m) in moving}
        at_once = {m: v for m, v in item.add.items() if m not in held}
        if at_once:
            early.append(AddMembers(spec, at_once))
        if held:
            late.append(AddMembers(spec, held))
        if item.delete:
            remove.append(DeleteMembers(spec, item.delete))
    steps: list[Step] = []

    def put(*groups: list[SetOp]) -> None:
        ops = tuple(op for group in groups for op in group)
        if ops:
            steps.append(SetTransaction(ops))

    put(leave, early)
    for family, table in tables.items():
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
    put(remove, tighten, loosen, late, appear)
    return Plan(tuple(steps))


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
    steps: list[Step] = []
    for family in FAMILIES:
        doomed, rest = tuple(chains.get(family, ())), replace.get(family, {})
        if doomed or rest:
            steps.append(TableTransaction(TABLE, family, replace=rest, delete=doomed))
    ops = tuple(DestroySet(name) for name in sets)
    if ops:
        steps.append(SetTransaction(ops))
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
