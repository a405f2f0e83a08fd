"""The verbs on objects: from a parsed and authorized call to the store and back.

Owns get, list, watch, create, update, patch, apply and delete as HTTP shows them. Routing and the order of
checks stand in `http.py`.
"""

import asyncio

from aiohttp import web

from netpol.lab.apiserver import (
    apply,
    bodies,
    errors,
    exec,  # noqa: A004 - the subresource's name
    forms,
    patch,
    rbac,
    tables,
    typed,
)
from netpol.lab.apiserver.answers import answer, success
from netpol.lab.apiserver.auth import Authenticator, User
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.faults import Faults
from netpol.lab.apiserver.forms import Form
from netpol.lab.apiserver.history import Entry, Key, encode
from netpol.lab.apiserver.query import Filter, ListQuery, make_filter
from netpol.lab.apiserver.registry import DeleteOptions
from netpol.lab.apiserver.request import Call, flag, number
from netpol.lab.apiserver.store import Store
from netpol.lab.apiserver.watch import Stream, WatchQuery


class ObjectCalls:
    """Answers the requests on objects of one server.

    Args:
        store: The objects.
        authenticator: Who mints tokens.
        faults: What is to go wrong.
        hooks: The lab's part of logs and exec.
        bookmark_s: Seconds between two bookmarks of a watch.
    """

    def __init__(
        self,
        *,
        store: Store,
        authenticator: Authenticator,
        faults: Faults,
        hooks: exec.Hooks,
        bookmark_s: float,
    ) -> None:
        self._store = store
        self._authenticator = authenticator
        self._faults = faults
        self._hooks = hooks
        self._bookmark_s = bookmark_s
        self.closing = asyncio.Event()

    async def serve(self, request: web.Request, call: Call, user: User) -> web.StreamResponse:
        """Answer a request that was let through."""
        if call.resource.key == "pods" and call.subresource in ("log", "exec"):
            return await exec.serve(request, call, self._store, self._hooks)
        match call.verb:
            case "get":
                return self._get(request, call)
            case "list":
                return self._list(request, call)
            case "watch":
                return await self._watch(request, call)
            case "create":
                return await self._create(request, call, user)
            case "update":
                return await self._update(request, call)
            case "patch":
                return await self._patch(request, call)
            case "delete":
                return await self._delete(request, call)
            case _:
                return await self._delete_collection(request, call)

    def _get(self, request: web.Request, call: Call) -> web.StreamResponse:
        form = forms.negotiate(request.headers.get("Accept", ""))
        entry = self._store.entry(call.resource, call.key)
        return self._entry_answer(request, call, entry, form)

    def _entry_answer(
        self, request: web.Request, call: Call, entry: Entry, form: Form, status: int = 200
    ) -> web.StreamResponse:
        if form.table or form.yaml:
            return self._obj_answer(request, call, entry.obj(), form, status=status)
        return answer(request, forms.entry_json(call.resource, entry, form), status=status)

    def _obj_answer(
        self,
        request: web.Request,
        call: Call,
        obj: Obj,
        form: Form,
        *,
        status: int = 200,
        warnings: tuple[str, ...] = (),
    ) -> web.StreamResponse:
        obj = forms.to_served(call.resource, obj)
        if form.table:
            include = call.query.get("includeObject", "Metadata")
            obj = tables.table(call.resource, [obj], include=include)
        elif form.partial:
            obj = forms.metadata_only(obj)
        return answer(request, encode(obj), status=status, yaml=form.yaml, warnings=warnings)

    def _list(self, request: web.Request, call: Call) -> web.StreamResponse:
        form = forms.negotiate(request.headers.get("Accept", ""))
        query = ListQuery(
            self._filter(call),
            limit=number(call.query, "limit") or 0,
            continue_token=call.query.get("continue", ""),
            resource_version=number(call.query, "resourceVersion"),
            match=call.query.get("resourceVersionMatch", ""),
        )
        page = self._store.page(call.resource, query)
        if form.table:
            objects = [forms.to_served(call.resource, entry.obj()) for entry in page.entries]
            include = call.query.get("includeObject", "Metadata")
            metadata = forms.list_metadata(page)
            body = tables.table(call.resource, objects, metadata=metadata, include=include)
            return answer(request, encode(body))
        return answer(request, forms.list_json(call.resource, page, form), yaml=form.yaml)

    def _filter(self, call: Call) -> Filter:
        fields = call.query.get("fieldSelector", "")
        if self._faults.no_host_network_field and "spec.hostNetwork" in fields:
            self._faults.hits["no_host_network_field"] += 1
            raise errors.bad_request("field label not supported: spec.hostNetwork")
        if call.name:  # a watch of one object by its path
            fields = f"metadata.name={call.name}"
        return make_filter(
            call.resource,
            namespace=call.namespace,
            labels=call.query.get("labelSelector", ""),
            fields=fields,
        )

    async def _watch(self, request: web.Request, call: Call) -> web.StreamResponse:
        form = forms.negotiate(request.headers.get("Accept", ""))
        if self._faults.take("watch_http_410"):
            raise errors.expired("too old resource version: a fault was asked for")
        send_initial = call.query.get("sendInitialEvents")
        timeout_s = number(call.query, "timeoutSeconds")
        query = WatchQuery(
            self._filter(call),
            resource_version=number(call.query, "resourceVersion"),
            match=call.query.get("resourceVersionMatch", ""),
            send_initial=None if send_initial is None else flag(call.query, "sendInitialEvents"),
            bookmarks=flag(call.query, "allowWatchBookmarks"),
            timeout_s=None if timeout_s is None else float(timeout_s),
        )
        query.check(watch_list=not self._faults.no_watch_list)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        stream = Stream(
            history=self._store.history,
            resource=call.resource,
            query=query,
            form=form,
            faults=self._faults,
        )
        try:
            await stream.run(response, bookmark_s=self._bookmark_s, closing=self.closing)
            await response.write_eof()
        except ConnectionResetError:
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _create(self, request: web.Request, call: Call, user: User) -> web.StreamResponse:
        form = forms.negotiate(request.headers.get("Accept", ""))
        body = bodies.read(request.headers.get("Content-Type", ""), await request.read())
        resource = call.resource
        if resource.plural == "selfsubjectaccessreviews":
            reviewed = rbac.self_review(self._store, user, body)
            return answer(request, encode(reviewed), status=201)
        if resource.plural == "selfsubjectreviews":
            return answer(request, encode(rbac.who_am_i(user, body)), status=201)
        if call.subresource == "token":
            return self._token(request, call, body)
        if call.subresource == "binding" or body.get("kind") == "Binding":
            return self._bind(request, call, body)
        if call.subresource or call.name:
            raise errors.method_not_allowed()
        _check_kind(call, body)
        body, warnings = _read(call, body)
        body = forms.to_stored(resource, body)
        created = self._store.insert(
            resource,
            body,
            namespace=_namespace_of(call, body),
            dry_run=call.dry_run,
            manager=_manager(request, call),
        )
        return self._obj_answer(request, call, created, form, status=201, warnings=warnings)

    def _token(self, request: web.Request, call: Call, body: Obj) -> web.StreamResponse:
        self._store.entry(call.resource, call.key)
        token = self._authenticator.mint(call.key.namespace, call.name)
        status = {"token": token, "expirationTimestamp": "2099-01-01T00:00:00Z"}
        return answer(request, encode(body | {"status": status}), status=201)

    def _bind(self, request: web.Request, call: Call, body: Obj) -> web.StreamResponse:
        named = str((body.get("metadata") or {}).get("name") or "")
        name = call.name or named
        if named != name:
            raise errors.bad_request("name in URL does not match name in Binding object")
        key = Key(call.namespace or "", name)
        node = (body.get("target") or {}).get("name")
        if not node:
            raise errors.bad_request("a Binding without target.name")
        self._store.bind(key, str(node), dry_run=call.dry_run)
        return answer(request, encode(success({})), status=201)

    async def _update(self, request: web.Request, call: Call) -> web.StreamResponse:
        form = forms.negotiate(request.headers.get("Accept", ""))
        if not call.name:
            raise errors.method_not_allowed()
        body = bodies.read(request.headers.get("Content-Type", ""), await request.read())
        _check_kind(call, body)
        body, warnings = _read(call, body)
        updated = self._store.replace(
            call.resource,
            call.key,
            forms.to_stored(call.resource, body),
            subresource=call.subresource,
            dry_run=call.dry_run,
            manager=_manager(request, call),
        )
        return self._obj_answer(request, call, updated, form, warnings=warnings)

    async def _patch(self, request: web.Request, call: Call) -> web.StreamResponse:
        form = forms.negotiate(request.headers.get("Accept", ""))
        media = request.headers.get("Content-Type", "").partition(";")[0].strip()
        style = patch.STYLES.get(media)
        if style is None:
            text = (
                "the body of the request was in an unknown format - accepted media types "
                f"include: {', '.join(patch.STYLES)}"
            )
            raise errors.unsupported_media_type(text)
        body = bodies.read_yaml(await request.read())
        if style == "apply":
            return self._apply(request, call, body, form)
        resource = call.resource
        current = self._store.entry(resource, call.key).obj()
        served = forms.to_served(resource, current)
        changed, warnings = _read(call, patch.apply(resource, served, body, style))
        changed = forms.to_stored(resource, changed)
        meta = body.get("metadata") if isinstance(body, dict) else None
        if not (isinstance(meta, dict) and meta.get("resourceVersion")):
            changed["metadata"].pop("resourceVersion", None)
        updated = self._store.replace(
            resource,
            call.key,
            changed,
            subresource=call.subresource,
            dry_run=call.dry_run,
            manager=_manager(request, call),
        )
        return self._obj_answer(request, call, updated, form, warnings=warnings)

    def _apply(
        self, request: web.Request, call: Call, body: object, form: Form
    ) -> web.StreamResponse:
        if not isinstance(body, dict):
            raise errors.bad_request("an apply configuration is an object")
        manager = call.query.get("fieldManager", "")
        if not manager:
            raise errors.bad_request("PatchOptions.meta.k8s.io: fieldManager: Required value")
        _check_kind(call, body)
        resource = call.resource
        body, warnings = _read(call, body)
        body = forms.to_stored(resource, body)
        if call.key in self._store.history.shelf(resource).entries:
            live = self._store.entry(resource, call.key).obj()
            changed = apply.merge(live, body, manager, call.subresource)
            changed["metadata"].pop("resourceVersion", None)
            updated = self._store.replace(
                resource,
                call.key,
                changed,
                subresource=call.subresource,
                dry_run=call.dry_run,
                manager=manager,
                applied=body,
            )
            return self._obj_answer(request, call, updated, form, warnings=warnings)
        if call.subresource:
            raise errors.not_found(resource.group, resource.plural, call.name)
        given = body | {"metadata": dict(body.get("metadata") or {}) | {"name": call.name}}
        created = self._store.insert(
            resource,
            given,
            namespace=_namespace_of(call, body),
            dry_run=call.dry_run,
            manager=manager,
            applied=body,
        )
        return self._obj_answer(request, call, created, form, status=201, warnings=warnings)

    async def _delete(self, request: web.Request, call: Call) -> web.StreamResponse:
        if call.subresource:
            raise errors.method_not_allowed()
        form = forms.negotiate(request.headers.get("Accept", ""))
        deleted = self._store.discard(call.resource, call.key, await _delete_options(request, call))
        if not deleted.gone or call.resource.returns_deleted:
            return self._obj_answer(request, call, deleted.obj, form)
        details = {"name": call.name, "kind": call.resource.plural}
        if call.resource.group:
            details["group"] = call.resource.group
        details["uid"] = deleted.obj["metadata"]["uid"]
        return answer(request, encode(success(details)))

    async def _delete_collection(self, request: web.Request, call: Call) -> web.StreamResponse:
        form = forms.negotiate(request.headers.get("Accept", ""))
        options = await _delete_options(request, call)
        page = self._store.page(call.resource, ListQuery(self._filter(call)))
        shelf = self._store.history.shelf(call.resource)
        for entry in page.entries:
            if entry.key in shelf.entries:
                self._store.discard(call.resource, entry.key, options)
        return answer(request, forms.list_json(call.resource, page, form))


