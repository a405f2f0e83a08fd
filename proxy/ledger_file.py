"""The ledger's file: read at start, then a line is added before the kernel is told, never after.

Lines are appended, so that a Service more costs a line and not all Services. When more lines than servers
are in the file it is written anew beside itself and put in its place in one step. No fsync: the folder is
on a file system that the next boot finds empty, like the kernel's table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from netpol.lib.errors import NetpolError
from netpol.model.ipvs import ServerId
from proxy.ledger import Ledger, Word, changes, parse, text
from proxy.marks import MarkKey

#: Below this many bytes the file is not written anew: it is small however much of it is of the past.
COMPACT_BYTES = 1 << 18


class LedgerError(NetpolError):
    """The ledger cannot be written; the kernel is then not told either."""


class LedgerFile:
    """What is ours, in memory and on disk. Not thread-safe.

    Attributes:
        ledger: what is known now.
        fault: why a former agent's ledger is not believed, or "".
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._size = self._size_when_new = 0
        self.ledger = Ledger()
        self.fault = ""

    def load(self) -> None:
        """Read what a former agent left, and begin a file of our own with it.

        Raises:
            LedgerError: the file cannot be written.
        """
        try:
            self.ledger = parse(self._path.read_bytes())
        except FileNotFoundError:
            self.ledger = Ledger()
        except (OSError, ValueError) as e:
            self.ledger = Ledger()
            self.fault = f"{self._path}: {e}; only servers on our own link count as ours"
        self._rewrite()

    def say(self, facts: Iterable[tuple[Word, ServerId, MarkKey | None]]) -> None:
        """Write facts down; what is known already costs nothing.

        Raises:
            LedgerError: they are not on disk, and must not be acted on.
        """
        lines = changes(self.ledger, facts)
        if not lines and self._file is not None:
            return
        try:
            if self._file is None or self._size + len(lines) > max(
                COMPACT_BYTES, 2 * self._size_when_new
            ):
                self._rewrite()
                return
            self._file.write(lines)
            self._file.flush()
            self._size += len(lines)
        except OSError as e:
            self._forget_file()
            raise LedgerError(f"writing {self._path}", got=e.strerror or str(e)) from e

    def _rewrite(self) -> None:
        beside = self._path.with_name(f"{self._path.name}.new")
        data = text(self.ledger)
        self._forget_file()
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(
                beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
            )
            self._file = os.fdopen(descriptor, "wb")
            self._file.write(data)
            self._file.flush()
            beside.replace(self._path)
        except OSError as e:
            self._forget_file()
            raise LedgerError(f"writing {self._path}", got=e.strerror or str(e)) from e
        self._size = self._size_when_new = len(data)

    def _forget_file(self) -> None:
        """The next facts make the file anew: what is in it now may be half a line."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def close(self) -> None:
        """Release the file; it stays."""
        self._forget_file()
