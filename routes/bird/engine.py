"""Keeps BIRD running with the configuration that is wanted, and never with half of one.

A change is checked by BIRD itself before anything is replaced; one that it refuses changes nothing and is
a fault with its line. A risky change goes back by itself unless it is confirmed: by us, while what worked
before still works. A BIRD that died is started again so that no peer notices; one that hangs is killed first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.lib.errors import NetpolError, NoAnswerError
from netpol.model.net import family_of, format_address
from routes.bird import reply
from routes.bird.control import BirdControl
from routes.bird.daemon import BirdDaemon
from routes.bird.reply import ConfigFault, ProtocolState, Reply, RouteView

_log = structlog.get_logger(__name__)

#: An idle BIRD 2.0.12 may sleep three seconds with an UPDATE to send; any request wakes it.
AWAKE_S, IDLE_S = 0.1, 1.0
#: How often sessions are looked at: what does not converge keeps BIRD awake.
LOOK_S = 2.0
#: A risky change that nobody confirms is undone after this.
RISK_S = 30
#: A configuration may take this long to come into force (sessions that restart do not count).
SETTLE_S = 10.0
#: A BIRD that failed to answer so often in a row is killed.
HANGS_MAX = 3
#: Sessions that are down for longer than this are not waited for: an answer a second does.
AWAKE_MAX_S = 60.0
#: A risky change that broke what worked is not tried again before this, unless it is another one.
AGAIN_S = 600.0
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
    """What status and metrics show."""

    version: str = ""
    running: bool = False
    starts: int = 0
    applies: int = 0
    reverts: int = 0
    error: str = ""
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
        self.status = EngineStatus()
        self._applied: str | None = None
        #: Whether BIRD has said that `_applied` is in force. It has not where an agent died, or an answer
        #: did not come, between the file and BIRD.
        self._sure = False
        self._reverted: tuple[str, float] | None = None
        self._awake = True
        self._moved_s = 0.0
        self._hangs = 0
        self._lock = asyncio.Lock()

    # -- the configuration ------------------------------------------------------------------

    async def prepare(self) -> None:
        """Check the program and make its folder; find a BIRD that a former agent left.

        Raises:
            KernelMissingError: no BIRD, or one that is too old.
        """
        self.status.version = await self._daemon.check()
        self._daemon.prepare()
        if await self._daemon.answers(self.control):
            self._applied = self._read_applied()
            self.status.running = True
            _log.info("found BIRD running", version=self.control.version)

    def _read_applied(self) -> str | None:
        try:
            return self._folder.config.read_text(encoding="utf-8")
        except OSError:
            return None

    async def apply(
        self, text: str, *, healthy: Callable[[], Awaitable[bool]] | None = None
    ) -> bool:
        """Bring a configuration into force; returns whether anything changed.

        Args:
            text: all of it.
            healthy: given for a risky change: whether it may stay, asked until it says yes or RISK_S is
                nearly over. Nobody's yes means that BIRD goes back to what was before.

        Raises:
            RefusedError: BIRD does not take it; the former one is in force.
            NoAnswerError: BIRD cannot be started or asked.
        """
        async with self._lock:
            if text == self._applied and self._sure and self.status.running:
                return False
            risky = healthy is not None and self._applied is not None
            if risky:
                self._not_again(text)
            self._stay_awake()
            self._daemon.write(self._folder.candidate, text)
            if not await self._daemon.answers(self.control):
                await self._not_hanging()
                await self._first(text)
                return True
            self._hangs = 0
            await self._check(text)
            before = self._applied
            if before is not None:
                self._daemon.write(self._folder.last_good, before)
            self._sure = False
            self._folder.candidate.rename(self._folder.config)
            answer = await self.control.ask(f"configure timeout {RISK_S}" if risky else "configure")
            if answer.failed:
                self._go_back(before)
                raise RefusedError(reply.config_fault(answer))
            await self._settle()
            if risky and healthy is not None and not await self._confirmed(healthy):
                self._go_back(before)
                self.status.reverts += 1
                self._reverted = (text, self._clock.monotonic() + AGAIN_S)
                raise _undone()
            self._applied, self._sure, self._reverted = text, True, None
            self.status.applies += 1
            return text != before

    def _not_again(self, text: str) -> None:
        """Trying what broke sessions would break them anew each time: it waits for another change.

        Raises:
            NoAnswerError: this one was undone not long ago.
        """
        if self._reverted is None:
            return
        undone, until_s = self._reverted
        if text == undone and self._clock.monotonic() < until_s:
            raise _undone()

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
        self._folder.candidate.rename(self._folder.config)
        await self._start()
        self._applied, self._sure = text, True
        self.status.applies += 1

    async def _check(self, text: str) -> None:
        answer = await self.control.ask(f'configure check "{self._folder.candidate}"')
        if answer.code != reply.CONFIG_OK:
            fault = reply.config_fault(answer)
            raise RefusedError(fault, _line_of(text, fault.line))

    async def _settle(self) -> None:
        """Wait until BIRD has gone over to a new configuration: protocols may take time to end."""
        for _ in range(round(SETTLE_S / AWAKE_S)):
            answer = await self.control.ask("show status")
            if not any("econfiguration in progress" in line.text for line in answer.lines):
                return
            await self._clock.sleep(AWAKE_S)

    async def _confirmed(self, healthy: Callable[[], Awaitable[bool]]) -> bool:
        """Confirm a change while it is healthy; undo it otherwise."""
        for _ in range(round((RISK_S - 5) / 0.5)):
            if await healthy():
                return not (await self.control.ask("configure confirm")).failed
            await self._clock.sleep(0.5)
        await self.control.ask("configure undo")
        await self._settle()
        return False

    def _go_back(self, before: str | None) -> None:
        """The file must be what is in force, since the next start reads it."""
        if before is not None:
            self._daemon.write(self._folder.candidate, before)
            self._folder.candidate.rename(self._folder.config)

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
        answer: Reply = await self.control.ask("show protocols all")
        return reply.protocols(answer)

    async def routes(self, address: bytes | None = None) -> tuple[RouteView, ...]:
        """All routes of the tables that the kernel gets; or those for one address."""
        command = "show route"
        if address is not None:
            family = family_of(address).value
            command = f"show route table master{family} for {format_address(address)}"
        return reply.routes(await self.control.ask(command))

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
        return ""

    async def close(self) -> None:
        """Let go of it; it runs on."""
        await self.control.close()


def _undone() -> NoAnswerError:
    return NoAnswerError(
        "a change of routes",
        needed="sessions and routes that worked before to go on",
        got="they did not: it was undone",
    )


def _line_of(text: str, number: int) -> str:
    """A line of a configuration for a message, without what is secret in it."""
    lines = text.splitlines()
    if not 0 < number <= len(lines):
        return ""
    line = lines[number - 1].strip()
    return "a line with a password" if "password" in line else line[:200]
