"""BIRD as a process: its folder, starting it, finding one that runs, ending one that hangs.

It is nobody's child: it puts itself in the background, with no pipe of ours that could fill, and goes on when
the agent ends; the next agent finds it by its socket. What it is told is `routes.bird.engine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pwd
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import structlog

from netpol.lib.errors import KernelError, KernelMissingError, NoAnswerError
from routes.bird.control import BirdControl
from routes.bird.reply import ConfigFault

_log = structlog.get_logger(__name__)

#: The first version that all of the configuration was tried with.
VERSION_MIN = (2, 0, 12)
_VERSION = re.compile(r"BIRD (?:version )?(\d+)\.(\d+)(?:\.(\d+))?")
#: Reading the configuration and answering takes BIRD milliseconds; a machine under load more.
START_S = 10.0
_TRY_S = 0.02
_START_TRIES = round(START_S / _TRY_S)
#: A killed process that is no child of ours is gone when /proc says so.
_DEATH_TRIES = round(5.0 / _TRY_S)
#: BIRD 2, and the two programs of BIRD 1.
_COMMS = ("bird", "bird6")
_FAULT = re.compile(r"^bird: .*?:(?P<line>\d+):(?P<column>\d+) (?P<what>.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Folder:
    """Where BIRD's files are; on a file system that is empty after a reboot."""

    path: Path

    @property
    def config(self) -> Path:
        """What BIRD reads."""
        return self.path / "bird.conf"

    @property
    def candidate(self) -> Path:
        """What is being checked."""
        return self.path / "bird.conf.tmp"

    @property
    def old_log(self) -> Path:
        """What BIRD logged before it began a new file."""
        return self.path / "bird.log.1"

    @property
    def socket(self) -> Path:
        """BIRD's control socket."""
        return self.path / "bird.ctl"

    @property
    def pid(self) -> Path:
        """BIRD's process number."""
        return self.path / "bird.pid"


def command(binary: str, folder: Folder, *, user: str, recover: bool) -> list[str]:
    """BIRD's command line: in the background, as its own user.

    Args:
        binary: the program.
        folder: where its files are.
        user: whom it runs as.
        recover: whether it takes over routes that a former one left in the kernel (-R). Without any, it
            would wait for peers before it announced anything.
    """
    return [
        binary,
        *("-u", user, "-g", user),
        *("-c", str(folder.config), "-s", str(folder.socket), "-P", str(folder.pid)),
        *(["-R"] if recover else []),
    ]


def check_version(said: str, *, what: str) -> str:
    """The version in what BIRD says of itself.

    Raises:
        KernelMissingError: it says none, or one that is too old.
    """
    found = _VERSION.search(said)
    if found is None:
        raise KernelMissingError(what, needed="BIRD 2", got=said.strip()[:100] or "nothing")
    if tuple(int(part or 0) for part in found.groups()) < VERSION_MIN:
        wanted = ".".join(map(str, VERSION_MIN))
        raise KernelMissingError(what, needed=f"BIRD {wanted} or later", got=found[0])
    return found[0]


def _words_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


