"""Network namespaces: make, remove, and run code inside one.

A namespace belongs to a thread, so code that must run inside another one gets a thread of its own,
which ends with it: a thread that came back would hide every mistake in coming back. Sockets and
child processes that the code makes stay in the namespace.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from netpol.lib.errors import KernelError, NoAnswerError

T = TypeVar("T")

#: Where iproute2 keeps the named ones (NETNS_RUN_DIR).
NETNS_DIR = Path("/run/netns")
#: From linux/sched.h; os.setns exists only from Python 3.12 on.
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def path_of(name_or_path: str) -> Path:
    """The file that stands for a namespace: a path as it is, a name under /run/netns."""
    return Path(name_or_path) if "/" in name_or_path else NETNS_DIR / name_or_path


def exists(name: str) -> bool:
    """Whether there is a namespace of this name."""
    return path_of(name).exists()


def create(name: str) -> None:
    """Create a named namespace with its loopback up."""
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")


def delete(name: str) -> None:
    """Delete a named namespace; not an error where there is none."""
    if exists(name):
        _ip("netns", "delete", name)


def enter(name_or_path: str) -> None:
    """Move the calling thread into a namespace, for the rest of its life.

    Only for threads made for this, and for a process that has one thread.
    """
    path = path_of(name_or_path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise KernelError("no such network namespace", got=str(path)) from e
    try:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            if code == 1:
                raise NoAnswerError("entering a network namespace", needed="root")
            raise KernelError(f"entering namespace {path}", got=os.strerror(code))
    finally:
        os.close(fd)


def in_netns(name_or_path: str, fn: Callable[[], T]) -> T:
    """Run a function in a thread inside a namespace and hand back what it returns or raises."""
    return _in_thread(lambda: enter(name_or_path), fn)


def in_new_netns(fn: Callable[[], T]) -> T:
    """Run a function in a thread inside a namespace made for it.

    The namespace has no name, and is gone when the thread, its sockets and its programs are.
    """

    def unshare() -> None:
        if _libc.unshare(CLONE_NEWNET) != 0:
            raise NoAnswerError(
                "making a network namespace", needed="root", got=os.strerror(ctypes.get_errno())
            )

    return _in_thread(unshare, fn)


def _in_thread(first: Callable[[], None], fn: Callable[[], T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            first()
            results.append(fn())
        except BaseException as e:  # noqa: BLE001 - handed to the caller below
            failures.append(e)

    thread = threading.Thread(target=body, name="netpol-netns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def open_socket(
    name_or_path: str, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0
) -> socket.socket:
    """Open a socket that lives in a namespace; the caller closes it."""
    return in_netns(name_or_path, lambda: socket.socket(family, kind, proto))


def _ip(*args: str) -> None:
    """Run ip(8)."""
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        text = done.stderr.strip()
        if "Operation not permitted" in text or "Permission denied" in text:
            raise NoAnswerError(f"ip {' '.join(args)}", needed="root", got=text)
        raise KernelError(f"ip {' '.join(args)}", got=text)
