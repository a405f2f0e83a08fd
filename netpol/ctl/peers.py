"""`netpol-ctl peers`: the BGP sessions of this node."""

from __future__ import annotations

import argparse
from typing import Any

from netpol.admin import client
from netpol.ctl.output import emit, plural, table


def run(args: argparse.Namespace) -> int:
    """Print every session and how it is."""
    answer = client.call(args.socket, "peers")
    emit(answer, text(answer), form=args.output)
    return 0


def text(answer: dict[str, Any]) -> str:
    """The sessions for people."""
    peers = answer["peers"]
    up = sum(p["state"] == "Established" for p in peers)
    lines = [f"{answer['node']}: {up} of {plural(len(peers), 'session')} established"]
    lines += table([_row(p) for p in peers], indent="  ")
    for peer in peers:
        if peer["limits"]:
            lines.append(f"  {peer['peer']}: limit reached: {', '.join(peer['limits'])}")
    return "\n".join(lines)


def _row(peer: dict[str, Any]) -> list[str]:
    row = [
        peer["peer"],
        peer["kind"],
        f"AS {peer['asn']}",
        peer["state"],
        f"since {peer['since']}" if peer["since"] else "not configured",
        f"{peer['imported']} in, {peer['exported']} out",
    ]
    return [*row, f"last error: {peer['lastError']}"] if peer["lastError"] else row
