"""A change of the kernel's state as a value: steps in the one order that lets nothing forbidden pass.

    1  map entries of addresses that leave
    2  new sets; members added, but those of addresses whose class changes
    3  tables: new and changed chains, leaves, hooks (one transaction for each family)
    4  members removed
    5  map entries that change class
    6  members of the addresses whose class changed
    7  map entries of addresses that appear

Whoever loses something loses it before anybody gains by it. Between 2 and 4 a set holds old and new
members, which is what the API said before plus what it says now, under the old classes. An address
whose own class changes gets its memberships only under its new class. See docs/adr for the cases.

What nothing leads to any more (chains, sets, numbers) goes later, in a transaction of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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

Step = SetTransaction | TableTransaction

#: The class maps: their entries are what makes a pod's rules take effect.
MAPS = frozenset(names.class_map(d, f) for d in Direction for f in FAMILIES)


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
    moved: Mapping[Member, bool],
    recreated: frozenset[Prefix] = frozenset(),
) -> Plan:
    """Put changes in order.

    Args:
        sets: changes of sets, the class maps among them (their `add` holds new and changed entries).
        tables: changes of tables.
        moved: map entries (host prefixes) that exist and change, by prefix; the value is unused.
        recreated: host prefixes that another pod holds now: they leave, then appear.
    """
    leave: list[SetOp] = []
    early: list[SetOp] = []
    remove: list[SetOp] = []
    change: list[SetOp] = []
    late: list[SetOp] = []
    appear: list[SetOp] = []
    moving = {p.address for p in moved if isinstance(p, Prefix)}
    for item in sets:
        spec = item.spec
        if item.create:
            early.append(CreateSet(spec, max(item.size, len(item.add))))
        if spec.name in MAPS:
            gone = [*item.delete, *(m for m in item.add if m in recreated)]
            if gone:
                leave.append(DeleteMembers(spec, gone))
            changed = {m: v for m, v in item.add.items() if m in moved and m not in recreated}
            fresh = {m: v for m, v in item.add.items() if m not in changed}
            if changed:
                change.append(AddMembers(spec, changed))
            if fresh:
                appear.append(AddMembers(spec, fresh))
            continue
        if item.fresh:
            if item.delete:
                early.append(DeleteMembers(spec, item.delete))
            if item.add:
                early.append(AddMembers(spec, item.add))
            continue
        held = {m: v for m, v in item.add.items() if address_of(spec, m) in moving}
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
                    "mangle",
                    family,
                    replace=table.replace,
                    hooks=table.hooks,
                    hook_state=table.hook_state,
                )
            )
    put(remove, change, late, appear)
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
            steps.append(TableTransaction("mangle", family, replace=rest, delete=doomed))
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
