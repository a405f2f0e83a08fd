"""`python -m bench [ID...]`: run the rows (all, or those that begin with an ID) and print the table.

Every group of rows runs in a process of its own, in a network namespace of its own, so that none
inherits the garbage, the caches or the rules of another. The results go to bench/results.json, and from
there into the README's table; a selected run replaces only its own rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import structlog

from bench import measure, numbers, spaces
from netpol.kernel import netns

RESULTS = Path(__file__).parent / "results.json"
README = Path(__file__).parents[1] / "README.md"

#: Groups: the function that yields the rows, and the ids it yields.
GROUPS: dict[str, tuple[str, ...]] = {
    "selectors:selectors": ("selectors.full.ms", "selectors.pod_label.p99_ms"),
    "policy:pod_join": ("policy.pod_join.p99_ms", "policy.pod_join.broad.p99_ms"),
    "policy:policy_change": ("policy.policy_change.p99_ms",),
    "policy:cold_start": ("policy.cold_start.s", "policy.cold_start.broad.s"),
    "packets:new_connection": ("packet.new_connection", "packet.new_connection.legacy"),
    "packets:established": ("packet.established", "packet.established.legacy"),
    "ipset:load": ("ipset.load_50k",),
    "audit:packets": ("audit.packets_per_s",),
    "explain:explain": ("explain.p99_ms", "explain.world.ms"),
    "ipvs:cold": ("ipvs.cold", "ipvs.vips"),
    "ipvs:endpoint": ("ipvs.plan", "ipvs.endpoint", "ipvs.endpoint.growth"),
    "plan:plan": ("proxy.plan_10k.s", "proxy.diff_10k.s", "proxy.plan_endpoint.us"),
    "bgp:mesh": ("bgp.mesh3.s", "bgp.join.s"),
    "bgp:add_node": ("bgp.add_node.ms", "bgp.bird_memory.mb"),
    "memory:pods_10k": ("memory.pods_10k.mb",),
    "memory:pods_100k": ("memory.pods_100k.mb",),
}


def main() -> int:
    """Run; 1 when a row failed or missed its target."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="rows to run: beginnings of ids")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("-n", "--dry", action="store_true", help="do not write the results")
    parser.add_argument(
        "--readme", action="store_true", help="run nothing: only write the README's table anew"
    )
    args = parser.parse_args()
    if args.group:
        return _child(args.group)
    if args.readme:
        _write([])
        return 0
    if os.geteuid() != 0:
        print("bench: needs root, for network namespaces", file=sys.stderr)
        return 3
    rows, failed = [], []
    begin = time.monotonic()
    for group, ids in GROUPS.items():
        if args.ids and not any(i.startswith(a) for a in args.ids for i in ids):
            continue
        print(f"{group} ...", file=sys.stderr, flush=True)
        found = _run(group)
        if found is None:
            failed.append(group)
        for row in found or []:
            print(f"  {row['id']}: {row['value']:g} {row['unit']}  {row['note']}", file=sys.stderr)
        rows += found or []
    print(measure.table(rows))
    print(f"{time.monotonic() - begin:.0f} s")
    for group in failed:
        print(f"FAILED: {group} (its message stands above)")
    if not args.dry:
        _write(rows)
    return 1 if failed or any(row["met"] is False for row in rows) else 0


def _run(group: str) -> list[dict[str, Any]] | None:
    command = [sys.executable, "-m", "bench", "--group", group]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return None
    return [json.loads(line) for line in done.stdout.splitlines()]


def _child(group: str) -> int:
    """One group: in a namespace of its own, rows as lines of JSON."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    module, _, function = group.partition(":")
    with spaces.own_lock(), spaces.spaces("main") as (space,):
        netns.enter(space)
        for row in getattr(importlib.import_module(f"bench.{module}"), function)():
            print(json.dumps(row.as_json()), flush=True)
    return 0


def _write(rows: list[dict[str, Any]]) -> None:
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    merged = {row["id"]: row for row in [*old, *rows]}
    order = [i for ids in GROUPS.values() for i in ids]
    kept = [merged[i] for i in order if i in merged]
    kept += [row for i, row in merged.items() if i not in order]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in kept)
    RESULTS.write_text(f"[\n{lines}\n]\n")
    if numbers.LINES.keys() <= merged.keys():  # else a first run of some rows
        README.write_text(numbers.renewed(README.read_text("utf-8"), merged), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
