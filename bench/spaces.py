"""Network namespaces of a run: made, named after the process, and always removed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from netpol.kernel import netns

PREFIX = "knpb"


def name(role: str) -> str:
    """The name of a namespace of this process."""
    return f"{PREFIX}-{role}-{os.getpid()}"


@contextlib.contextmanager
def spaces(*roles: str) -> Iterator[list[str]]:
    """Fresh namespaces for some roles."""
    made: list[str] = []
    try:
        for role in roles:
            netns.create(name(role))
            made.append(name(role))
        yield made
    finally:
        for each in made:
            netns.delete(each)


@contextlib.contextmanager
def own_lock() -> Iterator[None]:
    """An xtables lock of our own: the machine's is shared with whoever else runs iptables."""
    with tempfile.TemporaryDirectory(prefix="netpol-bench-") as folder:
        os.environ["XTABLES_LOCKFILE"] = str(Path(folder) / "xtables.lock")
        yield
