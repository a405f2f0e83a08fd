"""One kind kept in step with the API server: list, watch, resume, and what to do when that fails.

An `Informer` is one task. It fills its `Store` by a paged list (or a WatchList, where the server has
it), then follows a watch and resumes it from the last resourceVersion that was *applied*. It owns the
decisions: when to list again, how long to wait, what counts as progress. Invariants:

- A request that did not bring anything new is followed by a pause that grows, whatever else happened:
  errors, streams that end at once, expirations right after a list. Only news reset the pause.
- What the store holds is never given up because of an error; it is replaced object by object.
- An object that cannot be read keeps its last good value, and is reported by name.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar, assert_never

import structlog

from netpol.aio.backoff import Backoff
from netpol.aio.clock import Clock, SystemClock
from netpol.aio.tasks import cancel
from netpol.k8s.api import Api
from netpol.k8s.cache import Identified, Listing, Store, version_number
from netpol.k8s.decode import ResourceKind, decode_list
from netpol.k8s.errors import ApiError, DecodeError
from netpol.k8s.stream import (
    EventDecoder,
    GarbageError,
    LineSplitter,
    Marker,
    Put,
    Removed,
    Unknown,
    Unreadable,
)
from netpol.k8s.watching import Misfits, Selection, WatchOptions, WatchStatus

_log = structlog.get_logger(__name__)

T = TypeVar("T", bound=Identified)

#: Watches in a row that give no usable initial events before a plain list is tried instead.
_MAX_WATCH_LIST_FAILURES = 3


class Informer(Generic[T]):
    """Keeps a store in step with the objects of one kind.

    Args:
        api: the connection, shared.
        kind: what to watch.
        selection: which of them.
        store: where to; a new one by default.
        name: shown in status; the kind's plural by default.
        options: see there.
        clock: for pauses.
        rng: for jitter.
    """

    def __init__(
        self,
        api: Api,
        kind: ResourceKind[T],
        *,
        selection: Selection | None = None,
        store: Store[T] | None = None,
        name: str = "",
        options: WatchOptions | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.kind = kind
        self.name = name or kind.plural
        self.store: Store[T] = Store(self.name) if store is None else store
        self.selection = selection or Selection()
        self._api = api
        self._options = options or WatchOptions()
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._backoff = Backoff(
            base_s=self._options.backoff_base_s,
            max_s=self._options.backoff_max_s,
            uniform=self._rng.uniform,
        )
        self._events = EventDecoder(kind)
        self._resume = ""  # "" means: list first
        self._use_watch_list = self._options.watch_list
        self._watch_list_failures = 0
        self._use_optional = True
        self._behind = False  # the last list was older than what was seen
        self._garbage = 0  # in a row without news
        self._stream_started = 0.0
        self._synced = asyncio.Event()
        self._restart = asyncio.Event()
        self._on_synced: list[Callable[[], None]] = []
        self._misfits = Misfits(kind.name)
        self.errors = 0
        self.lists = 0
        self.watches = 0
        self.last_error = ""

    # For readers --------------------------------------------------------------------------------

    @property
    def synced(self) -> bool:
        """Whether the store holds all objects of the current selection."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        """Wait until the store holds all objects of the current selection."""
        await self._synced.wait()

    def on_synced(self, callback: Callable[[], None]) -> None:
        """Be told, by a plain call, each time a list is complete (also after `retarget`)."""
        self._on_synced.append(callback)

    def status(self) -> WatchStatus:
        """The state of the watch."""
        return WatchStatus(
            name=self.name,
            kind=self.kind.name,
            selection=str(self.selection),
            resource_version=self._resume,
            synced=self.synced,
            objects=len(self.store),
            errors=self.errors + self._misfits.count,
            failures=self._backoff.failures,
            last_error=self.last_error,
            lists=self.lists,
            watches=self.watches,
            rejected={str(k): v for k, v in self._misfits.rejected.items()},
            incomplete={str(k): v for k, v in self._misfits.incomplete.items()},
        )

    def retarget(self, selection: Selection) -> None:
        """Watch another selection from now on.

        Objects that are in both stay untouched; those that are not in the new one go when its list is
        complete, and only then `synced` is true again.
        """
        if selection == self.selection:
            return
        self.selection = selection
        self._use_optional = True
        self._resume = ""
        self._synced.clear()
        self._restart.set()

    # The task -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """List and watch until cancelled."""
        while True:
            self._restart.clear()
            serving = asyncio.ensure_future(self._serve())
            restart = asyncio.ensure_future(self._restart.wait())
            try:
                await asyncio.wait((serving, restart), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel(serving, restart)
            if not serving.cancelled():
                serving.result()  # it does not return, so this raises what ended it

    async def _serve(self) -> None:
        while True:
            error: Exception | None = None
            self._stream_started = now = self._clock.monotonic()
            try:
                await self._attempt()
            except (ApiError, DecodeError) as e:
                error = e
            except Exception as e:  # noqa: BLE001
                # A fault of ours. Nobody else can help, so go on as after any failure, from a list.
                _log.exception("informer failed", watch=self.name)
                self._resume, error = "", e
            now = self._clock.monotonic()
            lasted = now - self._stream_started >= self._options.short_stream_s
            if error is None and lasted:
                self._backoff.reset()
                continue
            await self._clock.sleep(self._failed(error))

    def _failed(self, error: Exception | None) -> float:
        """Take note of an attempt that failed or brought nothing; returns the pause."""
        wanted_s = 0.0
        if isinstance(error, ApiError):
            wanted_s = error.retry_after_s or 0.0
            if error.expired:
                self._resume = ""
        if isinstance(error, GarbageError):
            # Once more from the last good point; if the garbage stands there for good, list anew.
            self._garbage += 1
            if self._garbage > 1:
                self._resume = ""
        delay_s = self._backoff.failed(at_least_s=wanted_s)
        if error is not None:
            self.errors += 1
            text = str(error)
            if text != self.last_error:  # a server that is down for an hour is one line
                _log.warning("watch failed", watch=self.name, error=text, retry_s=round(delay_s, 2))
            self.last_error = text
        return delay_s

    async def _attempt(self) -> None:
        if self._resume:
            await self._stream(None)
            return
        self.lists += 1
        if self._use_watch_list and not self._behind:
            if await self._watch_list():
                return
            self.lists += 1
        await self._list()
        await self._stream(None)

    def _query(self) -> dict[str, object]:
        return self.selection.query(optional=self._use_optional)

    @property
    def _path(self) -> str:
        return self.kind.path(namespace=self.selection.namespace)

    # Lists --------------------------------------------------------------------------------------

    async def _list(self) -> None:
        """Replace the store's content by a paged list."""
        try:
            await self._list_pages()
        except ApiError as e:
            if e.status != 400 or not (self._use_optional and self.selection.optional_fields):
                raise
            self._use_optional = False
            await self._list_pages()

    async def _list_pages(self) -> None:
        listing, token, version = self._begin(), "", ""
        limit: int | None = self._options.page_size
        while True:
            query = {**self._query(), "limit": limit, "continue": token}
            try:
                body = await self._api.get(self._path, **query)
            except ApiError as e:
                if not (e.expired and token):
                    raise
                # The pages took longer than the server keeps a version: all in one, as client-go.
                listing, token, version, limit = self._begin(), "", "", None
                continue
            page = decode_list(self.kind, body)
            if not version:
                version = page.resource_version
                self._check_version(version)
            for item in page.items:
                listing.put(item)
                self._misfits.read(item)
            for error in page.errors:
                listing.keep(error.key)
                self._misfits.reject(error)
            token = page.continue_token
            if not token:
                break
            await asyncio.sleep(0)
        self._finish(listing, version)

    def _check_version(self, resource_version: str) -> None:
        """Do not take a list that is older than what we know, except if the server insists.

        A server may lag behind another; but after a restore of etcd the numbers start lower, and then
        refusing for ever would be worse.
        """
        if not resource_version:
            raise ApiError(f"list {self.kind.plural}", message="it has no resourceVersion")
        number = version_number(resource_version)
        if not number or number >= self.store.horizon:
            return
        if not self._behind:
            self._behind = True
            raise ApiError(
                f"list {self.kind.plural}",
                message=f"version {number} is older than {self.store.horizon}, seen before",
            )
        _log.warning("the API server's history began anew", watch=self.name, version=number)
        self.store.forget_history()

    def _begin(self) -> Listing[T]:
        self._misfits.begin_list()
        return self.store.listing()

    def _finish(self, listing: Listing[T], version: str) -> None:
        listing.finish(version)
        self._misfits.finish_list()
        self._resume = version
        self._behind = False
        self._watch_list_failures = 0
        self._synced.set()
        for callback in tuple(self._on_synced):
            try:
                callback()
            except Exception:  # noqa: BLE001 - as with subscribers of the store
                self.errors += 1
                _log.exception("synced callback failed", watch=self.name)

    async def _watch_list(self) -> bool:
        """Follow a stream that begins with all objects; False if the server cannot do that."""
        try:
            await self._stream(self._begin())
        except ApiError as e:
            if self._resume or e.expired or e.refused:
                raise  # the initial events were complete, or a list would fare no better
            self._watch_list_failures += 1
            # A server that is silent for long does not know the question either (see `_next`).
            unsupported = e.status in (400, 422) or not self._use_watch_list
            if not unsupported and self._watch_list_failures < _MAX_WATCH_LIST_FAILURES:
                raise
            self._use_watch_list = not unsupported
            self._watch_list_failures = 0
            _log.info("listing instead of a watch list", watch=self.name, reason=str(e))
            return False
        return True

    # Watches ------------------------------------------------------------------------------------

    async def _stream(self, listing: Listing[T] | None) -> None:
        """Follow one watch to its end; with a listing, its beginning is the list.

        Raises:
            ApiError: it was refused, broken off, or carried an ERROR event.
        """
        options = self._options
        timeout_s = self._rng.uniform(options.min_timeout_s, options.max_timeout_s)
        query = {**self._query(), "allowWatchBookmarks": "true"}
        if listing is None:
            query["resourceVersion"] = self._resume
        else:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        self.watches += 1
        self._stream_started = self._clock.monotonic()
        splitter = LineSplitter()
        async with self._api.watch(self._path, timeout_s=timeout_s, **query) as chunks:
            while (chunk := await self._next(chunks, initial=listing is not None)) is not None:
                for line in splitter.feed(chunk):
                    listing = self._take(line, listing)
                await asyncio.sleep(0)  # chunks that are there already must not starve the loop
        if splitter.pending:
            raise ApiError(f"watch {self.kind.plural}", message="cut in the middle of an event")
        if listing is not None:
            raise ApiError(f"watch {self.kind.plural}", message="ended amid its initial events")

    async def _next(self, chunks: AsyncIterator[bytes], *, initial: bool) -> bytes | None:
        if not initial:
            return await anext(chunks, None)
        try:
            async with asyncio.timeout(self._options.initial_idle_s):
                return await anext(chunks, None)
        except TimeoutError as e:
            self._use_watch_list = False
            raise ApiError(
                f"watch {self.kind.plural}",
                message=f"no initial events for {self._options.initial_idle_s:g} s",
            ) from e

    def _take(self, line: bytes, listing: Listing[T] | None) -> Listing[T] | None:
        """Apply one event; returns the listing while the initial events go on."""
        event = self._events.decode(line)
        match event:
            case Put():
                (listing or self.store).put(event.item)
                self._misfits.read(event.item)
                self._advance(event.item.resource_version, listing)
            case Removed():
                self._remove(event, listing)
            case Unreadable():
                self._keep(event, listing)
            case Marker(version, initial_end):
                if listing is not None and initial_end:
                    self._check_version(version)
                    self._finish(listing, version)
                    return None
                self._advance(version, listing)
            case Unknown(kind):
                self.errors += 1
                _log.warning("unknown watch event", watch=self.name, type=kind[:40])
            case _:
                assert_never(event)
        return listing

    def _remove(self, event: Removed, listing: Listing[T] | None) -> None:
        if not event.key.name:
            self._resume = ""  # something was deleted and we cannot know what
            raise GarbageError(f"watch {self.kind.plural}", message="a deletion without a name")
        remove = self.store.remove if listing is None else listing.drop
        remove(event.key, uid=event.uid, resource_version=event.resource_version)
        self._misfits.forget(event.key)
        self._advance(event.resource_version, listing)

    def _keep(self, event: Unreadable, listing: Listing[T] | None) -> None:
        """Keep the last good value of an object that cannot be read, if it is the same object."""
        key = event.key
        self._misfits.reject(event.error)
        if listing is not None:
            listing.keep(key)
        held = self.store.get(key)
        if event.error.path != "kind":
            if held is not None and event.uid and held.uid and held.uid != event.uid:
                self.store.remove(key)
            self._advance(event.resource_version, listing)

    def _advance(self, version: str, listing: Listing[T] | None) -> None:
        """Remember where to resume: never back, and not within the initial events."""
        if listing is not None or not version or version == self._resume:
            return
        new, old = version_number(version), version_number(self._resume)
        if new and old and new < old:
            return
        self._resume = version
        self._garbage = 0
        self._backoff.reset()
