"""`netpol-ctl drops`: the denied packets that the node's agent remembers, and those to come."""

from __future__ import annotations

import argparse
import datetime as dt
import re
from collections.abc import Iterator
from typing import Any

from netpol.admin import client
from netpol.ctl.output import clip, to_yaml, write
from netpol.lib.errors import InputError

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def run(args: argparse.Namespace) -> int:
    """Print records as they are asked for; 0 however many there are."""
    since = None if args.since is None else parse_since(args.since, dt.datetime.now(dt.UTC))
    pod = _pod(args)
    seen = 0
    for record in client.follow(args.socket, "drops", follow=args.follow):
        if not _wanted(record, pod=pod, since=since):
            continue
        seen += 1
        _print(record, args.output)
    if not seen and args.output == "text":
        write("no denied packets remembered\n")
    return 0


def parse_since(text: str, now: dt.datetime) -> dt.datetime:
    """A time span back from now (90s, 10m, 2h, 1d), or an RFC 3339 time.

    Raises:
        InputError: neither.
    """
    span = _SPAN.fullmatch(text)
    try:
        if span:
            return now - dt.timedelta(seconds=float(span[1]) * _SECONDS[span[2]])
        time = dt.datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise InputError(
            "--since", needed="a span such as 10m, or a time as RFC 3339 writes it", got=text
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=dt.UTC)


def _pod(args: argparse.Namespace) -> str | None:
    if args.pod is None:
        return None
    name = args.pod.removeprefix("pod/")
    parts = name.split("/")
    if len(parts) == 1:
        return f"{args.namespace or 'default'}/{name}"
    if len(parts) == 3 and parts[1] == "pod":
        return f"{parts[0]}/{parts[2]}"
    if len(parts) != 2 or not all(parts):
        raise InputError("--pod", needed="NAME, NS/NAME or NS/pod/NAME", got=args.pod)
    return str(name)


def _wanted(record: dict[str, Any], *, pod: str | None, since: dt.datetime | None) -> bool:
    if pod is not None and pod not in (record["src"]["name"], record["dst"]["name"]):
        return False
    return since is None or dt.datetime.fromisoformat(record["ts"]) >= since


def _print(record: dict[str, Any], form: str) -> None:
    if form == "json":
        import json

        write(json.dumps(record, ensure_ascii=False) + "\n")
    elif form == "yaml":
        write("---\n" + to_yaml(record))
    else:
        write(text(record) + "\n")


def text(record: dict[str, Any]) -> str:
    """One record on one line, with a second one for the reason."""
    port = record["dst"]["port"]
    target = _party(record["dst"]) + (f":{port}" if port is not None else "")
    times = f" x{record['count']}" if record["count"] > 1 else ""
    direction = record["direction"] or "source"
    head = f"{record['ts']}  {record['reason']} {direction}  "
    head += f"{_party(record['src'])} -> {target}/{record['proto']}{times}"
    return clip(head) + "".join(f"\n    {clip(line)}" for line in _why(record))


def _party(party: dict[str, Any]) -> str:
    return f"{party['name']} ({party['ip']})" if party["name"] else str(party["ip"])


def _why(record: dict[str, Any]) -> Iterator[str]:
    if record["policies"]:
        yield f"isolated by {', '.join(record['policies'])}"
    rule = record["rule"]
    if rule:
        failed = "; ".join(f"{f['term']}: {f['reason']}" for f in rule["failed"])
        yield f"nearest rule: {rule['policy']} spec.{rule['direction']}[{rule['number']}]: {failed}"
    if record["note"]:
        yield f"note: {record['note']}"
    if record["suppressed"] or record["lost"]:
        yield f"before this: {record['suppressed']} not explained, {record['lost']} lost"
