"""An API server of one kind that misbehaves on demand, and a clock that makes waiting cheap.

It keeps state and a log like the real thing (resourceVersions, resume, compaction, pages, bookmarks,
WatchList), so that a client that does everything right always converges; faults are asked for by name
and counted when they happen.
"""

import asyncio
import contextlib
import json
from collections import Counter, deque

from aiohttp import web

from netpol.aio.clock import ManualClock


def pod(name, *, uid="", ip="", labels=None, node="n1", namespace="a", **more):
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-{name}",
            "labels": labels or {"app": name},
        },
        "spec": {"nodeName": node, "containers": [{"ports": [{"containerPort": 80}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}] if ip else []},
        **more,
    }


class FastClock(ManualClock):
    """Time passes when somebody sleeps, and only then; every pause is recorded."""

    def __init__(self):
        super().__init__(start_s=0.0)
        self.pauses = []

    async def sleep(self, delay_s):
        self.pauses.append(delay_s)
        self._now += delay_s
        await asyncio.sleep(0)


class BadServer:
    """Serves /api/v1/pods.

    `watch_faults` and `list_faults` name what happens to the next requests, one each; the `always_`
    ones to all. Names: a number (that HTTP status), "empty", "gone", "cut", "garbage", "duplicate",
    "reorder", "drop", "silent". `tokens` are those accepted.
    """

    def __init__(self):
        self.rv = 100
        self.floor = 100
        self.log = []
        self.objects = {}
        self.watch_faults, self.list_faults = deque(), deque()
        self.always_watch = self.always_list = ""
        self.watch_list = True
        self.refused_fields = ""
        self.tokens = None
        self.retry_after = ""
        self.expire_continue = 0
        self.lag = 0
        self.hits = Counter()
        self.lists, self.watches = [], []
        self.open = []
        self.url = ""
        self._wake = asyncio.Event()
        self._runner = None

    # State

    def put(self, obj):
        self.rv += 1
        obj = json.loads(json.dumps(obj))
        key = (obj["metadata"].get("namespace"), obj["metadata"]["name"])
        obj["metadata"]["resourceVersion"] = str(self.rv)
        kind = "MODIFIED" if key in self.objects else "ADDED"
        self.objects[key] = obj
        self._record(kind, obj)
        return obj

    def delete(self, name, namespace="a"):
        self.rv += 1
        gone = json.loads(json.dumps(self.objects.pop((namespace, name))))
        gone["metadata"]["resourceVersion"] = str(self.rv)
        self._record("DELETED", gone)

    def compact(self):
        self.floor = self.rv
        self.log.clear()

    def _record(self, kind, obj):
        self.log.append((self.rv, {"type": kind, "object": obj}))
        self._notify()

    def _notify(self):
        self._wake.set()
        self._wake = asyncio.Event()

    def inject(self, line):
        """Send raw bytes to every open watch."""
        for stream in self.open:
            stream.extra.append(line)
        self._notify()

    def drop_all(self):
        """Break every open connection off."""
        for stream in self.open:
            stream.broken = True
        self._notify()

    def matching(self, selector):
        terms = [t for t in selector.split(",") if t]
        return [
            o
            for o in self.objects.values()
            if all(self._matches(o, *t.split("=", 1)) for t in terms if "!" not in t)
        ]

    @staticmethod
    def _matches(obj, field, value):
        return field != "spec.nodeName" or obj["spec"]["nodeName"] == value

    # HTTP

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/api/v1/pods", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.02)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_):
        self.drop_all()
        await self._runner.cleanup()

    async def _handle(self, request):
        query = dict(request.query)
        watching = query.get("watch") == "true"
        (self.watches if watching else self.lists).append(query)
        token = request.headers.get("Authorization", "")
        if self.tokens is not None and token not in self.tokens:
            self.hits["401"] += 1
            return self._status(401, "Unauthorized")
        if self.refused_fields and self.refused_fields in query.get("fieldSelector", ""):
            self.hits["refused field"] += 1
            return self._status(400, "BadRequest")
        if watching:
            return await self._watch(request, query)
        return self._list(query)

    def _status(self, code, reason):
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        body = {"kind": "Status", "status": "Failure", "code": code, "reason": reason}
        return web.json_response(body, status=code, headers=headers)

    def _fault(self, queue, always):
        fault = queue.popleft() if queue else always
        if fault:
            self.hits[fault] += 1
        return fault

    def _list(self, query):
        fault = self._fault(self.list_faults, self.always_list)
        if fault.isdigit():
            return self._status(int(fault), "Expired" if fault == "410" else "InternalError")
        if fault == "garbage":
            return web.Response(body=b'{"kind":"PodList","items":[{"meta')
        found = sorted(self.matching(query.get("fieldSelector", "")), key=_key)
        start, rv = 0, self.rv - self.lag
        if "continue" in query:
            if self.expire_continue:
                self.expire_continue -= 1
                self.hits["continue expired"] += 1
                return self._status(410, "Expired")
            start, rv = map(int, query["continue"].split("."))
        limit = int(query.get("limit", "100000"))
        meta = {"resourceVersion": str(rv)}
        if start + limit < len(found):
            meta["continue"] = f"{start + limit}.{rv}"
        body = {"kind": "PodList", "metadata": meta, "items": found[start : start + limit]}
        return web.json_response(body)

    async def _watch(self, request, query):
        initial = query.get("sendInitialEvents") == "true"
        if initial and not self.watch_list:
            self.hits["422"] += 1
            return self._status(422, "Invalid")
        fault = self._fault(self.watch_faults, self.always_watch)
        if fault.isdigit():
            return self._status(int(fault), "Expired" if fault == "410" else "InternalError")
        response = web.StreamResponse()
        await response.prepare(request)
        stream = Stream(self, response, fault)
        self.open.append(stream)
        try:
            with contextlib.suppress(ConnectionError):
                await stream.run(query, initial=initial)
        finally:
            self.open.remove(stream)
        if stream.broken and request.transport is not None:
            request.transport.abort()
        return response


