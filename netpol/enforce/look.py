"""One look at the kernel for drift, in steps so small that an event never waits for it.

A whole dump and its comparison take a tenth of a second of Python on a large node. So nothing is held
while a look is under way: the caller's `still` says before each step whether the graph and the kernel
are where the look began, and a look that was overtaken ends without an answer. Tables whose saved text
has not changed since they were last found right are not read again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import KernelDump, dump_kernel
from netpol.enforce.plan import set_differences
from netpol.kernel.drivers import SetDriver, SetDump, TableDriver
from netpol.model.ids import SetName
from netpol.model.net import FAMILIES, Family
from netpol.render.static import TABLE

T = TypeVar("T")

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
        # By family: the number of table transactions, and the fingerprint of what was right then.
        self._right: dict[Family, tuple[int, str]] = {}

    async def drift(
        self, *, still: Callable[[], bool], transactions: int, members: bool
    ) -> str | None:
        """What differs, in words; "" when nothing does, None when the look was overtaken.

        Args:
            still: whether graph and kernel are where they were when the look began.
            transactions: how many table transactions were made so far.
            members: look into the sets too.
        """
        if self._dataplane.refusals:
            return await self._everything(still)
        found: list[str] = []
        for family in FAMILIES:
            if not await self._tables_differ(family, transactions, still, found):
                return None
        if members and not await self._sets_differ(still, found):
            return None
        return "; ".join(found[:NAMED_MAX]) + ("; and more" if len(found) > NAMED_MAX else "")

    async def _everything(self, still: Callable[[], bool]) -> str | None:
        """In one go: policies are left out, and what that means for sets depends on the whole dump."""
        dump: KernelDump = await self._run(lambda: dump_kernel(self._sets, self._tables))
        return self._dataplane.drift(dump) if still() else None

    async def _tables_differ(
        self, family: Family, transactions: int, still: Callable[[], bool], found: list[str]
    ) -> bool:
        """Add what differs to `found`; False when overtaken."""
        print_ = await self._run(lambda: self._tables.fingerprint(TABLE, family))
        if not still():
            return False
        if self._right.get(family) == (transactions, print_):
            return True
        dump = await self._run(lambda: self._tables.dump(TABLE, family))
        if not still():
            return False
        differences = self._dataplane.table_drift(family, dump)
        found += differences
        if differences:
            self._right.pop(family, None)
        else:
            self._right[family] = (transactions, print_)
        return True

    async def _sets_differ(self, still: Callable[[], bool], found: list[str]) -> bool:
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
            if not part:
                continue
            dump: dict[SetName, SetDump] = await self._run(partial(self._sets.dump, list(part)))
            if not still():
                return False
            found += set_differences(part, dump)
        return False
