"""`netpol-ctl status`: what the node's agent says of itself."""

from __future__ import annotations

import argparse
from typing import Any

from netpol.admin import client
from netpol.ctl.output import emit, table
from netpol.lib.errors import NoAnswerError


def run(args: argparse.Namespace) -> int:
    """Print the agent's state; 0 whatever it is, since that is the answer."""
    answer = client.call(args.socket, "status")
    if not isinstance(answer, dict):
        raise NoAnswerError(f"the agent at {args.socket} gave no status")
    emit(answer, text(answer), form=args.output)
    return 0


def text(status: dict[str, Any]) -> str:
    """The state for people."""
    errors = status.get("errors") or []
    if errors:
        state = "not in sync" if not status.get("in_sync") else "in sync, with errors"
    elif status.get("ready"):
        state = "in sync" if status.get("in_sync") else "applying"
    else:
        state = "not ready: nothing applied yet"
    lines = [f"{status.get('node') or 'this node'}: {state}"]
    age = status.get("applied_age_s")
    applied = "never" if age is None else f"{age:.1f} s ago"
    lines.append(
        f"  generation {status.get('generation')}, applied {status.get('applied_generation')} "
        f"({applied}), netpol {status.get('version')}"
    )
    rows = [
        [
            str(w.get("kind")),
            "synced" if w.get("synced") else "not synced",
            f"resourceVersion {w.get('resource_version') or 'none'}",
            f"{w.get('errors', 0)} errors",
        ]
        for w in status.get("watches") or ()
    ]
    lines += table(rows, indent="  watch ")
    for name, room in (status.get("rooms") or {}).items():
        counts = [f"{v} {k}" for k, v in room.items() if k != "errors"]
        lines.append(f"  room {name}: {', '.join(counts) or 'nothing to count'}")
        lines += [f"    error: {e}" for e in room.get("errors") or ()]
    lines += [f"  error: {e}" for e in errors]
    known = {
        *("node", "version", "ready", "generation", "applied_generation", "in_sync"),
        *("applied_age_s", "watches", "rooms", "errors"),
    }
    lines += [f"  {k}: {v}" for k, v in status.items() if k not in known]
    return "\n".join(lines)
