"""What every TableDriver does; the classes that run it provide the fixtures `tables` and `sets`."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from netpol.kernel.drivers import (
    CreateSet,
    DestroySet,
    HookState,
    SetDriver,
    SetError,
    SetTransaction,
    TableDriver,
    TableDump,
    TableError,
    TableTransaction,
)
from netpol.kernel.rule_text import canonical
from netpol.model.ids import ChainName, SetName
from netpol.model.net import FAMILIES, Family, Prefix
from netpol.model.ruleset import (
    Chain,
    Drop,
    Goto,
    Hook,
    Jump,
    MapMark,
    Masquerade,
    NetMatch,
    Return,
    Rule,
    SetMatch,
    Side,
)
from tests.kernel import forms
from tests.kernel.forms import CHAIN_A, CHAIN_B

both_families = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
NONE = ChainName("KNP-NONE")


def change(
    family: Family = Family.V4,
    *,
    replace: Mapping[ChainName, Chain] | None = None,
    delete: tuple[ChainName, ...] = (),
    hooks: Mapping[Hook, ChainName | None] | None = None,
    state: Mapping[Hook, HookState] | None = None,
    table: str = "mangle",
) -> TableTransaction:
    return TableTransaction(table, family, replace or {}, delete, hooks or {}, state or {})


def refusal(tables: TableDriver, tx: TableTransaction) -> TableError:
    before = tables.dump(tx.table, tx.family)
    with pytest.raises(TableError) as caught:
        tables.apply(tx)
    assert tables.dump(tx.table, tx.family) == before, "a refused transaction changed something"
    return caught.value


class TableContract:
    @both_families
    def test_an_absent_table_is_an_empty_dump(self, tables: TableDriver, family: Family) -> None:
        assert tables.dump("mangle", family) == TableDump()
        assert tables.counters("mangle", family) == {}

    @both_families
    def test_every_form_comes_back_canonical(
        self, tables: TableDriver, sets: SetDriver, family: Family
    ) -> None:
        sets.apply(SetTransaction(tuple(CreateSet(spec) for spec in forms.set_specs(family))))
        rules = forms.rules(family)
        tables.apply(change(family, replace={CHAIN_A: rules, CHAIN_B: ()}))
        dump = tables.dump("mangle", family)
        for wanted, got in zip(rules, dump.chains[CHAIN_A], strict=True):
            assert got == canonical(wanted)
        assert dump.chains[CHAIN_B] == ()
        assert tables.counters("mangle", family) == {CHAIN_A: ((0, 0),) * len(rules), CHAIN_B: ()}

    @both_families
    def test_reject_stands_in_filter(self, tables: TableDriver, family: Family) -> None:
        rules = tuple(map(canonical, forms.rejects(family)))
        tables.apply(change(family, table="filter", replace={CHAIN_A: rules}))
        assert tables.dump("filter", family).chains == {CHAIN_A: rules}
        assert tables.dump("mangle", family) == TableDump()

    @both_families
    def test_masquerading_stands_in_nat(self, tables: TableDriver, family: Family) -> None:
        rules = tuple(map(canonical, forms.masquerades(family)))
        hook = Hook.POSTROUTING
        tables.apply(change(family, table="nat", replace={CHAIN_A: rules}, hooks={hook: CHAIN_A}))
        dump = tables.dump("nat", family)
        assert dump.chains == {CHAIN_A: rules}
        assert dump.hooks == {hook: HookState(((1, CHAIN_A),))}
        error = refusal(tables, change(family, replace={CHAIN_B: (Rule(Masquerade()),)}))
        assert not error.retryable

    def test_replacing_one_chain_leaves_the_others(self, tables: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: (Rule(Drop()),), CHAIN_B: (Rule(Drop()),)}))
        tables.apply(change(replace={CHAIN_A: (Rule(Return()), Rule(Jump(CHAIN_B)))}))
        assert tables.dump("mangle", Family.V4).chains == {
            CHAIN_A: (Rule(Return()), Rule(Jump(CHAIN_B))),
            CHAIN_B: (Rule(Drop()),),
        }

    def test_transactions_are_counted_or_said_not_to_be(self, tables: TableDriver) -> None:
        before = tables.generation()
        assert tables.generation() == before
        tables.apply(change(replace={CHAIN_A: (Rule(Drop()),)}))
        assert (tables.generation() == before) is (before is None)

    def test_the_families_are_apart(self, tables: TableDriver) -> None:
        tables.apply(change(Family.V6, replace={CHAIN_A: (Rule(Drop()),)}))
        assert tables.dump("mangle", Family.V4) == TableDump()

    def test_chains_of_one_transaction_may_name_each_other_in_any_order(
        self, tables: TableDriver
    ) -> None:
        tables.apply(change(replace={CHAIN_A: (Rule(Goto(CHAIN_B)),), CHAIN_B: (Rule(Drop()),)}))
        tables.apply(change(replace={CHAIN_B: (), NONE: (Rule(Jump(CHAIN_A)),)}))
        # All go at once although they reference each other.
        tables.apply(change(delete=(CHAIN_B, CHAIN_A, NONE)))
        assert tables.dump("mangle", Family.V4) == TableDump()

    def test_a_chain_goes_with_the_last_reference_to_it(self, tables: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: (Rule(Jump(CHAIN_B)),), CHAIN_B: ()}))
        assert not refusal(tables, change(delete=(CHAIN_B,))).retryable
        tables.apply(change(replace={CHAIN_A: (Rule(Drop()),)}, delete=(CHAIN_B,)))
        assert tables.dump("mangle", Family.V4).chains == {CHAIN_A: (Rule(Drop()),)}

    @pytest.mark.parametrize(
        "rule",
        [
            Rule(Jump(NONE)),
            Rule(Goto(NONE)),
            Rule(Drop(), (SetMatch(SetName("KNP-NOSET"), (Side.SRC,)),)),
            Rule(MapMark(SetName("KNP-NOSET"), Side.SRC)),
            Rule(Drop(), (NetMatch(Side.SRC, Prefix(bytes(16), 8)),)),
            Rule(Drop(), (), "two\nlines"),
            Rule(Drop(), (), "c" * 256),
        ],
        ids=["jump", "goto", "set", "map", "family", "newline", "comment"],
    )
    def test_a_bad_rule_is_refused_at_its_line(self, tables: TableDriver, rule: Rule) -> None:
        tables.apply(change(replace={CHAIN_A: (Rule(Return()),)}))
        tx = change(replace={CHAIN_B: (Rule(Drop()),), CHAIN_A: (Rule(Drop()), rule)})
        error = refusal(tables, tx)
        assert error.line == 6, str(error)  # *mangle, two chains, two good rules
        assert not error.retryable

    def test_a_rule_of_another_table_is_refused(self, tables: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: ()}))
        error = refusal(tables, change(replace={CHAIN_B: (Rule(forms.reject(Family.V4)),)}))
        assert not error.retryable

    @pytest.mark.parametrize("name", ["FORWARD", "KUBE-FORWARD", "KNP-" + "x" * 25, "KNP-a b"])
    def test_only_chains_of_ours_are_written(self, tables: TableDriver, name: str) -> None:
        refusal(tables, change(replace={ChainName(name): (Rule(Drop()),)}))
        refusal(tables, change(delete=(ChainName(name),)))

    def test_a_name_of_28_characters_is_the_longest(self, tables: TableDriver) -> None:
        longest = ChainName("KNP-" + "x" * 24)
        tables.apply(change(replace={longest: (), CHAIN_A: (Rule(Jump(longest)),)}))
        assert tables.dump("mangle", Family.V4).chains == {
            longest: (),
            CHAIN_A: (Rule(Jump(longest)),),
        }

    @both_families
    @pytest.mark.parametrize("hook", Hook)
    def test_a_jump_is_made_moved_and_removed(
        self, tables: TableDriver, family: Family, hook: Hook
    ) -> None:
        tables.apply(change(family, replace={CHAIN_A: (), CHAIN_B: ()}, hooks={hook: CHAIN_A}))
        state = tables.dump("mangle", family).hooks
        assert state == {hook: HookState(((1, CHAIN_A),))}
        # The same again writes nothing into the hook.
        tables.apply(change(family, hooks={hook: CHAIN_A}, state=state))
        assert tables.dump("mangle", family).hooks == state
        # A new layout beside the old: jump moves and the old chain goes, in one transaction.
        tables.apply(change(family, hooks={hook: CHAIN_B}, state=state, delete=(CHAIN_A,)))
        state = tables.dump("mangle", family).hooks
        assert state == {hook: HookState(((1, CHAIN_B),))}
        tables.apply(change(family, hooks={hook: None}, state=state, delete=(CHAIN_B,)))
        assert tables.dump("mangle", family) == TableDump()

    def test_doubled_and_old_jumps_leave_one_at_rule_1(self, tables: TableDriver) -> None:
        hook = Hook.FORWARD
        tables.apply(change(replace={CHAIN_A: (), CHAIN_B: ()}))
        for chain in (
            CHAIN_A,
            CHAIN_B,
            CHAIN_A,
            CHAIN_B,
        ):  # each as rule 1, the older ones pushed down
            tables.apply(change(hooks={hook: chain}))
        state = tables.dump("mangle", Family.V4).hooks
        assert state[hook].jumps == ((1, CHAIN_B), (2, CHAIN_A), (3, CHAIN_B), (4, CHAIN_A))
        tables.apply(change(hooks={hook: CHAIN_A}, state=state))
        assert tables.dump("mangle", Family.V4).hooks == {hook: HookState(((1, CHAIN_A),))}

    def test_a_hook_that_is_not_named_is_left_alone(self, tables: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: ()}, hooks={Hook.INPUT: CHAIN_A}))
        state = tables.dump("mangle", Family.V4).hooks
        tables.apply(change(replace={CHAIN_A: (Rule(Drop()),)}, hooks={}, state=state))
        assert tables.dump("mangle", Family.V4).hooks == state

    def test_a_jump_that_is_gone_makes_the_transaction_fail(self, tables: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: ()}))
        stale = {Hook.FORWARD: HookState(((1, CHAIN_A),))}
        refusal(tables, change(hooks={Hook.FORWARD: None}, state=stale))
        refusal(tables, change(hooks={Hook.FORWARD: NONE}))

    def test_a_chain_that_a_hook_uses_is_not_deleted(self, tables: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: (Rule(Drop()),)}, hooks={Hook.OUTPUT: CHAIN_A}))
        assert not refusal(tables, change(delete=(CHAIN_A,))).retryable

    def test_chains_that_loop_are_refused(self, tables: TableDriver) -> None:
        tables.apply(change(replace={CHAIN_A: (), CHAIN_B: ()}, hooks={Hook.FORWARD: CHAIN_A}))
        loop: dict[ChainName, Chain] = {
            CHAIN_A: (Rule(Jump(CHAIN_B)),),
            CHAIN_B: (Rule(Jump(CHAIN_A)),),
        }
        refusal(tables, change(replace=loop))

    def test_a_set_in_use_is_not_destroyed(self, tables: TableDriver, sets: SetDriver) -> None:
        spec = forms.set_specs(Family.V4)[0]
        sets.apply(SetTransaction((CreateSet(spec),)))
        rules = (Rule(Drop(), (SetMatch(spec.name, (Side.SRC,)),)),)
        tables.apply(change(replace={CHAIN_A: rules}))
        assert sets.dump()[spec.name].references == 1
        with pytest.raises(SetError) as caught:
            sets.apply(SetTransaction((DestroySet(spec.name),)))
        assert (caught.value.name, caught.value.code) == (spec.name, 4100)
        tables.apply(change(delete=(CHAIN_A,)))
        sets.apply(SetTransaction((DestroySet(spec.name),)))
        assert sets.dump() == {}

    def test_a_set_of_the_other_family_is_refused(
        self, tables: TableDriver, sets: SetDriver
    ) -> None:
        spec = forms.set_specs(Family.V6)[0]
        sets.apply(SetTransaction((CreateSet(spec),)))
        rules = (Rule(Drop(), (SetMatch(spec.name, (Side.SRC,)),)),)
        refusal(tables, change(replace={CHAIN_A: rules}))
