"""The server: store, HTTP and the life of the listening socket.

Owns construction and start and stop. One event loop runs it, together with whoever uses it in process.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Self

from aiohttp import web

from netpol.lab.apiserver import kubeconfig
from netpol.lab.apiserver.auth import Authenticator, User
from netpol.lab.apiserver.exec import ExecRequest, Hooks, LogRequest, Process
from netpol.lab.apiserver.faults import Faults
from netpol.lab.apiserver.http import Handler
from netpol.lab.apiserver.objects import ObjectCalls
from netpol.lab.apiserver.registry import utc_now
from netpol.lab.apiserver.store import Store
from netpol.lab.apiserver.tls import make_identity

_SHUTDOWN_S = 1.0  # for requests that run, and for a connection's TLS goodbye

_MAX_BODY_BYTES = 64 << 20


class ApiServer:
    """A Kubernetes API server on loopback.

    Plain HTTP, or HTTPS with `tls` by a CA of its own. Two warnings: kubectl and client-go send a
    token over HTTPS only, so with `tokens` use `tls`; and without `tokens` everybody who reaches the
    port is the cluster's admin, who may run commands by the exec hook.

    Args:
        tokens: Bearer tokens and their users; None lets everybody in as the admin. Tokens of
            ServiceAccounts from `token_for` are known in both cases, and then RBAC decides.
        exec_hook: Starts a command in a Pod, for `kubectl exec`.
        log_hook: Yields a Pod's log, for `kubectl logs`.
        host: Where to listen.
        port: Where to listen; 0 is a free one.
        tls: Serve HTTPS.
        history: How many events per kind a watch can resume from.
        bookmark_s: Seconds between two bookmarks.
        service_cidrs: Where cluster IPs come from, the primary family first.
        faults: Knobs of misbehaviour, for tests.
        clock: The time that goes into time stamps.
    """

    def __init__(
        self,
        *,
        tokens: dict[str, User] | None = None,
        exec_hook: Callable[[ExecRequest], Awaitable[Process]] | None = None,
        log_hook: Callable[[LogRequest], AsyncIterator[bytes]] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: bool = False,
        history: int = 10_000,
        bookmark_s: float = 30.0,
        service_cidrs: tuple[str, ...] = ("10.96.0.0/16",),
        faults: Faults | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.faults = faults or Faults()
        self.store = Store(history=history, service_cidrs=service_cidrs, clock=clock)
        self.url = ""
        self._authenticator = Authenticator(tokens, self.faults)
        self._tls = tls
        self.ca_pem = b""
        self._host = host
        self._port = port
        self._objects = ObjectCalls(
            store=self.store,
            authenticator=self._authenticator,
            faults=self.faults,
            hooks=Hooks(exec=exec_hook, logs=log_hook),
            bookmark_s=bookmark_s,
        )
        self._handler = Handler(
            store=self.store,
            authenticator=self._authenticator,
            faults=self.faults,
            objects=self._objects,
        )
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen; return the URL.

        Raises:
            OSError: The address cannot be listened on.
        """
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handler.handle)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=_SHUTDOWN_S, handler_cancellation=True
        )
        await self._runner.setup()
        if self._runner.server is None:
            raise RuntimeError("the HTTP server was not set up")
        context = None
        if self._tls:
            identity = await asyncio.to_thread(make_identity, self._host)
            context, self.ca_pem = identity
        # Not a TCPSite: a client that goes without a TLS goodbye would be waited for, 30 s by default.
        self._listening = await asyncio.get_running_loop().create_server(
            self._runner.server,
            self._host,
            self._port,
            ssl=context,
            ssl_shutdown_timeout=_SHUTDOWN_S if context else None,
        )
        host, port = self._listening.sockets[0].getsockname()[:2]
        scheme = "https" if context else "http"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        return self.url

    async def serve_socket(self, listening: socket.socket) -> None:
        """Serve one more socket, by plain HTTP; it may stand in another network namespace.

        Args:
            listening: a listening TCP socket, closed by `stop`.
        """
        if self._runner is None:
            raise RuntimeError("serve_socket before start")
        await web.SockSite(self._runner, listening).start()

    async def stop(self) -> None:
        """End all watches and stop listening; more calls do nothing."""
        self._objects.closing.set()
        for shelf in self.store.history.shelves():
            for cursor in shelf.cursors:
                cursor.wake.set()
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def token_for(self, namespace: str, serviceaccount: str) -> str:
        """Return a new token of a ServiceAccount, which need not be stored."""
        return self._authenticator.mint(namespace, serviceaccount)

    def compact(self, kind: str = "") -> None:
        """Forget the log of one kind, or of all: older resourceVersions are answered with 410."""
        history = self.store.history
        shelves = history.shelves()
        if kind:
            shelves = [history.shelf(self.store.kinds.named(kind))]
        for shelf in shelves:
            shelf.compact(history.rv)

    def kubeconfig(self, path: Path, token: str = "", *, namespace: str = "default") -> None:
        """Write a kubeconfig for this server, which must have been started."""
        kubeconfig.write(
            path, server=self.url, token=token, ca_pem=self.ca_pem, namespace=namespace
        )
