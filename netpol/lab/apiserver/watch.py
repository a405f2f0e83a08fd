"""One watch request: the initial state, then events until its time is up.

Owns the parameters of a watch, bookmarks, the in-stream ERROR and the faults of streams. A watch reads
the shelf's log through a cursor, so a slow client costs no memory and is told 410 when the log was cut
behind it.
"""

import asyncio
import random
from dataclasses import dataclass

from aiohttp import web

from netpol.lab.apiserver import errors, forms, tables
from netpol.lab.apiserver.errors import Cause, Obj
from netpol.lab.apiserver.faults import Faults
from netpol.lab.apiserver.forms import Form
from netpol.lab.apiserver.history import CompactedError, Cursor, Entry, History, LogEvent, encode
from netpol.lab.apiserver.query import Filter, ListQuery, list_page, options_invalid
from netpol.lab.apiserver.resources import Resource

# kube-apiserver's --min-request-timeout: a watch without a timeout lasts this to twice this long.
MIN_TIMEOUT_S = 1800
_BATCH_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class WatchQuery:
    """A watch request; `resource_version` None is unset, `send_initial` None too."""

    filter: Filter
    resource_version: int | None = None
    match: str = ""
    send_initial: bool | None = None
    bookmarks: bool = False
    timeout_s: float | None = None

    def check(self, *, watch_list: bool) -> None:
        """Refuse parameters that make no sense together.

        Raises:
            ApiError: 422.
        """
        field = "resourceVersionMatch"
        if self.send_initial is not None and not watch_list:
            text = "Forbidden: sendInitialEvents is forbidden for watch: WatchList is disabled"
            raise options_invalid("ListOptions", Cause("sendInitialEvents", "", text))
        if self.send_initial is None:
            if self.match:
                text = f"Forbidden: {field} is forbidden for watch without sendInitialEvents"
                raise options_invalid("ListOptions", Cause(field, "FieldValueForbidden", text))
        elif self.match != "NotOlderThan":
            text = f"Forbidden: sendInitialEvents requires {field} NotOlderThan"
            raise options_invalid("ListOptions", Cause(field, "FieldValueForbidden", text))


class Stream:
    """The lines of one watch on their way to one client."""

    def __init__(
        self, *, history: History, resource: Resource, query: WatchQuery, form: Form, faults: Faults
    ) -> None:
        self._history = history
        self._resource = resource
        self._query = query
        self._form = form
        self._faults = faults
        self._buffer = bytearray()
        self._lines = 0
        self._cut_at = faults.cut_at()
        self._columns_sent = False

    async def run(
        self, response: web.StreamResponse, *, bookmark_s: float, closing: asyncio.Event
    ) -> None:
        """Write lines until the time is up, the server closes, or the log is gone."""
        query = self._query
        if self._faults.take("watch_empty"):
            return
        if self._faults.take("watch_gone"):
            await self._gone(response, "too old resource version")
            return
        shelf = self._history.shelf(self._resource)
        initial: list[Entry] = []
        wants_state = query.send_initial or (
            query.send_initial is None and query.resource_version in (None, 0)
        )
        try:
            if wants_state:
                cursor = shelf.cursor()
                initial = list_page(self._history, self._resource, ListQuery(query.filter)).entries
            elif query.resource_version:
                cursor = shelf.cursor(query.resource_version)
            else:
                cursor = shelf.cursor()
        except CompactedError as gone:
            await self._gone(response, str(gone))
            return
        try:
            for entry in initial:
                self._put(self._line("ADDED", entry, LogEvent("ADDED", entry, None)))
                if len(self._buffer) >= _BATCH_BYTES:
                    await self._flush(response)
            if query.send_initial and query.bookmarks:
                rv = self._history.rv
                resource, form = self._resource, self._form
                self._put(forms.bookmark(resource, rv, initial_end=True, form=form))
            await self._flush(response)
            await self._follow(response, cursor, bookmark_s=bookmark_s, closing=closing)
        except CompactedError as gone:
            await self._gone(response, str(gone))
        finally:
            cursor.close()

    async def _follow(
        self,
        response: web.StreamResponse,
        cursor: Cursor,
        *,
        bookmark_s: float,
        closing: asyncio.Event,
    ) -> None:
        query = self._query
        loop = asyncio.get_running_loop()
        timeout_s = query.timeout_s
        if timeout_s is None:
            timeout_s = MIN_TIMEOUT_S * (1 + random.random())  # noqa: S311 - no secret
        end = loop.time() + timeout_s
        bookmark_at = loop.time() + min(bookmark_s, max(timeout_s - 0.05, 0))
        sent_rv = 0
        answered = self._history.bookmarks_asked
        while not closing.is_set():
            if self._faults.watch_silent:
                self._faults.hits["watch_silent"] += 1
                await asyncio.sleep(0.02)
                if loop.time() >= end:
                    return
                continue
            events = cursor.take()
            for event in events:
                kept = query.filter.translate(event)
                if kept is not None:
                    self._send(*kept, event)
            await self._flush(response)
            if events:
                continue
            now = loop.time()
            asked, answered = (
                self._history.bookmarks_asked != answered,
                self._history.bookmarks_asked,
            )
            due = asked or now >= bookmark_at
            if query.bookmarks and due and not self._faults.no_bookmarks:
                bookmark_at = now + bookmark_s
                if asked or self._history.rv != sent_rv:
                    sent_rv = self._history.rv
                    resource, form = self._resource, self._form
                    self._put(forms.bookmark(resource, sent_rv, initial_end=False, form=form))
                    await self._flush(response)
            if now >= end:
                return
            until = min(end, bookmark_at) if query.bookmarks else end
            try:
                async with asyncio.timeout(max(until - now, 0.001)):
                    await cursor.wake.wait()
            except TimeoutError:
                continue

    def _send(self, kind: str, entry: Entry, event: LogEvent) -> None:
        line = self._line(kind, entry, event)
        if self._faults.watch_garbage:
            self._faults.hits["watch_garbage"] += 1
            self._put(self._faults.watch_garbage.popleft())
        self._put(line)
        if self._faults.watch_duplicate:
            self._faults.hits["watch_duplicate"] += 1
            self._put(line)

    def _line(self, kind: str, entry: Entry, event: LogEvent) -> bytes:
        if not self._form.table:
            return forms.watch_line(self._resource, kind, entry, event, self._form)
        obj: Obj = entry.obj()
        obj["metadata"]["resourceVersion"] = str(event.rv)
        body = tables.table(self._resource, [obj], columns=not self._columns_sent)
        self._columns_sent = True
        return forms.event_line(kind, encode(body))

    def _put(self, line: bytes) -> None:
        if self._cut_at is not None and self._lines == self._cut_at:
            self._faults.hits["watch_cut_after"] += 1
            self._buffer += line[: len(line) // 2]
        elif self._cut_at is None or self._lines < self._cut_at:
            self._buffer += line
        self._lines += 1

    async def _flush(self, response: web.StreamResponse) -> None:
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            await response.write(data)
        if self._cut_at is not None and self._lines > self._cut_at:
            raise ConnectionResetError("cut by a fault")

    async def _gone(self, response: web.StreamResponse, message: str) -> None:
        self._put(forms.event_line("ERROR", encode(errors.expired(message).status())))
        await self._flush(response)
