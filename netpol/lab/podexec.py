"""`kubectl exec` and `kubectl logs`: a command in a pod's network namespace, and what its servers answered.

Owns the process of a command and its terminal. The command is a program of this machine, run as root with
the pod's network, its own /etc/hosts and /etc/resolv.conf, the pod's hostname, and nothing else of a
container: files and processes are the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import signal
import struct
import termios
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from netpol.kernel.netns import path_of
from netpol.lab import names
from netpol.lab.apiserver import ExecRequest, LogRequest
from netpol.lab.apiserver.errors import bad_request
from netpol.lab.kubelet import PodView
from netpol.lab.podserver import PodServers
from netpol.lib.errors import NoAnswerError
from netpol.model.ids import ObjectKey

#: The PATH of commands, with the directories that only root has.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_REFRESH_S = 1.0  # how old the names of an open shell may be

#: Runs in fresh mount and UTS namespaces: $1 hosts, $2 resolv.conf, $3 hostname, then the command.
_SCRIPT = """
for f in hosts resolv.conf; do
  if [ -e /etc/$f ]; then mount --bind "$1" /etc/$f || exit 126; fi
  shift
done
mount -t sysfs sysfs /sys 2>/dev/null || :
hostname "$1"; shift
exec "$@"
"""


def command_line(*, netns: str, files: Path, hostname: str, command: Sequence[str]) -> list[str]:
    """Return the command that runs another one with a pod's network and names."""
    inside = ["sh", "-c", _SCRIPT, "sh", str(files / "hosts"), str(files / "resolv.conf"), hostname]
    outside = ["nsenter", f"--net={path_of(netns)}", "unshare", "--mount", "--uts", "--"]
    return [*outside, *inside, *command]


class _PipedProcess:
    """A command with pipes; killing it kills what it started too."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.stdin = process.stdin
        self.stdout = process.stdout
        self.stderr = process.stderr

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        _kill_group(self._process.pid)


class _TerminalReader:
    """The screen of a terminal; its end is EIO, not an empty read."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream

    async def read(self, n: int = -1, /) -> bytes:
        try:
            return await self._stream.read(n)
        except OSError as error:
            if error.errno == errno.EIO:
                return b""
            raise


class _TerminalWriter:
    """The keyboard of a terminal; its end is ^D, since closing it would hang up."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def write(self, data: bytes, /) -> None:
        self._transport.write(data)

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        self._transport.write(b"\x04")


class _TerminalProcess(_PipedProcess):
    """A command with a terminal of its own."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        *,
        master: int,
        reader: _TerminalReader,
        writer: _TerminalWriter,
        close: Callable[[], None],
    ) -> None:
        super().__init__(process)
        self._master = master
        self._close = close
        self.stdin = writer  # type: ignore[assignment]
        self.stdout = reader  # type: ignore[assignment]
        self.stderr = None

    async def wait(self) -> int:
        code = await super().wait()
        self._close()
        return code

    def resize(self, *, columns: int, rows: int) -> None:
        with contextlib.suppress(OSError):  # it may have ended in between
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def spawn(argv: Sequence[str], *, env: dict[str, str], stdin: bool) -> _PipedProcess:
    """Start a command with pipes."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=pipe if stdin else asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        env=env,
        cwd="/",
        start_new_session=True,
    )
    return _PipedProcess(process)


async def spawn_terminal(argv: Sequence[str], *, env: dict[str, str]) -> _TerminalProcess:
    """Start a command with a terminal of its own, as its session's controlling one."""
    loop = asyncio.get_running_loop()
    master, slave = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            "setsid", "--ctty", *argv, stdin=slave, stdout=slave, stderr=slave, env=env, cwd="/"
        )
    except OSError:
        os.close(master)
        raise
    finally:
        os.close(slave)
    stream = asyncio.StreamReader()
    screen = os.fdopen(os.dup(master), "rb", buffering=0)
    keyboard = os.fdopen(master, "wb", buffering=0)
    read_end, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), screen)
    write_end, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, keyboard)

    def close() -> None:
        read_end.close()
        write_end.close()

    return _TerminalProcess(
        process,
        master=master,
        reader=_TerminalReader(stream),
        writer=_TerminalWriter(write_end),
        close=close,
    )


