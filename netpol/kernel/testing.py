"""Drivers in memory for tests: they keep state and refuse what the kernel refuses.

They pass the same contract suites as the drivers of the real kernel, on which every refusal here was
first seen. What they add: state that a test can look at and change behind the caller's back, a count
of calls, and failures on demand.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from netpol.kernel.drivers import (
    ForeignRule,
    TableDump,
    TableError,
    TableTransaction,
    Variant,
)
from netpol.kernel.rule_text import canonical, rule_text
from netpol.kernel.table_text import hook_states, transaction_text
from netpol.kernel.testing_sets import Failures, FakeSet, FakeSets
from netpol.model.ids import POLICY, ChainName, Owner, SetName
from netpol.model.net import Family
from netpol.model.ruleset import (
    Goto,
    Hook,
    Jump,
    MapMark,
    Masquerade,
    Reject,
    Rule,
    SetMatch,
)

__all__ = ["Failures", "FakeSet", "FakeSets", "FakeTable", "FakeTables"]

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
        owner: whose chains and jumps it sees and touches.

    Attributes:
        state: the tables that exist; a test may change it behind our back.
        calls, failures: as in FakeSets; a step is one transaction.
        transactions: the text of each transaction that was applied, in order.
    """

    def __init__(
        self,
        variant: Variant = Variant.NFT,
        *,
        sets: FakeSets | None = None,
        owner: Owner = POLICY,
    ) -> None:
        self.variant = variant
        self._owner = owner
        self.state: dict[tuple[str, Family], FakeTable] = {}
        self.calls: Counter[str] = Counter()
        self.failures = Failures()
        self.transactions: list[str] = []
        self._sets = sets
        if sets is not None:
            sets.watch_references(self._set_references)

    def seen_by(self, owner: Owner) -> FakeTables:
        """Another owner's driver on the same tables; counts and failures are its own."""
        other = FakeTables(self.variant, owner=owner)
        other.state, other._sets = self.state, self._sets
        return other

    def table(self, table: str, family: Family) -> FakeTable:
        """A table to look at or change; it comes into being."""
        return self.state.setdefault((table, family), FakeTable())

    def dump(self, table: str, family: Family) -> TableDump:
        """See TableDriver."""
        self.calls["dump"] += 1
        found = self.state.get((table, family), FakeTable())
        jumps = {
            hook: [rule if isinstance(rule, str) else None for rule in rules]
            for hook, rules in found.hooks.items()
        }
        chains = {n: tuple(rules) for n, rules in found.chains.items() if self._owner.owns(n)}
        return TableDump(chains, hook_states(jumps, self._owner))

    def fingerprint(self, table: str, family: Family) -> str:
        """See TableDriver."""
        self.calls["fingerprint"] += 1
        found = self.state.get((table, family))
        if found is None:
            return ""
        excluded = self._owner.excluding
        chains = {n: rules for n, rules in found.chains.items() if not n.startswith(excluded)}
        return repr((chains, found.hooks))

    def generation(self) -> int | None:
        """See TableDriver. Told from the state, so that also what a test does to it counts."""
        return zlib.crc32(repr(self.state).encode())

    def counters(self, table: str, family: Family) -> dict[ChainName, tuple[tuple[int, int], ...]]:
        """See TableDriver. Nothing is ever counted."""
        self.calls["counters"] += 1
        found = self.state.get((table, family), FakeTable())
        return {
            name: ((0, 0),) * len(rules)
            for name, rules in found.chains.items()
            if self._owner.owns(name)
        }

    def apply(self, tx: TableTransaction) -> None:
        """See TableDriver."""
        self.calls["apply"] += 1
        self.failures.step()
        text = transaction_text(tx, self._owner)
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
                rules, place = hooks.setdefault(Hook(words[1]), []), int(words[2])
                if place > len(rules) + 1:
                    raise self._refused(line, "index of insertion too big")
                rules.insert(place - 1, ChainName(words[4]))
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
        if isinstance(action, Masquerade) and self._tx.table != "nat":
            raise self._refused(line, "MASQUERADE is only valid in nat")
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
