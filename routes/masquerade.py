"""Keeps the rules of `routes.egress` in the kernel. Blocking: called where the room's kernel work runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from netpol.kernel.converge import set_changes, table_change
from netpol.kernel.drivers import SetDriver, TableDriver
from netpol.model.ids import SetName
from netpol.model.net import FAMILIES
from netpol.model.ruleset import Members, Ruleset
from routes import egress


@dataclass(frozen=True, slots=True)
class EgressDrivers:
    """Drivers that see what is the routes room's alone."""

    sets: SetDriver
    tables: TableDriver


def keep_egress(drivers: EgressDrivers, members: Mapping[SetName, Members] | None) -> int:
    """Make rules and sets what they should be; returns how many transactions it took.

    Args:
        drivers: the kernel.
        members: of every set; None to have nothing of this in the kernel.

    Raises:
        KernelError: the kernel refuses something; what follows was not done.
    """
    want = (
        {}
        if members is None
        else {name: (spec, members.get(name, {})) for name, spec in egress.SPECS.items()}
    )
    first, last = set_changes(drivers.sets.dump(), want)
    done = 0
    if first.ops:
        drivers.sets.apply(first)
        done += 1
    for family in FAMILIES:
        rules = Ruleset() if members is None else egress.ruleset(family)
        have = drivers.tables.dump(egress.TABLE, family)
        tx = table_change(have, rules, table=egress.TABLE, family=family)
        if tx is not None:
            drivers.tables.apply(tx)
            done += 1
    if last.ops:
        drivers.sets.apply(last)
        done += 1
    return done
