"""Where audit lines go: a file that can be reopened, or standard output; never waits for either.

Owns one thread that writes and a bounded backlog before it: a full disk or a stuck pipe loses lines,
which are counted, and holds up nobody.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

#: Text that may wait for the writer; at 500 bytes a line over 30,000 lines.
BACKLOG_BYTES = 16 << 20
#: How long `close` waits for what is still to be written.
CLOSE_S = 2.0


class LineSink:
    """Appends lines to `path`, or to standard output if it is None.

    Attributes:
        lost: lines that could not be written or did not fit into the backlog.
        written: lines written.
    """

    def __init__(self, path: Path | None, *, backlog_bytes: int = BACKLOG_BYTES) -> None:
        self.lost = self.written = 0
        self._path, self._backlog_bytes = path, backlog_bytes
        self._chunks: deque[tuple[bytes, int]] = deque()
        self._waiting_bytes = 0
        self._reopen = self._closing = False
        self._change = threading.Condition()
        self._fd = self._open()
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    def _open(self) -> int:
        """Open the file; the caller sees the OSError of the first time, later ones are logged."""
        if self._path is None:
            return os.dup(1)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(self._path, flags, 0o640)

    def write(self, chunk: bytes, lines: int) -> bool:
        """Hand over whole lines; False (and counted) when the writer is too far behind."""
        with self._change:
            if self._closing or self._waiting_bytes + len(chunk) > self._backlog_bytes:
                self.lost += lines
                return False
            self._chunks.append((chunk, lines))
            self._waiting_bytes += len(chunk)
            self._change.notify()
        return True

    def reopen(self) -> None:
        """Open the path anew before the next write: after a rotation the old file is left alone."""
        with self._change:
            self._reopen = True
            self._change.notify()

    def close(self) -> None:
        """Write what waits, for a bounded time, and stop."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._chunks or self._reopen or self._closing):
                    self._change.wait()
                if not self._chunks and self._closing:
                    break
                reopen, self._reopen = self._reopen, False
                chunk, lines = self._chunks.popleft() if self._chunks else (b"", 0)
            if reopen:
                self._renew()
            if chunk:
                self._write_all(chunk, lines)
                with self._change:
                    self._waiting_bytes -= len(chunk)
        os.close(self._fd)

    def _renew(self) -> None:
        try:
            fd = self._open()
        except OSError as e:
            _log.warning("audit_reopen_failed", path=str(self._path), error=str(e))
            return
        os.close(self._fd)
        self._fd = fd

    def _write_all(self, chunk: bytes, lines: int) -> None:
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as e:
            rest = bytes(view).count(b"\n")
            self.lost += rest
            self.written += lines - rest
            _log.warning("audit_write_failed", path=str(self._path), error=str(e), lines=rest)
        else:
            self.written += lines
