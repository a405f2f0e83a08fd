"""The CNI configuration file of the node, replaced as a whole. What is in it: `routes.conflist`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from netpol.kernel.conflist import first_file
from netpol.lib.errors import KernelError
from netpol.model.net import Prefix
from routes import conflist


def keep_conflist(folder: Path, pod_cidrs: Sequence[Prefix], *, mtu: int) -> bool:
    """Have the podCIDRs in the node's conflist; returns whether it was written.

    A container runtime sees the old file or the new one, never a part.

    Raises:
        InputError: what stands there is no conflist.
        KernelError: it cannot be read or written.
    """
    path = folder / conflist.FILE_NAME
    try:
        try:
            before: str | None = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            before = None
        have = None if before is None else conflist.parse(before, where=str(path))
        after = conflist.inject(have, pod_cidrs, mtu=mtu)
        if after == have:
            return False
        _replace(path, conflist.text_of(after))
    except UnicodeDecodeError as e:
        raise KernelError(str(path), needed="a CNI configuration list", got="no text") from e
    except OSError as e:
        raise KernelError(str(path), got=e.strerror or str(e)) from e
    return True


def beaten(folder: Path) -> str:
    """Why container runtimes do not read the node's conflist: another file comes first; else ""."""
    try:
        first = first_file(folder)
    except OSError:
        return ""
    if first is None or first.name >= conflist.FILE_NAME:
        return ""
    return f"{first} comes before {conflist.FILE_NAME}: pods are made by what it says"


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no runtime takes for a configuration; what a killed agent left there is overwritten.
    beside = path.with_name(f".{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(beside, flags, 0o644)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
