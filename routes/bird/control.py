"""The control socket of BIRD: one connection, one request at a time, never waited for without end.

Owns connecting, asking and the order of replies. What replies mean is `routes.bird.reply`; when to
configure is `routes.bird.engine`.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from netpol.lib.errors import NoAnswerError
from routes.bird.reply import READY, Reader, Reply

#: BIRD answers in milliseconds, also with a thousand peers; what takes longer hangs.
ANSWER_S = 5.0
#: The longest line that is read; `show route all` of a long AS path stays far below.
_LINE_MAX = 1 << 20


class BirdControl:
    """A client of the socket; connects when asked something, and anew after any failure."""

    def __init__(self, path: Path, *, answer_s: float = ANSWER_S) -> None:
        self._path, self._answer_s = path, answer_s
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = asyncio.Lock()
        self.version = ""

    async def ask(self, command: str) -> Reply:
        """Send a command and return its whole reply.

        Raises:
            NoAnswerError: nobody listens, or no answer came in time.
        """
        async with self._lock:
            try:
                async with asyncio.timeout(self._answer_s):
                    if self._writer is None:
                        await self._connect()
                    return await self._exchange(command)
            except TimeoutError as e:
                await self.close()
                raise NoAnswerError(
                    f"BIRD at {self._path}", needed=f"an answer in {self._answer_s:g} s", got="none"
                ) from e
            except (OSError, EOFError, ValueError) as e:
                await self.close()
                raise NoAnswerError(
                    f"BIRD at {self._path}", got=getattr(e, "strerror", None) or str(e)
                ) from e
            except asyncio.CancelledError:
                await (
                    self.close()
                )  # an answer that nobody waits for would be taken for the next one
                raise

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_unix_connection(
            str(self._path), limit=_LINE_MAX
        )
        hello = await self._reply()
        if hello.code != READY:
            raise EOFError(f"needed a greeting, got {hello}")
        self.version = str(hello)

    async def _exchange(self, command: str) -> Reply:
        if self._writer is None:
            raise EOFError("not connected")
        self._writer.write(command.encode() + b"\n")
        await self._writer.drain()
        return await self._reply()

    async def _reply(self) -> Reply:
        if self._reader is None:
            raise EOFError("not connected")
        reader = Reader()
        while True:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise EOFError("it closed the connection")
            reply = reader.feed(line[:-1].decode(errors="replace"))
            if reply is not None:
                return reply

    async def close(self) -> None:
        """Drop the connection; the next question makes a new one."""
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
