"""The watches of a process: which run, whether all are in sync, and how each one is.

Owns the informers' tasks. The agent starts one per kind that its rooms need and widens or stops them
at run time; nothing is written to the kernel before `wait_synced` has returned.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, Self, TypeVar

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.tasks import DeathObserver, TaskSet, cancel
from netpol.k8s.api import Api
from netpol.k8s.cache import Identified, Store
from netpol.k8s.decode import ResourceKind
from netpol.k8s.informer import Informer
from netpol.k8s.watching import Selection, WatchOptions, WatchStatus

T = TypeVar("T", bound=Identified)

#: A finished pod has given up its addresses (semantics row 38) and will not run again: leaving such
#: pods out saves a list of old Jobs.
LIVE_PODS = ("status.phase!=Succeeded", "status.phase!=Failed")

#: Pods in the host's network are no subjects and no peers (rows 80 and 81). Servers before 1.27 do not
#: know the field and answer 400, so it can only be asked for as optional.
PODS_WITH_OWN_NETWORK = ("spec.hostNetwork=false",)


#: The name of the watch of this node's pods, which more than one part of the agent needs.
LOCAL_PODS = "local pods"


def pods_on(node: str) -> Selection:
    """The pods of one node, finished and host-network ones included (their events matter here)."""
    return Selection(fields=(f"spec.nodeName={node}",))


def pods_everywhere() -> Selection:
    """All pods that can be a peer."""
    return Selection(fields=LIVE_PODS, optional_fields=PODS_WITH_OWN_NETWORK)


class InformerSet:
    """Informers by name, sharing one connection.

    Args:
        api: the connection; not closed here.
        options: for all of them.
        on_death: told if an informer's task ends, which it never should.
    """

    def __init__(
        self,
        api: Api,
        *,
        options: WatchOptions | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        on_death: DeathObserver | None = None,
    ) -> None:
        self._api, self._options = api, options
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._tasks = TaskSet(on_death=on_death)
        self._informers: dict[str, Informer[Any]] = {}
        self._stopped = asyncio.Event()

    def start(
        self,
        kind: ResourceKind[T],
        *,
        name: str = "",
        selection: Selection | None = None,
        store: Store[T] | None = None,
    ) -> Informer[T]:
        """Start to watch a kind.

        Args:
            kind: which.
            name: to tell two watches of a kind apart; the kind's plural by default.
            selection: which objects.
            store: where to; a new one by default. Subscribe to it before anything awaits, and no
                change is missed.

        Raises:
            ValueError: a watch of this name runs.
        """
        name = name or kind.plural
        if name in self._informers:
            raise ValueError(f"a watch named {name!r} runs already")
        informer = Informer(
            self._api,
            kind,
            name=name,
            selection=selection,
            store=store,
            options=self._options,
            clock=self._clock,
            rng=self._rng,
        )
        self._informers[name] = informer
        self._tasks.spawn(f"watch {name}", informer.run())
        return informer

    def share(
        self, kind: ResourceKind[T], *, name: str = "", selection: Selection | None = None
    ) -> Informer[T]:
        """The watch of that name, started if it does not run: two rooms need one."""
        found: Informer[T] | None = self._informers.get(name or kind.plural)
        return found or self.start(kind, name=name, selection=selection)

    async def stop(self, name: str, *, clear: bool = True) -> None:
        """Stop a watch; unknown names are fine.

        Args:
            name: which.
            clear: also empty its store, which delivers the deletion of every object.
        """
        informer = self._informers.pop(name, None)
        if informer is None:
            return
        self._stopped.set()
        await self._tasks.cancel(f"watch {name}")
        if clear:
            informer.store.clear()

    def get(self, name: str) -> Informer[Any] | None:
        """The informer of that name, if it runs."""
        return self._informers.get(name)

    @property
    def synced(self) -> bool:
        """Whether every watch holds all objects of its selection."""
        return all(i.synced for i in self._informers.values())

    async def wait_synced(self) -> None:
        """The barrier: wait until every watch, also those started meanwhile, is in sync."""
        while not self.synced:
            late = next(i for i in self._informers.values() if not i.synced)
            # A watch that is stopped meanwhile never syncs.
            waiting = [asyncio.ensure_future(w()) for w in (late.wait_synced, self._stopped.wait)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel(*waiting)
            self._stopped.clear()

    def status(self) -> tuple[WatchStatus, ...]:
        """The state of every watch, in the order of their start."""
        return tuple(i.status() for i in self._informers.values())

    async def close(self) -> None:
        """Stop all watches; the stores keep what they hold."""
        await self._tasks.cancel()
        self._informers.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
