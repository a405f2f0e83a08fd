"""The body of a watch: chunks to lines, lines to events.

Owns the framing and what an event says; the informer owns what follows from it. A line that is no
event at all is `GarbageError`: something may have been lost with it, unlike with an object that is
merely wrong, which is an event like any other (`Unreadable`).
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from netpol.k8s import wire
from netpol.k8s.decode import DECODING_ERRORS, Decoded, ResourceKind, decode, from_wire, peek
from netpol.k8s.errors import ApiError, DecodeError
from netpol.model.ids import ObjectKey

T = TypeVar("T")

#: The annotation of the bookmark that ends the initial events of a WatchList (meta/v1
#: InitialEventsAnnotationKey).
INITIAL_EVENTS_END = "k8s.io/initial-events-end"

#: etcd refuses objects over 1.5 MiB by default; a longer line is not an object.
LINE_MAX_BYTES = 64 << 20


class GarbageError(ApiError):
    """A line of a watch is no event; what it should have been is unknown."""


class LineSplitter:
    """Puts lines together out of chunks that are cut anywhere."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.pending = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take a chunk; returns the lines that it completes, without line ends and without blanks.

        Raises:
            GarbageError: a line that never ends.
        """
        head, newline, rest = chunk.partition(b"\n")
        if not newline:
            self._hold(chunk)
            return []
        if self._parts:
            head = b"".join((*self._parts, head))
            self._parts.clear()
            self.pending = 0
        lines = rest.split(b"\n")
        self._hold(lines.pop())
        return [line for line in (head, *lines) if line and not line.isspace()]

    def _hold(self, part: bytes) -> None:
        if not part:
            return
        self._parts.append(part)
        self.pending += len(part)
        if self.pending > LINE_MAX_BYTES:
            raise GarbageError("watch", message=f"a line over {LINE_MAX_BYTES} bytes")


class Put(NamedTuple, Generic[T]):
    """ADDED or MODIFIED."""

    item: Decoded[T]


class Removed(NamedTuple):
    """DELETED; `resource_version` is that of the deletion."""

    key: ObjectKey
    uid: str
    resource_version: str


class Marker(NamedTuple):
    """BOOKMARK: everything up to `resource_version` was sent."""

    resource_version: str
    initial_end: bool


class Unreadable(NamedTuple):
    """ADDED or MODIFIED with an object that does not decode; the name may be ""."""

    key: ObjectKey
    uid: str
    resource_version: str
    error: DecodeError


class Unknown(NamedTuple):
    """An event type of the future."""

    type: str


class _RawEvent(msgspec.Struct, gc=False):
    type: str
    object: msgspec.Raw


class _BookmarkEvent(msgspec.Struct, gc=False):
    object: wire.Bookmark | None = None


_raw_event = msgspec.json.Decoder(_RawEvent)
_bookmark_event = msgspec.json.Decoder(_BookmarkEvent)
_status = msgspec.json.Decoder(wire.Status)


class EventDecoder(Generic[T]):
    """Decodes the lines of a watch on one kind."""

    def __init__(self, kind: ResourceKind[T]) -> None:
        self._kind = kind
        event = msgspec.defstruct(
            f"{kind.name}Event", [("type", str), ("object", kind.struct)], gc=False
        )
        self._typed: msgspec.json.Decoder[Any] = msgspec.json.Decoder(event)

    def decode(self, line: bytes) -> Put[T] | Removed | Marker | Unreadable | Unknown:
        """Read one event.

        Raises:
            ApiError: it is an ERROR event, with the status that it carries.
            GarbageError: it is no event.
        """
        try:
            event = self._typed.decode(line)
            match event.type:
                case "ADDED" | "MODIFIED":
                    return Put(from_wire(self._kind, event.object))
                case "DELETED":
                    item = from_wire(self._kind, event.object)
                    return Removed(item.key, item.value.uid, item.resource_version)  # type: ignore[attr-defined]  # all models have it
        except (*DECODING_ERRORS, DecodeError) as e:
            return self._other(line, e)
        return self._other(line, None)

    def _other(
        self, line: bytes, error: Exception | None
    ) -> Put[T] | Removed | Marker | Unreadable | Unknown:
        """Events whose object is not one of the kind, or not a right one."""
        try:
            event = _raw_event.decode(line)
        except DECODING_ERRORS as e:
            raise GarbageError("watch", message=f"a line is no event: {e}") from e
        raw = bytes(event.object)
        if isinstance(error, DecodeError) and error.path == "kind":
            return Unreadable(*peek(self._kind, raw), error)  # not even a deletion of ours
        match event.type:
            case "BOOKMARK":
                return self._bookmark(line)
            case "ERROR":
                raise self._failure(raw)
            case "ADDED" | "MODIFIED":
                return self._again(raw, error)
            case "DELETED":
                return Removed(*peek(self._kind, raw))
            case other:
                return Unknown(other)

    def _again(self, raw: bytes, error: Exception | None) -> Put[T] | Unreadable:
        try:
            return Put(decode(self._kind, raw))
        except DecodeError as e:
            e.__cause__ = error
            return Unreadable(*peek(self._kind, raw), e)

    def _bookmark(self, line: bytes) -> Marker:
        try:
            obj = _bookmark_event.decode(line).object
        except DECODING_ERRORS as e:
            raise GarbageError("watch", message=f"a bookmark is none: {e}") from e
        meta = (obj and obj.metadata) or wire.BookmarkMeta()
        ended = (meta.annotations or {}).get(INITIAL_EVENTS_END) == "true"
        return Marker(meta.resource_version or "", ended)

    def _failure(self, raw: bytes) -> ApiError:
        try:
            status = _status.decode(raw)
        except DECODING_ERRORS:
            status = wire.Status()
        return ApiError(
            f"watch {self._kind.plural}",
            status=status.code or 500,
            reason=status.reason or "",
            message=status.message or "",
        )
