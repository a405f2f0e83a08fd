"""Sends the probe's packets and collects what comes back; one thread, one epoll for everything.

Owns rounds, time-outs and source ports; `probewire` owns the sockets of one source and the witnesses at
the destinations. All cells of a window are in flight at the same time; one window is as many pairs as
the neighbour table and the open files allow. What stays silent is sent again from a new source port, and
as long as a repeat still finds answers (the machine is busy) there is another round, before silence is
called a deny. How long silence must last follows from the slowest answer seen, and time that the
machine did not give us does not count.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import select
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from netpol.kernel import netns
from netpol.lab import neighbours, netsock
from netpol.lab.probesource import Source
from netpol.lab.probewire import Shot, Wires
from netpol.lib.errors import KernelError
from netpol.model.flow import Verdict
from netpol.model.ids import Protocol
from netpol.model.net import family_of, format_address

#: Below the ephemeral range (32768) and the NodePorts (30000), above most servers.
SOURCE_PORT_FIRST, SOURCE_PORT_LAST = 10240, 29999
#: Ports that a process reserves at a time.
_BLOCK_PORTS = 32

#: At most this many packets leave before answers are read, so that no receive buffer overflows.
BATCH = 128
#: Files kept free for everything that is not a TCP probe.
RESERVED_FILES = 2048
#: Wanted limit of open files: TCP needs one a probe.
WANTED_FILES = 65536
#: Rounds: the first, one repeat, and more only while repeats still find answers.
ROUNDS_MIN, ROUNDS_MAX = 2, 5
#: One wait, and the most that one turn of the loop counts as silence.
TICK_S = 0.02
#: Silence that ends the first round and the repeats, at least.
SILENCE_MIN_S = (0.06, 0.1)
#: The same, as a multiple of the slowest answer seen.
PATIENCE = (8, 16)
SILENCE_MAX_S = 3.0
#: Windows of a run that lost packets to a full neighbour table are tried again this often.
WINDOW_TRIES = 4


class End(NamedTuple):
    """A source and destination: name for messages, namespace (None: unreachable for us), addresses."""

    name: str
    netns: str | None
    addresses: tuple[bytes, ...]


class Outcome(NamedTuple):
    """What a run found: verdicts by (source, destination, port), and how it went."""

    verdicts: dict[tuple[int, int, tuple[Protocol, int]], Verdict]
    packets: int
    duration_s: float
    faults: tuple[str, ...]


class SourcePorts:
    """Hands out source ports, each once until the range is used up, across all runs on this machine.

    Nothing that conntrack still remembers of an earlier run can then match a packet of this one: a run
    takes some dozens, so the range lasts for hundreds of runs. The place of the next port is kept in a
    file; a random start alone would meet an old flow now and then, and report it as allowed.

    Args:
        file: where the next port is kept; None starts at random (a process that probes for itself).
    """

    def __init__(self, file: Path | None = None) -> None:
        self._size = SOURCE_PORT_LAST - SOURCE_PORT_FIRST + 1
        self._file = file
        self._next = random.SystemRandom().randrange(self._size)
        self._left = 0
        self._lock = threading.Lock()

    def take(self, avoid: frozenset[int]) -> int:
        """The next port that is not among those probed, where a server may sit."""
        with self._lock:
            while True:
                if not self._left:
                    self._reserve()
                self._left -= 1
                self._next = (self._next + 1) % self._size
                port = SOURCE_PORT_FIRST + self._next
                if port not in avoid:
                    return port

    def _reserve(self) -> None:
        """Take a block of ports for this process, so that the file is touched once for many."""
        self._left = _BLOCK_PORTS
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a+", encoding="ascii") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            text = f.read().strip()
            if text.isdigit():
                self._next = int(text) % self._size
            f.truncate(0)
            f.write(str((self._next + _BLOCK_PORTS) % self._size))


class Engine:
    """One run. `plan` cells, then `run` once on a thread that may change its namespace."""

    def __init__(self, *, ends: Sequence[End], source_ports: SourcePorts, timeout_s: float) -> None:
        self._ends = ends
        self._source_ports = source_ports
        self._timeout_s = timeout_s
        self._shots: dict[tuple[int, bytes, tuple[Protocol, int]], Shot] = {}
        self._slowest_s = 0.0
        self._wires = Wires(select.epoll())

    def plan(
        self, *, source: int, destination: int, address: bytes, port: tuple[Protocol, int]
    ) -> None:
        """Add a cell; cells that are the same packet (two pods on one host's network) share it."""
        shot = self._shots.setdefault(
            (source, address, port),
            Shot(source, address, format_address(address), port[0], port[1]),
        )
        shot.destinations.append(destination)

    def run(self) -> Outcome:
        """Send everything and judge.

        Raises:
            KernelError: a namespace cannot be entered, or raw sockets are refused.
        """
        start = time.monotonic()
        limit = netsock.raise_file_limit(WANTED_FILES)
        try:
            self._place_witnesses()
            tcp_max = max(BATCH, (limit - RESERVED_FILES) // ROUNDS_MAX)
            for window in self._windows(neighbours.BUDGET // 2, tcp_max):
                self._judge_window(window)
        finally:
            self._wires.close()
        silent = {(s.source, s.text) for s in self._shots.values() if s.verdict is None}
        return Outcome(
            verdicts={
                (s.source, d, (s.protocol, s.port)): s.verdict or Verdict.DENY
                for s in self._shots.values()
                for d in s.destinations
            },
            packets=self._wires.packets,
            duration_s=time.monotonic() - start,
            faults=tuple(
                f"{self._ends[source].name} to {text}: {os.strerror(code)}"
                for source, text, code in sorted(self._wires.faults)
                if (source, text) in silent
            ),
        )

    def _place_witnesses(self) -> None:
        """Put raw sockets into every namespace that takes part, for the families that are judged."""
        families = {family_of(s.address) for s in self._shots.values()}
        protocols = {s.protocol for s in self._shots.values()}
        spaces: dict[tuple[int, int], list[End]] = {}
        for end in self._ends:
            if end.netns is not None:
                spaces.setdefault(netsock.netns_id(end.netns), []).append(end)
        for ends in spaces.values():
            path = str(ends[0].netns)
            netns.enter(path)
            addresses = [address for end in ends for address in end.addresses]
            for family, protocol in itertools.product(families, protocols):
                mine = [address for address in addresses if family_of(address) is family]
                try:
                    self._wires.add_witness(protocol, family, mine)
                except OSError as e:
                    raise KernelError(
                        f"cannot open a raw {protocol} socket in {path}",
                        needed="CAP_NET_RAW there",
                        got=os.strerror(e.errno or 0),
                    ) from e

    def _windows(self, pairs_max: int, tcp_max: int) -> Iterator[list[Shot]]:
        """Split the cells so that few pairs and few connections are in use at a time.

        Both directions of a pair share its two neighbour entries, so they go together.
        """
        pairs: dict[tuple[int, int], list[Shot]] = {}
        for shot in self._shots.values():
            ends = shot.source, shot.destinations[0]
            pairs.setdefault((min(ends), max(ends)), []).append(shot)
        window: list[Shot] = []
        count = tcp = 0
        for shots in pairs.values():
            more = sum(s.protocol is Protocol.TCP for s in shots)
            if window and (count >= pairs_max or tcp + more > tcp_max):
                yield window
                window, count, tcp = [], 0, 0
            window += shots
            count += 1
            tcp += more
        if window:
            yield window

    def _judge_window(self, shots: list[Shot]) -> None:
        """Judge cells; silence while the neighbour table overflowed proves nothing and is asked again."""
        pending = shots
        for number in range(WINDOW_TRIES):
            before = neighbours.overflows()
            step = max(1, len(pending) >> number)
            for at in range(0, len(pending), step):
                part = pending[at : at + step]
                self._judge(part)
                if number or len(shots) > BATCH:
                    self._forget_neighbours(part)
            pending = [s for s in pending if s.verdict is None]
            if not pending or neighbours.overflows() == before:
                return

    def _forget_neighbours(self, shots: list[Shot]) -> None:
        """Make room in the neighbour table for the next window."""
        ends = {s.source for s in shots} | {s.destinations[0] for s in shots}
        for path in {end.netns for end in (self._ends[i] for i in ends) if end.netns is not None}:
            netns.enter(path)
            neighbours.forget_learned()

    def _judge(self, shots: list[Shot]) -> None:
        """Rounds over one window of cells, until all answered or repeats find nothing more."""
        pending = shots
        for number in range(ROUNDS_MAX):
            before = len(pending)
            for source, mine in _by_source(pending):
                self._send(source, mine)
            self._wait(pending, self._silence_s(number))
            pending = [s for s in pending if s.verdict is None]
            if not pending or (number + 1 >= ROUNDS_MIN and len(pending) == before):
                break
        self._wires.end_window()

    def _silence_s(self, number: int) -> float:
        """How long nothing must come before a round is over."""
        if not self._slowest_s:  # not one answer yet: nothing is known about this machine
            return self._timeout_s
        stage = min(number, 1)
        return min(max(SILENCE_MIN_S[stage], PATIENCE[stage] * self._slowest_s), SILENCE_MAX_S)

    def _send(self, index: int, shots: list[Shot]) -> None:
        end = self._ends[index]
        if end.netns is None:
            raise KernelError(f"{end.name} cannot send", needed="a network namespace", got="none")
        netns.enter(end.netns)
        avoid = frozenset(s.port for s in shots)
        source = Source(
            wires=self._wires,
            addresses={family_of(a): a for a in reversed(end.addresses)},
            take_port=lambda: self._source_ports.take(avoid),
        )
        for at in range(0, len(shots), BATCH):
            for shot in shots[at : at + BATCH]:
                source.send(shot, time.monotonic())
            self._drain(0)

    def _drain(self, timeout_s: float) -> int:
        """Read what has arrived; returns how many sockets had something."""
        events = self._wires.epoll.poll(timeout_s)
        now = time.monotonic()
        for fd, _ in events:
            for shot in self._wires.read(fd):
                self._slowest_s = max(self._slowest_s, now - shot.sent_at)
        return len(events)

    def _wait(self, shots: list[Shot], timeout_s: float) -> None:
        """Wait for the rest of a round; a turn counts as silence only if nothing came in it."""
        silent_s = 0.0
        while any(s.verdict is None for s in shots):
            began = time.monotonic()
            if self._drain(TICK_S) == 0:
                silent_s += min(time.monotonic() - began, TICK_S)
                if silent_s >= timeout_s:
                    return


def _by_source(shots: Sequence[Shot]) -> Iterator[tuple[int, list[Shot]]]:
    groups: dict[int, list[Shot]] = {}
    for shot in shots:
        groups.setdefault(shot.source, []).append(shot)
    yield from groups.items()