class PodCommands:
    """The two hooks of the API server.

    Args:
        files: where the name files of pods are.
        pod: finds a running pod.
        entries: everything that has a name now.
        servers: whose answers the logs show.
    """

    def __init__(
        self,
        *,
        files: Path,
        pod: Callable[[ObjectKey], PodView | None],
        entries: Callable[[], list[names.Named]],
        servers: PodServers,
    ) -> None:
        self._files = files
        self._pod = pod
        self._entries = entries
        self._servers = servers
        self._open: dict[str, tuple[PodView, int]] = {}
        self._waiting: set[asyncio.Task[None]] = set()

    async def exec(self, request: ExecRequest) -> _PipedProcess:
        """Start a command in a pod.

        Raises:
            ApiError: The pod does not run.
        """
        view = self._running(request.pod)
        argv = self.command(view, request.command)
        env = {"PATH": PATH, "HOME": "/root", "HOSTNAME": view.key.name, "TERM": "xterm"}
        if request.tty:
            process: _PipedProcess = await spawn_terminal(argv, env=env)
        else:
            process = await spawn(argv, env=env, stdin=request.stdin)
        self._follow_names(view, process)
        return process

    def command(self, view: PodView, command: Sequence[str]) -> list[str]:
        """Return the command line that runs a command in a pod, its name files written."""
        files = self._write_names(view)
        hostname = view.node if view.host_network else view.key.name
        return command_line(netns=view.netns, files=files, hostname=hostname, command=command)

    async def logs(self, request: LogRequest) -> AsyncIterator[bytes]:
        """Yield the lines of a pod's servers.

        Raises:
            ApiError: The pod does not run, or its previous container is asked for.
        """
        meta = request.pod["metadata"]
        if request.previous:
            text = f'previous terminated container "{request.container}" in pod "{meta["name"]}" '
            raise bad_request(text + "not found")
        view = self._running(request.pod)
        tail = request.tail_lines
        try:
            if request.follow:
                async for line in self._servers.follow(view.key, tail=tail):
                    yield f"{line}\n".encode()
                return
            lines = self._servers.log(view.key)
        except NoAnswerError as error:
            raise bad_request(f"the log of pod {view.key}: {error}") from error
        kept = lines if tail is None else lines[max(len(lines) - tail, 0) :]
        for line in kept:
            yield f"{line}\n".encode()

    def _running(self, pod: dict[str, object]) -> PodView:
        meta = pod["metadata"]
        assert isinstance(meta, dict)  # noqa: S101 - from the API server's own store
        view = self._pod(ObjectKey(meta["namespace"], meta["name"]))
        if view is None or view.uid != meta["uid"] or not view.addresses:
            why = f": {view.problem}" if view is not None and view.problem else ""
            raise bad_request(f"pod {meta['namespace']}/{meta['name']} does not run yet{why}")
        return view

    def _write_names(self, view: PodView) -> Path:
        folder = self._files / f"{view.netns}-{view.key.name}"
        own = names.Named(view.key.namespace, view.key.name, view.addresses, service=False)
        text = names.hosts_text(namespace=view.key.namespace, own=own, entries=self._entries())
        names.write_in_place(folder / "hosts", text)
        names.write_in_place(folder / "resolv.conf", names.resolv_text(view.key.namespace))
        return folder

    def _follow_names(self, view: PodView, process: _PipedProcess) -> None:
        """Keep a pod's names fresh as long as a command runs there."""
        _, count = self._open.get(view.uid, (view, 0))
        self._open[view.uid] = (view, count + 1)

        async def ended() -> None:
            await process.wait()
            _, left = self._open[view.uid]
            if left > 1:
                self._open[view.uid] = (view, left - 1)
            else:
                del self._open[view.uid]

        task = asyncio.create_task(ended(), name=f"exec in {view.key}")
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def run(self) -> None:
        """Rewrite the names of pods with open commands, until cancelled."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            for view, _ in list(self._open.values()):
                self._write_names(view)
