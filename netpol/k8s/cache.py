"""The shared object cache: `Store`, what it tells its readers (`Change`), and how a list replaces it.

Owns which object is the current one. It knows nothing about HTTP; informers feed it decoded objects,
tests feed it by hand. Invariants:

- An object that equals the one held is never delivered, so that status noise ends here.
- An object never goes back: news older than what is held, or than a deletion, is dropped. That is
  decided by resourceVersion when both are numbers, else the later delivery counts.
- A key that comes back with another uid is another object: its readers see a delete, then an add.
- Subscribers are plain calls, in the order of subscription, after the store has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import structlog

from netpol.k8s.decode import Decoded
from netpol.model.ids import ObjectKey

_log = structlog.get_logger(__name__)

#: Deletions that are remembered against late news of the deleted object. Late news follows its
#: deletion within moments if it comes at all, so a bounded memory is enough.
MAX_GRAVES = 1024


class Identified(Protocol):
    """What a store needs of its objects, besides equality."""

    @property
    def uid(self) -> str:
        """Tells one object from its successor of the same name."""
        ...


T = TypeVar("T", bound=Identified)


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """One object's change; `before` is None for an add, `after` for a delete, never both."""

    key: ObjectKey
    before: T | None
    after: T | None


Subscriber = Callable[[Change[T]], None]


def version_number(resource_version: str) -> int:
    """A resourceVersion as a number, or 0 if it is none (then it cannot be compared)."""
    return (
        int(resource_version)
        if resource_version.isascii() and resource_version.isdigit() and len(resource_version) < 20
        else 0
    )


