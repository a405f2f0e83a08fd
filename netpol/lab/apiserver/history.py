"""The shelves: objects of one kind as encoded bytes, and the bounded log of their changes.

Owns the global resourceVersion, snapshots at an older version, compaction and the cursors that watches
read the log through. Knows no admission, no defaults, no HTTP. An object is encoded once when it is
stored and is never changed after, so a 10,000 pod cluster costs its JSON and not its dicts.

Invariants: versions in a log only rise; a cursor sees every event after its start exactly once, or is
told that the log was cut behind it.
"""

import asyncio
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from typing import Any, NamedTuple

import msgspec

from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.resources import Resource
from netpol.lab.apiserver.selectors import field_text

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Key(NamedTuple):
    """Where an object stands; the namespace of a cluster-scoped object is empty."""

    namespace: str
    name: str


class Entry:
    """One version of one object, immutable."""

    __slots__ = ("fields", "json", "key", "labels", "rv")

    def __init__(self, resource: Resource, key: Key, obj: Obj, rv: int) -> None:
        obj["metadata"]["resourceVersion"] = str(rv)
        self.key = key
        self.rv = rv
        self.json: bytes = _encode(obj)
        self.labels: dict[str, str] = obj["metadata"].get("labels") or {}
        self.fields = tuple(field_text(obj, path) for path in resource.fields)

    def obj(self) -> Obj:
        """Return the object as a fresh dict, which is the caller's to change."""
        found: Obj = _decode(self.json)
        return found


class LogEvent:
    """One change. `before` is None for an ADDED; `entry` of a DELETED is the last state.

    `lines` caches the encoded watch line per (type, format), so that a fan-out encodes once.
    """

    __slots__ = ("before", "entry", "lines", "rv", "type")

    def __init__(self, kind: str, entry: Entry, before: Entry | None) -> None:
        self.type = kind
        self.entry = entry
        self.before = before
        self.rv = entry.rv
        self.lines: dict[tuple[str, str], bytes] = {}


class CompactedError(Exception):
    """The log no longer reaches back to the wanted version."""

    def __init__(self, wanted: int, oldest: int) -> None:
        super().__init__(f"too old resource version: {wanted} ({oldest})")
        self.wanted = wanted
        self.oldest = oldest


class Snapshot(NamedTuple):
    """The objects of one kind at one version, with their keys in order."""

    rv: int
    keys: list[Key]
    entries: dict[Key, Entry]

    def range(self, namespace: str | None, after: Key | None) -> tuple[int, int]:
        """Return the first and the last plus one index for a namespace, behind a key."""
        low, high = 0, len(self.keys)
        if namespace is not None:
            low = bisect_left(self.keys, Key(namespace, ""))
            high = bisect_left(self.keys, Key(namespace + "\0", ""))
        if after is not None:
            low = max(low, bisect_right(self.keys, after))
        return low, high


