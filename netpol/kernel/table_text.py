"""One table as text: a transaction for iptables-restore, and what iptables-save says of our part. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from netpol.kernel.drivers import (
    ForeignRule,
    HookState,
    TableDump,
    TableError,
    TableTransaction,
)
from netpol.kernel.rule_parse import parse_words, split_words
from netpol.kernel.rule_text import check_chain, rule_text
from netpol.model.ids import OWN_PREFIX, POLICY, ChainName, Owner
from netpol.model.net import Family
from netpol.model.ruleset import Chain, Hook, Jump, Rule

#: Hook rules in one table; a line `:HOOK` would reset the policy that others set, so none is printed.
_HOOKS = {str(hook): hook for hook in Hook}

Counters = tuple[tuple[int, int], ...]


def transaction_text(tx: TableTransaction, owner: Owner = POLICY) -> str:
    """Write a transaction as the text for `iptables-restore --noflush`.

    Args:
        tx: the transaction.
        owner: whose chains it may touch.

    Raises:
        TableError: a rule that cannot be written; `line` is where it would stand.
    """
    lines = [f"*{tx.table}"]
    own = [*tx.replace, *tx.delete]
    for name in own:
        _check(name, owner, line=len(lines) + 1)
    # A line for a chain creates or empties it. Deleted ones too: their rules may reference each other.
    lines += [f":{name} - [0:0]" for name in own]
    for name, chain in tx.replace.items():
        _append_chain(lines, name, chain=chain, family=tx.family)
    for hook, target in tx.hooks.items():
        lines += _hook_lines(hook, target, tx.hook_state.get(hook, HookState()))
    lines += [f"-X {name}" for name in tx.delete]
    lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def _check(name: ChainName, owner: Owner, *, line: int) -> None:
    try:
        check_chain(name)
    except ValueError as e:
        raise TableError(str(e), retryable=False, line=line) from e
    if not owner.owns(name):
        raise TableError(f"chain {name} is not ours to write", retryable=False, line=line)


def _append_chain(lines: list[str], name: ChainName, *, chain: Chain, family: Family) -> None:
    for rule in chain:
        try:
            lines.append(f"-A {name} {rule_text(rule, family)}")
        except ValueError as e:
            raise TableError(
                f"a rule of chain {name} cannot be written: {e}",
                retryable=False,
                line=len(lines) + 1,
            ) from e


def _hook_lines(hook: Hook, target: ChainName | None, state: HookState) -> list[str]:
    """The lines that leave one jump of ours, in its place, or none.

    Deletes go by what the rule says, never by its position: between the dump and now a foreign rule
    may have moved there.
    """
    if target is None:
        return [f"-D {hook} -j {chain}" for _, chain in state.jumps]
    if state.jumps == ((state.place, target),):
        return []
    insert = [f"-I {hook} {state.place} -j {target}"]
    old = [f"-D {hook} -j {chain}" for _, chain in state.jumps if chain != target]
    # A delete takes the first rule that equals it, so that jumps to the same chain must go before the
    # new one is there. Inside one transaction no packet can tell.
    same = [f"-D {hook} -j {target}" for _, chain in state.jumps if chain == target]
    return same + insert + old


def parse_save(text: str, owner: Owner = POLICY) -> TableDump:
    """Read an owner's part of what iptables-save printed of one table."""
    chains: dict[ChainName, list[Rule | ForeignRule]] = {}
    jumps: dict[Hook, list[ChainName | None]] = {}
    for line in text.splitlines():
        if line.startswith(f":{owner.prefix}"):
            name = line[1:].split(" ", 1)[0]
            if owner.owns(name):
                chains[ChainName(name)] = []
            continue
        if not line.startswith("-A "):
            continue
        _, name, rest = line.split(" ", 2)
        if name in chains:
            rule = parse_words(split_words(rest))
            chains[ChainName(name)].append(ForeignRule(rest) if rule is None else rule)
        elif name in _HOOKS:
            ours = f"-j {OWN_PREFIX}" in rest
            jumps.setdefault(_HOOKS[name], []).append(_jump_of(rest) if ours else None)
    return TableDump(
        chains={name: tuple(rules) for name, rules in chains.items()},
        hooks=hook_states(jumps, owner),
    )


def hook_states(
    jumps: Mapping[Hook, Sequence[ChainName | None]], owner: Owner
) -> dict[Hook, HookState]:
    """What of an owner is in the hooks.

    Args:
        jumps: for each rule of a hook, the chain of ours that it plainly jumps to, or None.
        owner: whose jumps are wanted.
    """
    found: dict[Hook, HookState] = {}
    for hook, targets in jumps.items():
        ahead = 0
        for target in targets:
            if target is None or not owner.yields_to(target):
                break
            ahead += 1
        own = tuple((n, t) for n, t in enumerate(targets, 1) if t is not None and owner.owns(t))
        if own or ahead:
            found[hook] = HookState(own, place=ahead + 1)
    return found


def _jump_of(rest: str) -> ChainName | None:
    """The chain that a hook's rule jumps to, where it is our plain jump and nothing else."""
    rule = parse_words(split_words(rest))
    if rule is not None and isinstance(rule.action, Jump) and not rule.matches and not rule.comment:
        return rule.action.chain
    return None


def without_others(text: str, owner: Owner) -> str:
    """What iptables-save printed, without the chains of the rooms that `owner` excludes.

    Looked for one by one: those rooms have a few rules beside an owner's many thousands.
    """
    for prefix in owner.excluding:
        for head in (f"\n:{prefix}", f"\n-A {prefix}"):
            kept: list[str] = []
            begin, at = 0, text.find(head)
            while at >= 0:
                kept.append(text[begin:at])
                begin = text.find("\n", at + 1)
                begin = begin if begin >= 0 else len(text)
                at = text.find(head, begin)
            if kept:
                text = "".join([*kept, text[begin:]])
    return text


def parse_counters(text: str, owner: Owner = POLICY) -> dict[ChainName, Counters]:
    """Read packets and bytes of an owner's rules from what iptables-save -c printed."""
    found: dict[ChainName, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        if line.startswith(f":{owner.prefix}"):
            name = line[1:].split(" ", 1)[0]
            if owner.owns(name):
                found[ChainName(name)] = []
        elif line.startswith("["):
            counted, _, name, *_ = line.split(" ", 3)
            if name in found:
                packets, _, size = counted.strip("[]").partition(":")
                found[ChainName(name)].append((int(packets), int(size)))
    return {name: tuple(values) for name, values in found.items()}
