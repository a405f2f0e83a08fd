"""One table as text: a transaction for iptables-restore, and what iptables-save says of our part. Pure."""

from __future__ import annotations

from netpol.kernel.drivers import (
    ForeignRule,
    HookState,
    TableDump,
    TableError,
    TableTransaction,
)
from netpol.kernel.rule_parse import parse_words, split_words
from netpol.kernel.rule_text import check_chain, rule_text
from netpol.model.ids import ChainName
from netpol.model.net import Family
from netpol.model.ruleset import OWN_PREFIX, Chain, Hook, Jump, Rule

#: Hook rules in one table; a line `:HOOK` would reset the policy that others set, so none is printed.
_HOOKS = {str(hook): hook for hook in Hook}

Counters = tuple[tuple[int, int], ...]


def transaction_text(tx: TableTransaction) -> str:
    """Write a transaction as the text for `iptables-restore --noflush`.

    Raises:
        TableError: a rule that cannot be written; `line` is where it would stand.
    """
    lines = [f"*{tx.table}"]
    own = [*tx.replace, *tx.delete]
    for name in own:
        _check(name, line=len(lines) + 1)
    # A line for a chain creates or empties it. Deleted ones too: their rules may reference each other.
    lines += [f":{name} - [0:0]" for name in own]
    for name, chain in tx.replace.items():
        _append_chain(lines, name, chain=chain, family=tx.family)
    for hook, target in tx.hooks.items():
        lines += _hook_lines(hook, target, tx.hook_state.get(hook, HookState()))
    lines += [f"-X {name}" for name in tx.delete]
    lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def _check(name: ChainName, *, line: int) -> None:
    try:
        check_chain(name)
    except ValueError as e:
        raise TableError(str(e), retryable=False, line=line) from e
    if not name.startswith(OWN_PREFIX):
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
    """The lines that leave one jump of ours, as rule 1, or none.

    Deletes go by what the rule says, never by its position: between the dump and now a foreign rule
    may have moved there.
    """
    if target is None:
        return [f"-D {hook} -j {chain}" for _, chain in state.jumps]
    if state.jumps == ((1, target),):
        return []
    insert = [f"-I {hook} 1 -j {target}"]
    old = [f"-D {hook} -j {chain}" for _, chain in state.jumps if chain != target]
    # A delete takes the first rule that equals it, so that jumps to the same chain must go before the
    # new one is there. Inside one transaction no packet can tell.
    same = [f"-D {hook} -j {target}" for _, chain in state.jumps if chain == target]
    return same + insert + old


def parse_save(text: str) -> TableDump:
    """Read our part of what iptables-save printed of one table."""
    chains: dict[ChainName, list[Rule | ForeignRule]] = {}
    jumps: dict[Hook, list[tuple[int, ChainName]]] = {}
    positions: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(f":{OWN_PREFIX}"):
            chains[ChainName(line[1:].split(" ", 1)[0])] = []
            continue
        if not line.startswith("-A "):
            continue
        _, name, rest = line.split(" ", 2)
        if name.startswith(OWN_PREFIX):
            rule = parse_words(split_words(rest))
            chains[ChainName(name)].append(ForeignRule(rest) if rule is None else rule)
        elif name in _HOOKS:
            positions[name] = positions.get(name, 0) + 1
            if f"-j {OWN_PREFIX}" in rest:
                chain = _jump_of(rest)
                if chain is not None:
                    jumps.setdefault(_HOOKS[name], []).append((positions[name], chain))
    return TableDump(
        chains={name: tuple(rules) for name, rules in chains.items()},
        hooks={hook: HookState(tuple(found)) for hook, found in jumps.items()},
    )


def _jump_of(rest: str) -> ChainName | None:
    """The chain that a hook's rule jumps to, where it is our plain jump and nothing else."""
    rule = parse_words(split_words(rest))
    if rule is not None and isinstance(rule.action, Jump) and not rule.matches and not rule.comment:
        return rule.action.chain
    return None


def parse_counters(text: str) -> dict[ChainName, Counters]:
    """Read packets and bytes of our rules from what iptables-save -c printed."""
    found: dict[ChainName, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        if line.startswith(f":{OWN_PREFIX}"):
            found[ChainName(line[1:].split(" ", 1)[0])] = []
        elif line.startswith("["):
            counted, _, name, *_ = line.split(" ", 3)
            if name.startswith(OWN_PREFIX):
                packets, _, size = counted.strip("[]").partition(":")
                found[ChainName(name)].append((int(packets), int(size)))
    return {name: tuple(values) for name, values in found.items()}
