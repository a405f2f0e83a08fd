"""One look at the kernel for drift, in steps so small that no change of a Service waits for it.

A dump of everything and its comparison take a good part of a second with ten thousand Services. So the
kernel is read in a thread of its own, through a socket of its own, and compared some hundred at a time,
while changes go on. What they touched since the look began is left out: a dump may show it before or after.
A look that was overtaken by a look at everything ends without an answer. What drifted is not repaired here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from netpol.kernel.converge import table_change
from netpol.model.ids import SetName
from netpol.model.ipvs import ServerId
from netpol.model.net import Family
from netpol.model.ruleset import Member
from proxy import names
from proxy.apply import Applier, Drivers
from proxy.desired import Change, Desired, Place
from proxy.steps import ServerOps, have_of
from proxy.troubles import Troubles, port_of
from proxy.work import Static, Work, plan_sets

T = TypeVar("T")

#: Servers or members that are compared in one go: a few milliseconds.
STEP = 500


@dataclass(slots=True)
class Touched:
    """What changes touched since a look began."""

    servers: set[ServerId] = field(default_factory=set)
    vips: set[bytes] = field(default_factory=set)
    places: set[Place] = field(default_factory=set)

    def note(self, change: Change) -> None:
        """A change begins."""
        self.servers.update(change.servers)
        self.vips.update(change.vips_add, change.vips_remove)
        for name, members in (*change.add.items(), *change.delete.items()):
            self.places.update((name, member) for member in members)

    def retry(self, troubles: Troubles) -> None:
        """What was refused is tried again."""
        self.servers.update(troubles.servers)
        self.vips.update(troubles.vips)
        self.places.update(port_of(id_) for id_ in troubles.servers if id_.protocol)


class Runner(Protocol):
    """Runs blocking work in a thread that no apply waits for."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """The answer of the work."""
        ...


class OvertakenError(Exception):
    """Something changed since the look began."""


class Look:
    """Compares the kernel with what was applied."""

    def __init__(
        self, desired: Desired, applier: Applier, drivers: Drivers, *, run: Runner
    ) -> None:
        self._desired, self._applier, self._drivers = desired, applier, drivers
        self._run = run
        # By table and family: the rules that were found right, and the fingerprint of the table then.
        self._right: dict[tuple[str, Family], tuple[object, str]] = {}

    async def drift(
        self, static: Static, *, touched: Touched, still: Callable[[], bool]
    ) -> str | None:
        """What differs, in words; "" when nothing does, None when the look was overtaken.

        Args:
            static: what is wanted whatever the Services are.
            touched: grows while the look is under way.
            still: whether no look at everything came, or is to come, since this one began.
        """
        try:
            found = [
                await self._servers(touched, still),
                await self._vips(static, touched, still),
                await self._sets(static, touched, still),
                await self._tables(static, still),
            ]
        except OvertakenError:
            return None
        return "; ".join(words for words in found if words)

    async def _read(self, work: Callable[[], T], still: Callable[[], bool]) -> T:
        answer = await self._run(work)
        if not still():
            raise OvertakenError
        return answer

    async def _servers(self, touched: Touched, still: Callable[[], bool]) -> str:
        states = await self._read(self._drivers.eyes.dump, still)
        wanted, applier = self._desired.servers, self._applier
        ops = ServerOps()
        for part in _parts([*wanted, *(id_ for id_ in states if not wanted.claimed(id_))]):
            for id_ in part:
                if id_ in touched.servers or id_ in applier.troubles.servers:
                    continue
                state, want = states.get(id_), wanted.get(id_)
                if want is not None or applier.is_ours(id_):
                    ops.plan(id_, None if state is None else have_of(state), want)
            await self._read(_nothing, still)
        return f"IPVS differs in {ops.count} places" if ops.count else ""

    async def _vips(self, static: Static, touched: Touched, still: Callable[[], bool]) -> str:
        there = await self._read(self._drivers.vips.dump, still) or frozenset()
        wrong = set(there).symmetric_difference(self._desired.vips)
        if there:
            misrouted = partial(self._drivers.vips.misrouted, static.sources)
            wrong.update(await self._read(misrouted, still))
        wrong -= touched.vips
        wrong -= self._applier.troubles.vips.keys()
        return f"{len(wrong)} addresses differ" if wrong else ""

    async def _sets(self, static: Static, touched: Touched, still: Callable[[], bool]) -> str:
        want: dict[SetName, dict[Member, int | None]] = {
            name: dict(static.members.get(name, {})) for name in names.SPECS
        }
        for part in _parts(list(self._desired.entries)):
            for place in part:
                if self._desired.entries.claimed(place):
                    want[place[0]][place[1]] = self._desired.entries.value(place)
            await self._read(_nothing, still)
        found: list[str] = []
        there = await self._read(self._drivers.sets.headers, still)
        for name in {**want, **there}:
            work = Work()
            dump = await self._read(partial(self._drivers.sets.dump, [name]), still)
            plan_sets(work, {name: want[name]} if name in want else {}, dump)
            wrong = {*work.add.get(name, ()), *work.delete.get(name, ())}
            skip = touched.places | self._applier.troubles.shut
            if work.create or work.destroy or any((name, m) not in skip for m in wrong):
                found.append(name)
        return f"sets differ: {', '.join(found)}" if found else ""

    async def _tables(self, static: Static, still: Callable[[], bool]) -> str:
        wrong: list[str] = []
        tables = self._drivers.tables
        for (table, family), want in static.rulesets.items():
            print_ = await self._read(partial(tables.fingerprint, table, family), still)
            if self._right.get((table, family)) == (want, print_):
                continue
            have = await self._read(partial(tables.dump, table, family), still)
            if table_change(have, want, table=table, family=family) is not None:
                wrong.append(f"{table} (IPv{family.value})")
                self._right.pop((table, family), None)
            else:
                self._right[table, family] = (want, print_)
        return f"tables differ: {', '.join(wrong)}" if wrong else ""


def _nothing() -> None:
    """For a turn of the loop."""


def _parts(things: Sequence[T]) -> Iterator[Sequence[T]]:
    for at in range(0, len(things), STEP):
        yield things[at : at + STEP]
