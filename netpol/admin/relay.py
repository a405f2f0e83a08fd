"""Lists of the API server for netpol-ctl on a node, over the agent's own connection.

An agent keeps only what its rooms need; who asks it about the whole cluster gets the API server's answer,
page by page, with the agent's rights and for the kinds that netpol reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from netpol.admin.server import Handler
from netpol.k8s.decode import KINDS
from netpol.lib.errors import InputError, NoAnswerError

#: Objects of one page, as kubectl asks for.
PAGE = 500


class Connection(Protocol):
    """What is asked of the API client."""

    async def get(self, path: str, **query: object) -> bytes:
        """GET a list; parameters that are "" are left out."""
        ...


def list_handler(connection: Callable[[], Connection | None]) -> Handler:
    """The operation `list`: {"kind": "Pod", "continue": TOKEN} to {"body": the page as the API wrote it}."""

    async def handle(args: dict[str, Any]) -> dict[str, str]:
        kind, token = args.get("kind"), args.get("continue", "")
        if not isinstance(kind, str) or kind not in KINDS:
            raise InputError("kind of a list", needed=", ".join(KINDS), got=repr(kind)[:60])
        if not isinstance(token, str):
            raise InputError("continue of a list", needed="a token", got=type(token).__name__)
        api = connection()
        if api is None:
            raise NoAnswerError("the agent has no connection to the API server yet")
        body = await api.get(KINDS[kind].path(), **{"limit": PAGE, "continue": token})
        return {"body": body.decode()}

    return handle
