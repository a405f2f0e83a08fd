"""The node's policy dataplane: keeps the kernel at what the graph says.

Owns what was applied (chains, numbers, which sets exist) and how to get from there to what is wanted:
`change` for a delta of the graph (what it costs depends on the delta alone), `reconcile` for everything
(start, drift, after a failure), `collect` for what nothing leads to any more. All three are pure: they
return a `Plan` and record it as applied; `kernel_state.execute` applies it, and after a failure the next
plan is a `reconcile`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from netpol.enforce.kernel_state import KernelDump
from netpol.enforce.moves import Judgements, Move, crosses
from netpol.enforce.numbers import Numbers, leaves_of
from netpol.enforce.plan import (
    MAPS,
    MapEntry,
    Plan,
    SetChange,
    TableChange,
    assemble,
    garbage,
    set_changes,
    set_differences,
)
from netpol.enforce.podsets import (
    At,
    changed_entries,
    new_holders,
    pod_entries,
    strangers_of,
)
from netpol.enforce.refusal import Refusals, withhold
from netpol.enforce.two_tables import filter_first, rest_last, table_differences
from netpol.kernel.drivers import HookState, TableDump, TableTransaction
from netpol.model.ids import ChainName, Direction, SetName
from netpol.model.net import FAMILIES, Family, Prefix, family_of
from netpol.model.ruleset import AddressPort, Chain, Members, Ruleset, SetSpec
from netpol.policy.graph import ClassKey, Graph, GraphDelta, LocalPod
from netpol.render import classes, names, policies, reject, static
from netpol.render.node import (
    Desired,
    classes_in_use,
    member_spec,
    member_values,
    members_at,
    render_graph,
    set_parts,
)
from netpol.render.options import NONE, OPEN, UNKNOWN, DenyWith, RenderOptions

#: A chain that the kernel does not have, unlike any chain that it has.
_ABSENT: object = object()


def _without_mismatches(dump: KernelDump, desired: Desired) -> KernelDump:
    """Count sets of another type than the one that their name is wanted for among the strange ones."""
    strange = {
        name: f"a {have.spec.kind} set {name} exists, needed {desired.sets[name][0].kind}"
        for name, have in dump.sets.items()
        if name in desired.sets and have.spec != desired.sets[name][0]
    }
    if not strange:
        return dump
    left = {n: d for n, d in dump.sets.items() if n not in strange}
    return replace(dump, sets=left, strange={**dump.strange, **strange})


@dataclass(slots=True)
class _Applied:
    """What the kernel has, as far as we know."""

    chains: dict[Family, dict[ChainName, Chain]] = field(
        default_factory=lambda: {f: {} for f in FAMILIES}
    )
    sets: set[SetName] = field(default_factory=set)
    # Sets that bear our prefix but are not what we make: left alone.
    strange: set[SetName] = field(default_factory=set)
    # Address of a local pod to (uid, whether it is in force): to see that an address moved to another pod.
    holders: dict[bytes, str] = field(default_factory=dict)


class Dataplane:
    """Plans for one node. Not thread-safe; planning happens in the loop, `execute` elsewhere."""

    def __init__(self, graph: Graph, options: RenderOptions) -> None:
        self.graph, self.options = graph, options
        self.numbers = Numbers(options)
        self._applied = _Applied()
        self._users: dict[ClassKey, int] = {}
        # Sets that left use, with members that nobody keeps: one that comes back is emptied first.
        self._stale: set[SetName] = set()
        # Classes without a number. They stay so while they have pods, even if a number gets free:
        # a class in the middle of the change would be found by neither way.
        self._over: set[ClassKey] = set()
        self._extra_chains = False
        # Addresses, as host prefixes, whose entries were of others than have them now.
        self._strangers: set[Prefix] = set()
        self._knows_holders = False
        self.refusals = Refusals()
        # What the other setting of `deny_with` left behind.
        self._rest: tuple[TableTransaction, ...] = ()
        #: Why denied packets are dropped although they should be answered; "" while that works.
        self.reject_fault = ""
        #: Why filter was not written; then this agent does not try again.
        self.filter_refused = ""

    # -- everything -------------------------------------------------------------------------

    def reconcile(self, dump: KernelDump) -> Plan:
        """What brings the kernel, as dumped, to what the graph says (which was flushed before)."""
        self._choose_ending(dump)
        self._adopt(dump)
        strangers = strangers_of(self.graph.local_pods.values(), self._applied.holders)
        # A new agent does not know whose entries it finds: they may be of the pods that it knows.
        self._strangers = strangers if self._knows_holders else set()
        used = classes_in_use(self.graph)
        self._over &= set(used)
        for key in used:
            self._number(key)
        self._users = {}
        for pod in self.graph.local_pods.values():
            self._count(pod, 1)
        desired = render_graph(self.graph, self.options, self._numbers_of(used))
        dump = _without_mismatches(dump, desired)
        self.refusals.forget_changed(self.graph.active_policies)
        self.refusals.blame_sets(dump.strange, self.graph.active_policies)
        self._withhold(desired, dump)
        changes = set_changes(desired.sets, dump.sets)
        # An overflow set that left use is emptied: its class may come back to it, pod by pod.
        changes += [
            SetChange(d.spec, delete=list(d.members))
            for n, d in dump.sets.items()
            if names.is_overflow_set(n) and n not in desired.sets and d.members
        ]
        self._rest = ()
        tables = {f: self._table_change(desired, dump, f) for f in FAMILIES}
        chains = {f: {**dump.tables[f].chains, **desired.rulesets[f].chains} for f in FAMILIES}
        entries, recreated = changed_entries(changes, dump.sets, self._strangers)
        moved = self._moves(entries, chains)
        self._remember(desired, dump)
        return assemble(
            sets=changes,
            tables=tables,
            moved=moved,
            recreated=recreated,
            strangers=strangers,
            held_mark=self.options.mark(UNKNOWN),
            open_marks=self._open_marks,
        )

    @property
    def _open_marks(self) -> tuple[int, ...]:
        return self.options.mark(NONE), self.options.mark(OPEN)

    def _choose_ending(self, dump: KernelDump) -> None:
        """Where filter cannot be read, nothing relies on it, until the next time."""
        if self.options.rejects or self.reject_fault:
            faults = [*map(str, dump.filter_faults.values()), self.filter_refused]
            faults = [f for f in faults if f]
            self.reject_fault = faults[0] if faults else ""
            ending = DenyWith.DROP if faults else DenyWith.REJECT
            self.options = replace(self.options, deny_with=ending)

    def do_without_answers(self, why: str) -> bool:
        """Filter refused what answers denied packets; False where nothing is to be answered."""
        if not self.options.rejects:
            return False
        self.filter_refused = why
        return True

    def _withhold(self, desired: Desired, dump: KernelDump) -> None:
        """Adapt a rendered state to what is in the kernel and must stay for now."""
        for family in FAMILIES:
            # Leaves of a former agent stay until no map entry can lead to them.
            chains = self._with_trees(desired.rulesets[family].chains, family)
            desired.rulesets[family] = replace(desired.rulesets[family], chains=chains)
        if not self.refusals:
            self.refusals.peers.clear()
            return
        blocked = withhold(
            desired,
            self.refusals,
            graph=self.graph,
            sets=dump.sets,
            tables={f: t for f, t in dump.tables.items() if f not in dump.failed},
            options=self.options,
            strangers=self._strangers,
        )
        self.numbers.release(blocked)
        for key, family in itertools.product(blocked - self._over, FAMILIES):
            # Without a number, but not for want of one.
            desired.sets.pop(names.overflow_set(key, family), None)
        for family in FAMILIES:
            chains = self._with_trees(desired.rulesets[family].chains, family)
            desired.rulesets[family] = replace(desired.rulesets[family], chains=chains)

    def _with_trees(
        self, chains: Mapping[ChainName, Chain], family: Family
    ) -> dict[ChainName, Chain]:
        """Chains with the trees that lead where they may lead now, and no node of others."""
        kept = {n: c for n, c in chains.items() if not names.is_tree_chain(n)}
        return {**kept, **self._trees(family)}

    def _numbers_of(self, used: list[ClassKey]) -> dict[ClassKey, int]:
        return {k: self.numbers.used[k] for k in used if k in self.numbers.used}

    def _number(self, key: ClassKey) -> None:
        if key not in self._over and self.numbers.assign(key) is None:
            self._over.add(key)

    def _adopt(self, dump: KernelDump) -> None:
        self.numbers = Numbers(self.options)
        # What `_trees` may lead to; an empty tuple, since nobody looked into these chains yet.
        self._applied.chains = {f: dict.fromkeys(dump.tables[f].chains, ()) for f in FAMILIES}
        for direction, family in itertools.product(Direction, FAMILIES):
            leaves = leaves_of(dump.tables[family].chains, direction, self.options)
            self.numbers.adopt(direction, family, leaves)

    def _table_change(self, desired: Desired, dump: KernelDump, family: Family) -> TableChange:
        want, have = desired.rulesets[family], dump.tables[family]
        change = TableChange()
        for name, chain in want.chains.items():
            if have.chains.get(name) != chain:
                change.replace[name] = chain
        for hook, chain_name in want.hooks.items():
            state = have.hooks.get(hook, HookState())
            if state.jumps != ((1, chain_name),):
                change.hooks[hook] = chain_name
                change.hook_state[hook] = state
        answers, there = desired.filters[family], dump.filters.get(family, TableDump())
        change.first = filter_first(answers, there, family)
        self._rest += rest_last(answers, there, family, mangle_want=want, mangle_have=have)
        return change

    def _remember(self, desired: Desired, dump: KernelDump) -> None:
        """Record what will be there once the plan is applied; what is extra is garbage."""
        for family in FAMILIES:
            # Extra chains have unknown contents here; an empty tuple marks them for the garbage.
            extra = dict.fromkeys(dump.tables[family].chains, ())
            self._extra_chains |= bool(set(extra) - set(desired.rulesets[family].chains))
            self._applied.chains[family] = {**extra, **desired.rulesets[family].chains}
        self._applied.sets = {*dump.sets, *desired.sets}
        self._applied.strange = set(dump.strange)
        self._stale = set(dump.sets) - set(desired.sets)
        self._applied.holders = {
            a: p.uid for p in self.graph.local_pods.values() for a in p.addresses
        }
        self._knows_holders = True

    # -- one delta --------------------------------------------------------------------------

    def change(self, delta: GraphDelta) -> Plan:
        """What a delta of the graph (from `Graph.flush`) changes in the kernel.

        The caller must `reconcile` after any failure of the plan, since this records it as applied.
        """
        changes: dict[SetName, SetChange] = {}

        def at(spec: SetSpec) -> SetChange:
            change = changes.get(spec.name)
            if change is None:
                change = changes[spec.name] = SetChange(spec)
                if spec.name not in self._applied.sets:
                    change.create = True
                    self._applied.sets.add(spec.name)
            return change

        self._count_delta(delta)
        if delta.policies:
            self._extra_chains = True  # a changed policy may leave prefix sets behind
        new_classes = self._assign(delta)
        self._peer_sets(delta, at)
        recreated = new_holders(delta, self._applied.holders)
        entries = pod_entries(
            delta, at, recreated=recreated, numbers=self.numbers.used, options=self.options
        )
        tables = self._tables(delta, new_classes, at)
        return assemble(
            sets=changes.values(),
            tables=tables,
            moved=self._moves(entries, self._applied.chains),
            recreated=frozenset(recreated),
            held_mark=self.options.mark(UNKNOWN),
            open_marks=self._open_marks,
            crossing=crosses(delta, self.graph.active_policies.values()),
        )

    def _moves(
        self,
        entries: Mapping[MapEntry, tuple[int, int]],
        chains: Mapping[Family, Mapping[ChainName, tuple[object, ...]]],
    ) -> dict[MapEntry, Move]:
        """How map entries change, given their marks before and after, and what chains will be there."""
        judgements: dict[SetName, Judgements] = {}
        if entries:
            for direction, family in itertools.product(Direction, FAMILIES):
                judgements[names.class_map(direction, family)] = Judgements(
                    direction,
                    family,
                    self.numbers,
                    chains=chains[family],
                    shift=self.options.shift,
                )
        return {at: judgements[at[0]].move(old, new) for at, (old, new) in entries.items()}

    def serve(self, services: tuple[AddressPort, ...]) -> Plan:
        """What changes when IPVS serves other services than before, as far as INPUT lets them through.

        As with `change`, the caller must `reconcile` after any failure of the plan; also where there
        was no IPVS, or will be none, since then rules change too.
        """
        before = self.options
        self.options = replace(before, ipvs_services=services)
        changes = []
        for family in FAMILIES:
            had = static.ipvs_members(before, family)
            want = static.ipvs_members(self.options, family)
            change = SetChange(static.ipvs_spec(family))
            change.add = {m: v for m, v in want.items() if m not in had}
            change.delete = [m for m in had if m not in want]
            changes.append(change)
        return assemble(sets=changes, tables={}, moved={})

    def _count(self, pod: LocalPod | None, step: int) -> None:
        for key in (pod.ingress, pod.egress) if pod is not None else ():
            if key is not None:
                self._users[key] = self._users.get(key, 0) + step

    def _count_delta(self, delta: GraphDelta) -> None:
        for key, pod in delta.pods.items():
            self._count(pod, 1)
            self._count(delta.before.get(key), -1)

    def _assign(self, delta: GraphDelta) -> list[ClassKey]:
        """Give numbers to the classes that appear; returns those whose chains are missing."""
        missing = []
        for pod in delta.pods.values():
            for key in (pod.ingress, pod.egress) if pod is not None else ():
                if key is None:
                    continue
                self._number(key)
                chain = names.class_chain(key)
                if any(not self._applied.chains[f].get(chain) for f in FAMILIES):
                    missing.append(key)
        return missing

    def _peer_sets(self, delta: GraphDelta, at: At) -> None:
        for key in delta.new_sets:
            for family in FAMILIES:
                spec = member_spec(key, family)
                change = at(spec)
                change.fresh, change.back = True, spec.name in self._stale
                change.add.update(member_values(self.graph, key, family))
                self._stale.discard(spec.name)
        for key in delta.gone_sets:
            self._stale |= {names.member_set(key, f) for f in FAMILIES}
        for key, set_delta in delta.set_deltas.items():
            if key in delta.new_sets:
                continue
            for address, (old, new) in set_delta.changes.items():
                change = at(member_spec(key, family_of(address)))
                had, has = members_at(key, address, old), members_at(key, address, new)
                change.add.update(dict.fromkeys(m for m in has if m not in had))
                change.delete += [m for m in had if m not in has]

    def _tables(
        self, delta: GraphDelta, new_classes: list[ClassKey], at: At
    ) -> dict[Family, TableChange]:
        tables: dict[Family, TableChange] = {f: TableChange() for f in FAMILIES}
        for family, table in tables.items():
            want: dict[ChainName, Chain] = {}
            for identity, policy in delta.policies.items():
                if policy is None:
                    continue
                for direction in identity.isolates:
                    chain = names.policy_chain(identity, direction)
                    want[chain] = policies.policy_rules(policy, direction, family)
                for spec, members in policies.policy_net_sets(policy, family).values():
                    if spec.name not in self._applied.sets or spec.name in self._stale:
                        at(spec).add.update(members)
                        self._stale.discard(spec.name)
            for key in new_classes:
                want[names.class_chain(key)] = classes.class_rules(key, self.options, family)
            if new_classes:
                want |= self._trees(family)
                for key in self._overflow():
                    at(classes.overflow_spec(key, family))
            have = self._applied.chains[family]
            table.replace = {n: c for n, c in want.items() if have.get(n, _ABSENT) != c}
            have.update(table.replace)
        return tables

    def _overflow(self) -> list[ClassKey]:
        return sorted(self._over)

    def _trees(self, family: Family) -> dict[ChainName, Chain]:
        out: dict[ChainName, Chain] = {}
        for direction in Direction:
            out |= classes.tree_chains(
                direction,
                self.numbers.used,
                self._overflow(),
                options=self.options,
                family=family,
                extra=self.numbers.foreign(direction, family),
            )
        return out

    # -- garbage ----------------------------------------------------------------------------

    def collect(self, *, without: Collection[Family] = ()) -> Plan:
        """What removes everything that nothing leads to; records it as done.

        Not while a policy is refused: what it had last is still in use. Families in `without` are down:
        theirs goes when they are back. A number that is reused may mean another class there: what the
        families disagree about is sorted out when they are (see `numbers`).
        """
        rest, self._rest = self._rest, ()
        if self.refusals:
            return Plan(rest)
        self._extra_chains = False
        retired = [k for k, n in self._users.items() if not n]
        for key in retired:
            del self._users[key]
            self._over.discard(key)
        self.numbers.release(retired)
        self.numbers.settle()
        want: set[ChainName] = set()
        used = list(self._users)
        replace: dict[Family, dict[ChainName, Chain]] = {}
        doomed: dict[Family, list[ChainName]] = {}
        net_sets: set[SetName] = set()
        for family in FAMILIES:
            trees = self._trees(family)
            want |= set(trees) | set(static.static_chains(self.options, family))
            have = self._applied.chains[family]
            replace[family] = {n: c for n, c in trees.items() if have.get(n, _ABSENT) != c}
            have.update(replace[family])
            for policy in self.graph.active_policies.values():
                net_sets |= set(policies.policy_net_sets(policy, family))
        want |= {names.class_chain(k) for k in used}
        for identity in self.graph.active_policies:
            want |= {names.policy_chain(identity, d) for d in identity.isolates}
        for family in FAMILIES:
            have = self._applied.chains[family]
            doomed[family] = [n for n in have if n not in want]
            for name in doomed[family]:
                del have[name]
        keep = net_sets | set(MAPS)
        if self.options.ipvs_services is not None:
            keep |= {names.ipvs_set(f) for f in FAMILIES}
        keep |= {s.name for f in FAMILIES for s, _ in static.answer_sets(self.options, f)}
        keep |= {names.member_set(k, f) for k in self.graph.members.active() for f in FAMILIES}
        keep |= {names.overflow_set(k, f) for k in self._overflow() for f in FAMILIES}
        extra = self._applied.sets - keep
        gone = sorted(n for n in extra if names.family_of_set(n) not in without)
        self._applied.sets -= set(gone)
        self._stale -= extra
        plan = garbage(chains=doomed, replace=replace, sets=gone)
        return Plan((*rest, *plan.steps))

    # -- looking ----------------------------------------------------------------------------

    def drift(self, dump: KernelDump) -> str:
        """What differs between a dump and what was applied, in words; "" when nothing does.

        What waits for the garbage does not count, nor does a family that could not be read.
        """
        whole = [f for f in FAMILIES if f not in dump.failed]
        found = [d for f in whole for d in self.table_drift(f, dump.tables[f])]
        for family, have in dump.filters.items():
            found += self.filter_drift(family, have)
        desired = render_graph(
            self.graph, self.options, self._numbers_of(classes_in_use(self.graph))
        )
        if self.refusals:
            self._withhold(desired, dump)
        sets = {n: w for n, w in desired.sets.items() if w[0].family in whole}
        found += set_differences(sets, dump.sets)
        found += self.foreign_sets(dump.sets)
        return "; ".join(found[:5]) + ("; and more" if len(found) > 5 else "")

    def table_drift(self, family: Family, have: TableDump) -> list[str]:
        """What differs between a family's table and what was applied, in words."""
        want = Ruleset(self._applied.chains[family], static.hook_jumps(self.options))
        return table_differences(want, have, family, static.TABLE, rest=bool(self._rest))

    def filter_drift(self, family: Family, have: TableDump) -> list[str]:
        """What differs between a family's filter table and what was applied, in words."""
        want = reject.filter_ruleset(self.options, family)
        return table_differences(want, have, family, reject.TABLE, rest=bool(self._rest))

    def foreign_sets(self, present: Iterable[SetName]) -> list[str]:
        """Which of the sets with our prefix were never applied, in words."""
        known = self._applied.sets | self._applied.strange
        return [f"set {n} is not ours to have" for n in present if n not in known]

    def wanted_sets(self) -> Iterator[dict[SetName, tuple[SetSpec, Members]]]:
        """All sets as they must be, some at a time; see `set_parts`."""
        return set_parts(self.graph, self.options, self._numbers_of(classes_in_use(self.graph)))

    @property
    def has_garbage(self) -> bool:
        """Whether `collect` would find something."""
        if self._rest or self.refusals:
            return bool(self._rest)
        return bool(self._stale) or self._extra_chains or any(not n for n in self._users.values())

    def counts(self) -> dict[str, int]:
        """Sizes for status and metrics."""
        chains = self._applied.chains
        return {
            "sets": len(self._applied.sets),
            "chains": sum(len(c) for c in chains.values()),
            "rules": sum(len(c) for by_name in chains.values() for c in by_name.values()),
            "classes": sum(1 for n in self._users.values() if n),
            "pods": len(self.graph.local_pods),
        }
