"""`netpol-ctl cleanup`: removes all that is ours from this node's kernel, and nothing else.

Both variants of iptables, both families, then the sets (which rules reference). A variant that holds
nothing of ours is not touched, so that no table of it comes into being.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

from netpol.admin import client
from netpol.ctl import cleanup_kube_proxy, cleanup_proxy, cleanup_routes
from netpol.ctl.output import emit, plural, remark
from netpol.kernel.drivers import (
    DestroySet,
    HookState,
    SetError,
    SetTransaction,
    TableDriver,
    TableError,
    TableTransaction,
    Variant,
)
from netpol.lib.errors import KernelMissingError, NetpolError, NoAnswerError
from netpol.model.ids import EVERYBODY
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import Hook

#: Tables that any room writes. Mangle first: what relies on filter goes before it.
TABLES = ("mangle", "filter", "nat")


def run(args: argparse.Namespace) -> int:
    """Remove; refused while an agent runs, since it would write everything again."""
    if os.geteuid() != 0:
        raise NoAnswerError("cleanup changes the kernel", needed="root")
    if args.kube_proxy:
        return cleanup_kube_proxy.run(args)
    if not args.force:
        _refuse_if_running(args.socket)
    removed: dict[str, Any] = {"chains": 0, "jumps": 0, "sets": 0}
    left: list[str] = []
    removed |= cleanup_routes.clean_routes(Path(args.run_dir), left)
    # Addresses of Services go before the rules that keep the node's own ports off them.
    removed |= cleanup_proxy.clean_proxy(Path(args.run_dir), left)
    lacking: dict[str, None] = {}
    for driver, family, table in itertools.product(_drivers(), FAMILIES, TABLES):
        try:
            chains, jumps = clean_table(driver, table, family, left)
        except KernelMissingError as e:
            lacking[str(e)] = None
            continue
        except (NetpolError, OSError) as e:
            left.append(f"table {table}, IPv{int(family)}, {driver.variant}: {e}")
            continue
        removed["chains"] += chains
        removed["jumps"] += jumps
    removed["sets"] = _clean_sets(left)
    removed["files"] = _clean_state(Path(args.state_dir), left)
    for why in lacking:
        # No reason to fail: nearly all rules of ours name a set, and are left if that is in use.
        remark(f"not looked at: {why}")
    if left:
        raise NoAnswerError("not all of it could be removed", got="; ".join(left))
    what = ", ".join(
        plural(n, k[:-1]) for k, n in removed.items() if n or k in ("chains", "jumps", "sets")
    )
    nothing = not any(removed.values())
    emit(
        {"removed": removed},
        "nothing of netpol here" if nothing else f"removed {what}",
        form=args.output,
    )
    return 0


def clean_table(
    driver: TableDriver, table: str, family: Family, left: list[str]
) -> tuple[int, int]:
    """Remove our chains and jumps from one table; how many of each.

    The jumps go first, in a transaction of their own: a chain that a foreign rule refers to cannot be
    deleted, but nothing of ours may stay in force because of it. What stays is added to `left`.
    """
    dump = driver.dump(table, family)
    hooks: dict[Hook, HookState] = {h: s for h, s in dump.hooks.items() if s.jumps}
    jumps = TableTransaction(table, family, hooks=dict.fromkeys(hooks), hook_state=hooks)
    chains = TableTransaction(table, family, delete=tuple(dump.chains))
    done = []
    for wanted, tx in ((bool(hooks), jumps), (bool(dump.chains), chains)):
        try:
            if wanted:
                driver.apply(tx)
            done.append(wanted)
        except TableError as e:
            done.append(False)
            left.append(f"table {table}, IPv{int(family)}, {driver.variant}: {e}")
    count = sum(len(s.jumps) for s in hooks.values())
    return len(dump.chains) if done[1] else 0, count if done[0] else 0


def _drivers() -> list[TableDriver]:
    from netpol.kernel.tables import RestoreTables

    return [RestoreTables(v, owner=EVERYBODY) for v in Variant]


def _clean_sets(left: list[str]) -> int:
    from netpol.kernel.sets import NetlinkSets

    try:
        sets = NetlinkSets(owner=EVERYBODY)
    except KernelMissingError:
        return 0  # a kernel without ipset has no set of ours
    count = 0
    try:
        for name in sorted(sets.headers()):
            try:
                sets.apply(SetTransaction((DestroySet(name),)))
                count += 1
            except SetError as e:
                left.append(str(e))
    finally:
        sets.close()
    return count


def _clean_state(folder: Path, left: list[str]) -> int:
    """Forget the pod ranges: a later agent must not hold what this node's pods no longer have."""
    from netpol.enforce.node import STATE_FILE

    try:
        (folder / STATE_FILE).unlink()
    except FileNotFoundError:
        return 0
    except OSError as e:
        left.append(f"{folder / STATE_FILE}: {e.strerror}")
        return 0
    return 1


def _refuse_if_running(socket: str) -> None:
    try:
        client.call(socket, "status", timeout_s=2.0)
    except NetpolError as e:
        if "no agent answers" in str(e):
            return
    raise NoAnswerError(
        f"an agent runs at {socket} and would write everything again",
        needed="it stopped, or --force",
    )
