"""Network namespaces of the lab: many made or removed in one go, and work done inside one.

Owns the batched `ip` calls and the search for processes that live in a namespace. Entering one is
`netpol.kernel.netns`; names come from `plan`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from netpol.kernel.netns import NETNS_DIR, in_netns, path_of
from netpol.lib.errors import KernelError, KernelMissingError

_SIOCSIFFLAGS = 0x8914  # linux/sockios.h
_IFF_UP = 1  # linux/if.h


def ip_batch(lines: Iterable[str], *, netns: str = "", force: bool = False) -> None:
    """Run `ip` commands in one process, inside a namespace where one is named.

    Args:
        lines: the commands without the leading `ip`.
        netns: where they run, "" for here.
        force: go on after a command that fails, and call that no error.

    Raises:
        KernelError: A command was refused; its text is in the message.
    """
    text = [line for line in lines if line]
    if not text:
        return
    command = [
        "ip",
        *(["-n", netns] if netns else []),
        *(["-force"] if force else []),
        "-batch",
        "-",
    ]
    try:
        done = subprocess.run(
            command, input="\n".join(text) + "\n", capture_output=True, text=True, check=False
        )
    except FileNotFoundError as missing:
        raise KernelMissingError("ip", needed="the program `ip` (package iproute2)") from missing
    if done.returncode and not force:
        where = f" in {netns}" if netns else ""
        raise KernelError(f"ip -batch{where}", got=_blame(done.stderr, text))


def _blame(stderr: str, text: list[str]) -> str:
    """Return the refusal in one line, with the command that `ip` names by number."""
    lines = stderr.strip().splitlines() or ["no message"]
    number = lines[-1].rpartition(":")[2].strip()
    if "Command failed" in lines[-1] and number.isdigit() and 1 <= int(number) <= len(text):
        return f"{lines[0]} (ip {text[int(number) - 1]})"
    return lines[0]


def names(prefix: str) -> list[str]:
    """Return the namespaces whose names begin so."""
    try:
        return sorted(p.name for p in NETNS_DIR.iterdir() if p.name.startswith(prefix))
    except FileNotFoundError:
        return []


def create(wanted: Iterable[str]) -> None:
    """Make namespaces that do not exist yet."""
    present = set(names(""))
    ip_batch(f"netns add {name}" for name in wanted if name not in present)


def remove(unwanted: Iterable[str]) -> None:
    """Remove namespaces; one that is gone is no error."""
    ip_batch((f"netns del {name}" for name in unwanted), force=True)


def listen(name: str, address: str, port: int) -> socket.socket:
    """Return a TCP socket that listens inside a namespace and can be served from outside."""

    def work() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind((address, port))
        server.listen(128)
        server.setblocking(False)
        return server

    return in_netns(name, work)


def loopback_up() -> None:
    """Set `lo` up in the namespace that the calling thread is in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sH14x", b"lo", _IFF_UP)
        fcntl.ioctl(control, _SIOCSIFFLAGS, request)


def write_sysctls(values: dict[str, str]) -> None:
    """Write sysctls of the namespace that the calling thread is in; the keys are paths.

    Raises:
        KernelError: The kernel has no such setting, or refuses the value.
    """
    for key, value in values.items():
        try:
            Path("/proc/sys", key).write_text(value)
        except OSError as error:
            needed = "the module br_netfilter" if "bridge" in key else ""
            raise KernelError(f"sysctl {key}={value}", needed=needed, got=str(error)) from error


def pids(wanted: Iterable[str]) -> set[int]:
    """Return the processes that live in one of these namespaces."""
    inodes = set()
    for name in wanted:
        try:
            inodes.add(path_of(name).stat().st_ino)
        except FileNotFoundError:
            continue
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns/net").stat().st_ino in inodes:
                    found.add(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def kill_inside(wanted: list[str], *, timeout_s: float = 5.0) -> int:
    """End every process that lives in one of these namespaces; return how many there were."""
    seen: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        alive = pids(wanted) - {os.getpid()}
        if not alive:
            break
        seen |= alive
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return len(seen)
