"""An agent's socket, served from a thread, for tests of commands."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from netpol.admin.server import AdminServer

#: An operation: what it is asked with to what it answers; raising is an answer too.
Answer = Callable[[dict[str, Any]], Any]


@contextlib.contextmanager
def agent_socket(folder: Path, operations: Mapping[str, Answer]) -> Iterator[str]:
    """The path of a socket that answers these operations."""
    path = str(folder / "agent.sock")
    started = threading.Event()
    halt: list[Callable[[], object]] = []

    def handler(answer: Answer) -> Any:
        async def handle(args: dict[str, Any]) -> Any:
            return answer(args)

        return handle

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        server = AdminServer(path, {name: handler(a) for name, a in operations.items()})
        await server.start()
        halt.append(lambda: loop.call_soon_threadsafe(stop.set))
        started.set()
        await stop.wait()
        await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(5)
    try:
        yield path
    finally:
        halt[0]()
        thread.join()
