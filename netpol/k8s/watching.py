"""What an informer is told and what it tells: options, the selection, status, and odd objects.

Values and counters only; the informer decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import structlog

from netpol.k8s.decode import Decoded
from netpol.k8s.errors import DecodeError
from netpol.model.ids import ObjectKey

_log = structlog.get_logger(__name__)

#: Objects that are reported by name; beyond, only their number is known.
MAX_REPORTED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """How to watch; the defaults are for a real cluster.

    Attributes:
        page_size: objects per page of a list (client-go uses 500 too).
        watch_list: ask for the initial objects as a stream first.
        min_timeout_s: a watch is ended by the server after a random time from here,
        max_timeout_s: to here, so that agents that started together do not stay together.
        short_stream_s: a stream that ends sooner than this without news counts as a failure.
        initial_idle_s: silence before the initial events are complete that shows a server which
            ignores the question.
        backoff_base_s: bound of the first pause after a failure; doubles.
        backoff_max_s: bound of all pauses.
    """

    page_size: int = 500
    watch_list: bool = True
    min_timeout_s: float = 270.0
    max_timeout_s: float = 540.0
    short_stream_s: float = 5.0
    initial_idle_s: float = 30.0
    backoff_base_s: float = 0.2
    backoff_max_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which objects of a kind are wanted.

    Attributes:
        namespace: only there; "" for everywhere.
        fields: field selector terms.
        labels: label selector, as written.
        optional_fields: terms that save work but that old servers refuse: dropped on a 400.
    """

    namespace: str = ""
    fields: tuple[str, ...] = ()
    labels: str = ""
    optional_fields: tuple[str, ...] = ()

    def query(self, *, optional: bool) -> dict[str, object]:
        """The query parameters."""
        terms = self.fields + (self.optional_fields if optional else ())
        return {"fieldSelector": ",".join(terms), "labelSelector": self.labels}

    def __str__(self) -> str:
        parts = (
            self.namespace and f"namespace {self.namespace}",
            ",".join(self.fields),
            self.labels,
        )
        return " ".join(p for p in parts if p) or "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchStatus:
    """What `netpol-ctl status` shows of a watch.

    `errors` counts failed requests and unusable events since the start, `failures` those in a row now,
    `rejected` names objects that could not be read, `incomplete` those read in part.
    """

    name: str
    kind: str
    selection: str
    resource_version: str
    synced: bool
    objects: int
    errors: int
    failures: int
    last_error: str
    lists: int
    watches: int
    rejected: dict[str, str]
    incomplete: dict[str, str]


class Misfits:
    """The objects of one watch that could not be read, or only in part: by name, with the reason.

    Each is logged once per reason, however often the server sends it.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.rejected: dict[ObjectKey, str] = {}
        self.incomplete: dict[ObjectKey, str] = {}
        self.count = 0
        self._listed: set[ObjectKey] | None = None

    def reject(self, error: DecodeError) -> None:
        """An object could not be read."""
        self.count += 1
        self._note(self.rejected, error.key, str(error), "object rejected")

    def read(self, item: Decoded[Any]) -> None:
        """An object was read, perhaps without some of its parts."""
        self.rejected.pop(item.key, None)
        if item.problems:
            why = "; ".join(f"{p.field}: {p.message}" for p in item.problems)
            self._note(self.incomplete, item.key, why, "object read in part")
        else:
            self.incomplete.pop(item.key, None)

    def forget(self, key: ObjectKey) -> None:
        """An object is gone."""
        self.rejected.pop(key, None)
        self.incomplete.pop(key, None)

    def begin_list(self) -> None:
        """A list begins: what it does not mention again is gone."""
        self._listed = set()

    def finish_list(self) -> None:
        """The list is complete."""
        if self._listed is None:
            return
        for notes in (self.rejected, self.incomplete):
            for key in notes.keys() - self._listed:
                del notes[key]
        self._listed = None

    def _note(self, notes: dict[ObjectKey, str], key: ObjectKey, why: str, event: str) -> None:
        if self._listed is not None:
            self._listed.add(key)
        if notes.get(key) != why and (key in notes or len(notes) < MAX_REPORTED):
            notes[key] = why
            _log.warning(event, kind=self._kind, key=str(key), why=why)
