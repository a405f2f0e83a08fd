"""`netpol-ctl status`: what the node's agent says of itself."""

from __future__ import annotations

import argparse
from typing import Any

from netpol.admin import client
from netpol.ctl.output import emit, plural, table
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
    lines += table([_watch(w) for w in status.get("watches") or ()], indent="  watch ")
    for name, room in (status.get("rooms") or {}).items():
        counts = [f"{k} {_value(v)}" for k, v in room.items() if k != "errors" and _says(v)]
        lines.append(f"  room {name}: {', '.join(counts) or 'nothing to count'}")
        lines += [f"    error: {e}" for e in room.get("errors") or ()]
    lines += [f"  error: {e}" for e in errors]
    known = {
        *("node", "version", "ready", "generation", "applied_generation", "in_sync"),
        *("applied_age_s", "watches", "rooms", "errors"),
    }
    lines += [f"  {k}: {_value(v)}" for k, v in status.items() if k not in known and _says(v)]
    return "\n".join(lines)


def _watch(watch: dict[str, Any]) -> list[str]:
    synced = "synced" if watch.get("synced") else "not synced"
    if watch.get("last_error"):
        synced += f", last error: {watch['last_error']}"
    return [
        str(watch.get("name") or watch.get("kind")),
        f"at {watch.get('resource_version') or 'no version yet'}",
        plural(int(watch.get("errors") or 0), "error"),
        synced,
    ]


def _says(value: Any) -> bool:
    """Whether there is anything to print: an empty value says nothing to people."""
    return value is not None and value not in ("", [], {})


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items() if _says(v))
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