class BirdDaemon:
    """Starts and ends BIRD in the calling process's network namespace.

    Args:
        external: somebody else starts it (`routes.bird.sidecar`): it is waited for, and never killed.
    """

    def __init__(
        self, folder: Folder, *, binary: str = "bird", user: str = "bird", external: bool = False
    ) -> None:
        self.folder, self._binary, self._user, self._external = folder, binary, user, external
        self.starts = 0

    async def check(self) -> str:
        """The version of the program.

        Raises:
            KernelMissingError: there is none, or it is too old.
        """
        path = shutil.which(self._binary)
        if path is None:
            raise KernelMissingError(
                "routes", needed="BIRD 2 (Debian package bird2)", got=f"no {self._binary}"
            )
        _, said = await self._run(path, "--version")
        return check_version(said, what=path)

    def prepare(self) -> None:
        """Make the folder, which the daemon may write to and nobody else may read.

        Raises:
            KernelError: it cannot be made.
        """
        group = self._group()
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            os.chown(self.folder.path, 0, group)
            # setgid: what is made inside belongs to the daemon's group.
            self.folder.path.chmod(0o2770)
        except OSError as e:
            raise _unwritable(self.folder.path, e) from e

    def _group(self) -> int:
        try:
            return pwd.getpwnam(self._user).pw_gid
        except KeyError as e:
            raise KernelMissingError("routes", needed=f"the user {self._user}", got="none") from e

    def write(self, path: Path, text: str) -> None:
        """Write a file that holds passwords: whole or not at all, for root and the daemon's group.

        Raises:
            KernelError: it cannot be written.
        """
        try:
            self._write(path, text)
        except OSError as e:
            if e.errno != errno.ENOSPC or not self.folder.old_log.exists():
                raise _unwritable(path, e) from e
            # A withdrawal must not wait for somebody who looks after a full disk.
            self.folder.old_log.unlink(missing_ok=True)
            self._again(path, text)

    def _again(self, path: Path, text: str) -> None:
        try:
            self._write(path, text)
        except OSError as e:
            raise _unwritable(path, e) from e

    def install(self) -> None:
        """What was checked is what BIRD reads from now on.

        Raises:
            KernelError: the folder cannot be written to.
        """
        try:
            self.folder.candidate.rename(self.folder.config)
        except OSError as e:
            raise _unwritable(self.folder.config, e) from e

    def _write(self, path: Path, text: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            os.fchown(fd, 0, self._group())
            os.fchmod(fd, 0o640)  # whatever the umask says
            data = text.encode()
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    async def parse(self, path: Path) -> ConfigFault | None:
        """Have the program read a file without a daemon; what is wrong with it, or None."""
        code, said = await self._run(self._binary, "-p", "-c", str(path))
        if not code:
            return None
        at = _FAULT.search(said)
        return (
            ConfigFault(int(at["line"]), at["what"]) if at else ConfigFault(0, said.strip()[:300])
        )

    async def answers(self, control: BirdControl) -> bool:
        """Whether a BIRD listens at the socket."""
        try:
            await control.ask("show status")
        except NoAnswerError:
            return False
        return True

    async def start(self, control: BirdControl, *, recover: bool) -> None:
        """Start it and wait until it answers.

        Args:
            control: asks at its socket.
            recover: see `command`.

        Raises:
            NoAnswerError: it ended, or did not answer in time.
        """
        if not self._external:
            words = command(self._binary, self.folder, user=self._user, recover=recover)
            code, said = await self._run(*words)
            if code:
                at = _FAULT.search(said)
                got = at["what"] if at else said.strip()
                raise NoAnswerError("BIRD", needed="it to start", got=got)
            self.starts += 1
            _log.info("started BIRD", pid=self.running(), recover=recover)
        for _ in range(_START_TRIES):
            if await self.answers(control):
                return
            if not self._external and self.running() is None:
                raise NoAnswerError("BIRD", needed="it to run", got="it ended: see its log")
            await asyncio.sleep(_TRY_S)
        raise NoAnswerError("BIRD", needed=f"an answer in {START_S:g} s", got="none")

    def running(self) -> int | None:
        """The process number of the daemon of this folder, whoever started it; None for none."""
        try:
            pid = int(self.folder.pid.read_text(encoding="ascii"))
        except (OSError, ValueError):
            pid = 0
        # Its own words: a number may be another program's by now, or another BIRD's.
        if os.fsencode(self.folder.socket) in _words_of(pid):
            return pid
        # The file may be gone, and with it the socket: two daemons would fight for the port and the routes.
        mine = (os.fsencode(self.folder.socket), os.fsencode(self.folder.pid))
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and all(w in _words_of(int(entry.name)) for w in mine):
                return int(entry.name)
        return None

    def others(self) -> list[int]:
        """Other BIRDs of this network namespace, as far as their processes are seen from here."""
        here = Path("/proc/thread-self/ns/net").stat().st_ino
        mine = os.fsencode(self.folder.socket)
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or (entry / "comm").read_text().strip() not in _COMMS:
                    continue
                pid = int(entry.name)
                if (entry / "ns/net").stat().st_ino == here and mine not in _words_of(pid):
                    found.append(pid)
            except OSError:
                continue  # it ended
        return sorted(found)

    async def kill(self) -> None:
        """End it at once, so that peers keep its routes until the next one speaks (never SIGTERM)."""
        pid = self.running()
        if pid is None or self._external:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        for _ in range(_DEATH_TRIES):
            if self.running() is None:
                return
            await asyncio.sleep(_TRY_S)
        raise NoAnswerError("BIRD", needed=f"process {pid} to end", got="still there")

    async def _run(self, *command: str) -> tuple[int, str]:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as e:
            raise KernelMissingError(command[0], needed="BIRD 2", got=e.strerror or str(e)) from e
        try:
            async with asyncio.timeout(START_S):
                said, _ = await process.communicate()
        except TimeoutError as e:
            process.kill()
            await process.wait()
            raise NoAnswerError(
                " ".join(command[:2]), needed=f"an end within {START_S:g} s", got="none"
            ) from e
        return process.returncode or 0, said.decode(errors="replace")


def _unwritable(path: Path, error: OSError) -> KernelError:
    return KernelError(str(path), needed="to write it", got=error.strerror or str(error))
