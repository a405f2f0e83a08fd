"""Processes of the lab, known by pid *and* start time, so that a pid used again is never killed.

Owns the records on disk and the ending of what they name. Pure bookkeeping: it starts nothing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_START_FIELD = 19  # starttime: field 22 of /proc/PID/stat, counted behind the closing parenthesis
_STATE_FIELD = 0


class Process(NamedTuple):
    """A process; `start_ticks` is its start after boot, as the kernel counts."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        fields = _stat(self.pid)
        return bool(
            fields and int(fields[_START_FIELD]) == self.start_ticks and fields[_STATE_FIELD] != "Z"
        )


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat behind the command, which may contain anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def identify(pid: int) -> Process | None:
    """Return the process that has this pid now."""
    fields = _stat(pid)
    return Process(pid, int(fields[_START_FIELD])) if fields else None


def record(file: Path, pid: int) -> None:
    """Write down a process that was just started."""
    found = identify(pid)
    if found is not None:
        replace_text(file, json.dumps(found._asdict()))


def recorded(file: Path) -> Process | None:
    """Return the process that a file names, or None where there is none or it cannot be read."""
    try:
        data = json.loads(file.read_text())
        return Process(int(data["pid"]), int(data["start_ticks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def end(processes: Iterable[Process], *, grace_s: float) -> None:
    """Ask processes to end, and kill those that have not after the grace."""
    left = [process for process in processes if process.alive]
    for process in left:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [process for process in left if process.alive]
    for process in left:
        _signal(process, signal.SIGKILL)
    deadline = time.monotonic() + 2.0  # the kernel's own time to tear a process down
    while any(process.alive for process in left) and time.monotonic() < deadline:
        time.sleep(0.01)


def _signal(process: Process, number: int) -> None:
    if process.alive:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            return  # it went in between


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, and nobody else reads either."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(text)
    draft.replace(file)