class Store(Generic[T]):
    """The current objects of one kind, by key.

    Attributes:
        name: for logs.
        generation: grows by one with each delivered change.
        stale: how many deliveries were dropped as older than what is held.
        subscriber_errors: how often a subscriber raised. It is logged; the others are told all the same.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.generation = 0
        self.stale = 0
        self.subscriber_errors = 0
        self._objects: dict[ObjectKey, T] = {}
        self._versions: dict[ObjectKey, int] = {}
        self._graves: dict[ObjectKey, int] = {}
        self._floor = 0  # an object that is absent was so at this version
        self._horizon = 0  # the newest version seen
        self._subscribers: list[Subscriber[T]] = []
        self._synced = asyncio.Event()

    # Reading ------------------------------------------------------------------------------------

    def get(self, key: ObjectKey) -> T | None:
        """The object of a key."""
        return self._objects.get(key)

    def version(self, key: ObjectKey) -> str:
        """The resourceVersion of a key's object, to guard an update with; "" where it is no number."""
        return str(self._versions[key]) if key in self._versions else ""

    @property
    def objects(self) -> Mapping[ObjectKey, T]:
        """A live view of all objects; copy it before awaiting anything."""
        return MappingProxyType(self._objects)

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[T]:
        return iter(self._objects.values())

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._objects

    @property
    def horizon(self) -> int:
        """The newest resourceVersion seen, as a number; 0 when none was."""
        return self._horizon

    @property
    def synced(self) -> bool:
        """Whether the store has held everything once."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        """Wait until the first list is complete."""
        await self._synced.wait()

    def subscribe(self, subscriber: Subscriber[T], *, replay: bool = False) -> Callable[[], None]:
        """Be told every change from now on.

        Args:
            subscriber: called synchronously; must not change the store.
            replay: deliver what is there already, as adds.

        Returns:
            A call that ends the subscription.
        """
        if replay:
            for key, value in list(self._objects.items()):
                subscriber(Change(key, None, value))
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

        return unsubscribe

    # Writing ------------------------------------------------------------------------------------

    def put(self, new: Decoded[T], *, listed: bool = False) -> bool:
        """Take an object as the current one of its key.

        Args:
            new: the object.
            listed: it comes from a consistent list, which knows better than deletions remembered here.

        Returns:
            Whether anything changed for readers.
        """
        key, value = new.key, new.value
        before = self._objects.get(key)
        version = version_number(new.resource_version)
        if version:
            if self._is_stale(key, version, listed=listed):
                self.stale += 1
                return False
            self._versions[key] = version
            self._horizon = max(self._horizon, version)
        else:
            self._versions.pop(key, None)
        self._graves.pop(key, None)
        if before == value:
            return False
        if before is not None and before.uid != value.uid:
            del self._objects[key]
            self._deliver(Change(key, before, None))
            before = None
        self._objects[key] = value
        self._deliver(Change(key, before, value))
        return True

    def _is_stale(self, key: ObjectKey, version: int, *, listed: bool) -> bool:
        if key in self._objects:
            return version < self._versions.get(key, 0)
        # The version of a deletion is that of its event, and no later object can have it too.
        return not listed and version <= max(self._floor, self._graves.get(key, 0))

    def remove(self, key: ObjectKey, *, uid: str = "", resource_version: str = "") -> bool:
        """Take an object away.

        Args:
            key: whose.
            uid: of the deleted object, "" if unknown.
            resource_version: of the deletion, "" if unknown.

        Returns:
            Whether it was there; not if the deletion is of an earlier object of the same name.
        """
        before = self._objects.get(key)
        version = version_number(resource_version)
        self._horizon = max(self._horizon, version)
        if before is not None:
            # The same uid never comes back, so its deletion holds whatever the version says.
            another = bool(uid and before.uid and uid != before.uid)
            if another and version and version < self._versions.get(key, 0):
                self.stale += 1
                return False
            version = max(version, self._versions.pop(key, 0))
            del self._objects[key]
        if version:
            self._bury(key, version)
        if before is None:
            return False
        self._deliver(Change(key, before, None))
        return True

    def _bury(self, key: ObjectKey, version: int) -> None:
        last = self._graves.pop(key, 0)
        self._graves[key] = max(version, last)
        if len(self._graves) > MAX_GRAVES:
            del self._graves[next(iter(self._graves))]

    def listing(self) -> Listing[T]:
        """Begin to replace the content by a list; nothing else may write until it is finished."""
        return Listing(self)

    def forget_history(self) -> None:
        """Stop comparing with versions seen so far: the server's numbering began anew (a restore)."""
        self._versions.clear()
        self._graves.clear()
        self._floor = self._horizon = 0

    def clear(self) -> None:
        """Take all objects away, delivering their deletion; not synced any more."""
        self._synced.clear()
        for key in list(self._objects):
            self.remove(key)
        self.forget_history()

    def _deliver(self, change: Change[T]) -> None:
        self.generation += 1
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(change)
            except Exception:  # noqa: BLE001 - a reader must not stop the others, nor the informer
                self.subscriber_errors += 1
                _log.exception("subscriber failed", store=self.name, key=str(change.key))

    def finish_listing(self, unseen: set[ObjectKey], resource_version: str) -> int:
        """End a listing (see `Listing.finish`)."""
        for key in unseen:
            self.remove(key)
        version = version_number(resource_version)
        self._floor = max(self._floor, version)
        self._horizon = max(self._horizon, version)
        self._graves = {k: v for k, v in self._graves.items() if v > self._floor}
        self._synced.set()
        return len(unseen)


class Listing(Generic[T]):
    """A list that comes in page by page: objects are taken at once, missing ones go at the end.

    One that is given up half-way leaves a store that is newer in parts and misses nothing.
    """

    def __init__(self, store: Store[T]) -> None:
        self._store = store
        self._unseen = set(store.objects)

    def put(self, new: Decoded[T]) -> bool:
        """Take a listed object."""
        self._unseen.discard(new.key)
        return self._store.put(new, listed=True)

    def keep(self, key: ObjectKey) -> None:
        """The key is listed but its object cannot be read: what is held stays."""
        self._unseen.discard(key)

    def drop(self, key: ObjectKey, *, uid: str = "", resource_version: str = "") -> bool:
        """Take a deletion that came in between (a stream that begins with the list)."""
        self._unseen.discard(key)
        return self._store.remove(key, uid=uid, resource_version=resource_version)

    def finish(self, resource_version: str) -> int:
        """Delete what the list did not have; the store is in sync at `resource_version`.

        Returns:
            How many objects went.
        """
        return self._store.finish_listing(self._unseen, resource_version)
