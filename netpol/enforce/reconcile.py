"""One comparison of everything with the kernel, repeated until whatever is refused was left out.

Owns who is left out of a run: policies that the kernel does not take (see `refusal`), and families of
which it takes nothing. When a run ends, everything else is in force. When runs happen is the room's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Protocol, TypeVar

import structlog

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import (
    Faults,
    KernelDump,
    StepError,
    dump_kernel,
    other_mask,
    refuses_everything,
)
from netpol.enforce.plan import Plan
from netpol.enforce.refusal import Search
from netpol.kernel.drivers import (
    SetDriver,
    SetError,
    TableDriver,
    TableError,
    TableTransaction,
)
from netpol.lib.errors import InputError, KernelError
from netpol.model.net import FAMILIES, Family
from netpol.policy.graph import PolicyId
from netpol.render import reject

_log = structlog.get_logger(__name__)
T = TypeVar("T")

#: Rounds of one run: finds a dozen refused policies among a thousand. What is left is for the next run,
#: which comes after a pause.
ROUNDS_MAX = 256

#: Applies a plan, families to skip aside; says which families stopped.
Attempt = Callable[[Plan, Collection[Family]], Awaitable[dict[Family, StepError]]]


class KernelThread(Protocol):
    """Runs blocking work where all work with the kernel runs."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """The answer of the work."""
        ...


class Reconciler:
    """Brings the kernel to what the graph says, as far as it lets itself be brought.

    Attributes:
        unchecked: families whose mark field is still to be compared with ours (see `other_mask`).
    """

    def __init__(
        self,
        dataplane: Dataplane,
        *,
        sets: SetDriver,
        tables: TableDriver,
        kernel: KernelThread,
        attempt: Attempt,
    ) -> None:
        self._dataplane, self._sets, self._tables = dataplane, sets, tables
        self._kernel, self._attempt = kernel, attempt
        self.unchecked: set[Family] = set()

    async def run(self, resting: Faults) -> dict[Family, Exception]:
        """Compare and apply.

        Args:
            resting: families that are not tried; only addresses that leave are taken from them.

        Returns:
            The families that are not up to date, those at rest among them.
        """
        search = Search(self._dataplane.refusals)
        failed = dict(resting)
        try:
            for _ in range(ROUNDS_MAX):
                dump = await self._dump(failed)
                self._dataplane.graph.flush(together=True)
                plan = self._dataplane.reconcile(dump)
                withheld = self._dataplane.refusals.withheld
                errors = await self._attempt(plan, failed)
                blamed = [
                    await self._blame(stopped, failed, search, withheld)
                    for stopped in errors.values()
                ]
                if any(blamed):
                    continue
                if not search.took(f for f in FAMILIES if f not in failed):
                    self._dataplane.refusals.retried.clear()
                    if errors:  # those that stopped are left out from here on
                        await self._attempt(replace(plan, steps=()), errors)
                    return failed
        finally:
            search.end()
        return dict.fromkeys(FAMILIES, KernelError("too many refusals to sort out in one go"))

    async def _dump(self, failed: dict[Family, Exception]) -> KernelDump:
        """Read the kernel; adds families of which that, or more, is impossible."""
        while True:
            dump = await self._kernel(
                lambda: dump_kernel(self._sets, self._tables, skip=dict(failed))
            )
            failed.update(dump.failed)
            mask = self._dataplane.options.field_mask
            others = {f: other_mask(dump.tables[f], mask) for f in self.unchecked - set(failed)}
            self.unchecked -= {f for f, fault in others.items() if fault is None}
            faults = {f: InputError(fault) for f, fault in others.items() if fault}
            if not faults:
                return dump
            failed.update(faults)

    async def _blame(
        self,
        stopped: StepError,
        failed: dict[Family, Exception],
        search: Search,
        withheld: set[PolicyId],
    ) -> bool:
        """Leave out whose fault an error is: policies, or for now (then False) the family."""
        refusals, active = self._dataplane.refusals, self._dataplane.graph.active_policies
        error, family, known = stopped.error, stopped.family, set(refusals.policies)
        if _is_of_filter(stopped):
            # An answer is not worth a verdict: drop from the next round on.
            guilty = self._dataplane.do_without_answers(str(error))
        elif isinstance(error, SetError):
            # What is left out already cannot be left out once more.
            guilty = refusals.blame_set(error, active) and refusals.withheld > withheld
        else:
            guilty = await self._takes_other_things(stopped) and search.refused(
                error, stopped.step, active, withheld
            )
        if not guilty:
            failed[family] = error
        elif set(refusals.policies) != known:
            _log.error("policy refused", error=str(stopped))
        return guilty

    async def _takes_other_things(self, stopped: StepError) -> bool:
        """Whether a table takes what it has: else it is nobody's fault, whoever a line names."""
        if not isinstance(stopped.error, TableError) or stopped.error.retryable:
            return False
        options, family = self._dataplane.options, stopped.family
        broken = await self._kernel(lambda: refuses_everything(self._tables, family, options))
        return broken is None


def _is_of_filter(stopped: StepError) -> bool:
    """Whether filter refused something for good."""
    step, error = stopped.step, stopped.error
    passes = isinstance(error, TableError) and error.retryable
    return isinstance(step, TableTransaction) and step.table == reject.TABLE and not passes
