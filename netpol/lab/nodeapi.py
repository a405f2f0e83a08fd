"""The kubelets' own HTTPS server, which a real API server asks for the logs of pods and for commands.

Owns the two requests that the lab answers, as a kubelet is asked for them; what they do is `podexec`'s
business. It listens on every node's addresses, and whoever has no certificate of the lab's CA gets no
further than the handshake: pods reach those addresses too.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from netpol.lab import spaces, spdy
from netpol.lab.apiserver import ApiError, ExecRequest, LogRequest
from netpol.lab.apiserver.exec import ERROR, RESIZE, STDERR, STDIN, STDOUT, run_exec
from netpol.lab.kubelet import PodView
from netpol.lab.plan import NodePlan
from netpol.lab.podexec import PodCommands
from netpol.lab.podstatus import KUBELET_PORT
from netpol.lib.errors import NetpolError
from netpol.model.ids import ObjectKey

_HEAD_MAX_BYTES = 64 * 1024
_HEAD_TIMEOUT_S = 30.0
_PATH_PARTS = 4  # what, namespace, pod, container
_REASONS = {101: "Switching Protocols", 200: "OK", 400: "Bad Request", 404: "Not Found"}


class _Asked(NamedTuple):
    """A request as far as it matters."""

    path: list[str]
    query: dict[str, list[str]]
    headers: dict[str, str]

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1] in ("1", "true")

    def number(self, name: str) -> int | None:
        text = self.query.get(name, [""])[-1]
        return int(text) if text.isdigit() else None


class NodeApi:
    """Answers for all nodes.

    Args:
        nodes: where to listen.
        commands: runs commands and has the logs.
        pod: finds a pod that is on a node.
    """

    def __init__(
        self,
        nodes: Sequence[NodePlan],
        *,
        commands: PodCommands,
        pod: Callable[[ObjectKey], PodView | None],
    ) -> None:
        self._nodes = nodes
        self._commands = commands
        self._pod = pod
        self._servers: list[asyncio.Server] = []

    async def start(self, context: ssl.SSLContext) -> None:
        """Listen on all nodes' addresses."""
        for node in self._nodes:
            for address in node.addresses:
                listening = spaces.listen(node.netns, address, KUBELET_PORT)
                self._servers.append(
                    await asyncio.start_server(
                        self._serve, sock=listening, ssl=context, limit=_HEAD_MAX_BYTES
                    )
                )

    async def close(self) -> None:
        """Accept no more."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close: an API server that wants more opens another connection."""
        try:
            async with asyncio.timeout(_HEAD_TIMEOUT_S):
                asked = _parse(await reader.readuntil(b"\r\n\r\n"))
            await self._answer(asked, reader, writer)
        except ApiError as error:
            _refuse(writer, error.code, error.message)
        except NetpolError as error:
            print(f"nodeapi: {error}", flush=True)
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            return  # a client that went, or that is none of ours
        except ValueError as error:
            _refuse(writer, 400, str(error))
        finally:
            writer.close()

    async def _answer(
        self, asked: _Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if len(asked.path) != _PATH_PARTS or asked.path[0] not in ("containerLogs", "exec"):
            _refuse(writer, 404, "the lab's kubelet answers logs and exec only")
            return
        what, namespace, name, container = asked.path
        view = self._pod(ObjectKey(namespace, name))
        if view is None:
            _refuse(writer, 404, f'pod "{name}" is not on this node')
            return
        pod = {"metadata": {"namespace": namespace, "name": name, "uid": view.uid}}
        if what == "exec":
            wanted = ExecRequest(
                pod,
                container,
                tuple(asked.query.get("command", [])),
                stdin=asked.flag("input"),
                stdout=asked.flag("output"),
                stderr=asked.flag("error"),
                tty=asked.flag("tty"),
            )
            await self._exec(wanted, asked, reader, writer)
        else:
            log = LogRequest(
                pod,
                container,
                follow=asked.flag("follow"),
                tail_lines=asked.number("tailLines"),
                timestamps=asked.flag("timestamps"),
                previous=asked.flag("previous"),
            )
            await self._logs(log, reader, writer)

    async def _logs(
        self, wanted: LogRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        pieces = self._commands.logs(wanted)
        first = await anext(pieces, b"")  # what is refused is refused before the answer begins
        _begin(writer, 200, ["Content-Type: text/plain", "Connection: close"])

        async def send() -> None:
            writer.write(first)
            async for piece in pieces:
                writer.write(piece)
                await writer.drain()
            await writer.drain()

        sending = asyncio.create_task(send())
        leaving = asyncio.create_task(reader.read())  # returns when the client is gone
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            if isinstance(pieces, AsyncGenerator):  # a client that left ends what it followed
                await pieces.aclose()

    async def _exec(
        self,
        wanted: ExecRequest,
        asked: _Asked,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if not wanted.command:
            _refuse(writer, 400, "you must specify at least 1 command")
            return
        spoken = asked.headers.get("x-stream-protocol-version", "")
        if asked.headers.get("upgrade", "").lower() != "spdy/3.1" or spdy.CHANNELS not in spoken:
            _refuse(writer, 400, f"exec is served over SPDY/3.1 with {spdy.CHANNELS} only")
            return
        upgrade = ["Connection: Upgrade", "Upgrade: SPDY/3.1"]
        _begin(writer, 101, [*upgrade, f"X-Stream-Protocol-Version: {spdy.CHANNELS}"])
        session = spdy.ExecSession(reader, writer)
        flags = {
            ERROR: True,
            STDIN: wanted.stdin,
            STDOUT: wanted.stdout,
            STDERR: wanted.stderr and not wanted.tty,
            RESIZE: wanted.tty,
        }
        await session.opened({channel for channel, is_on in flags.items() if is_on})
        await run_exec(wanted, self._commands.exec, send=session.send, messages=session.messages())
        await session.finish()


def _parse(head: bytes) -> _Asked:
    """Read the head of a request.

    Raises:
        ValueError: It is none.
    """
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3:
        raise ValueError("this is no HTTP request")
    url = urlsplit(words[1])
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name = name.strip().lower()
        headers[name] = ", ".join(filter(None, (headers.get(name), value.strip())))
    path = [unquote(part) for part in url.path.strip("/").split("/")]
    return _Asked(path, parse_qs(url.query, keep_blank_values=True), headers)


def _begin(writer: asyncio.StreamWriter, code: int, headers: Sequence[str]) -> None:
    lines = [f"HTTP/1.1 {code} {_REASONS.get(code, 'Error')}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())


def _refuse(writer: asyncio.StreamWriter, code: int, message: str) -> None:
    body = message.encode()
    length = f"Content-Length: {len(body)}"
    _begin(writer, code, ["Content-Type: text/plain", length, "Connection: close"])
    writer.write(body)
