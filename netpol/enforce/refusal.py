"""What the kernel refuses stays alone: which policy it was, and a desired state without it.

A refused policy changes nothing: its chains keep the rules that were applied last. A pod that would move
to a class with a policy that never had rules keeps the class it has; one that has none is held. All other
policies and pods are up to date. A refusal holds until the policy changes or it is time to try again.

Where an error names nobody, `Search` finds out who it is. What each of its tries applies stays applied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from netpol.enforce.plan import address_of
from netpol.kernel.drivers import SetDump, SetError, TableDump, TableError, TableTransaction
from netpol.kernel.table_text import transaction_text
from netpol.model.ids import ChainName, Direction, ObjectKey, SetName
from netpol.model.net import FAMILIES, Family, Prefix, host_prefix
from netpol.model.objects import Endpoint
from netpol.model.policy import CompiledPolicy
from netpol.model.ruleset import Rule, Ruleset
from netpol.policy.graph import ClassKey, Graph, PolicyId, sets_of
from netpol.render import names
from netpol.render.node import Desired
from netpol.render.options import UNKNOWN, RenderOptions
from netpol.render.policies import policy_net_sets

#: Names that are followed in one search before it asks everybody.
HINTS_MAX = 8
_CHAIN_OF_LINE = re.compile(r"(?:-A |:)(\S+)")


@dataclass(slots=True)
class Refusals:
    """The policies that the kernel does not take, and the sets that it cannot be asked about.

    Attributes:
        policies: each with the contents that were refused, and the reason.
        sets: sets that failed, with the reason.
        waiting: policies that wait for their turn while a search is under way.
        retried: those that are tried again; refused for all that anybody knows, until that is done.
        peers: who had which address in the sets of what is kept, when that was seen first.
    """

    policies: dict[PolicyId, tuple[CompiledPolicy, str]] = field(default_factory=dict)
    sets: dict[SetName, str] = field(default_factory=dict)
    waiting: list[PolicyId] = field(default_factory=list)
    retried: dict[PolicyId, tuple[CompiledPolicy, str]] = field(default_factory=dict)
    peers: dict[bytes, Endpoint | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.policies or self.waiting)

    @property
    def withheld(self) -> set[PolicyId]:
        """Whatever must stay as it is for now."""
        return {*self.policies, *self.waiting}

    def reasons(self) -> dict[ObjectKey, str]:
        """Why each refused policy was."""
        return {i.key: why for i, (_, why) in {**self.retried, **self.policies}.items()}

    def try_again(self) -> None:
        """Leave nothing out at the next run."""
        self.retried, self.policies, self.sets = self.policies, {}, {}

    def forget_changed(self, active: Mapping[PolicyId, CompiledPolicy]) -> None:
        """A policy with other contents, or out of use, is not refused."""
        kept = {i: p for i, p in self.policies.items() if active.get(i) == p[0]}
        if kept != self.policies:
            self.policies, self.sets = kept, {}

    def blame_set(self, error: SetError, active: Mapping[PolicyId, CompiledPolicy]) -> bool:
        """Refuse the policies that need a set that failed; False where none does."""
        guilty = [i for i, p in active.items() if error.name in set_names(p)]
        if guilty:
            self.sets[error.name] = str(error)
        for identity in guilty:
            self.policies[identity] = (active[identity], str(error))
        return bool(guilty)

    def blame_sets(
        self, strange: Mapping[SetName, str], active: Mapping[PolicyId, CompiledPolicy]
    ) -> None:
        """Sets under our prefix that are not what we make: their policies cannot be applied."""
        self.sets |= strange
        for identity, policy in active.items():
            for name in set_names(policy) & set(strange):
                self.policies[identity] = (policy, strange[name])


class Search:
    """Who it is, where a table refuses a transaction.

    An error's line is a hint at best: legacy names COMMIT for what the kernel refuses, nft for a loop some
    rule that leads there. So whoever is named waits, else everybody who has new rules in the transaction;
    what is then still refused is nobody's fault. After that half of those who wait have their turn; when
    that is refused, half of them, down to one alone, who it is. Finding one takes two transactions for
    each doubling of the number of suspects, at most.

    Args:
        refusals: keeps who waits and who was found.
    """

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        # Families that took a transaction without the suspects, since they first refused one.
        self._sound: set[Family] = set()
        self._hints = 0

    def refused(
        self,
        error: Exception,
        step: object,
        active: Mapping[PolicyId, CompiledPolicy],
        withheld: set[PolicyId],
    ) -> bool:
        """Take in that a family refused a transaction; False when that is nobody's fault.

        Args:
            error: what the driver raised.
            step: the transaction.
            active: all policies in use.
            withheld: who was left out when the transaction was made.
        """
        if not isinstance(error, TableError) or error.retryable:
            return False
        if not isinstance(step, TableTransaction):
            return False
        # In the same order for both families, so that those who are tried are tried in both.
        suspects = sorted(
            i for i in active.keys() - withheld if not _chains(i).isdisjoint(step.replace)
        )
        if step.family not in self._sound:
            wait = self._named(error, step, suspects) or suspects
        elif len(suspects) == 1:
            self._refusals.policies[suspects[0]] = (active[suspects[0]], str(error))
            wait = []
        else:
            wait = suspects[len(suspects) // 2 :]
        self._refusals.waiting += [i for i in wait if i not in self._refusals.waiting]
        return bool(suspects)

    def _named(
        self, error: TableError, step: TableTransaction, suspects: list[PolicyId]
    ) -> list[PolicyId]:
        self._hints += 1
        chain = _chain_at(step, error.line) if self._hints <= HINTS_MAX else None
        return [i for i in suspects if chain in _chains(i)]

    def took(self, families: Iterable[Family]) -> bool:
        """These families took what they were given; False when nobody waits any more."""
        if not self._refusals.waiting:
            return False
        self._sound |= set(families)
        del self._refusals.waiting[: -(-len(self._refusals.waiting) // 2)]
        return True

    def end(self) -> None:
        """Nobody waits."""
        self._refusals.waiting.clear()


def set_names(policy: CompiledPolicy) -> set[SetName]:
    """The sets of both families that a policy's rules name."""
    out = {names.member_set(k, f) for k in sets_of(policy) for f in FAMILIES}
    for family in FAMILIES:
        out |= set(policy_net_sets(policy, family))
    return out


