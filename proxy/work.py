"""One apply as a value, and what of it follows from sets and tables as they are.

Pure: the order in which it is done is `proxy.steps`'s, and `proxy.apply` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netpol.kernel.drivers import CreateSet, DestroySet, SetDump, TableTransaction
from netpol.model.ids import SetName
from netpol.model.ipvs import ServerId
from netpol.model.net import Family
from netpol.model.ruleset import Member, Members, Ruleset
from proxy import names
from proxy.desired import Desired
from proxy.ledger import Word
from proxy.marks import MarkKey
from proxy.steps import ServerOps

Fact = tuple[Word, ServerId, MarkKey | None]


@dataclass(frozen=True, slots=True)
class Static:
    """What is there whatever the Services are.

    Attributes:
        rulesets: by table and family; each table that ever held a chain of ours is named.
        members: of the sets that no Service has a part in.
        sources: the node's addresses, which it speaks with to addresses of Services.
    """

    rulesets: Mapping[tuple[str, Family], Ruleset] = field(default_factory=dict)
    members: Mapping[SetName, Members] = field(default_factory=dict)
    sources: Mapping[Family, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Work:
    """One apply, before it is done."""

    servers: ServerOps = field(default_factory=ServerOps)
    create: list[CreateSet] = field(default_factory=list)
    destroy: list[DestroySet] = field(default_factory=list)
    tables: list[TableTransaction] = field(default_factory=list)
    vips_add: list[bytes] = field(default_factory=list)
    vips_remove: list[bytes] = field(default_factory=list)
    add: dict[SetName, dict[Member, int | None]] = field(default_factory=dict)
    delete: dict[SetName, list[Member]] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)

    def words(self) -> str:
        """What it does, for a line in the log; "" when nothing."""
        members = sum(map(len, self.add.values())) + sum(map(len, self.delete.values()))
        counted = (
            (self.servers.count, "IPVS operations"),
            (len(self.vips_add) + len(self.vips_remove), "addresses"),
            (members + len(self.create) + len(self.destroy), "set members"),
            (len(self.tables), "tables"),
        )
        return ", ".join(f"{n} {what}" for n, what in counted if n)


def members_wanted(desired: Desired, static: Static) -> dict[SetName, dict[Member, int | None]]:
    """All members of all sets."""
    want: dict[SetName, dict[Member, int | None]] = {
        name: dict(static.members.get(name, {})) for name in names.SPECS
    }
    for (name, member), mark in desired.entries.items():
        want[name][member] = mark
    return want


def plan_sets(
    work: Work,
    want: Mapping[SetName, dict[Member, int | None]],
    dump: Mapping[SetName, SetDump],
) -> None:
    """Add what brings sets from what they are to what they must be."""
    for name, members in want.items():
        have: Members = {}
        if name in dump:
            have = dump[name].members
        else:
            work.create.append(CreateSet(names.SPECS[name], len(members)))
        add = {m: v for m, v in members.items() if m not in have or have[m] != v}
        delete = [m for m in have if m not in members]
        if add:
            work.add[name] = add
        if delete:
            work.delete[name] = delete
    work.destroy += [DestroySet(name) for name in dump if name not in want]
