"""The cluster's objects behind a real API server, with the interface of the embedded one's store.

Owns requests, watches and the reading of refusals; knows no lab. Plain calls block the lab's loop for the
milliseconds that a server on the same machine takes: that is the price for controllers that decide on
what is stored now, which are written once for both servers. Watches and `call` do not block.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import aiohttp

from netpol.lab.apiserver import patch as patches
from netpol.lab.apiserver.errors import ApiError
from netpol.lab.apiserver.history import CompactedError, Key
from netpol.lab.apiserver.resources import Kinds, Resource

Obj = dict[str, Any]
Objs = list[Obj]  # the class below has a method named list

#: Where the server's certificate is valid, whatever the socket really is.
SERVER_NAME = "127.0.0.1"

_TIMEOUT_S = 20.0
_WATCH_S = 300
_RETRY_S = 0.2
_CRD_TIMEOUT_S = 10.0
_LINE_MAX_BYTES = 16 << 20
_LATER = (429, 500, 503, 504)  # with these a server says that it may know better soon
_PATCH_TYPES = {style: media for media, style in patches.STYLES.items()}


class _Connection(http.client.HTTPConnection):
    """A connection over a socket that somebody else makes."""

    def __init__(self, make: Callable[[], socket.socket], context: ssl.SSLContext) -> None:
        super().__init__(SERVER_NAME)
        self._make = make
        self._context = context

    def connect(self) -> None:
        raw = self._make()
        raw.settimeout(_TIMEOUT_S)
        try:
            self.sock = self._context.wrap_socket(raw, server_hostname=SERVER_NAME)
        except OSError:
            raw.close()
            raise


class RemoteStore:
    """The objects of one API server.

    Args:
        connect: returns a fresh TCP socket that is connected to the server.
        unconnected: returns a fresh socket, and `port` is where it is to be connected at loopback.
        context: trusts the server's CA.
        token: whose rights are used.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], socket.socket],
        unconnected: Callable[[], socket.socket],
        port: int,
        context: ssl.SSLContext,
        token: str,
    ) -> None:
        self.kinds = Kinds()
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        self._connection = _Connection(connect, context)
        self._unconnected = unconnected
        self._context = context
        self._url = f"https://{SERVER_NAME}:{port}"
        self._session: aiohttp.ClientSession | None = None

    # Requests

    def request(self, method: str, path: str, *, body: Any = None, media: str = "") -> Obj:
        """Ask one thing and wait for the answer.

        Raises:
            ApiError: The server refuses it, or does not answer (503).
        """
        headers = dict(self._headers)
        data = None
        if body is not None:
            data = json.dumps(body)
            headers["Content-Type"] = media or "application/json"
        for again in (False, True):
            try:
                self._connection.request(method, path, body=data, headers=headers)
                response = self._connection.getresponse()
                return _answer(response.status, response.read())
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                # A connection that was kept too long ends when it is used, before anything is done.
                stale = isinstance(error, http.client.RemoteDisconnected | BrokenPipeError)
                if again or not stale:
                    raise _unreachable(error) from error
        raise AssertionError  # pragma: no cover - the loop returns or raises

    async def call(self, method: str, path: str, *, body: Any = None) -> Obj:
        """Ask one thing without blocking the loop.

        Raises:
            ApiError: The server refuses it, or does not answer (503).
        """
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with self._open().request(
                method, self._url + path, json=body, headers=self._headers, timeout=timeout
            ) as response:
                return _answer(response.status, await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(error) from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0, ssl=self._context, socket_factory=lambda _: self._unconnected()
            )
            self._session = aiohttp.ClientSession(
                connector=connector, read_bufsize=_LINE_MAX_BYTES // 4
            )
        return self._session

    async def close(self) -> None:
        """End all connections."""
        self._connection.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    # Reading

    @property
    def resource_version(self) -> int:
        """The version of the newest change."""
        return _version(self.request("GET", "/api/v1/namespaces?limit=1"))

    def timestamp(self) -> str:
        """Return the present time as it stands in metadata."""
        return datetime.now(tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def get(self, kind: str, name: str, namespace: str = "") -> Obj:
        """Return an object.

        Raises:
            ApiError: 404 when there is none.
        """
        return self.request("GET", _path(self.kinds.named(kind), namespace, name))

    def list(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
    ) -> Objs:
        """Return the objects of a kind in the order of their keys."""
        resource = self.kinds.named(kind)
        query = _query(labelSelector=label_selector, fieldSelector=field_selector)
        return _items(resource, self.request("GET", _path(resource, namespace or "") + query))

    async def listing(self, kind: str) -> tuple[Objs, int]:
        """Return all objects of a kind and the version of that list, without blocking the loop."""
        resource = self.kinds.named(kind)
        found = await self._patient(_path(resource, ""))
        return _items(resource, found), _version(found)

    async def _patient(self, path: str) -> Obj:
        """Read a list, again while the server has no answer: somebody else minds whether it lives."""
        while True:
            try:
                return await self.call("GET", path)
            except ApiError as error:
                if error.code not in _LATER:
                    raise
                print(f"list of {path}: {error.message}", flush=True)
            await asyncio.sleep(_RETRY_S)

    async def watch(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: int | None = None,
    ) -> AsyncIterator[tuple[str, Obj]]:
        """Yield (type, object) from a version on, or the present state as ADDED and then changes.

        Raises:
            CompactedError: The server no longer reaches back to where the reader stands.
        """
        resource = self.kinds.named(kind)
        path = _path(resource, namespace or "")
        chosen = {"labelSelector": label_selector, "fieldSelector": field_selector}
        version = resource_version
        if version is None:
            found = await self._patient(path + _query(**chosen))
            version = _version(found)
            for item in _items(resource, found):
                yield "ADDED", item
        while True:
            query = _query(
                watch="1",
                allowWatchBookmarks="true",
                timeoutSeconds=str(_WATCH_S),
                resourceVersion=str(version),
                **chosen,
            )
            try:
                async with aclosing(self._stream(path + query)) as events:
                    async for event in events:
                        obj = event["object"]
                        if event["type"] == "ERROR":
                            raise ApiError(int(obj.get("code") or 0), "", str(obj.get("message")))
                        version = int(obj["metadata"]["resourceVersion"])
                        if event["type"] != "BOOKMARK":
                            yield event["type"], obj
            except ApiError as error:
                if error.code == 410:
                    raise CompactedError(version, 0) from error
                print(f"watch of {kind}: {error.message}", flush=True)
            await asyncio.sleep(_RETRY_S)

    async def _stream(self, path: str) -> AsyncGenerator[Obj, None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S)
        try:
            async with self._open().get(
                self._url + path, headers=self._headers, timeout=timeout
            ) as response:
                if response.status != 200:
                    _answer(response.status, await response.read())
                pieces: list[bytes] = []
                async for piece in response.content.iter_any():
                    *lines, rest = piece.split(b"\n")
                    for line in lines:
                        yield json.loads(b"".join([*pieces, line]))
                        pieces.clear()
                    pieces.append(rest)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(error) from error

    # Writing

    def create(self, obj: Obj, *, keep_status: bool = False, manager: str = "") -> Obj:
        """Store a new object, with its status where that is asked for.

        Raises:
            ApiError: It is refused.
        """
        resource = self.kinds.of(obj)
        namespace = (obj.get("metadata") or {}).get("namespace") or "default"
        path = _path(resource, namespace)
        stored = self.request("POST", path + _query(fieldManager=manager), body=obj)
        if keep_status and "status" in obj and stored.get("status") != obj["status"]:
            stored = self.update(stored | {"status": obj["status"]}, subresource="status")
        if resource.kind == "CustomResourceDefinition":
            self._await_served(stored)
        return stored

    def _await_served(self, crd: Obj) -> None:
        """Wait until what a definition defines can be created: a server takes a moment for that."""
        self.kinds.register(crd)
        deadline = time.monotonic() + _CRD_TIMEOUT_S
        for resource in list(self.kinds):
            if not resource.custom or resource.qualified != crd["metadata"]["name"]:
                continue
            while True:
                try:
                    self.request("GET", _path(resource, "") + "?limit=1")
                    break
                except ApiError as error:
                    if error.code != 404 or time.monotonic() > deadline:
                        raise
                time.sleep(0.05)

    def update(self, obj: Obj, *, subresource: str = "") -> Obj:
        """Replace an object, or with `subresource="status"` its status.

        Raises:
            ApiError: 409 when the object carries a resourceVersion that is not the stored one.
        """
        meta = obj["metadata"]
        path = _path(self.kinds.of(obj), meta.get("namespace") or "", meta["name"], subresource)
        return self.request("PUT", path, body=obj)

    def patch(
        self,
        kind: str,
        name: str,
        namespace: str = "",
        *,
        body: Obj | Objs,
        style: str = "merge",
        subresource: str = "",
    ) -> Obj:
        """Patch an object by `merge`, `strategic` or `json`."""
        path = _path(self.kinds.named(kind), namespace, name, subresource)
        return self.request("PATCH", path, body=body, media=_PATCH_TYPES[style])

    def bind(self, key: Key, node: str) -> None:
        """Give a Pod its node, as a scheduler does.

        Raises:
            ApiError: 409 when it has one.
        """
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": key.name, "namespace": key.namespace},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        path = _path(self.kinds.named("pods"), key.namespace, key.name, "binding")
        self.request("POST", path, body=body)

    def delete(
        self,
        kind: str,
        name: str,
        namespace: str = "",
        *,
        grace_period_s: int | None = None,
        uid: str = "",
    ) -> object:
        """Delete an object; a Pod with a node and a grace period is only marked.

        Raises:
            ApiError: 404 when there is none, 409 when its uid is another.
        """
        options: Obj = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace_period_s is not None:
            options["gracePeriodSeconds"] = grace_period_s
        if uid:
            options["preconditions"] = {"uid": uid}
        path = _path(self.kinds.named(kind), namespace, name)
        return self.request("DELETE", path, body=options)


def _path(resource: Resource, namespace: str, name: str = "", subresource: str = "") -> str:
    root = f"/apis/{resource.api_version}" if resource.group else f"/api/{resource.version}"
    parts = [root]
    if resource.namespaced and namespace:
        parts.append(f"namespaces/{namespace}")
    parts += [part for part in (resource.plural, name, subresource) if part]
    return "/".join(parts)


def _query(**given: str) -> str:
    kept = {name: value for name, value in given.items() if value}
    return f"?{urlencode(kept)}" if kept else ""


def _version(found: Obj) -> int:
    return int(found["metadata"]["resourceVersion"])


def _items(resource: Resource, found: Obj) -> Objs:
    """Return the items of a list with their kind, which a list leaves out."""
    kind = {"apiVersion": resource.api_version, "kind": resource.kind}
    items = [kind | item for item in found.get("items") or ()]
    return sorted(
        items, key=lambda i: (i["metadata"].get("namespace") or "", i["metadata"]["name"])
    )


def _answer(code: int, data: bytes) -> Obj:
    try:
        found = json.loads(data) if data else {}
    except ValueError:
        found = {"message": data.decode(errors="replace").strip()}
    if not isinstance(found, dict):
        found = {"message": str(found)}
    if code >= 400:
        message = str(found.get("message") or f"HTTP {code}")
        raise ApiError(code, str(found.get("reason") or ""), message, details=found.get("details"))
    return found


def _unreachable(error: BaseException) -> ApiError:
    return ApiError(503, "ServiceUnavailable", f"the API server does not answer: {error!r}")
