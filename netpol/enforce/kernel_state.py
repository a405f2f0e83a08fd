"""What of ours is in the kernel, read at one look, and the one way by which a plan gets there.

Blocking: called where all work with the kernel runs. Plans are made elsewhere. Each family is read and
written for itself: what fails of one is said of that one, and the other goes on.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from netpol.enforce.plan import MAPS, Plan, Step, family_of_step
from netpol.kernel.drivers import (
    SetDriver,
    SetDump,
    SetError,
    SetTransaction,
    TableDriver,
    TableDump,
    TableTransaction,
)
from netpol.lib.errors import KernelError, NetpolError
from netpol.model.ids import Direction, SetName
from netpol.model.net import FAMILIES, Family, Prefix
from netpol.model.ruleset import Rule, SetMark
from netpol.render import classes, names
from netpol.render.options import RenderOptions
from netpol.render.reject import TABLE as FILTER
from netpol.render.static import TABLE, static_chains

#: What drivers raise: their own errors, and those of starting a program.
DRIVER_ERRORS = (NetpolError, OSError)

#: Families that are left out, and why.
Faults = Mapping[Family, Exception]


@dataclass(frozen=True, slots=True)
class KernelDump:
    """Everything of ours in the kernel, at one look.

    `failed` names the families of which something could not be read, or was not asked for: their table
    is empty here, and no plan made of this may touch it.
    """

    sets: Mapping[SetName, SetDump]
    tables: Mapping[Family, TableDump]
    # Sets under our prefix that are not what we make, and why.
    strange: Mapping[SetName, str] = field(default_factory=dict)
    failed: Faults = field(default_factory=dict)
    # The second table, where denied packets may be answered; without a family that it was not read of.
    filters: Mapping[Family, TableDump] = field(default_factory=dict)
    filter_faults: Faults = field(default_factory=dict)


def dump_kernel(sets: SetDriver, tables: TableDriver, *, skip: Faults | None = None) -> KernelDump:
    """Read everything of ours (blocking), but for the tables of the families in `skip`.

    Raises:
        NetpolError: no set can be read.
    """
    found, strange = _dump_sets(sets)
    failed = dict(skip or {})
    for name in MAPS & set(strange):
        # Nothing of its family works without a class map.
        failed.setdefault(
            names.family_of_set(name), SetError(strange[name], name=name, code=errno.EEXIST)
        )
    dumps = dump_tables(tables, failed)
    return KernelDump(found, dumps, strange, failed, *_dump_filters(tables, failed))


def dump_tables(tables: TableDriver, failed: dict[Family, Exception]) -> dict[Family, TableDump]:
    """Read the tables of verdicts of the families that have not failed; adds those that do now."""
    dumps: dict[Family, TableDump] = {}
    for family in FAMILIES:
        dumps[family] = TableDump()
        if family not in failed:
            try:
                dumps[family] = tables.dump(TABLE, family)
            except DRIVER_ERRORS as e:
                failed[family] = e
    return dumps


def _dump_filters(
    tables: TableDriver, skip: Collection[Family]
) -> tuple[dict[Family, TableDump], dict[Family, Exception]]:
    """Read what is ours in the second table, and why that did not work."""
    dumps: dict[Family, TableDump] = {}
    faults: dict[Family, Exception] = {}
    for family in [f for f in FAMILIES if f not in skip]:
        try:
            dumps[family] = tables.dump(FILTER, family)
        except DRIVER_ERRORS as e:
            faults[family] = e
    return dumps, faults


def _dump_sets(sets: SetDriver) -> tuple[dict[SetName, SetDump], dict[SetName, str]]:
    found: dict[SetName, SetDump] = {}
    strange: dict[SetName, str] = {}
    try:
        found = sets.dump()
    except SetError:
        for name in sets.headers():
            try:
                found |= sets.dump([name])
            except SetError as e:
                strange[name] = str(e)
    for direction in Direction:
        for family in FAMILIES:
            spec = classes.map_spec(direction, family)
            have = found.get(spec.name)
            if have is not None and have.spec != spec:
                strange[spec.name] = f"a {have.spec.kind} set {spec.name} exists"
                del found[spec.name]
    return found, strange


class StepError(KernelError):
    """A step of a plan was refused; the driver's error is the cause."""

    def __init__(self, step: Step, error: Exception) -> None:
        super().__init__(str(error))
        self.step, self.error, self.family = step, error, family_of_step(step)


def attempt(
    plan: Plan, sets: SetDriver, tables: TableDriver, *, skip: Collection[Family] = ()
) -> dict[Family, StepError]:
    """Apply a plan, each family as far as it goes (blocking).

    Of the families in `skip`, only what can only deny more is done (`Plan.leaving`, `Plan.behind`), as far
    as that is possible. Returns which of the others stopped, and where; their steps before it stay applied.
    """
    stopped: dict[Family, StepError] = {}
    for number, step in enumerate(plan.steps):
        family = family_of_step(step)
        if family in stopped or (family in skip and number >= plan.leaving):
            continue
        try:
            if isinstance(step, SetTransaction):
                sets.apply(step)
            else:
                tables.apply(step)
        except DRIVER_ERRORS as e:
            stopped[family] = StepError(step, e)
            stopped[family].__cause__ = e
    for op in (op for family in skip for op in plan.behind.get(family, ())):
        # Each for itself: what is missing there is no worse than it was.
        with contextlib.suppress(*DRIVER_ERRORS):
            sets.apply(SetTransaction((op,)))
    return {f: error for f, error in stopped.items() if f not in skip}


def execute(plan: Plan, sets: SetDriver, tables: TableDriver) -> None:
    """Apply a plan (blocking). Raises the first StepError, after the other family's steps were done."""
    for error in attempt(plan, sets, tables).values():
        raise error


def refuses_everything(
    tables: TableDriver, family: Family, options: RenderOptions
) -> Exception | None:
    """Why a table does not even take the chain that it has (blocking); None where it does."""
    same = {names.OK: static_chains(options, family)[names.OK]}
    try:
        tables.apply(TableTransaction(TABLE, family, replace=same))
    except DRIVER_ERRORS as e:
        return e
    return None


def other_mask(dump: TableDump, mask: int) -> str | None:
    """Whether the rules in force use another mark field, in words.

    Rules and map entries could not change over together: between the two, numbers would mean nothing.
    """
    for rule in dump.chains.get(names.OK, ()):
        if isinstance(rule, Rule) and isinstance(rule.action, SetMark) and rule.action.mask != mask:
            return (
                f"the rules in force use the mark field {rule.action.mask:#010x}; got --mark-mask "
                f"{mask:#010x}: drain the node, run netpol-ctl cleanup, then start again"
            )
    return None


def knows_pods(dump: KernelDump) -> bool:
    """Whether a former agent left the entry of a pod: as a source every pod has one, and only pods."""
    maps = (dump.sets.get(names.class_map(Direction.EGRESS, f)) for f in FAMILIES)
    return any(
        isinstance(entry, Prefix) and entry.is_host
        for found in maps
        if found is not None
        for entry in found.members
    )
