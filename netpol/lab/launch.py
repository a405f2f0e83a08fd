"""Starting and ending a lab from the outside: the detached supervisor, its progress, and `down`.

Owns the start of the supervisor process and the only teardown there is, which works from names and files
and so does not care who was killed before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from netpol.lab import network, processes, spaces
from netpol.lab.assets import Assets
from netpol.lab.objects import Selection
from netpol.lab.plan import STATE_ROOT, LabPlan, check_name, netns_prefix
from netpol.lib.errors import InputError, NetpolError, NoAnswerError

Obj = dict[str, Any]

_POLL_S = 0.02
_SUPERVISOR_GRACE_S = 2.0
_GRACE_S = 5.0  # beyond its time-outs, for a supervisor that cannot say so itself

SPEC = "spec.json"
PROGRESS = "progress.jsonl"
SUPERVISOR_RECORD = "supervisor.process"
SUPERVISOR_LOG = "supervisor.log"


class LaunchError(NetpolError):
    """`lab up` failed; carries the exit code that fits the reason."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def require_root() -> None:
    """Refuse to go on as anybody else.

    Raises:
        NoAnswerError: This is not root.
    """
    if os.geteuid() != 0:
        got = f"uid {os.geteuid()}"
        raise NoAnswerError("the lab makes network namespaces", needed="root (try sudo)", got=got)


def is_up(name: str, *, state_root: Path = STATE_ROOT) -> bool:
    """Tell whether a lab's supervisor runs."""
    found = processes.recorded(state_root / name / SUPERVISOR_RECORD)
    return found is not None and found.alive


def leftovers(name: str, *, state_root: Path = STATE_ROOT) -> bool:
    """Tell whether something of a lab stands, its supervisor or not."""
    return (state_root / name).exists() or bool(spaces.names(netns_prefix(name)))


def up(
    plan: LabPlan,
    selection: Selection,
    *,
    timeout_s: float,
    say: Callable[[str], None],
    assets: Assets | None = None,
) -> None:
    """Start a lab and wait until all of it is ready; on failure nothing is left.

    Args:
        plan: the lab.
        selection: what is created in it.
        timeout_s: how long it may take.
        say: told about the progress, a line at a time.
        assets: the programs of a real API server; None for the embedded one.

    Raises:
        InputError: It is up already, or the API server refuses a manifest.
        NetpolError: It did not become ready; the message says why.
    """
    with _only_one(plan):
        _up(plan, selection, timeout_s=timeout_s, say=say, assets=assets)


