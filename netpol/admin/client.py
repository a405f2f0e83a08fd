"""The command line's end of the admin socket: blocking, standard library only."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from netpol.admin import wire
from netpol.lib.errors import NoAnswerError

#: An answer later than this means that the agent's loop does not turn.
TIMEOUT_S = 10.0


def call(path: str, op: str, *, timeout_s: float = TIMEOUT_S, **args: Any) -> Any:
    """Ask the agent and return its answer.

    Raises:
        NoAnswerError: no agent, or no answer.
        InputError: the agent refuses the request.
    """
    with _connect(path, timeout_s) as stream:
        return wire.decode_answer(_ask(stream, path, wire.Request(op, args)))


def follow(path: str, op: str, **args: Any) -> Iterator[Any]:
    """Yield the items of an operation that follows something, until it ends or the agent goes.

    Raises:
        NoAnswerError: no agent.
        InputError: the agent refuses the request.
    """
    with _connect(path, None) as stream:
        line = _ask(stream, path, wire.Request(op, args))
        while line and not wire.is_end(line):
            yield wire.decode_answer(line)
            line = stream.readline(wire.ANSWER_MAX_BYTES)


def _connect(path: str, timeout_s: float | None) -> BinaryIO:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(timeout_s)
        try:
            s.connect(path)
        except PermissionError:
            raise NoAnswerError(f"not allowed to ask the agent at {path}", needed="root") from None
        except OSError as e:
            raise NoAnswerError(
                f"no agent answers at {path}",
                needed="a running netpol-agent, or --socket PATH",
                got=e.strerror or str(e),
            ) from None
        return cast("BinaryIO", s.makefile("rwb"))


def _ask(stream: BinaryIO, path: str, request: wire.Request) -> bytes:
    try:
        stream.write(wire.encode_request(request))
        stream.flush()
        line = stream.readline(wire.ANSWER_MAX_BYTES)
    except TimeoutError:
        raise NoAnswerError(f"the agent at {path} does not answer in time") from None
    except OSError as e:
        raise NoAnswerError(f"the agent at {path} went away", got=e.strerror or str(e)) from None
    if not line.endswith(b"\n"):
        raise NoAnswerError(f"the agent at {path} ended without an answer")
    return line
