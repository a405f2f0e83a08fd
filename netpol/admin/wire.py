"""The language of the agent's admin socket: one JSON object a line, each way.

A request is {"op": NAME, "args": {...}}. The answer is {"ok": ...} or {"error": {...}}; an operation
that follows something answers many lines of {"ok": ...} and ends with {"end": true}. Standard library
only, so that the command line starts quickly.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from netpol.lib.errors import InputError, NetpolError, NoAnswerError

#: Where the agent of a node listens unless told otherwise.
DEFAULT_SOCKET = "/run/netpol/agent.sock"
#: Longest request line in bytes; requests are a few names.
REQUEST_MAX_BYTES = 1 << 20
#: Longest answer line in bytes; an answer may list the members of all sets of a pod.
ANSWER_MAX_BYTES = 256 << 20


class Request(NamedTuple):
    """What a client asks for."""

    op: str
    args: dict[str, Any]


def encode(value: Any) -> bytes:
    """One line."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def encode_request(request: Request) -> bytes:
    """The line of a request."""
    return encode({"op": request.op, "args": request.args})


def decode_request(line: bytes) -> Request:
    """Read a request.

    Raises:
        InputError: not a request.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError("request is not JSON", got=str(e)[:200]) from None
    op = value.get("op") if isinstance(value, dict) else None
    if not isinstance(op, str):
        raise InputError("not a request", needed='{"op": NAME, "args": {...}}')
    args = value.get("args", {})
    if not isinstance(args, dict):
        raise InputError("args of a request", needed="an object", got=type(args).__name__)
    return Request(op, args)


def ok(value: Any) -> bytes:
    """The line of a good answer (or of one item of many)."""
    return encode({"ok": value})


def end() -> bytes:
    """The line after the last item of many."""
    return encode({"end": True})


def error(e: Exception) -> bytes:
    """The line of an error."""
    if isinstance(e, NetpolError):
        return encode({"error": {"message": str(e), "exit_code": e.exit_code}})
    return encode({"error": {"message": f"{type(e).__name__}: {e}"[:1000], "exit_code": 3}})


def is_end(line: bytes) -> bool:
    """Whether a line is that after the last item."""
    return line.strip() == b'{"end":true}'


def decode_answer(line: bytes) -> Any:
    """Read an answer line.

    Raises:
        InputError: the agent says the request was wrong.
        NoAnswerError: the agent could not answer, or what came is no answer.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise NoAnswerError("the agent's answer is not JSON") from None
    if not isinstance(value, dict):
        raise NoAnswerError("the agent's answer is not an object")
    if "ok" in value:
        return value["ok"]
    failure = value.get("error")
    message = failure.get("message") if isinstance(failure, dict) else None
    text = message if isinstance(message, str) else "no reason given"
    if isinstance(failure, dict) and failure.get("exit_code") == InputError.exit_code:
        raise InputError(text)
    raise NoAnswerError(text)
