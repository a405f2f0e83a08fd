"""The forms in which stored objects leave the server: JSON, metadata only, lists, watch lines.

Owns the choice by the Accept header, the two versions of Event, and encoding. Tables stand in
`tables.py`. Stored bytes are passed on as they are wherever the form allows it.
"""

from typing import NamedTuple

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.history import Entry, LogEvent, decode, encode
from netpol.lab.apiserver.query import Page
from netpol.lab.apiserver.resources import Resource

JSON_TYPE = "application/json"
JSON_STREAM = "application/json;stream=watch"
_READABLE = (JSON_TYPE, "application/*", "*/*", "application/yaml", "text/yaml")

# core/v1 Event fields and their names in events.k8s.io/v1.
_EVENT_NAMES = {
    "involvedObject": "regarding",
    "message": "note",
    "reportingComponent": "reportingController",
    "source": "deprecatedSource",
    "firstTimestamp": "deprecatedFirstTimestamp",
    "lastTimestamp": "deprecatedLastTimestamp",
    "count": "deprecatedCount",
}
_EVENT_NAMES_BACK = {new: old for old, new in _EVENT_NAMES.items()}


class Form(NamedTuple):
    """What a client wants to read: `as_` is empty, Table, PartialObjectMetadata or its List."""

    as_: str = ""
    yaml: bool = False

    @property
    def table(self) -> bool:
        """Whether rows are wanted."""
        return self.as_ == "Table"

    @property
    def partial(self) -> bool:
        """Whether metadata alone is wanted."""
        return self.as_.startswith("PartialObjectMetadata")


def negotiate(accept: str) -> Form:
    """Return the first form of an Accept header that is written here.

    Raises:
        ApiError: 406 when there is none.
    """
    if not accept.strip():
        return Form()
    for choice in accept.split(","):
        media, *parameters = (part.strip() for part in choice.split(";"))
        if media not in _READABLE:
            continue
        values = dict(part.partition("=")[::2] for part in parameters)
        as_ = values.get("as", "")
        if as_ in ("", "Table", "PartialObjectMetadata", "PartialObjectMetadataList"):
            return Form(as_, yaml=media.endswith("yaml"))
    raise errors.not_acceptable(f"{JSON_TYPE}, application/yaml")


def to_stored(resource: Resource, obj: Obj) -> Obj:
    """Return an object as its shelf keeps it."""
    if resource.stored_as == "events":
        obj = {_EVENT_NAMES_BACK.get(name, name): value for name, value in obj.items()}
        obj["apiVersion"] = "v1"
    return obj


def to_served(resource: Resource, obj: Obj) -> Obj:
    """Return a stored object in the version of the request."""
    if resource.stored_as == "events":
        obj = {_EVENT_NAMES.get(name, name): value for name, value in obj.items()}
    if obj.get("apiVersion") != resource.api_version:
        obj = obj | {"apiVersion": resource.api_version}
    return obj


def converts(resource: Resource) -> bool:
    """Tell whether stored bytes may be of another version than the one served."""
    return bool(resource.stored_as) or resource.custom


def metadata_only(obj: Obj) -> Obj:
    """Return an object's PartialObjectMetadata."""
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": obj.get("metadata") or {},
    }


def entry_json(resource: Resource, entry: Entry, form: Form) -> bytes:
    """Return one object in a form other than a table."""
    if form.partial:
        return encode(metadata_only(entry.obj()))
    if converts(resource):
        return encode(to_served(resource, entry.obj()))
    return entry.json


def list_json(resource: Resource, page: Page, form: Form) -> bytes:
    """Return a page as a list in a form other than a table."""
    head: Obj = {"kind": resource.list_name, "apiVersion": resource.api_version}
    if form.partial:
        head = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1"}
    head["metadata"] = list_metadata(page)
    start = encode(head)[:-1] + b',"items":['
    if form.partial or converts(resource):
        items = [entry_json(resource, entry, form) for entry in page.entries]
    else:
        # Items of built-in kinds come without kind and apiVersion, as from the real server.
        prefix = len(encode({"apiVersion": resource.api_version, "kind": resource.kind}))
        items = [b"{" + entry.json[prefix:] for entry in page.entries]
    return start + b",".join(items) + b"]}\n"


def list_metadata(page: Page) -> Obj:
    """Return the ListMeta of a page."""
    metadata: Obj = {"resourceVersion": str(page.rv)}
    if page.continue_token:
        metadata["continue"] = page.continue_token
        if page.remaining is not None:
            metadata["remainingItemCount"] = page.remaining
    return metadata


def watch_line(resource: Resource, kind: str, entry: Entry, event: LogEvent, form: Form) -> bytes:
    """Return one line of a watch; equal lines of many watchers are encoded once."""
    known = (kind, f"{resource.api_version}/{form.as_}")
    line = event.lines.get(known)
    if line is None:
        if entry.rv == event.rv:
            body = entry_json(resource, entry, form)
        else:  # an older state, sent as what stopped to match, at the version of the change
            obj = entry.obj()
            obj["metadata"]["resourceVersion"] = str(event.rv)
            obj = to_served(resource, obj)
            body = encode(metadata_only(obj) if form.partial else obj)
        line = event.lines[known] = event_line(kind, body)
    return line


def event_line(kind: str, body: bytes) -> bytes:
    """Return the watch line of an encoded object."""
    return b'{"type":"' + kind.encode() + b'","object":' + body + b"}\n"


def bookmark(resource: Resource, rv: int, *, initial_end: bool, form: Form) -> bytes:
    """Return a bookmark line."""
    metadata: Obj = {"resourceVersion": str(rv), "creationTimestamp": None}
    if initial_end:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    obj: Obj = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
    if form.table:
        obj = {
            "kind": "Table",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": str(rv)},
            "columnDefinitions": None,
            "rows": [],
        }
        if initial_end:
            row = {"cells": [], "object": metadata_only({"metadata": metadata})}
            obj["rows"] = [row]
    elif form.partial:
        obj = metadata_only({"metadata": metadata})
    return event_line("BOOKMARK", encode(obj))


def read_json(data: bytes) -> Obj:
    """Return the object in a JSON body.

    Raises:
        ApiError: 400 when there is none.
    """
    try:
        obj = decode(data)
    except ValueError as fault:
        raise errors.bad_request(f"the body is no JSON: {fault}") from None
    if not isinstance(obj, dict):
        raise errors.bad_request("the body is no JSON object")
    return obj
