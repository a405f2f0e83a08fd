"""Connections passed on, byte by byte: from a listening socket to a server in another namespace.

Owns the pumps alone. What listens where, and whether TLS is spoken to the server, is the caller's choice.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable

_CHUNK_BYTES = 64 * 1024

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """Passes on the connections of any number of listening sockets.

    Args:
        connect: opens a connection to the server.
    """

    def __init__(self, connect: Callable[[], Awaitable[Stream]]) -> None:
        self._connect = connect
        self._servers: list[asyncio.Server] = []

    async def serve(self, listening: socket.socket, *, tls: ssl.SSLContext | None = None) -> None:
        """Accept on one more socket, which is closed by `close`."""
        server = await asyncio.start_server(self._pass_on, sock=listening, ssl=tls)
        self._servers.append(server)

    async def close(self) -> None:
        """Accept no more; connections that stand end with the loop."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await self._connect()
        except OSError as error:
            print(f"relay: no connection: {error}", flush=True)
            writer.close()
            return
        pumps = [
            asyncio.create_task(_pump(reader, far_writer)),
            asyncio.create_task(_pump(far_reader, writer)),
        ]
        try:
            # HTTP has no half-closed connections worth keeping: the end of one way ends both.
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, far_writer):
                end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):  # it went: the caller closes both ends
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
