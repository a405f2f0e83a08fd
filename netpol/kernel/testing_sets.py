"""The SetDriver in memory for tests, and failures on demand; see `testing`, which offers them too."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    EmptySet,
    SetDump,
    SetError,
    SetOp,
    SetTransaction,
)
from netpol.kernel.set_text import check_name, check_owner, maxelem_for, member_text
from netpol.model.ids import POLICY, Owner, SetName
from netpol.model.net import Prefix, family_of
from netpol.model.ruleset import (
    AddressPort,
    AddressPortNet,
    Member,
    NetPair,
    SetKind,
    SetSpec,
)

# IPSET_ERR_*, as the kernel numbers them.
ERR_PROTOCOL, ERR_BUSY, ERR_INVALID_CIDR, ERR_FULL = 4097, 4100, 4104, 4352

_MEMBER_TYPES: dict[SetKind, type] = {
    SetKind.HASH_IP: bytes,
    SetKind.HASH_NET: Prefix,
    SetKind.HASH_IP_PORT: AddressPort,
    SetKind.HASH_NET_NET: NetPair,
    SetKind.HASH_IP_PORT_NET: AddressPortNet,
}


class Failures:
    """Errors to raise at chosen steps: one step is one operation of a set, or one table transaction."""

    def __init__(self) -> None:
        self._planned: list[tuple[int, BaseException]] = []

    def plan(self, error: BaseException, *, after: int = 0) -> None:
        """Raise an error once, at the step after `after` more."""
        self._planned.append((after, error))

    def step(self) -> None:
        """Take one step; raises what is planned for it."""
        due = [error for left, error in self._planned if left == 0]
        self._planned = [(left - 1, error) for left, error in self._planned if left > 0]
        if due:
            raise due[0]


@dataclass(slots=True)
class FakeSet:
    """One set: what it is, its ceiling and its members."""

    spec: SetSpec
    maxelem: int
    members: dict[Member, int | None] = field(default_factory=dict)


class FakeSets:
    """SetDriver in memory.

    Args:
        owner: whose sets it sees and touches.

    Attributes:
        state: all sets, other owners' too; a test may change it behind our back.
        calls: how often each method, and each kind of operation, was called.
        failures: see Failures; a step is one operation of a transaction.
        missing_kinds: set types that "this kernel" lacks.
    """

    def __init__(self, owner: Owner = POLICY) -> None:
        self._owner = owner
        self.state: dict[SetName, FakeSet] = {}
        self.calls: Counter[str] = Counter()
        self.failures = Failures()
        self.missing_kinds: set[SetKind] = set()
        self.closed = False
        self._referees: list[Callable[[], Mapping[SetName, int]]] = []

    def seen_by(self, owner: Owner) -> FakeSets:
        """Another owner's driver on the same sets; counts and failures are its own."""
        other = FakeSets(owner)
        other.state, other.missing_kinds = self.state, self.missing_kinds
        other._referees = self._referees
        return other

    def watch_references(self, count: Callable[[], Mapping[SetName, int]]) -> None:
        """Ask this before destroying: how many rules name each set."""
        self._referees.append(count)

    def references(self, name: SetName) -> int:
        """How many rules name a set."""
        return sum(count().get(name, 0) for count in self._referees)

    def dump(self, names: Sequence[SetName] | None = None) -> dict[SetName, SetDump]:
        """See SetDriver."""
        self.calls["dump"] += 1
        wanted = self._own() if names is None else names
        return {
            name: SetDump(found.spec, dict(found.members), self.references(name))
            for name in wanted
            if (found := self.state.get(name)) is not None
        }

    def headers(self) -> dict[SetName, int]:
        """See SetDriver."""
        self.calls["headers"] += 1
        return {name: len(self.state[name].members) for name in self._own()}

    def apply(self, tx: SetTransaction) -> None:
        """See SetDriver."""
        self.calls["apply"] += 1
        for op in tx.ops:
            self.calls[type(op).__name__] += 1
            self.failures.step()
            self._apply_one(op)

    def close(self) -> None:
        """See SetDriver."""
        self.closed = True

    def _own(self) -> list[SetName]:
        return sorted(name for name in self.state if self._owner.owns(name))

    def _apply_one(self, op: SetOp) -> None:
        check_owner(op, self._owner)
        match op:
            case CreateSet():
                self._create(op)
            case AddMembers():
                found = self._existing(op.spec, "adding to")
                for member, mark in op.members.items():
                    self._add(found, member, mark)
            case DeleteMembers():
                found = self._existing(op.spec, "deleting from")
                for member in op.members:
                    _check_member(found.spec, member)
                    found.members.pop(member, None)
            case EmptySet():
                self._existing(op.spec, "emptying").members.clear()
            case DestroySet():
                if self.references(op.name):
                    raise SetError(f"set {op.name} is in use", name=op.name, code=ERR_BUSY)
                self.state.pop(op.name, None)
            case _:
                assert_never(op)

    def _create(self, op: CreateSet) -> None:
        spec = op.spec
        check_name(spec.name)
        if spec.kind in self.missing_kinds:
            raise SetError(f"no set type {spec.kind}", name=spec.name, code=4098)
        found = self.state.setdefault(spec.name, FakeSet(spec, maxelem_for(op.size)))
        if found.spec != spec:
            raise SetError(
                f"creating set {spec.name}: {found.spec} exists", name=spec.name, code=errno.EEXIST
            )

    def _existing(self, spec: SetSpec, verb: str) -> FakeSet:
        found = self.state.get(spec.name)
        if found is None:
            raise SetError(
                f"{verb} set {spec.name}: no such set", name=spec.name, code=errno.ENOENT
            )
        return found

    @staticmethod
    def _add(found: FakeSet, member: Member, mark: int | None) -> None:
        name = found.spec.name
        _check_member(found.spec, member)
        if found.spec.marks != (mark is not None):
            raise SetError(f"a mark on set {name}", name=name, code=ERR_PROTOCOL, member=member)
        if member not in found.members and len(found.members) >= found.maxelem:
            raise SetError(f"set {name} is full", name=name, code=ERR_FULL, member=member)
        found.members[member] = mark


def _check_member(spec: SetSpec, member: Member) -> None:
    """Refuse what the kernel refuses of a member: another type, another family, a length of 0."""
    addresses: tuple[bytes | Prefix, ...]
    if isinstance(member, AddressPort):
        addresses = (member.address,)
    elif isinstance(member, NetPair):
        addresses = (member.first, member.second)
    elif isinstance(member, AddressPortNet):
        addresses = (member.address, member.net)
    else:
        addresses = (member,)
    packed = [a.address if isinstance(a, Prefix) else a for a in addresses]
    fits = type(member) is _MEMBER_TYPES[spec.kind]
    if not fits or any(family_of(address) is not spec.family for address in packed):
        code = ERR_PROTOCOL
    elif spec.kind in (SetKind.HASH_NET, SetKind.HASH_IP_PORT_NET) and any(
        isinstance(a, Prefix) and a.length == 0 for a in addresses
    ):
        code = ERR_INVALID_CIDR
    else:
        return
    raise SetError(
        f"set {spec.name} at member {member_text(member)}",
        name=spec.name,
        code=code,
        member=member,
    )
