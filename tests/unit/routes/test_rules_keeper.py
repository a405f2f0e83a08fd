"""When the routes room looks at its rules again."""

from __future__ import annotations

from netpol.aio.clock import ManualClock
from netpol.kernel.testing import FakeTables
from netpol.kernel.testing_sets import FakeSets
from netpol.model.ids import ROUTES
from netpol.model.net import FAMILIES
from netpol.model.ruleset import Ruleset
from routes import egress
from routes.rules import RoutesRules, RuleDrivers
from routes.rules_keeper import LOOK_MAX_S, LOOK_S, RulesKeeper


class Count:
    """nf_tables' number, which grows with everybody's transactions."""

    def __init__(self) -> None:
        self.number: int | None = 1

    def __call__(self) -> int | None:
        return self.number


WANT = RoutesRules({(egress.TABLE, f): egress.ruleset(f) for f in FAMILIES})


def chains(tables: FakeTables) -> set[str]:
    return {str(c) for f in FAMILIES for c in tables.dump(egress.TABLE, f).chains}


async def test_what_somebody_removed_is_back_and_looks_that_find_nothing_come_rarely() -> None:
    clock, count, tables, sets = (
        ManualClock(),
        Count(),
        FakeTables(owner=ROUTES),
        FakeSets(owner=ROUTES),
    )
    keeper = RulesKeeper(RuleDrivers(sets, tables), clock, count=count)
    assert not keeper.due()
    want = RoutesRules(WANT.rulesets, {n: (s, {}) for n, s in egress.SPECS.items()})
    keeper.keep(want, everything=False)
    there = chains(tables)
    assert there

    async def later(pause_s: float) -> bool:
        count.number = (count.number or 0) + 1
        await clock.advance(pause_s)
        return keeper.due()

    assert not keeper.due()  # nobody wrote anything
    keeper_before = chains(tables)
    RulesKeeper(RuleDrivers(sets, tables), clock, count=count).keep(
        RoutesRules({(egress.TABLE, f): Ruleset() for f in FAMILIES}, want.sets), everything=True
    )
    assert not chains(tables)
    assert await later(LOOK_S)
    keeper.keep(want, everything=False)
    assert chains(tables) == keeper_before
    pauses = []
    for _ in range(10):
        waited = LOOK_S
        while not await later(LOOK_S):
            waited += LOOK_S
        pauses.append(waited)
        keeper.keep(want, everything=False)
    assert pauses[:4] == [LOOK_S, 2 * LOOK_S, 4 * LOOK_S, 8 * LOOK_S]
    assert pauses[-1] == LOOK_MAX_S


async def test_where_nobody_counts_it_waits_for_the_next_full_look() -> None:
    clock, count, tables = ManualClock(), Count(), FakeTables(owner=ROUTES)
    count.number = None
    keeper = RulesKeeper(RuleDrivers(FakeSets(owner=ROUTES), tables), clock, count=count)
    keeper.keep(RoutesRules(), everything=False)
    await clock.advance(60)
    assert not keeper.due()
