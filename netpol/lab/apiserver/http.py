"""The HTTP side: routing, and the order of checks before an object is touched.

Owns faults, authentication, path, authorization, in this order, and the paths that are no objects
(discovery, version, health). The verbs on objects stand in `objects.py`.
"""

import asyncio
import random

from aiohttp import web

from netpol.lab.apiserver import discovery, errors, openapi, rbac
from netpol.lab.apiserver.answers import answer
from netpol.lab.apiserver.auth import Authenticator, User, named_user
from netpol.lab.apiserver.errors import ApiError, Obj
from netpol.lab.apiserver.faults import Faults
from netpol.lab.apiserver.history import encode
from netpol.lab.apiserver.objects import ObjectCalls
from netpol.lab.apiserver.request import parse_call
from netpol.lab.apiserver.store import Store

_HEALTH = ("/healthz", "/readyz", "/livez")


class Handler:
    """Answers every request of one server.

    Args:
        store: The objects.
        authenticator: Who is asking.
        faults: What is to go wrong.
        objects: Who answers the requests on objects.
    """

    def __init__(
        self,
        *,
        store: Store,
        authenticator: Authenticator,
        faults: Faults,
        objects: ObjectCalls,
    ) -> None:
        self._store = store
        self._authenticator = authenticator
        self._faults = faults
        self._objects = objects

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request; every refusal becomes a Status."""
        try:
            await self._misbehave(request)
            user = self._authenticator.user(request.headers.get("Authorization", ""))
            user = self._impersonated(user, request)
            path = request.path
            if path.startswith("/api/v1/") or (path.startswith("/apis/") and path.count("/") > 3):
                call = parse_call(self._store.kinds, request.method, path, request.query)
                rbac.authorize(self._store, user, call)
                return await self._objects.serve(request, call, user)
            return self._about(request, user)
        except ApiError as refusal:
            headers = {}
            if refusal.code in (429, 504):
                headers["Retry-After"] = "1"
            return answer(request, encode(refusal.status()), status=refusal.code, headers=headers)

    async def _misbehave(self, request: web.Request) -> None:
        faults = self._faults
        if faults.latency_s:
            faults.hits["latency_s"] += 1
            await asyncio.sleep(faults.latency_s)
        if faults.fail_paths not in request.path_qs:
            return
        failed = faults.take("fail_requests")
        if not failed and faults.fail_probability > random.random():  # noqa: S311 - no secret
            faults.hits["fail_probability"] += 1
            failed = True
        if failed:
            refusal = errors.internal("Internal error occurred: a fault was asked for")
            refusal.code = faults.fail_status
            raise refusal

    def _impersonated(self, user: User, request: web.Request) -> User:
        """Return whom the user wants to be, as `kubectl --as` asks."""
        name = request.headers.get("Impersonate-User")
        if not name:
            return user
        wanted = rbac.Attributes("impersonate", "", "users", name=name)
        if not rbac.allowed(self._store, user, wanted):
            why = f'User "{user.name}" cannot impersonate resource "users" at the cluster scope'
            raise errors.forbidden("", "users", name, why)
        return named_user(name, request.headers.getall("Impersonate-Group", []))

    # Paths that are no objects

    def _about(self, request: web.Request, user: User) -> web.StreamResponse:
        path = request.path.rstrip("/") or "/"
        if not rbac.allowed_path(self._store, user, path):
            why = f'User "{user.name}" cannot get path "{path}"'
            raise ApiError(403, "Forbidden", f"forbidden: {why}", details={})
        if request.method not in ("GET", "HEAD"):
            raise errors.method_not_allowed()
        if path in _HEALTH or path.rpartition("/")[0] in _HEALTH:
            return web.Response(text="ok")
        kinds = self._store.kinds
        accept = request.headers.get("Accept", "")
        if path in ("/api", "/apis") and "APIGroupDiscoveryList" in accept:
            beta = "v=v2;" not in accept + ";"
            body = discovery.aggregated(kinds, core=path == "/api", beta=beta)
            version = body["apiVersion"].rpartition("/")[2]
            kind = f"application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
            return answer(request, encode(body), content_type=kind)
        match path.strip("/").split("/"):
            case ["openapi", "v3", "api", "v1"]:
                return answer(request, openapi.document(kinds, "", "v1"))
            case ["openapi", "v3", "apis", group, version] if version in kinds.groups().get(
                group, ()
            ):
                return answer(request, openapi.document(kinds, group, version))
            case _:
                return answer(request, encode(self._document(path)))

    def _document(self, path: str) -> Obj:
        kinds = self._store.kinds
        groups = kinds.groups()
        match path.strip("/").split("/"):
            case [""]:
                return {"paths": ["/api", "/apis", "/healthz", "/openapi/v3", "/version"]}
            case ["version"]:
                return discovery.VERSION
            case ["api"]:
                return discovery.legacy_versions()
            case ["apis"]:
                return discovery.legacy_groups(kinds)
            case ["api", "v1"]:
                return discovery.legacy_resources(kinds, "", "v1")
            case ["apis", group] if group in groups:
                return discovery.legacy_group(group, groups[group])
            case ["apis", group, version] if version in groups.get(group, ()):
                return discovery.legacy_resources(kinds, group, version)
            case ["openapi", "v3"]:
                return openapi.index(kinds)
            case _:
                raise errors.no_such_path()
