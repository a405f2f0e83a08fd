"""The agent's end of the admin socket.

Owns the socket's file: root only (mode 0600), replaced when it is stale, and never shared. Whether an
agent lives is told by a lock on a file beside it, which the kernel drops with the process however it
dies; the second agent of a node is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from netpol.admin import wire
from netpol.lib.errors import InputError, NetpolError, NoAnswerError

#: A handler gets the request's args and makes the answer, or (an async generator) many.
Handler = Callable[[dict[str, Any]], Awaitable[Any] | AsyncIterator[Any]]
#: A client that takes no more than this long to read a line does not hold a follower's memory.
WRITE_TIMEOUT_S = 30.0
#: Longest path of a unix socket in bytes (sockaddr_un.sun_path is 108 with its NUL).
PATH_MAX_BYTES = 107


class AdminServer:
    """Serves handlers on a unix socket until closed."""

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        """Args: path: of the socket. handlers: by operation."""
        self._path, self._handlers = Path(path), dict(handlers)
        self._lock_fd = -1
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._inode = 0

    async def start(self) -> None:
        """Take the lock and listen.

        Raises:
            InputError: the path cannot be a socket.
            NoAnswerError: another agent runs on this node.
        """
        if len(os.fsencode(self._path)) > PATH_MAX_BYTES:
            raise InputError(
                f"admin socket {self._path}", needed=f"a path of at most {PATH_MAX_BYTES} bytes"
            )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock()
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(self._path.lstat().st_mode):
                    self._unlock()
                    raise InputError(
                        f"admin socket {self._path}", needed="a path of its own", got="another file"
                    )
                self._path.unlink()
            listening = self._listen()
        except OSError as e:
            self._unlock()
            raise InputError(
                f"admin socket {self._path} cannot be made", got=e.strerror or str(e)
            ) from e
        self._inode = self._path.stat().st_ino
        self._server = await asyncio.start_unix_server(
            self._client, sock=listening, limit=wire.REQUEST_MAX_BYTES
        )

    def _listen(self) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Between bind and chmod nobody may connect: the mask makes the file 0600 from the start.
        before = os.umask(0o177)
        try:
            listening.bind(str(self._path))
        except OSError:
            listening.close()
            raise
        finally:
            os.umask(before)
        listening.setblocking(False)
        return listening

    def _lock(self) -> None:
        fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise NoAnswerError(
                    f"another netpol-agent runs on this node (it holds {self._path}.lock)",
                    needed="one agent a node",
                    got=f"process {owner}" if owner else "",
                ) from None
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd

    def _unlock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def close(self) -> None:
        """Stop serving, end all clients and remove the socket; the lock file stays, unlocked."""
        if self._server is not None:
            self._server.close()
            for task in tuple(self._clients):
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            await self._server.wait_closed()
            self._server = None
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()
        self._unlock()

    # -- clients --------------------------------------------------------------------------------

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._clients.add(task)
        try:
            # A client that goes away, or reads nothing, is its own affair. Cancellation is not raised
            # again: asyncio's stream callback would log it as an error at shutdown.
            with contextlib.suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
                while line := await self._line(reader, writer):
                    await self._answer(line, writer)
        finally:
            if task is not None:
                self._clients.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        try:
            return await reader.readline()
        except ValueError:  # longer than the limit: what follows cannot be told apart any more
            await self._send(writer, wire.error(InputError("request line is too long")))
            return b""

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            request = wire.decode_request(line)
            handler = self._handlers.get(request.op)
            if handler is None:
                raise InputError(
                    f"no operation {request.op[:60]!r}", needed=", ".join(sorted(self._handlers))
                )
            result = handler(request.args)
            if isinstance(result, AsyncIterator):
                await self._stream(result, writer)
                return
            answer = wire.ok(await result)
        except (ConnectionError, TimeoutError):
            raise
        except NetpolError as e:
            answer = wire.error(e)
        except Exception as e:  # noqa: BLE001  (one bad request must not end the agent)
            answer = wire.error(e)
        await self._send(writer, answer)

    async def _stream(self, items: AsyncIterator[Any], writer: asyncio.StreamWriter) -> None:
        try:
            async for item in items:
                await self._send(writer, wire.ok(item))
        finally:
            # Async generators end when closed; waiting for the collector would keep what they follow.
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()
        await self._send(writer, wire.end())

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await writer.drain()
