"""Drivers in memory for tests: they keep state and refuse what the kernel refuses.

They pass the same contract suites as the drivers of the real kernel, on which every refusal here was
first seen. What they add: state that a test can look at and change behind the caller's back, a count
of calls, and failures on demand.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    ForeignRule,
    HookState,
    SetDump,
    SetError,
    SetOp,
    SetTransaction,
    TableDump,
    TableError,
    TableTransaction,
    Variant,
)
from netpol.kernel.rule_text import canonical, rule_text
from netpol.kernel.set_text import check_name, maxelem_for, member_text
from netpol.kernel.table_text import transaction_text
from netpol.model.ids import ChainName, SetName
from netpol.model.net import Family, Prefix, family_of
from netpol.model.ruleset import (
    OWN_PREFIX,
    AddressPort,
    Goto,
    Hook,
    Jump,
    MapMark,
    Member,
    NetPair,
    Reject,
    Rule,
    SetKind,
    SetMatch,
    SetSpec,
)

# IPSET_ERR_*, as the kernel numbers them.
ERR_PROTOCOL, ERR_BUSY, ERR_INVALID_CIDR, ERR_FULL = 4097, 4100, 4104, 4352

_MEMBER_TYPES: dict[SetKind, type] = {
    SetKind.HASH_IP: bytes,
    SetKind.HASH_NET: Prefix,
    SetKind.HASH_IP_PORT: AddressPort,
    SetKind.HASH_NET_NET: NetPair,
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

    Attributes:
        state: all sets, those without our prefix too; a test may change it behind our back.
        calls: how often each method, and each kind of operation, was called.
        failures: see Failures; a step is one operation of a transaction.
        missing_kinds: set types that "this kernel" lacks.
    """

    def __init__(self) -> None:
        self.state: dict[SetName, FakeSet] = {}
        self.calls: Counter[str] = Counter()
        self.failures = Failures()
        self.missing_kinds: set[SetKind] = set()
        self.closed = False
        self._referees: list[Callable[[], Mapping[SetName, int]]] = []

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
        return sorted(name for name in self.state if name.startswith(OWN_PREFIX))

    def _apply_one(self, op: SetOp) -> None:
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
    else:
        addresses = (member,)
    packed = [a.address if isinstance(a, Prefix) else a for a in addresses]
    fits = type(member) is _MEMBER_TYPES[spec.kind]
    if not fits or any(family_of(address) is not spec.family for address in packed):
        code = ERR_PROTOCOL
    elif spec.kind is SetKind.HASH_NET and any(
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


#: A rule of a hook: the chain of our plain jump, or the text of anything else.
HookRule = ChainName | ForeignRule


@dataclass(slots=True)
class FakeTable:
    """One table of one family: our chains, and all rules of the hooks, foreign ones too."""

    chains: dict[ChainName, list[Rule | ForeignRule]] = field(default_factory=dict)
    hooks: dict[Hook, list[HookRule]] = field(default_factory=dict)

    def copy(self) -> FakeTable:
        """A copy that shares nothing that changes."""
        return FakeTable(
            {name: list(rules) for name, rules in self.chains.items()},
            {hook: list(rules) for hook, rules in self.hooks.items()},
        )


class FakeTables:
    """TableDriver in memory.

    Args:
        variant: which one it plays.
        sets: where rules look for the sets they name, and which then cannot be destroyed.

    Attributes:
        state: the tables that exist; a test may change it behind our back.
        calls, failures: as in FakeSets; a step is one transaction.
        transactions: the text of each transaction that was applied, in order.
    """

    def __init__(self, variant: Variant = Variant.NFT, *, sets: FakeSets | None = None) -> None:
        self.variant = variant
        self.state: dict[tuple[str, Family], FakeTable] = {}
        self.calls: Counter[str] = Counter()
        self.failures = Failures()
        self.transactions: list[str] = []
        self._sets = sets
        if sets is not None:
            sets.watch_references(self._set_references)

    def table(self, table: str, family: Family) -> FakeTable:
        """A table to look at or change; it comes into being."""
        return self.state.setdefault((table, family), FakeTable())

    def dump(self, table: str, family: Family) -> TableDump:
        """See TableDriver."""
        self.calls["dump"] += 1
        found = self.state.get((table, family), FakeTable())
        hooks = {
            hook: HookState(
                tuple((at, rule) for at, rule in enumerate(rules, 1) if isinstance(rule, str))
            )
            for hook, rules in found.hooks.items()
        }
        return TableDump(
            {name: tuple(rules) for name, rules in found.chains.items()},
            {hook: state for hook, state in hooks.items() if state.jumps},
        )

    def fingerprint(self, table: str, family: Family) -> str:
        """See TableDriver."""
        self.calls["fingerprint"] += 1
        return repr(self.state.get((table, family)))

    def counters(self, table: str, family: Family) -> dict[ChainName, tuple[tuple[int, int], ...]]:
        """See TableDriver. Nothing is ever counted."""
        self.calls["counters"] += 1
        found = self.state.get((table, family), FakeTable())
        return {name: ((0, 0),) * len(rules) for name, rules in found.chains.items()}

    def apply(self, tx: TableTransaction) -> None:
        """See TableDriver."""
        self.calls["apply"] += 1
        self.failures.step()
        text = transaction_text(tx)
        after = self.state.get((tx.table, tx.family), FakeTable()).copy()
        _Transaction(tx, text=text, table=after, sets=self._sets).run()
        self.state[tx.table, tx.family] = after
        self.transactions.append(text)

    def _set_references(self) -> Mapping[SetName, int]:
        return Counter(
            name
            for found in self.state.values()
            for rules in found.chains.values()
            for rule in rules
            if isinstance(rule, Rule)
            for name in _sets_of(rule)
        )


def _sets_of(rule: Rule) -> Iterable[SetName]:
    yield from (match.name for match in rule.matches if isinstance(match, SetMatch))
    if isinstance(rule.action, MapMark):
        yield rule.action.name


class _Transaction:
    """One transaction on a copy of a table; what the kernel would refuse raises TableError."""

    def __init__(
        self, tx: TableTransaction, *, text: str, table: FakeTable, sets: FakeSets | None
    ) -> None:
        self._tx, self._lines, self._table, self._sets = tx, text.splitlines(), table, sets

    def run(self) -> None:
        tx, chains = self._tx, self._table.chains
        for name in (*tx.replace, *tx.delete):
            chains[name] = []
        for name, rules in tx.replace.items():
            for rule in rules:
                self._check(name, rule)
            chains[name] = [canonical(rule) for rule in rules]
        self._edit_hooks()
        for name in tx.delete:
            if any(True for _ in self._jumps_to(name)):
                raise self._refused(f"-X {name}", "the chain is referenced")
            del chains[name]
        self._check_loops()

    def _edit_hooks(self) -> None:
        """Do the hook lines of the text, which is where their order is decided."""
        hooks = self._table.hooks
        for line in self._lines:
            words = line.split()
            if words[0] == "-I":
                self._existing(ChainName(words[4]), line)
                hooks.setdefault(Hook(words[1]), []).insert(0, ChainName(words[4]))
            elif words[0] == "-D":
                rules = hooks.get(Hook(words[1]), [])
                if words[3] not in rules:
                    raise self._refused(line, "no such rule")
                rules.remove(ChainName(words[3]))

    def _check(self, name: ChainName, rule: Rule) -> None:
        line = f"-A {name} {rule_text(rule, self._tx.family)}"
        action = rule.action
        if isinstance(action, Jump | Goto):
            self._existing(action.chain, line)
        if isinstance(action, MapMark) and self._tx.table != "mangle":
            raise self._refused(line, "--map-set is only valid in mangle")
        if isinstance(action, Reject) and self._tx.table != "filter":
            raise self._refused(line, "REJECT is only valid in filter")
        if self._sets is None:
            return
        for set_name in _sets_of(rule):
            found = self._sets.state.get(set_name)
            if found is None:
                raise self._refused(line, f"set {set_name} does not exist")
            if found.spec.family is not self._tx.family:
                raise self._refused(line, f"set {set_name} is of the other family")

    def _existing(self, name: ChainName, line: str) -> None:
        if name not in self._table.chains:
            raise self._refused(line, f"chain {name} does not exist")

    def _jumps_to(self, name: ChainName) -> Iterable[Rule | ChainName]:
        for rules in self._table.hooks.values():
            yield from (rule for rule in rules if rule == name)
        for chain in self._table.chains.values():
            for rule in chain:
                if isinstance(rule, Rule) and _target(rule) == name:
                    yield rule

    def _check_loops(self) -> None:
        """Chains that a hook reaches must not come back to themselves."""
        done: set[ChainName] = set()

        def walk(name: ChainName, path: tuple[ChainName, ...]) -> None:
            if name in path:
                raise TableError(f"chain {name} loops", retryable=False, line=len(self._lines))
            if name in done:
                return
            for rule in self._table.chains.get(name, ()):
                target = _target(rule) if isinstance(rule, Rule) else None
                if target is not None:
                    walk(target, (*path, name))
            done.add(name)

        for rules in self._table.hooks.values():
            for rule in rules:
                if isinstance(rule, str):
                    walk(rule, ())

    def _refused(self, line: str, why: str) -> TableError:
        at = self._lines.index(line) + 1
        return TableError(
            f"table {self._tx.table} (IPv{self._tx.family}) refused line {at} ({line})",
            retryable=False,
            line=at,
            got=why,
        )


def _target(rule: Rule) -> ChainName | None:
    return rule.action.chain if isinstance(rule.action, Jump | Goto) else None
