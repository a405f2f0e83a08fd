"""What brings sets and tables from what they are to what they should be: values in, transactions out. Pure.

For rooms whose chains hardly change. Order between the two is the caller's: sets that rules name come first,
sets that no rule names any more go last.
"""

from __future__ import annotations

from collections.abc import Mapping

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    HookState,
    SetDump,
    SetOp,
    SetTransaction,
    TableDump,
    TableTransaction,
)
from netpol.model.ids import ChainName, SetName
from netpol.model.net import Family
from netpol.model.ruleset import Chain, Hook, Members, Ruleset, SetSpec


def set_changes(
    have: Mapping[SetName, SetDump], want: Mapping[SetName, tuple[SetSpec, Members]]
) -> tuple[SetTransaction, SetTransaction]:
    """What comes before rules name the sets, and what goes when no rule names them."""
    ops: list[SetOp] = []
    for name, (spec, members) in want.items():
        there: Members = {}
        if name in have:
            there = have[name].members
        else:
            ops.append(CreateSet(spec, len(members)))
        add = {m: v for m, v in members.items() if m not in there or there[m] != v}
        gone = [m for m in there if m not in members]
        if add:
            ops.append(AddMembers(spec, add))
        if gone:
            ops.append(DeleteMembers(spec, gone))
    return SetTransaction(tuple(ops)), SetTransaction(
        tuple(DestroySet(name) for name in have if name not in want)
    )


def table_change(
    have: TableDump, want: Ruleset, *, table: str, family: Family
) -> TableTransaction | None:
    """What makes our part of a table what it should be; None where it is."""
    replace: dict[ChainName, Chain] = {
        name: chain for name, chain in want.chains.items() if have.chains.get(name) != chain
    }
    delete = tuple(name for name in have.chains if name not in want.chains)
    hooks: dict[Hook, ChainName | None] = {}
    for hook in {**have.hooks, **want.hooks}:
        state, chain = have.hooks.get(hook, HookState()), want.hooks.get(hook)
        wanted = () if chain is None else ((state.place, chain),)
        if state.jumps != wanted:
            hooks[hook] = chain
    if not (replace or delete or hooks):
        return None
    states = {hook: have.hooks.get(hook, HookState()) for hook in hooks}
    return TableTransaction(table, family, replace, delete, hooks, states)
