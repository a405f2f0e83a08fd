"""Logs and exec of Pods, delegated to what the lab injects.

Owns the hook protocols, the parameters of the two subresources and the WebSocket channels of
`v5.channel.k8s.io` and `v4.channel.k8s.io`. Runs nothing itself. SPDY is not spoken.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from aiohttp import WSMsgType, web

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.history import decode, encode
from netpol.lab.apiserver.request import Call, flag, number
from netpol.lab.apiserver.store import Store

# First byte of every message, from apimachinery's remotecommand constants.
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_CHUNK_BYTES = 32 * 1024


class Reader(Protocol):
    """Output of a process."""

    async def read(self, n: int = -1, /) -> bytes:
        """Return up to n bytes, none at the end."""


class Writer(Protocol):
    """Input of a process."""

    def write(self, data: bytes, /) -> None:
        """Queue bytes."""

    async def drain(self) -> None:
        """Wait until there is room."""

    def close(self) -> None:
        """Let the process read the end of its input."""


class Process(Protocol):
    """A running command; asyncio.subprocess.Process is one."""

    @property
    def stdin(self) -> Writer | None:
        """Its input, if it was asked for."""

    @property
    def stdout(self) -> Reader | None:
        """Its output; with a terminal also its errors."""

    @property
    def stderr(self) -> Reader | None:
        """Its errors."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, None while it runs."""

    async def wait(self) -> int:
        """Return its exit code when it has ended."""

    def kill(self) -> None:
        """End it now."""


