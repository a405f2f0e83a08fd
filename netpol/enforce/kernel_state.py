"""What of ours is in the kernel, read at one look, and the one way by which a plan gets there.

Blocking: called where all work with the kernel runs. Plans are made elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netpol.enforce.plan import MAPS, Plan, Step
from netpol.kernel.drivers import (
    SetDriver,
    SetDump,
    SetError,
    SetTransaction,
    TableDriver,
    TableDump,
    TableError,
)
from netpol.lib.errors import KernelError
from netpol.model.ids import SetName
from netpol.model.net import FAMILIES, Family
from netpol.render.static import TABLE


@dataclass(frozen=True, slots=True)
class KernelDump:
    """Everything of ours in the kernel, at one look."""

    sets: Mapping[SetName, SetDump]
    tables: Mapping[Family, TableDump]
    # Sets under our prefix that are not what we make, and why.
    strange: Mapping[SetName, str] = field(default_factory=dict)


def dump_kernel(sets: SetDriver, tables: TableDriver) -> KernelDump:
    """Read everything of ours (blocking)."""
    found, strange = _dump_sets(sets)
    return KernelDump(found, {f: tables.dump(TABLE, f) for f in FAMILIES}, strange)


def _dump_sets(sets: SetDriver) -> tuple[dict[SetName, SetDump], dict[SetName, str]]:
    try:
        return sets.dump(), {}
    except SetError:
        found: dict[SetName, SetDump] = {}
        strange: dict[SetName, str] = {}
    for name in sets.headers():
        try:
            found |= sets.dump([name])
        except SetError as e:
            if name in MAPS:
                raise  # nothing works without the class maps
            strange[name] = str(e)
    return found, strange


class StepError(KernelError):
    """A step of a plan was refused; the driver's error is the cause."""

    def __init__(self, step: Step, error: KernelError) -> None:
        super().__init__(str(error))
        self.step, self.error = step, error


def execute(plan: Plan, sets: SetDriver, tables: TableDriver) -> None:
    """Apply a plan (blocking). Raises StepError; steps before it stay applied."""
    for step in plan.steps:
        try:
            if isinstance(step, SetTransaction):
                sets.apply(step)
            else:
                tables.apply(step)
        except (SetError, TableError) as e:
            raise StepError(step, e) from e
