"""Which objects and events a list or watch request wants, and the pages of a list.

Owns selectors bound to a kind, the translation of events for a selector, resourceVersion rules of lists
and the continue token. Reads shelves, writes nothing.
"""

import base64
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.errors import Cause
from netpol.lab.apiserver.history import (
    CompactedError,
    Entry,
    History,
    Key,
    LogEvent,
    Snapshot,
    decode,
    encode,
)
from netpol.lab.apiserver.resources import Resource
from netpol.lab.apiserver.selectors import LabelTerm, matches_labels, parse_fields, parse_labels

_LATEST = -1  # the version in a continue token that goes on with whatever is stored now


class _FieldCheck(NamedTuple):
    """One field term, resolved: an index of `Entry.fields`, or a negative one of the key."""

    place: int
    equal: bool
    value: str


@dataclass(frozen=True, slots=True)
class Filter:
    """What a request keeps of a kind; `namespace` None is all."""

    namespace: str | None
    labels: tuple[LabelTerm, ...]
    fields: tuple[_FieldCheck, ...]

    @property
    def selective(self) -> bool:
        """Whether it looks at more than the namespace."""
        return bool(self.labels or self.fields)

    def keeps(self, entry: Entry) -> bool:
        """Tell whether an object is wanted."""
        if self.namespace is not None and entry.key.namespace != self.namespace:
            return False
        for check in self.fields:
            found = entry.fields[check.place] if check.place >= 0 else entry.key[check.place]
            if (found == check.value) is not check.equal:
                return False
        return matches_labels(self.labels, entry.labels)

    def translate(self, event: LogEvent) -> tuple[str, Entry] | None:
        """Return the event as a watcher sees it: what stops to match appears as DELETED."""
        if not self.selective:
            if self.namespace is not None and event.entry.key.namespace != self.namespace:
                return None
            return event.type, event.entry
        before = event.before is not None and self.keeps(event.before)
        if event.type == "DELETED":
            return ("DELETED", event.entry) if before else None
        after = self.keeps(event.entry)
        if after:
            return ("MODIFIED" if before else "ADDED", event.entry)
        return ("DELETED", event.entry) if before else None


def make_filter(
    resource: Resource, *, namespace: str | None = None, labels: str = "", fields: str = ""
) -> Filter:
    """Bind selectors to a kind.

    Raises:
        ApiError: 400 when a selector cannot be read, or names a field the kind is not selectable by.
    """
    checks = []
    for term in parse_fields(fields):
        name = _FIELD_ALIASES.get((resource.group, term.field), term.field)
        if name == "metadata.namespace":
            index = -2
        elif name == "metadata.name":
            index = -1
        elif name in resource.fields:
            index = resource.fields.index(name)
        else:
            raise errors.bad_request(f"field label not supported: {term.field}")
        checks.append(_FieldCheck(index, term.equal, term.value))
    return Filter(namespace, parse_labels(labels), tuple(checks))


_FIELD_ALIASES = {("", "source"): "source.component"} | {
    ("events.k8s.io", f"regarding.{name}"): f"involvedObject.{name}"
    for name in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
}


@dataclass(frozen=True, slots=True)
class ListQuery:
    """A list request; `resource_version` None is unset."""

    filter: Filter
    limit: int = 0
    continue_token: str = ""
    resource_version: int | None = None
    match: str = ""


class Page(NamedTuple):
    """One page; `remaining` is None where the API does not tell."""

    rv: int
    entries: list[Entry]
    continue_token: str
    remaining: int | None


def list_page(history: History, resource: Resource, query: ListQuery) -> Page:
    """Return one page of a list.

    Raises:
        ApiError: 410 for a version that is gone, 504 for one that is not there yet, 400 or 422 for
            parameters that make no sense together.
    """
    shelf = history.shelf(resource)
    after: Key | None = None
    wanted_rv = query.resource_version
    exact = query.match == "Exact" or (
        not query.match and bool(query.limit) and bool(wanted_rv) and not query.continue_token
    )
    limit = query.limit
    snapshot: Snapshot
    if query.continue_token:
        if wanted_rv:
            text = "specifying resource version is not allowed when using continue"
            raise errors.bad_request(text)
        token_rv, after = _read_token(query.continue_token)
        if token_rv == _LATEST:
            snapshot = shelf.now(history.rv)
        else:
            try:
                snapshot = shelf.at(token_rv)
            except CompactedError:
                raise _expired_token(after) from None
    else:
        _check_match(wanted_rv, query.match)
        if wanted_rv is not None and wanted_rv > history.rv:
            raise errors.too_large_resource_version(wanted_rv, history.rv)
        if exact and wanted_rv:
            try:
                snapshot = shelf.at(wanted_rv)
            except CompactedError as gone:
                raise errors.expired(str(gone)) from None
        else:
            snapshot = shelf.now(history.rv)
            if wanted_rv == 0:
                limit = 0  # served from the watch cache, which does not page
    return _cut(snapshot, query.filter, after, limit)


def _cut(snapshot: Snapshot, wanted: Filter, after: Key | None, limit: int) -> Page:
    low, high = snapshot.range(wanted.namespace, after)
    entries: list[Entry] = []
    for index, key in enumerate(islice(snapshot.keys, low, high), start=low):
        entry = snapshot.entries[key]
        if wanted.selective and not wanted.keeps(entry):
            continue
        if limit and len(entries) == limit:
            token = _write_token(snapshot.rv, entries[-1].key)
            remaining = None if wanted.selective else high - index
            return Page(snapshot.rv, entries, token, remaining)
        entries.append(entry)
    return Page(snapshot.rv, entries, "", None)


def _check_match(rv: int | None, match: str) -> None:
    if not match:
        return
    field = "resourceVersionMatch"
    if match not in ("Exact", "NotOlderThan"):
        text = f'Unsupported value: "{match}": supported values: "Exact", "NotOlderThan"'
        raise options_invalid("ListOptions", Cause(field, "FieldValueNotSupported", text))
    if rv is None:
        text = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
        raise options_invalid("ListOptions", Cause(field, "FieldValueForbidden", text))
    if match == "Exact" and rv == 0:
        text = 'Forbidden: resourceVersionMatch "Exact" is forbidden for resourceVersion "0"'
        raise options_invalid("ListOptions", Cause(field, "FieldValueForbidden", text))


def options_invalid(kind: str, cause: Cause) -> errors.ApiError:
    """Return the refusal of a query parameter."""
    return errors.invalid("meta.k8s.io", kind, "", [cause])


def _write_token(rv: int, key: Key) -> str:
    text = encode({"v": "meta.k8s.io/v1", "rv": rv, "start": [key.namespace, key.name]})
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def _read_token(token: str) -> tuple[int, Key]:
    try:
        found = decode(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        namespace, name = found["start"]
        return int(found["rv"]), Key(str(namespace), str(name))
    except (ValueError, KeyError, TypeError):
        raise errors.bad_request(f"continue key is not valid: {token!r}") from None


def _expired_token(after: Key) -> errors.ApiError:
    text = (
        "The provided continue parameter is too old for a consistent list. Start a new list, or go "
        "on with the continue token of this answer: what changed in between may be missing or new"
    )
    return errors.expired(text, continue_token=_write_token(_LATEST, after))
