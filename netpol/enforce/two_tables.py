"""The order in which the second table comes and goes: it is there before anything relies on it, and after.

With `--deny-with=reject`, mangle leaves denied packets to filter and to a net in POSTROUTING (see
`render.reject`). The tables of a family change one after the other, so

    on   1  filter answers whatever bears the value of a denied packet; nothing does so far
         2  mangle, in one transaction: the net, and classes that end in the value
    off  1  mangle, in one transaction: classes that drop
         2  with the garbage, long after the last packet that was under way: filter's part, then the net

Stopped anywhere, the next agent goes on from what it finds, whichever way it wants to go.
"""

from __future__ import annotations

from collections.abc import Mapping

from netpol.kernel.drivers import HookState, TableDump, TableTransaction
from netpol.model.ids import ChainName
from netpol.model.net import Family
from netpol.model.ruleset import Hook, Ruleset
from netpol.render import reject, static

_TOOLS = {Family.V4: "iptables", Family.V6: "ip6tables"}


def filter_first(want: Ruleset, have: TableDump, family: Family) -> tuple[TableTransaction, ...]:
    """What filter lacks: before mangle's change."""
    replace = {n: c for n, c in want.chains.items() if have.chains.get(n) != c}
    hooks = _missing(want.hooks, have.hooks)
    if not replace and not hooks:
        return ()
    state = {h: have.hooks.get(h, HookState()) for h in hooks}
    return (TableTransaction(reject.TABLE, family, replace, hooks=hooks, hook_state=state),)


def rest_last(
    want: Ruleset,
    have: TableDump,
    family: Family,
    *,
    mangle_want: Ruleset,
    mangle_have: TableDump,
) -> tuple[TableTransaction, ...]:
    """What is too much in filter, and mangle's jumps that are: with the garbage."""
    out = []
    gone = _extra(want.hooks, have.hooks)
    doomed = tuple(n for n in have.chains if n not in want.chains)
    if gone or doomed:
        out.append(_without(reject.TABLE, family, gone, doomed))
    gone = _extra(mangle_want.hooks, mangle_have.hooks)
    if gone:
        out.append(_without(static.TABLE, family, gone))
    return tuple(out)


def _without(
    table: str, family: Family, hooks: Mapping[Hook, HookState], chains: tuple[ChainName, ...] = ()
) -> TableTransaction:
    return TableTransaction(
        table, family, delete=chains, hooks=dict.fromkeys(hooks), hook_state=hooks
    )


def _missing(
    want: Mapping[Hook, ChainName], have: Mapping[Hook, HookState]
) -> dict[Hook, ChainName | None]:
    return {h: c for h, c in want.items() if have.get(h, HookState()).jumps != ((1, c),)}


def _extra(want: Mapping[Hook, ChainName], have: Mapping[Hook, HookState]) -> dict[Hook, HookState]:
    return {h: state for h, state in have.items() if state.jumps and h not in want}


def table_differences(
    want: Ruleset, have: TableDump, family: Family, table: str, *, rest: bool
) -> list[str]:
    """How a table differs from what should be there, in words.

    Args:
        want: what should be there; of chains without rules nothing is known.
        have: what is.
        family: whose.
        table: its name.
        rest: whether something waits for the garbage that is more than that.
    """
    tool = _TOOLS[family] + ("" if table == static.TABLE else f" -t {table}")
    found: list[str] = []
    for name, chain in want.chains.items():
        if chain and have.chains.get(name) != chain:
            state = "changed" if name in have.chains else "gone"
            found.append(f"{tool} chain {name} is {state}")
    found += [
        f"{tool} {hook} does not begin with our jump alone"
        for hook in _missing(want.hooks, have.hooks)
    ]
    if rest:
        return found
    found += [f"{tool} chain {n} is not ours to have" for n in have.chains if n not in want.chains]
    found += [f"{tool} {hook} has a jump to us" for hook in _extra(want.hooks, have.hooks)]
    return found
