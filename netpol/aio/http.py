"""Answers to GET and HEAD on a port, for health checks: a request, an answer, and the connection ends.

For ports that come and go by the hundred, where a web framework for each would be heavy. It knows no
paths and no health; what is answered is the caller's. Not for requests with bodies.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import NamedTuple

#: A health check's request is a few hundred bytes.
_HEAD_MAX_BYTES = 8192
#: A client that sends nothing is let go, so that idle connections cannot use up the descriptors.
READ_TIMEOUT_S = 5.0
#: Connections that are served at once on a port; further ones are closed.
_AT_ONCE = 64
_BACKLOG = 64

#: All addresses of both families.
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - health checks come from outside
#: A kernel without IPv6, or with it switched off.
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


#: The answer for a path; called once for each request.
Handler = Callable[[str], Answer]


def listening_sockets(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Open sockets that listen on a port of all given addresses, or of none.

    An unspecified address of either family stands for both families. IPv6 is left out where the kernel
    has none, unless nothing else was asked for.

    Raises:
        OSError: the port of some address cannot be had.
    """
    if set(hosts) & set(EVERYWHERE):
        hosts = EVERYWHERE
    opened: list[socket.socket] = []
    try:
        for host in hosts:
            try:
                opened.append(_listen(host, port))
            except OSError as e:
                if ":" not in host or e.errno not in _NO_FAMILY or len(hosts) == 1:
                    raise
            else:
                port = port or opened[0].getsockname()[1]
    except OSError:
        for one in opened:
            one.close()
        raise
    return opened


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


class SmallServer:
    """Serves one handler on some addresses of one port."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._servers: list[asyncio.Server] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def open(self, hosts: Sequence[str], port: int) -> None:
        """Listen; port 0 takes a free one.

        Raises:
            OSError: the port cannot be had.
        """
        sockets = listening_sockets(hosts, port)
        self.port = sockets[0].getsockname()[1]
        for one in sockets:
            server = await asyncio.start_server(self._serve, sock=one, limit=_HEAD_MAX_BYTES)
            self._servers.append(server)

    async def close(self) -> None:
        """Stop listening and break off what is under way."""
        for server in self._servers:
            server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) >= _AT_ONCE:
            writer.transport.abort()
            return
        self._writers.add(writer)
        # A peer that goes away in the middle, or sends what is no request, is nobody's fault here.
        broken = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError)
        try:
            with contextlib.suppress(*broken):
                async with asyncio.timeout(READ_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/"):
            return _encode(Answer(400, b"not HTTP\n", "text/plain"), body=True)
        if words[0] not in ("GET", "HEAD"):
            refused = Answer(405, b"GET or HEAD only\n", "text/plain", (("Allow", "GET, HEAD"),))
            return _encode(refused, body=True)
        return _encode(self._handler(words[1].partition("?")[0]), body=words[0] == "GET")


def _encode(answer: Answer, *, body: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        *(f"{name}: {value}" for name, value in answer.headers),
        "Connection: close",
    ]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head + answer.body if body else head
