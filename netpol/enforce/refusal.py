"""What the kernel refuses stays alone: which policy it was, and a desired state without it.

A refused policy changes nothing: its chains keep the rules that were applied last. A pod that would move
to a class with a policy that never had rules keeps the class it has; one that has none is held. All other
policies and pods are up to date. A refusal holds until the policy changes or it is time to try again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from netpol.kernel.drivers import SetDump, SetError, TableDump, TableError, TableTransaction
from netpol.kernel.table_text import transaction_text
from netpol.lib.errors import KernelError
from netpol.model.ids import ChainName, Direction, ObjectKey, SetName
from netpol.model.net import FAMILIES, Family, host_prefix
from netpol.model.policy import CompiledPolicy
from netpol.model.ruleset import Rule, Ruleset
from netpol.policy.graph import ClassKey, Graph, PolicyId, sets_of
from netpol.render import names
from netpol.render.node import Desired
from netpol.render.options import UNKNOWN, RenderOptions
from netpol.render.policies import policy_net_sets

_CHAIN_OF_LINE = re.compile(r"(?:-A |:)(\S+)")


@dataclass(slots=True)
class Refusals:
    """The policies that the kernel does not take, and the sets that it cannot be asked about.

    Attributes:
        policies: each with the contents that were refused, and the reason.
        sets: sets that failed, with the reason.
    """

    policies: dict[PolicyId, tuple[CompiledPolicy, str]] = field(default_factory=dict)
    sets: dict[SetName, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.policies)

    def reasons(self) -> dict[ObjectKey, str]:
        """Why each refused policy was."""
        return {identity.key: why for identity, (_, why) in self.policies.items()}

    def clear(self) -> None:
        """Try everything again."""
        self.policies.clear()
        self.sets.clear()

    def forget_changed(self, active: Mapping[PolicyId, CompiledPolicy]) -> None:
        """A policy with other contents, or out of use, is not refused."""
        kept = {i: p for i, p in self.policies.items() if active.get(i) == p[0]}
        if kept != self.policies:
            self.policies, self.sets = kept, {}

    def blame(
        self,
        error: KernelError,
        step: object,
        active: Mapping[PolicyId, CompiledPolicy],
    ) -> bool:
        """Find the policies behind an error; False when it is none's (or will pass)."""
        guilty: list[PolicyId] = []
        if isinstance(error, SetError):
            guilty = [i for i, p in active.items() if error.name in set_names(p)]
            if guilty:
                self.sets[error.name] = str(error)
        elif isinstance(error, TableError) and not error.retryable:
            chain = _chain_at(step, error.line)
            guilty = [i for i in active if chain in {names.policy_chain(i, d) for d in i.isolates}]
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


def set_names(policy: CompiledPolicy) -> set[SetName]:
    """The sets of both families that a policy's rules name."""
    out = {names.member_set(k, f) for k in sets_of(policy) for f in FAMILIES}
    for family in FAMILIES:
        out |= set(policy_net_sets(policy, family))
    return out


def _chain_at(step: object, line: int) -> ChainName | None:
    if not isinstance(step, TableTransaction) or not line:
        return None
    lines = transaction_text(step).splitlines()
    found = _CHAIN_OF_LINE.match(lines[line - 1]) if line <= len(lines) else None
    return ChainName(found.group(1)) if found else None


def withhold(
    desired: Desired,
    refusals: Refusals,
    *,
    graph: Graph,
    sets: Mapping[SetName, SetDump],
    tables: Mapping[Family, TableDump],
    options: RenderOptions,
) -> set[ClassKey]:
    """Take what is refused out of a desired state, in favour of what is in the kernel.

    Returns:
        The classes that no pod may move to.
    """
    for name in refusals.sets:
        desired.sets.pop(name, None)
    blocked = _blocked(refusals.policies, graph, tables)
    for family in FAMILIES:
        chains = dict(desired.rulesets[family].chains)
        for identity in refusals.policies:
            for direction in identity.isolates:
                chain = names.policy_chain(identity, direction)
                have = tables[family].chains.get(chain)
                if have is None:
                    chains.pop(chain, None)
                else:
                    chains[chain] = tuple(r for r in have if isinstance(r, Rule))
        for key in blocked:
            chains.pop(names.class_chain(key), None)
        desired.rulesets[family] = Ruleset(chains, desired.rulesets[family].hooks)
    _keep_entries(desired, blocked, graph=graph, sets=sets, options=options)
    return blocked


def _blocked(
    refused: Iterable[PolicyId], graph: Graph, tables: Mapping[Family, TableDump]
) -> set[ClassKey]:
    """Classes with a refused policy whose chain some family does not have."""
    absent = {
        (i, d)
        for i in refused
        for d in i.isolates
        if any(names.policy_chain(i, d) not in tables[f].chains for f in FAMILIES)
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
) -> None:
    for pod in graph.local_pods.values():
        for direction in Direction:
            if pod.class_of(direction) not in blocked:
                continue
            for address in pod.addresses:
                entry = host_prefix(address)
                name = names.class_map(direction, entry.family)
                have = sets[name].members.get(entry) if name in sets else None
                spec, members = desired.sets[name]
                mark = options.mark(UNKNOWN) if have is None else have
                desired.sets[name] = spec, {**members, entry: mark}
