"""How far each watch of an agent must have come, on an API server that sends bookmarks when it likes.

Owns the latest change of every kind that agents watch, and the answer to: which version must a watch
with this selection have seen to know all that the server holds now? A change counts for a watch when the
object was selected before it or after it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from netpol.k8s import informers
from netpol.lab.apiserver.history import CompactedError
from netpol.lab.remotestore import RemoteStore

Obj = dict[str, Any]

KINDS = {
    "Namespace": "namespaces",
    "Pod": "pods",
    "Node": "nodes",
    "Service": "services",
    "NetworkPolicy": "networkpolicies.networking.k8s.io",
    "EndpointSlice": "endpointslices.discovery.k8s.io",
}
_POLL_S = 0.01
_CHANGES_MAX = 20_000
#: The fields that agents select by, as dotted paths.
_FIELDS = (
    "metadata.name",
    "metadata.namespace",
    "spec.nodeName",
    "spec.hostNetwork",
    "status.phase",
)


class _Seen(NamedTuple):
    """An object as the tide knows it."""

    version: int
    fields: dict[str, str]


class _Change(NamedTuple):
    """What happened to an object at a version; None where it was not, or is no more."""

    version: int
    before: dict[str, str] | None
    after: dict[str, str] | None


class Tide:
    """Follows the kinds that agents watch."""

    def __init__(self, store: RemoteStore) -> None:
        self._store = store
        self._objects: dict[str, dict[str, _Seen]] = defaultdict(dict)
        self._gone: dict[str, dict[str, int]] = defaultdict(dict)
        self._changes: dict[str, deque[_Change]] = {
            kind: deque(maxlen=_CHANGES_MAX) for kind in KINDS
        }

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for kind in KINDS:
                tasks.create_task(self._follow(kind), name=f"tide {kind}")

    async def _follow(self, kind: str) -> None:
        while True:
            items, version = await self._store.listing(KINDS[kind])
            present = {item["metadata"]["uid"] for item in items}
            for uid in self._objects[kind].keys() - present:
                self.note(kind, uid, version, None)  # it went unseen, by now at the latest
            for item in items:
                self._see(kind, "MODIFIED", item)
            try:
                changes = self._store.watch(KINDS[kind], resource_version=version)
                async for event, obj in changes:
                    self._see(kind, event, obj)
            except CompactedError:
                continue

    def _see(self, kind: str, event: str, obj: Obj) -> None:
        meta = obj["metadata"]
        after = None if event == "DELETED" else _fields(obj)
        self.note(kind, meta["uid"], int(meta["resourceVersion"]), after)

    def note(self, kind: str, uid: str, version: int, after: dict[str, str] | None) -> None:
        """Write down the state of an object; one that is known already changes nothing."""
        objects = self._objects[kind]
        old = objects.get(uid)
        if old is not None and old.version >= version:
            return
        before = old.fields if old is not None else None
        self._changes[kind].append(_Change(version, before, after))
        if after is None:
            objects.pop(uid, None)
            self._gone[kind][uid] = version
        else:
            objects[uid] = _Seen(version, after)

    async def horizon(self) -> Callable[[Obj], int]:
        """Wait until all that the server holds is noted; return what a watch must have seen.

        The answer takes the line of a watch in an agent's status.
        """
        for kind, plural in KINDS.items():
            items, version = await self._store.listing(plural)
            wanted = {
                item["metadata"]["uid"]: int(item["metadata"]["resourceVersion"]) for item in items
            }
            while self._is_behind(kind, wanted, version):
                await asyncio.sleep(_POLL_S)
        ends = {kind: self._changes[kind][-1].version for kind in KINDS if self._changes[kind]}
        return lambda watch: self.needed(str(watch.get("kind")), str(watch["selection"]), ends)

    def _is_behind(self, kind: str, wanted: dict[str, int], version: int) -> bool:
        objects, gone = self._objects[kind], self._gone[kind]
        for uid, listed in wanted.items():
            seen = objects.get(uid)
            if uid not in gone and (seen is None or seen.version < listed):
                return True
        return any(seen.version <= version and uid not in wanted for uid, seen in objects.items())

    def needed(self, kind: str, selection: str, ends: dict[str, int]) -> int:
        """Return the version of the last change, up to `ends`, that a selection is told about."""
        terms = list(_terms(kind, selection))
        end = ends.get(kind, 0)
        for change in reversed(self._changes.get(kind, ())):
            if change.version <= end and any(
                fields is not None and _keeps(terms, fields)
                for fields in (change.before, change.after)
            ):
                return change.version
        return 0


class _Term(NamedTuple):
    field: str
    equal: bool
    value: str


def _terms(kind: str, selection: str) -> Iterator[_Term]:
    """Read a selection as an agent reports it (`Selection` as text)."""
    everywhere = informers.pods_everywhere()
    words = [] if selection == "all" else selection.split(" ")
    if kind == "Pod" and selection == str(everywhere):
        words = [",".join(everywhere.fields + everywhere.optional_fields)]
    if words[:1] == ["namespace"]:
        yield _Term("metadata.namespace", equal=True, value=words[1])
        words = words[2:]
    for text in ",".join(words).split(","):
        name, operator, value = text.partition("=")
        if operator and name.rstrip("!") in _FIELDS:
            yield _Term(name.rstrip("!"), equal=not name.endswith("!"), value=value.lstrip("="))


def _keeps(terms: list[_Term], fields: dict[str, str]) -> bool:
    return all((fields[term.field] == term.value) is term.equal for term in terms)


def _fields(obj: Obj) -> dict[str, str]:
    found = {}
    for path in _FIELDS:
        value: Any = obj
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if path == "spec.hostNetwork":
            value = "true" if value else "false"
        found[path] = str(value or "")
    return found