def _chains(identity: PolicyId) -> set[ChainName]:
    return {names.policy_chain(identity, d) for d in identity.isolates}


def _chain_at(step: TableTransaction, line: int) -> ChainName | None:
    try:
        lines = transaction_text(step).splitlines() if line else []
    except TableError:  # a rule that cannot be written: the driver failed for the same
        return None
    found = _CHAIN_OF_LINE.match(lines[line - 1]) if 0 < line <= len(lines) else None
    return ChainName(found.group(1)) if found else None


def withhold(
    desired: Desired,
    refusals: Refusals,
    *,
    graph: Graph,
    sets: Mapping[SetName, SetDump],
    tables: Mapping[Family, TableDump],
    options: RenderOptions,
    strangers: Collection[Prefix] = (),
) -> set[ClassKey]:
    """Take what is refused out of a desired state, in favour of what is in the kernel.

    Args:
        desired: the state; changed.
        refusals: what is refused.
        graph: who is who.
        sets: what the kernel has.
        tables: of the families that are read and written at all.
        options: how entries are rendered.
        strangers: host prefixes whose entries are of other pods than those that have them now.

    Returns:
        The classes that no pod may move to.
    """
    for name in refusals.sets:
        spec_and_members = desired.sets.pop(name, None)
        if spec_and_members is not None and name in sets:
            # What it has too much can go, whatever it does not take.
            spec, want = spec_and_members
            desired.sets[name] = spec, {m: v for m, v in sets[name].members.items() if m in want}
    withheld = refusals.withheld
    blocked = _blocked(withheld, graph, tables)
    for family, dump in tables.items():
        chains = dict(desired.rulesets[family].chains)
        for identity in withheld:
            for direction in identity.isolates:
                chain = names.policy_chain(identity, direction)
                have = dump.chains.get(chain)
                if have is None:
                    chains.pop(chain, None)
                else:
                    chains[chain] = tuple(r for r in have if isinstance(r, Rule))
        for key in blocked:
            chains.pop(names.class_chain(key), None)
        desired.rulesets[family] = Ruleset(chains, desired.rulesets[family].hooks)
    _forget_peers(desired, refusals, graph=graph, sets=sets)
    _keep_entries(desired, blocked, graph=graph, sets=sets, options=options, strangers=strangers)
    return blocked


def _forget_peers(
    desired: Desired, refusals: Refusals, *, graph: Graph, sets: Mapping[SetName, SetDump]
) -> None:
    """Take out of the sets of kept rules whoever is not who was meant.

    Nobody knows any more what those sets select. But an address that has another pod now, or one with other
    labels, is not what was applied.
    """
    for name, dump in sets.items():
        if name in desired.sets or names.is_overflow_set(name):
            continue
        kept = dict(dump.members)
        for member in dump.members:
            address = address_of(dump.spec, member)
            if address is None:
                continue
            owner = graph.members.owner(address)
            meant = refusals.peers.setdefault(address, owner)
            if owner is not None and owner != meant:
                del kept[member]
        if len(kept) != len(dump.members):
            desired.sets[name] = dump.spec, kept


def _blocked(
    withheld: Iterable[PolicyId], graph: Graph, tables: Mapping[Family, TableDump]
) -> set[ClassKey]:
    """Classes with a withheld policy whose chain some family does not have."""
    absent = {
        (i, d)
        for i in withheld
        for d in i.isolates
        if any(names.policy_chain(i, d) not in dump.chains for dump in tables.values())
    }
    out: set[ClassKey] = set()
    for pod in graph.local_pods.values():
        for key in (pod.ingress, pod.egress):
            if key is not None and any((i, key.direction) in absent for i in key.policies):
                out.add(key)
    return out


def _keep_entries(
    desired: Desired,
    blocked: set[ClassKey],
    *,
    graph: Graph,
    sets: Mapping[SetName, SetDump],
    options: RenderOptions,
    strangers: Collection[Prefix],
) -> None:
    for pod in graph.local_pods.values():
        for direction in Direction:
            if pod.class_of(direction) not in blocked:
                continue
            for address in pod.addresses:
                entry = host_prefix(address)
                name = names.class_map(direction, entry.family)
                have = sets[name].members.get(entry) if name in sets else None
                if entry in strangers:
                    have = None
                spec, members = desired.sets[name]
                mark = options.mark(UNKNOWN) if have is None else have
                desired.sets[name] = spec, {**members, entry: mark}