@contextlib.contextmanager
def _only_one(plan: LabPlan) -> Iterator[None]:
    """Keep a second `lab up` of the same lab out; the kernel drops this lock with the process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        try:
            lock.bind(f"\0netpol-lab:{plan.state_dir}")
        except OSError as error:
            raise InputError(f"another `lab up` of lab {plan.name!r} is at work") from error
        yield


def _up(
    plan: LabPlan,
    selection: Selection,
    *,
    timeout_s: float,
    say: Callable[[str], None],
    assets: Assets | None,
) -> None:
    if is_up(plan.name, state_root=plan.state_root):
        flag = "" if plan.name == "lab" else f" --name {plan.name}"
        raise InputError(
            f"lab {plan.name!r} is up already",
            needed=f"`netpol-ctl lab down{flag}` before, or another --name",
        )
    if leftovers(plan.name, state_root=plan.state_root):
        say("removing what an ended lab left behind")
        down(plan.name, state_root=plan.state_root)
    state = plan.state_dir
    state.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # BIRD and FRR go through here as their own users; what is in it is made for root alone.
    state.mkdir(mode=0o711)
    (state / SUPERVISOR_LOG).touch(mode=0o600)
    ready = False
    try:
        _write_spec(plan, selection, timeout_s=timeout_s, assets=assets)
        supervisor = _start(plan)
        # A real API server has the same time again for its own start.
        longest_s = timeout_s if assets is None else 2 * timeout_s
        _wait(plan, supervisor, timeout_s=longest_s, say=say)
        ready = True
    finally:
        if not ready:
            say("taking the lab down again")
            down(plan.name, state_root=plan.state_root)


def _write_spec(
    plan: LabPlan, selection: Selection, *, timeout_s: float, assets: Assets | None
) -> None:
    spec = {
        "plan": plan.as_json(),
        "timeout_s": timeout_s,
        "assets": assets,
        "node_labels": selection.node_labels,
        "manifests": [{"source": m.source, "obj": m.obj} for m in selection.manifests],
    }
    processes.replace_text(plan.state_dir / SPEC, json.dumps(spec))


def _start(plan: LabPlan) -> subprocess.Popen[bytes]:
    """Start the supervisor with none of our files, in a session of its own."""
    env = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    env["HOME"] = "/root"
    with (plan.state_dir / SUPERVISOR_LOG).open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "netpol.lab.supervisor", str(plan.state_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            cwd="/",
            start_new_session=True,
            close_fds=True,
        )
    processes.record(plan.state_dir / SUPERVISOR_RECORD, supervisor.pid)
    return supervisor


def _wait(
    plan: LabPlan,
    supervisor: subprocess.Popen[bytes],
    *,
    timeout_s: float,
    say: Callable[[str], None],
) -> None:
    """Pass on the supervisor's progress until it says how it went."""
    file = plan.state_dir / PROGRESS
    deadline = time.monotonic() + timeout_s + _GRACE_S
    seen = 0
    last = "starting the supervisor"
    while True:
        ended = supervisor.poll() is not None  # before reading: its last words are in the file
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        for line in lines[seen:]:
            entry: Obj = json.loads(line)
            if "error" in entry:
                raise LaunchError(str(entry["error"]), int(entry["exit_code"]))
            if entry.get("ready"):
                return
            last = str(entry["text"])
            say(last)
        seen = len(lines)
        if ended:
            words = _last_line(plan.state_dir / SUPERVISOR_LOG)
            raise LaunchError(f"the lab's supervisor ended while {last}: {words}", 3)
        if time.monotonic() > deadline:
            raise LaunchError(f"lab up: no end after {timeout_s:g} s while {last}", 3)
        time.sleep(_POLL_S)


def _last_line(file: Path) -> str:
    try:
        lines = file.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        lines = []
    return lines[-1][:500] if lines else "no message"


def down(name: str, *, state_root: Path = STATE_ROOT) -> bool:
    """Remove all of a lab; return whether there was anything.

    The supervisor goes first, so that nothing is started again; then the agents by their records, then the
    daemons that put themselves into the background by theirs (their namespace may have lost its name), then
    whatever process lives in one of the namespaces, the namespaces, and the files.
    """
    check_name(name)
    state = state_root / name
    found = leftovers(name, state_root=state_root)
    supervisor = processes.recorded(state / SUPERVISOR_RECORD)
    if supervisor is not None:
        processes.end([supervisor], grace_s=_SUPERVISOR_GRACE_S)
    recorded = [processes.recorded(file) for file in sorted(state.glob("*/*.process"))]
    processes.end([process for process in recorded if process is not None], grace_s=0)
    processes.end(_daemons(state), grace_s=0)
    network.down(name)
    if state.exists():
        shutil.rmtree(state)
    _remove_empty(state_root)
    return found


def _daemons(state: Path) -> list[processes.Process]:
    """Return the BIRDs of the nodes and the router's daemons that their pid files name.

    A number may be another program's by now: its command line must name the very file.
    """
    found = []
    for file in (*state.glob("*/run/bird/*.pid"), *state.glob("*/*.pid")):
        try:
            process = processes.identify(int(file.read_text()))
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes() if process else b""
        except (OSError, ValueError):
            continue  # it ended, or never got to write its number
        if process is not None and os.fsencode(file) in words.split(b"\0"):
            found.append(process)
    return found


def _remove_empty(folder: Path) -> None:
    """Remove the folder of all labs after the last one."""
    try:
        folder.rmdir()
    except OSError:
        return  # another lab is there, or it never was
