"""The API server over HTTP: bytes in, bytes out, and one error class.

Owns connections, credentials, time limits and the mapping of every failure to `ApiError`. It knows no
kinds and decodes nothing but Status objects. The `kubernetes.aio` ApiClient below it contributes
configuration, authentication and TLS; its calls do not raise on HTTP errors, so that is done here.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
import msgspec
import structlog
from kubernetes.aio.client import ApiClient
from kubernetes.aio.client.exceptions import OpenApiException
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException

from netpol import __version__
from netpol.aio.clock import Clock, SystemClock
from netpol.k8s import credentials
from netpol.k8s.errors import ApiError
from netpol.k8s.wire import Status
from netpol.lib.errors import NetpolError

_log = structlog.get_logger(__name__)

#: A request that is no watch; a full list of a big cluster takes seconds, not minutes.
REQUEST_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0

#: How often credentials are read anew at most while the server refuses them.
RELOAD_PERIOD_S = 30.0

#: A Retry-After beyond this is cut: what we hold gets old meanwhile.
MAX_RETRY_AFTER_S = 60.0

#: A silent peer is noticed after KEEPIDLE + KEEPCNT * KEEPINTVL = 60 s (tcp(7)): a watch may be quiet
#: for minutes, and a node whose master vanished without a FIN must not wait that long.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)

#: Of a failed answer's body as much is read as can be a Status.
_STATUS_MAX_BYTES = 64 << 10

#: All that a request can raise below us: aiohttp's, time-outs, sockets and TLS, a bad header or URL, a
#: session that was closed, the client library's own.
_TRANSPORT_ERRORS = (
    aiohttp.ClientError,
    TimeoutError,
    OSError,
    ValueError,
    RuntimeError,
    OpenApiException,
    ConfigException,
)

_status_decoder = msgspec.json.Decoder(Status)


def _open_socket(address: Any) -> socket.socket:
    """Make the socket for a connection (aiohttp's socket_factory; takes an addrinfo)."""
    sock = socket.socket(family=address[0], type=address[1], proto=address[2])
    for level, option, value in _KEEPALIVE:
        sock.setsockopt(level, option, value)
    return sock


class _Rest(RESTClientObject):  # type: ignore[misc]  # the package has no types
    """The library's HTTP layer with keep-alive sockets."""

    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(
            limit=self.maxsize, ssl=self.ssl_context, socket_factory=_open_socket
        )


Reload = Callable[[], Awaitable[credentials.Found]]


def _client(configuration: Any) -> Any:
    try:
        client = ApiClient(configuration)
        client.rest_client = _Rest(configuration)
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        raise ApiError("TLS settings of the API server cannot be used", message=str(e)) from e
    client.user_agent = f"netpol-agent/{__version__}"
    return client


class Api:
    """A connection to one API server. Make it with one of the class methods; close it at the end."""

    def __init__(
        self,
        found: credentials.Found,
        *,
        reload: Reload | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._reload, self._clock = reload, clock or SystemClock()
        self._reloaded_at = float("-inf")
        self._client, self._token = _client(found.configuration), found.token
        self.url: str = found.configuration.host
        self.requests = 0

    @classmethod
    def for_server(
        cls,
        url: str,
        *,
        token: str = "",
        token_file: Path | None = None,
        ca_file: Path | None = None,
        verify: bool = True,
        clock: Clock | None = None,
    ) -> Self:
        """Connect to a server given by its URL."""
        clock = clock or SystemClock()

        async def load() -> credentials.Found:
            return find()

        def find() -> credentials.Found:
            return credentials.explicit(
                url,
                token=token,
                token_file=token_file,
                ca_file=ca_file,
                verify=verify,
                clock=clock,
            )

        return cls(find(), reload=load, clock=clock)

    @classmethod
    def in_cluster(cls, *, clock: Clock | None = None, **places: Any) -> Self:
        """Connect as a pod does (see `credentials.in_cluster` for `places`)."""
        clock = clock or SystemClock()

        async def load() -> credentials.Found:
            return credentials.in_cluster(clock=clock, **places)

        return cls(credentials.in_cluster(clock=clock, **places), reload=load, clock=clock)

    @classmethod
    async def from_kubeconfig(
        cls, path: Path | None = None, *, context: str = "", clock: Clock | None = None
    ) -> Self:
        """Connect as kubectl does."""

        async def load() -> credentials.Found:
            return await credentials.kubeconfig(path, context=context)

        return cls(await load(), reload=load, clock=clock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; running requests fail."""
        await self._client.close()

    async def get(self, path: str, **query: object) -> bytes:
        """GET an object or a list; query parameters that are None or "" are left out."""
        return await self._request("GET", path, query=query)

    async def post(self, path: str, body: Mapping[str, Any], **query: object) -> bytes:
        """Create an object (an Event, for instance)."""
        return await self._request("POST", path, query=query, body=body)

    async def put(self, path: str, body: Mapping[str, Any], **query: object) -> bytes:
        """Replace an object."""
        return await self._request("PUT", path, query=query, body=body)

    async def patch(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        content_type: str = "application/merge-patch+json",
        **query: object,
    ) -> bytes:
        """Change a part of an object."""
        return await self._request("PATCH", path, query=query, body=body, content_type=content_type)

    async def delete(self, path: str, **query: object) -> bytes:
        """Delete an object."""
        return await self._request("DELETE", path, query=query)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        response = await self._open(
            method, path, query=query, body=body, content_type=content_type, timeout=timeout
        )
        try:
            with _mapping(f"{method} {path}"):
                return await response.read()
        finally:
            response.release()

    @asynccontextmanager
    async def watch(
        self, path: str, *, timeout_s: float, **query: object
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open a watch; yields an iterator over the chunks of its body as they come.

        Args:
            path: the list to watch.
            timeout_s: when the server shall end it; it is broken off 30 s later.
            query: further parameters.
        """
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s + 30.0
        )
        parameters = {"watch": "true", "timeoutSeconds": max(1, round(timeout_s)), **query}
        response = await self._open("GET", path, query=parameters, timeout=timeout)
        try:
            async with aclosing(_chunks(f"watch {path}", response)) as chunks:
                yield chunks
        finally:
            response.close()  # not back to the pool: a watch that is left would go on filling buffers

    async def _open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - handed to aiohttp, not implemented here
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> aiohttp.ClientResponse:
        """Send a request; returns the answer if it is a success, with its body unread."""
        what = f"{method} {path}"
        self.requests += 1
        headers = {"Accept": "application/json", "Content-Type": content_type}
        parameters = [(k, v) for k, v in query.items() if v is not None and v != ""]
        try:
            with _mapping(what):
                verb, url, headers, sent, _ = await self._client.param_serialize(
                    method,
                    path,
                    query_params=parameters,
                    header_params=headers,
                    body=body,
                    auth_settings=["BearerToken"],
                )
                answer = await self._client.call_api(
                    verb, url, header_params=headers, body=sent, _request_timeout=timeout
                )
                response: aiohttp.ClientResponse = answer.response
                if response.status < 400:
                    return response
                try:
                    raise await self._refusal(what, response)
                finally:
                    response.close()
        except ApiError as e:
            if e.status == 401 or isinstance(e.__cause__, ssl.SSLError | aiohttp.ClientSSLError):
                await self._renew()
            raise

    async def _renew(self) -> None:
        """Read credentials and certificates anew after they failed: they may have been rotated.

        The request that failed stays failed. Requests that run on the old connections fail too, and
        watches resume; so this is not done more often than every `RELOAD_PERIOD_S`.
        """
        if self._token is not None:
            self._token.expire()  # rotated within its period
        now = self._clock.monotonic()
        if self._reload is None or now - self._reloaded_at < RELOAD_PERIOD_S:
            return
        self._reloaded_at = now
        try:
            found = await self._reload()
            client = _client(found.configuration)
        except NetpolError as e:
            _log.warning("API credentials cannot be read again", error=str(e))
            return
        old, self._client, self._token = self._client, client, found.token
        await old.close()

    async def _refusal(self, what: str, response: aiohttp.ClientResponse) -> ApiError:
        raw = await response.content.read(_STATUS_MAX_BYTES)
        try:
            status = _status_decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            status = Status(reason=response.reason, message="")
        return ApiError(
            what,
            status=response.status,
            reason=status.reason or "",
            message=status.message or "",
            retry_after_s=_retry_after(response.headers.get("Retry-After", "")),
        )


def _retry_after(header: str) -> float | None:
    # The API server writes seconds; the date form of RFC 9110 does not occur.
    return min(float(header), MAX_RETRY_AFTER_S) if header.isascii() and header.isdigit() else None


@contextmanager
def _mapping(what: str) -> Iterator[None]:
    """Turn every failure of the transport into ApiError."""
    try:
        yield
    except ApiError:
        raise
    except _TRANSPORT_ERRORS as e:
        raise ApiError(what, reason=type(e).__name__, message=str(e)) from e


async def _chunks(what: str, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    with _mapping(what):
        async for chunk in response.content.iter_any():
            yield chunk
