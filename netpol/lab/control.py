"""The lab's control socket: one JSON object a line in, one out, over STATE_DIR/lab.sock.

Owns the framing, the server and a blocking client for the command line. What the operations mean is the
supervisor's business. Root only, by the mode of the socket.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from netpol.lab.apiserver.errors import ApiError
from netpol.lib.errors import InputError, NetpolError, NoAnswerError

Obj = dict[str, Any]

LINE_MAX_BYTES = 64 << 20


class ControlServer:
    """Answers operations.

    Args:
        path: where the socket is.
        operations: what can be asked, by name; each gets the request and returns the answer.
    """

    def __init__(self, path: Path, operations: dict[str, Callable[[Obj], Awaitable[Obj]]]) -> None:
        self._path = path
        self._operations = operations
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; a socket of an earlier life is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(
            self._serve, path=str(self._path), limit=LINE_MAX_BYTES
        )
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                answer = await self._answer(line)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError) as error:  # ValueError: a line beyond the limit
            print(f"control: a client went: {error}", flush=True)
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> Obj:
        try:
            request = json.loads(line)
            operation = self._operations.get(request["op"])
            if operation is None:
                known = ", ".join(sorted(self._operations))
                raise InputError("op", needed=f"one of {known}", got=str(request["op"]))
            return {"ok": True} | await operation(request)
        except NetpolError as error:
            return {"ok": False, "error": str(error), "exit_code": error.exit_code}
        except ApiError as error:
            return {"ok": False, "error": f"the API server: {error.message}", "exit_code": 3}
        except (ValueError, KeyError, TypeError) as error:
            return {"ok": False, "error": f"unusable request: {error!r}", "exit_code": 2}


class AnswerError(NetpolError):
    """The lab answered that it cannot; carries the exit code it asked for."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def ask(path: Path, op: str, *, timeout_s: float = 30.0, **arguments: Any) -> Obj:
    """Ask one thing, blocking.

    Raises:
        NoAnswerError: Nobody listens there, or no answer came in time.
        AnswerError: The lab refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps({"op": op} | arguments).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
        except TimeoutError as error:
            raise NoAnswerError(f"lab: {op}", got=f"no answer in {timeout_s:g} s") from error
        except OSError as error:
            raise NoAnswerError("the lab is not up", got=f"{path}: {error.strerror}") from error
    if not line:
        raise NoAnswerError(f"lab: {op}", got="the supervisor ended")
    answer: Obj = json.loads(line)
    if not answer.get("ok"):
        raise AnswerError(str(answer.get("error")), int(answer.get("exit_code", 3)))
    return answer
