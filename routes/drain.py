"""A node that is being drained: routers outside are asked to take other ways, then addresses are taken back.

A file says that it is, since when, so that a restart of the agent neither ends it nor begins it anew.
"""

from __future__ import annotations

from pathlib import Path

from netpol.aio.clock import Clock

#: Routers outside get this long to take other ways, before addresses of Services are withdrawn.
DRAIN_S = 30.0


class Drain:
    """Whether this node is drained, and how far it is."""

    def __init__(self, file: Path, clock: Clock) -> None:
        self._file, self._clock = file, clock
        self._until_s: float | None = None
        self._told = False
        try:
            lasted_s = max(0.0, clock.wall() - file.stat().st_mtime)
        except OSError:
            return
        self._until_s = clock.monotonic() + DRAIN_S - lasted_s

    @property
    def on(self) -> bool:
        """Whether routers outside are asked to leave this node alone."""
        return self._until_s is not None

    @property
    def withdrawn(self) -> bool:
        """Whether it lasts so long that addresses of Services are no longer announced."""
        return self._until_s is not None and self._clock.monotonic() >= self._until_s

    def turn(self, *, on: bool) -> None:
        """Begin or end it."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if on:
            self._file.touch()
        else:
            self._file.unlink(missing_ok=True)
        self._until_s = self._clock.monotonic() + DRAIN_S if on else None
        self._told = False

    def comes_due(self) -> bool:
        """Whether the moment has come to take addresses back; once for each drain."""
        due = self.withdrawn and not self._told
        self._told = self._told or due
        return due