async def _delete_options(request: web.Request, call: Call) -> DeleteOptions:
    data = await request.read()
    body: Obj = {}
    if data:
        body = bodies.read(request.headers.get("Content-Type", ""), data)
    wanted = body.get("preconditions") or {}
    grace_s = number(call.query, "gracePeriodSeconds")
    if grace_s is None and body.get("gracePeriodSeconds") is not None:
        grace_s = int(body["gracePeriodSeconds"])
    dry_run = call.dry_run or "All" in (body.get("dryRun") or ())
    return DeleteOptions(
        grace_period_s=grace_s,
        uid=wanted.get("uid") or "",
        resource_version=wanted.get("resourceVersion") or "",
        dry_run=dry_run,
        propagation=call.query.get("propagationPolicy") or body.get("propagationPolicy") or "",
    )


def _read(call: Call, body: Obj) -> tuple[Obj, tuple[str, ...]]:
    """Return an object as its kind's fields allow, and the warnings about the rest."""
    validation = call.query.get("fieldValidation", "")
    obj, warnings = typed.read(call.resource, body, validation=validation)
    return obj, tuple(warnings)


def _check_kind(call: Call, body: Obj) -> None:
    """Refuse an object of another kind, version or namespace than the path's."""
    resource = call.resource
    given = (body.get("apiVersion") or resource.api_version, body.get("kind") or resource.kind)
    if given != (resource.api_version, resource.kind):
        text = (
            f"the object provided is {given[0]} {given[1]}, needed "
            f"{resource.api_version} {resource.kind}"
        )
        raise errors.bad_request(text)
    _namespace_of(call, body)


def _namespace_of(call: Call, body: Obj) -> str:
    meta = body.get("metadata")
    if meta is not None and not isinstance(meta, dict):
        raise errors.bad_request("metadata is no object")
    given = (meta or {}).get("namespace")
    if call.namespace and given and given != call.namespace:
        text = (
            "the namespace of the provided object does not match the namespace sent on the request"
        )
        raise errors.bad_request(text)
    return call.namespace or ""


def _manager(request: web.Request, call: Call) -> str:
    agent = request.headers.get("User-Agent", "").partition("/")[0]
    return call.query.get("fieldManager") or agent or "unknown"
