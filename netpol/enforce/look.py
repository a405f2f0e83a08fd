"""One look at the kernel for drift, in steps so small that an event never waits for it.

A whole dump and its comparison take a tenth of a second of Python on a large node. So nothing is held
while a look is under way: the caller's `still` says before each step whether the graph and the kernel
are where the look began, and a look that was overtaken ends without an answer. Tables whose saved text
has not changed since they were last found right are not read again.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import DRIVER_ERRORS, Faults, KernelDump, dump_kernel
from netpol.enforce.plan import set_differences
from netpol.kernel.drivers import SetDriver, SetDump, TableDriver, TableDump
from netpol.model.ids import SetName
from netpol.model.net import FAMILIES, Family
from netpol.render import reject, static

T = TypeVar("T")
#: Compares the dump of a family's table with what should be there.
Differs = Callable[[Family, TableDump], list[str]]

#: Differences that are named; the rest is only counted.
NAMED_MAX = 5


class Runner(Protocol):
    """Runs blocking work elsewhere."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """The answer of the work."""
        ...


class Look:
    """Compares the kernel with what was applied.

    Args:
        run: runs blocking work in a thread that no apply waits for.
    """

    def __init__(
        self,
        dataplane: Dataplane,
        *,
        sets: SetDriver,
        tables: TableDriver,
        run: Runner,
    ) -> None:
        self._dataplane, self._sets, self._tables, self._run = dataplane, sets, tables, run
        # Of each table: the number of table transactions, and the fingerprint of what was right then.
        self._right: dict[tuple[str, Family], tuple[int, str]] = {}
        # Everybody's transactions, when the last look that was not overtaken began.
        self._seen: int | None = None

    async def is_due(self) -> bool:
        """Whether somebody may have written tables since the last look; False where nobody counts."""
        return await self._run(self._tables.generation) != self._seen

    async def drift(
        self,
        *,
        still: Callable[[], bool],
        transactions: int,
        members: bool,
        skip: Faults | None = None,
    ) -> str | None:
        """What differs, in words; "" when nothing does, None when the look was overtaken.

        Args:
            still: whether graph and kernel are where they were when the look began.
            transactions: how many table transactions were made so far.
            members: look into the sets too.
            skip: families that are not up to date, and known not to be.
        """
        number = await self._run(self._tables.generation)
        if not still():
            return None
        found = await self._drift(still, transactions, members=members, skip=skip or {})
        if found is not None:
            self._seen = number
        return found

    async def _drift(
        self, still: Callable[[], bool], transactions: int, *, members: bool, skip: Faults
    ) -> str | None:
        if self._dataplane.refusals:
            return await self._everything(still, skip)
        found: list[str] = []
        differs: dict[str, Differs] = {static.TABLE: self._dataplane.table_drift}
        if self._dataplane.options.rejects:
            differs[reject.TABLE] = self._dataplane.filter_drift
        whole = [f for f in FAMILIES if f not in skip]
        if self._dataplane.reject_fault and await self._filter_is_back(whole):
            return "the filter table can be read again"
        for family, (table, of) in itertools.product(whole, differs.items()):
            if not await self._table_differs((table, family), of, transactions, still, found):
                return None
        # What is found is not risked: the sets take longer, and a look that is overtaken says nothing.
        if members and not found and not await self._sets_differ(still, skip, found):
            return None
        return "; ".join(found[:NAMED_MAX]) + ("; and more" if len(found) > NAMED_MAX else "")

    async def _everything(self, still: Callable[[], bool], skip: Faults) -> str | None:
        """In one go: policies are left out, and what that means for sets depends on the whole dump."""
        dump: KernelDump = await self._run(lambda: dump_kernel(self._sets, self._tables, skip=skip))
        for error in (e for f, e in dump.failed.items() if f not in skip):
            raise error
        return self._dataplane.drift(dump) if still() else None

    async def _filter_is_back(self, families: list[Family]) -> bool:
        if self._dataplane.filter_refused:
            return False
        try:
            for family in families:
                await self._run(partial(self._tables.dump, reject.TABLE, family))
        except DRIVER_ERRORS:
            return False
        return True

    async def _table_differs(
        self,
        at: tuple[str, Family],
        differs: Differs,
        transactions: int,
        still: Callable[[], bool],
        found: list[str],
    ) -> bool:
        """Add what differs to `found`; False when overtaken."""
        print_ = await self._run(lambda: self._tables.fingerprint(*at))
        if not still():
            return False
        if self._right.get(at) == (transactions, print_):
            return True
        dump = await self._run(lambda: self._tables.dump(*at))
        if not still():
            return False
        differences = differs(at[1], dump)
        found += differences
        if differences:
            self._right.pop(at, None)
        else:
            self._right[at] = (transactions, print_)
        return True

    async def _sets_differ(self, still: Callable[[], bool], skip: Faults, found: list[str]) -> bool:
        """Add what differs to `found`; False when overtaken."""
        present = await self._run(self._sets.headers)
        if not still():
            return False
        found += self._dataplane.foreign_sets(present)
        parts = self._dataplane.wanted_sets()
        while still():
            part = next(parts, None)
            if part is None:
                return True
            part = {n: wanted for n, wanted in part.items() if wanted[0].family not in skip}
            if not part:
                continue
            dump: dict[SetName, SetDump] = await self._run(partial(self._sets.dump, list(part)))
            if not still():
                return False
            found += set_differences(part, dump)
        return False