@runtime_checkable
class HasTerminal(Protocol):
    """A process whose terminal can change its size."""

    def resize(self, *, columns: int, rows: int) -> None:
        """Set the size of the terminal."""


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A command to run in a container of a Pod."""

    pod: Obj
    container: str
    command: tuple[str, ...]
    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


@dataclass(frozen=True, slots=True)
class LogRequest:
    """A log to read; `tail_lines` None is all of it."""

    pod: Obj
    container: str
    follow: bool
    tail_lines: int | None
    timestamps: bool
    previous: bool


@dataclass(frozen=True, slots=True)
class Hooks:
    """The lab's part. A hook raises OSError or ApiError when it cannot do what is asked.

    Attributes:
        exec: Starts a command; the caller ends and awaits the process.
        logs: Yields pieces of a log, and ends unless it is followed.
    """

    exec: Callable[[ExecRequest], Awaitable[Process]] | None = None
    logs: Callable[[LogRequest], AsyncIterator[bytes]] | None = None


async def serve(request: web.Request, call: Call, store: Store, hooks: Hooks) -> web.StreamResponse:
    """Answer a request on pods/log or pods/exec.

    Raises:
        ApiError: The Pod, its container or the hook does not exist.
    """
    pod = store.entry(call.resource, call.key).obj()
    container = _container(pod, call)
    if call.subresource == "log":
        return await _log(request, call, pod, container, hooks)
    return await _exec(request, pod, container, hooks)


def _container(pod: Obj, call: Call) -> str:
    spec = pod.get("spec") or {}
    names = [
        str(one.get("name"))
        for group in ("containers", "initContainers", "ephemeralContainers")
        for one in spec.get(group) or ()
    ]
    name = call.query.get("container") or (names[0] if names else "")
    many = len(spec.get("containers") or ()) > 1 and not call.query.get("container")
    if name not in names:
        text = f"container {name} is not valid for pod {call.name}"
        raise errors.bad_request(text)
    if many and call.subresource == "log":
        text = (
            f"a container name must be specified for pod {call.name}, choose one of: "
            f"[{' '.join(names)}]"
        )
        raise errors.bad_request(text)
    if not spec.get("nodeName"):
        if call.subresource == "exec":
            raise errors.bad_request(f"pod {call.name} does not have a host assigned")
        text = f'container "{name}" in pod "{call.name}" is waiting to start: Pending'
        raise errors.bad_request(text)
    return name


async def _log(
    request: web.Request, call: Call, pod: Obj, container: str, hooks: Hooks
) -> web.StreamResponse:
    if hooks.logs is None:
        raise errors.internal("this server has no logs: no hook was given")
    query = call.query
    wanted = LogRequest(
        pod,
        container,
        follow=flag(query, "follow"),
        tail_lines=number(query, "tailLines"),
        timestamps=flag(query, "timestamps"),
        previous=flag(query, "previous"),
    )
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    pieces = hooks.logs(wanted)
    try:
        first = await anext(pieces, b"")
    except OSError as fault:
        raise errors.internal(f"the log of {container} cannot be read: {fault}") from fault
    try:
        await response.prepare(request)
        if first:
            await response.write(first)
        async for piece in pieces:
            await response.write(piece)
        await response.write_eof()
    finally:
        if isinstance(pieces, AsyncGenerator):  # a client that left ends what it followed
            await pieces.aclose()
    return response


async def _exec(request: web.Request, pod: Obj, container: str, hooks: Hooks) -> web.StreamResponse:
    if hooks.exec is None:
        raise errors.internal("this server runs no commands: no hook was given")
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise errors.bad_request("Upgrade request required: exec is served over WebSocket only")
    query = request.query
    wanted = ExecRequest(
        pod,
        container,
        tuple(query.getall("command", [])),
        stdin=flag(query, "stdin"),
        stdout=flag(query, "stdout"),
        stderr=flag(query, "stderr"),
        tty=flag(query, "tty"),
    )
    if not wanted.command:
        raise errors.bad_request("you must specify at least 1 command")
    socket = web.WebSocketResponse(protocols=PROTOCOLS, max_msg_size=0)
    await socket.prepare(request)
    await run_exec(wanted, hooks.exec, send=socket.send_bytes, messages=_messages(socket))
    await socket.close()
    return socket


async def _messages(socket: web.WebSocketResponse) -> AsyncIterator[bytes]:
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            yield message.data.encode()
        elif message.type is WSMsgType.BINARY:
            yield message.data


async def run_exec(
    wanted: ExecRequest,
    start: Callable[[ExecRequest], Awaitable[Process]],
    *,
    send: Callable[[bytes], Awaitable[None]],
    messages: AsyncIterator[bytes],
) -> None:
    """Run a command between channels, whatever carries them; it is ended when the client is gone.

    Args:
        wanted: the command.
        start: starts it.
        send: takes a message to the client: the number of a channel, then bytes.
        messages: those from the client.
    """
    try:
        process = await start(wanted)
    except (OSError, errors.ApiError) as fault:
        failure = _failure(f"error executing command in container: {fault}")
        await send(bytes((ERROR,)) + encode(failure))
        return
    try:
        await _Channels(process, wanted, send=send, messages=messages).run()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class _Channels:
    """The pumps between one client and one process."""

    def __init__(
        self,
        process: Process,
        wanted: ExecRequest,
        *,
        send: Callable[[bytes], Awaitable[None]],
        messages: AsyncIterator[bytes],
    ) -> None:
        self._process = process
        self._wanted = wanted
        self._send = send
        self._messages = messages

    async def run(self) -> None:
        """Pump until the process has ended and its output is sent, or the client is gone."""
        incoming = asyncio.ensure_future(self._incoming())
        work = asyncio.ensure_future(self._outgoing())
        try:
            await asyncio.wait({incoming, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return  # the client is gone
            await self._send(bytes((ERROR,)) + encode(_exit_status(work.result())))
        except ConnectionResetError:
            return  # the client is gone
        finally:
            for task in (incoming, work):
                task.cancel()
            await asyncio.gather(incoming, work, return_exceptions=True)

    async def _outgoing(self) -> int:
        await asyncio.gather(
            self._pump(self._process.stdout, STDOUT), self._pump(self._process.stderr, STDERR)
        )
        return await self._process.wait()

    async def _pump(self, reader: Reader | None, channel: int) -> None:
        if reader is None:
            return
        while data := await reader.read(_CHUNK_BYTES):
            await self._send(bytes((channel,)) + data)

    async def _incoming(self) -> None:
        writer = self._process.stdin
        if not self._wanted.stdin and writer is not None:
            writer.close()
            writer = None
        async for data in self._messages:
            if not data:
                continue
            channel, rest = data[0], data[1:]
            if channel == STDIN and writer is not None:
                writer = await _write(writer, rest)
            elif channel == CLOSE and rest[:1] == bytes((STDIN,)) and writer is not None:
                writer.close()
                writer = None
            elif channel == RESIZE and isinstance(self._process, HasTerminal):
                size = decode(rest)
                self._process.resize(columns=int(size["Width"]), rows=int(size["Height"]))


async def _write(writer: Writer, data: bytes) -> Writer | None:
    """Write to a process that may have stopped reading."""
    try:
        writer.write(data)
        await writer.drain()
    except (BrokenPipeError, ConnectionResetError):
        return None
    return writer


def _failure(message: str) -> Obj:
    return errors.internal(f"Internal error occurred: {message}").status()


def _exit_status(code: int) -> Obj:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    number_text = str(code if code > 0 else 128 - code)  # a shell's number for a signal
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {number_text}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": number_text}]},
    }
