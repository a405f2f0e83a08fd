"""Keeps BIRD running with the configuration that is wanted, and never with half of one.

A change is checked by BIRD itself before anything is replaced; one that it refuses changes nothing and is
a fault with its line. A change on trial goes back by itself unless it is confirmed, also when the agent dies
meanwhile. A BIRD that died is started again so that no peer notices; one that hangs is killed first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.lib.errors import NetpolError, NoAnswerError
from netpol.model.net import FAMILIES, family_of, format_address
from routes.bird import reply
from routes.bird.control import BirdControl
from routes.bird.daemon import BirdDaemon, check_version
from routes.bird.reply import ConfigFault, ProtocolState, Reply, RouteView

_log = structlog.get_logger(__name__)

#: An idle BIRD 2.0.12 may sleep three seconds with an UPDATE to send; any request wakes it.
AWAKE_S, IDLE_S = 0.05, 1.0
#: How often sessions are looked at: what does not converge keeps BIRD awake.
LOOK_S = 2.0
#: A configuration may take this long to come into force (sessions that restart do not count).
SETTLE_S = 10.0
#: A BIRD that failed to answer so often in a row is killed.
HANGS_MAX = 3
#: Sessions that are down for longer than this are not waited for: an answer a second does.
AWAKE_MAX_S = 60.0
#: How often other BIRDs of the node are looked for: it means reading /proc.
OTHERS_S = 30.0
#: Pauses between attempts to start it.
RESTART_S, RESTART_MAX_S = 0.5, 15.0


class RefusedError(NetpolError):
    """BIRD refuses a configuration; what was in force stays."""

    def __init__(self, fault: ConfigFault, line: str = "") -> None:
        where = f"line {fault.line}: " if fault.line else ""
        super().__init__(f"BIRD refuses the configuration: {where}{fault.what}", got=line)
        self.fault = fault


@dataclass(slots=True)
class EngineStatus:
    """What status and metrics show; `beside` names other BIRDs of the node, with which ours works for now."""

    version: str = ""
    running: bool = False
    starts: int = 0
    applies: int = 0
    error: str = ""
    beside: str = ""
    sessions: int = 0
    established: int = 0


class BirdEngine:
    """One BIRD of one node."""

    def __init__(
        self,
        daemon: BirdDaemon,
        *,
        has_routes: Callable[[], Awaitable[bool]],
        clock: Clock | None = None,
    ) -> None:
        """Args: has_routes: whether the kernel holds routes of a BIRD that ran before (this boot)."""
        self._daemon, self._has_routes = daemon, has_routes
        self._folder = daemon.folder
        self._clock = clock or SystemClock()
        self.control = BirdControl(daemon.folder.socket)
        #: For what people ask, whose answers may be long: nothing that is to be told waits for them.
        self._reading = BirdControl(daemon.folder.socket)
        self.status = EngineStatus()
        self._applied: str | None = None
        #: Whether BIRD has said that `_applied` is in force. It has not where an agent died, or an answer
        #: did not come, between the file and BIRD.
        self._sure = False
        self._prepared = False
        self._others_at_s: float | None = None
        self._awake = True
        self._moved_s = 0.0
        self._hangs = 0
        self._lock = asyncio.Lock()

    # -- the configuration ------------------------------------------------------------------

    async def prepare(self) -> None:
        """Check the program and make its folder; find a BIRD that a former agent left.

        Raises:
            KernelMissingError: no BIRD, or one that is too old.
            KernelError: its folder cannot be made.
        """
        self.status.version = await self._daemon.check()
        self._daemon.prepare()
        if await self._daemon.answers(self.control):
            check_version(self.control.version, what="the BIRD that runs")
            self._applied = self._read_applied()
            self.status.running = True
            _log.info("found BIRD running", version=self.control.version)
        self._prepared = True

    def _read_applied(self) -> str | None:
        try:
            return self._folder.config.read_text(encoding="utf-8")
        except OSError:
            return None

    async def apply(self, text: str, *, undo_s: int = 0) -> bool:
        """Bring a configuration into force; returns whether anything changed.

        One that waits to be confirmed is superseded: nothing is undone by BIRD then.

        Args:
            text: all of it.
            undo_s: BIRD goes back to what was before after so many seconds, unless it is confirmed.

        Raises:
            RefusedError: BIRD does not take it; the former one is in force.
            NoAnswerError: BIRD cannot be started or asked.
            KernelError: there is no BIRD that can be used, or its files cannot be written.
        """
        async with self._lock:
            if not self._prepared:
                await self.prepare()
            if text == self._applied and self._sure and self.status.running:
                return False
            self._stay_awake()
            self._daemon.write(self._folder.candidate, text)
            if not await self._daemon.answers(self.control):
                await self._not_hanging()
                await self._first(text)
                return True
            self._hangs = 0
            await self._check(text)
            before = self._applied
            self._sure = False
            self._daemon.install()
            answer = await self.control.ask(
                f"configure timeout {undo_s}" if undo_s and before is not None else "configure"
            )
            if answer.failed:
                self._go_back(before)
                raise RefusedError(reply.config_fault(answer))
            self._applied, self._sure = text, True
            self.status.applies += 1
            return text != before

    async def confirm(self) -> None:
        """Have what is on trial stay."""
        async with self._lock:
            await self.control.ask("configure confirm")

    def doubt(self) -> None:
        """BIRD may have gone back to what was before: the next `apply` makes sure."""
        self._sure = False

    async def rescan(self) -> None:
        """Have BIRD compare its routes with the kernel's at once, and put back what is missing."""
        async with self._lock:
            for family in FAMILIES:
                await self.control.ask(f"reload in k_kernel{family.value}")

    async def _not_hanging(self) -> None:
        """No BIRD can be started beside one that hangs: kill it, after giving it some time.

        Raises:
            NoAnswerError: it has some time left.
        """
        if self._daemon.running() is None:
            return
        self._hangs += 1
        if self._hangs < HANGS_MAX:
            raise NoAnswerError("BIRD", needed="an answer", got="none, though it runs")
        _log.error("BIRD hangs, killing it")
        await self._daemon.kill()

    async def _first(self, text: str) -> None:
        """No BIRD runs: check the file without one, and start it."""
        fault = await self._daemon.parse(self._folder.candidate)
        if fault is not None:
            raise RefusedError(fault, _line_of(text, fault.line))
        self._sure = False
        self._daemon.install()
        await self._start()
        self._applied, self._sure = text, True
        self.status.applies += 1

    async def _check(self, text: str) -> None:
        answer = await self.control.ask(f'configure check "{self._folder.candidate}"')
        if answer.code != reply.CONFIG_OK:
            fault = reply.config_fault(answer)
            raise RefusedError(fault, _line_of(text, fault.line))

    async def settle(self) -> None:
        """Wait until BIRD has gone over to a new configuration: protocols may take time to end."""
        for _ in range(round(SETTLE_S / AWAKE_S)):
            answer = await self.control.ask("show status")
            if not any("econfiguration in progress" in line.text for line in answer.lines):
                return
            await self._clock.sleep(AWAKE_S)

    def _go_back(self, before: str | None) -> None:
        """The file must be what is in force, since the next start reads it."""
        if before is not None:
            self._daemon.write(self._folder.candidate, before)
            self._daemon.install()

    # -- the process ------------------------------------------------------------------------

    async def _start(self) -> None:
        await self.control.close()
        await self._daemon.start(self.control, recover=await self._has_routes())
        self.status.running, self.status.starts = True, self._daemon.starts
        self._hangs = 0
        self._stay_awake()

    def _stay_awake(self) -> None:
        """Something converges from now on."""
        self._awake, self._moved_s = True, self._clock.monotonic()

    async def run(self) -> None:
        """Keep it running and awake until cancelled. It goes on when this ends."""
        pause_s = RESTART_S
        looked_s = 0.0
        while True:
            await self._clock.sleep(AWAKE_S if self._awake else IDLE_S)
            if self._applied is None:
                continue
            try:
                async with self._lock:
                    now_s = self._clock.monotonic()
                    if now_s - looked_s >= LOOK_S:
                        looked_s = now_s
                        self._tell(await self._look())
                    else:
                        await self.control.ask("show status")
                self._hangs, pause_s = 0, RESTART_S
                self.status.running = True
            except NoAnswerError as e:
                self._tell(str(e))
                await self._revive()
                await self._clock.sleep(pause_s)
                pause_s = min(pause_s * 2, RESTART_MAX_S)

    async def _revive(self) -> None:
        """Start a BIRD that died; kill one that hangs first."""
        async with self._lock:
            self._hangs += 1
            if self._daemon.running() is not None:
                if self._hangs < HANGS_MAX:
                    return
                _log.error("BIRD hangs, killing it")
                await self._daemon.kill()
            self.status.running = False
            try:
                await self._start()
            except NetpolError as e:
                self._tell(str(e))

    def _tell(self, error: str) -> None:
        if error and error != self.status.error:
            _log.error("BIRD", error=error)
        self.status.error = error

    async def protocols(self) -> dict[str, ProtocolState]:
        """All protocols, as they are now."""
        answer: Reply = await self._reading.ask("show protocols all")
        return reply.protocols(answer)

    async def sessions(self) -> dict[str, bool]:
        """All BGP sessions, and whether each is up."""
        states = reply.protocols(await self._reading.ask("show protocols"))
        return {n: p.established for n, p in states.items() if p.kind == "BGP"}

    async def routes(self, address: bytes | None = None) -> tuple[RouteView, ...]:
        """All routes of the tables that the kernel gets; or those of BGP that hold one address."""
        command = "show route"
        if address is not None:
            family = family_of(address).value
            told = f"source = RTS_BGP && {format_address(address)} ~ net"
            command = f"show route table master{family} where {told}"
        return reply.routes(await self._reading.ask(command))

    async def _look(self) -> str:
        """Count sessions; what is wrong with all of them, or ""."""
        # Not `all`: with a thousand sessions that is megabytes.
        states = reply.protocols(await self.control.ask("show protocols"))
        sessions = [p for p in states.values() if p.kind == "BGP"]
        now_s, up = self._clock.monotonic(), reply.established(sessions)
        if (up, len(sessions)) != (self.status.established, self.status.sessions):
            self._moved_s = now_s
        self.status.sessions, self.status.established = len(sessions), up
        self._awake = up < len(sessions) and now_s - self._moved_s < AWAKE_MAX_S
        if any(p.state == "down" and "No listening socket" in p.error for p in sessions):
            # BIRD never tries again by itself, even when the port is free.
            await self.control.ask("configure")
            return "the port of BGP is taken by another program: no sessions"
        if self._others_at_s is None or now_s - self._others_at_s >= OTHERS_S:
            self._others_at_s = now_s
            pids = await asyncio.to_thread(self._daemon.others)
            self.status.beside = _other_birds(pids) if pids else ""
        return ""

    async def close(self) -> None:
        """Let go of it; it runs on."""
        await self.control.close()
        await self._reading.close()


def _other_birds(pids: list[int]) -> str:
    which = ", ".join(map(str, pids))
    return (
        f"another BIRD runs in this network (process {which}): each takes the other's routes away"
    )


def _line_of(text: str, number: int) -> str:
    """A line of a configuration for a message, without what is secret in it."""
    lines = text.splitlines()
    if not 0 < number <= len(lines):
        return ""
    line = lines[number - 1].strip()
    return "a line with a password" if "password" in line else line[:200]