def _key(obj):
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def line(kind, obj):
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def bookmark(rv, *, end=False):
    meta = {"resourceVersion": str(rv), "creationTimestamp": None}
    if end:
        meta["annotations"] = {"k8s.io/initial-events-end": "true"}
    return line("BOOKMARK", {"kind": "Pod", "metadata": meta, "spec": {"containers": None}})


class Stream:
    """One watch."""

    def __init__(self, server, response, fault):
        self.server, self.response, self.fault = server, response, fault
        self.extra = deque()
        self.broken = False

    async def run(self, query, *, initial):
        server, selector = self.server, query.get("fieldSelector", "")
        if self.fault == "silent":
            while not self.broken:
                await server._wake.wait()
            return
        if self.fault == "empty":
            return
        at = int(query.get("resourceVersion", "0"))
        if self.fault == "gone" or (not initial and at < server.floor):
            server.hits["gone"] += self.fault != "gone"
            status = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired"}
            await self.response.write(line("ERROR", status))
            return
        if initial:
            at = server.rv
            for obj in server.matching(selector):
                await self.response.write(line("ADDED", obj))
            await self.response.write(bookmark(at, end=True))
        while not self.broken:
            wake = server._wake
            batch = [(rv, e) for rv, e in server.log if rv > at]
            while self.extra:
                await self.response.write(self.extra.popleft())
            if batch:
                at = batch[-1][0]
                if await self._send(batch):
                    return
                continue
            await wake.wait()

    async def _send(self, batch):
        lines = [json.dumps(e).encode() + b"\n" for _, e in batch]
        match self.fault:
            case "cut":
                whole, half = lines[:-1], lines[-1][: len(lines[-1]) // 2]
                await self.response.write(b"".join(whole) + half)
                self.broken = True
                return True
            case "end":
                await self.response.write(b"".join(lines[:-1]) + lines[-1][:-5])
                return True  # a clean end of the body, in the middle of an object
            case "garbage":
                lines[0] = b'{"type":"MODIF\xff{{ ]\n'
                self.fault = ""
            case "duplicate":
                lines = [x for one in lines for x in (one, one)]
            case "reorder":
                lines = lines[::-1] + lines
                self.fault = ""
            case "drop":
                await self.response.write(b"".join(lines[: len(lines) // 2]))
                self.broken = True
                return True
        data = b"".join(lines)
        for i in range(0, len(data), 7919):  # a prime: cut anywhere
            await self.response.write(data[i : i + 7919])
        return False
