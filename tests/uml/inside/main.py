"""What happens inside the guest: groups of steps, each in a process and a network namespace of its own.

A group is a module with `run(say)`, where `say(name, answer)` keeps an answer for the tests on the host.
The groups run one after another, so that each has the processor to itself; what a group leaves behind
(links, tables, servers, a crash) is gone when the next one begins. Kernel modules stay.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

#: Name and module of each group, in their order: the first one wants a kernel without IPVS.
GROUPS = {
    "policy": "tests.uml.inside.policy",
    "proxy_driver": "tests.uml.inside.proxy_driver",
    "proxy_rules": "tests.uml.inside.steps_proxy_rules",
    "reject": "tests.uml.inside.steps_reject",
    "proxy_sync": "tests.uml.inside.steps_proxy_sync",
    "proxy_dsr": "tests.uml.inside.steps_proxy_dsr",
    "overlay": "tests.uml.inside.steps_overlay",
    "cni": "tests.uml.inside.steps_cni",
}
#: What they take, in seconds of a quiet machine, so that guests can share them evenly.
SECONDS = {
    "policy": 31,
    "proxy_rules": 22,
    "proxy_driver": 14,
    "reject": 10,
    "proxy_sync": 10,
    "proxy_dsr": 18,
}
#: A group's result where it did not come to its end: the traceback.
FAILED = "failed"
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000


def main() -> None:
    """Run the groups of argv (names, or modules by their dotted names); one file of results for each."""
    out = Path(sys.argv[1])
    # Once, for all: this takes seconds here.
    importlib.import_module("pyroute2")
    for group in sys.argv[2:] or GROUPS:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _run(group, out / f"{group}.json")
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.waitpid(pid, 0)


def _run(group: str, out: Path) -> None:
    results: dict[str, Any] = {}
    begin_s = time.monotonic()

    def say(name: str, answer: Any) -> None:
        results[name] = answer
        print(f"{time.monotonic() - begin_s:6.2f} {group}: {name}: {answer}", flush=True)

    try:
        _own_network()
        importlib.import_module(GROUPS.get(group, group)).run(say)
        say("seconds", round(time.monotonic() - begin_s, 1))
    except BaseException:  # noqa: BLE001 - the host's tests raise it
        say(FAILED, traceback.format_exc())
    out.write_text(json.dumps(results))


def _own_network() -> None:
    """Leave what other groups made: a new network namespace, and no names of older ones."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for command in (
        "mount --make-rprivate /",
        "mount -t sysfs none /sys",
        "mkdir -p /run/netns",
        "mount -t tmpfs none /run/netns",
        "ip link set lo up",
    ):
        subprocess.run(command.split(), check=True)


if __name__ == "__main__":
    main()