class Shelf:
    """All objects of one kind, and the log of their changes.

    Args:
        resource: The kind in its stored version.
        history: How many events the log keeps at least; twice as many at most.
        rv: The version at which the shelf begins.
    """

    def __init__(self, resource: Resource, history: int, rv: int) -> None:
        self.resource = resource
        self.entries: dict[Key, Entry] = {}
        self.compacted_rv = rv
        self.log: list[LogEvent] = []
        self.first = 0  # absolute index of log[0]; cursors count in absolute indexes
        self.cursors: set[Cursor] = set()
        self._history = history
        self.counts: Counter[str] = Counter()  # objects per namespace
        self._keys: list[Key] = []
        self._snapshot: Snapshot | None = None

    def commit(self, event: LogEvent) -> None:
        """Apply a change, log it and wake who reads the log."""
        key = event.entry.key
        if event.type == "DELETED":
            del self.entries[key]
            del self._keys[bisect_left(self._keys, key)]
            self.counts[key.namespace] -= 1
        else:
            if key not in self.entries:
                insort(self._keys, key)
                self.counts[key.namespace] += 1
            self.entries[key] = event.entry
        self.log.append(event)
        self._snapshot = None
        if len(self.log) > 2 * self._history:
            self._cut(len(self.log) - self._history)
        for cursor in self.cursors:
            cursor.wake.set()

    def _cut(self, count: int) -> None:
        if count > 0:
            self.compacted_rv = self.log[count - 1].rv
            del self.log[:count]
            self.first += count

    def compact(self, rv: int) -> None:
        """Forget the whole log: watches and snapshots older than `rv` are refused from now on."""
        self.first += len(self.log)
        self.log.clear()
        self.compacted_rv = rv
        self._snapshot = None
        for cursor in self.cursors:
            cursor.wake.set()

    def now(self, rv: int) -> Snapshot:
        """Return the present state, at the global version `rv`; read it before the next change."""
        return Snapshot(rv, self._keys, self.entries)

    def at(self, rv: int) -> Snapshot:
        """Return the state as it was at `rv`, rebuilt by undoing what the log says came after.

        Raises:
            CompactedError: The log does not reach back that far.
        """
        if rv < self.compacted_rv:
            raise CompactedError(rv, self.compacted_rv)
        start = bisect_right(self.log, rv, key=lambda event: event.rv)
        if start == len(self.log):
            return self.now(rv)
        if self._snapshot is None or self._snapshot.rv != rv:
            entries = dict(self.entries)
            for event in reversed(self.log[start:]):
                if event.before is None:
                    entries.pop(event.entry.key, None)
                else:
                    entries[event.entry.key] = event.before
            self._snapshot = Snapshot(rv, sorted(entries), entries)
        return self._snapshot

    def cursor(self, rv: int | None = None) -> "Cursor":
        """Open a cursor behind version `rv`, or behind the newest event.

        Raises:
            CompactedError: The log does not reach back that far.
        """
        if rv is None:
            return Cursor(self, self.first + len(self.log))
        if rv < self.compacted_rv:
            raise CompactedError(rv, self.compacted_rv)
        index = bisect_right(self.log, rv, key=lambda event: event.rv)
        return Cursor(self, self.first + index)


class Cursor:
    """A place in a shelf's log. Close it, or the shelf keeps waking it."""

    def __init__(self, shelf: Shelf, index: int) -> None:
        self.wake = asyncio.Event()
        self._shelf = shelf
        self._index = index
        shelf.cursors.add(self)

    def take(self, limit: int = 1000) -> list[LogEvent]:
        """Return the next events, at most `limit`, and step over them.

        Raises:
            CompactedError: Events that were not taken yet are gone.
        """
        shelf = self._shelf
        if self._index < shelf.first:
            raise CompactedError(self._index, shelf.compacted_rv)
        start = self._index - shelf.first
        events = shelf.log[start : start + limit]
        self._index += len(events)
        if start + len(events) == len(shelf.log):
            self.wake.clear()
        return events

    def close(self) -> None:
        """Stop reading."""
        self._shelf.cursors.discard(self)


class History:
    """All shelves and the one counter that versions them."""

    def __init__(self, history: int) -> None:
        self.rv = 1
        self.bookmarks_asked = 0  # how often every watch was to send a bookmark at once
        self._history = history
        self._shelves: dict[str, Shelf] = {}

    def shelf(self, resource: Resource) -> Shelf:
        """Return the shelf of a kind, made on first use."""
        found = self._shelves.get(resource.key)
        if found is None:
            # Nothing of this kind ever happened, so every version up to now is known: empty.
            found = self._shelves[resource.key] = Shelf(resource, self._history, 0)
        return found

    def shelves(self) -> list[Shelf]:
        """Return all shelves."""
        return list(self._shelves.values())

    def drop(self, resource: Resource) -> None:
        """Forget a kind that is no longer served; who reads its log is told."""
        shelf = self._shelves.pop(resource.key, None)
        if shelf is not None:
            shelf.compact(self.rv)

    def put(self, resource: Resource, key: Key, obj: Obj) -> Entry:
        """Store an object under the next version."""
        shelf = self.shelf(resource)
        before = shelf.entries.get(key)
        self.rv += 1
        entry = Entry(shelf.resource, key, obj, self.rv)
        shelf.commit(LogEvent("MODIFIED" if before else "ADDED", entry, before))
        return entry

    def remove(self, resource: Resource, key: Key, last: Obj | None = None) -> Entry:
        """Remove an object; its last state, at the version of the removal, is returned."""
        shelf = self.shelf(resource)
        before = shelf.entries[key]
        self.rv += 1
        entry = Entry(shelf.resource, key, last or before.obj(), self.rv)
        shelf.commit(LogEvent("DELETED", entry, before))
        return entry


def encode(obj: Any) -> bytes:
    """Return the JSON of an object."""
    return _encode(obj)


def decode(data: bytes) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: The text is no JSON.
    """
    return _decode(data)
