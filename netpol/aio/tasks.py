"""Tasks that are meant to live for ever, and what happens when one does not.

A task that dies quietly is the worst fault of an agent: everything looks alive and nothing is applied.
So each eternal task is spawned through here; its death, by exception or by simply returning, is logged
and handed to an observer, which makes the agent unready or restarts it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

_log = structlog.get_logger(__name__)

#: (name, exception); None when the task returned although it should not.
DeathObserver = Callable[[str, BaseException | None], None]


def spawn(
    name: str, coro: Coroutine[Any, Any, object], *, on_death: DeathObserver | None = None
) -> asyncio.Task[object]:
    """Start an eternal task; the caller keeps the reference.

    Args:
        name: shown in logs and status.
        coro: runs until cancelled.
        on_death: told when it ends in any other way.
    """
    task = asyncio.get_running_loop().create_task(coro, name=name)

    def ended(done: asyncio.Task[object]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        _log.error(
            "task died",
            task=name,
            error=str(error) or type(error).__name__ if error else "it returned",
            exc_info=error,
        )
        if on_death is not None:
            on_death(name, error)

    task.add_done_callback(ended)
    return task


async def cancel(*tasks: asyncio.Task[object] | None) -> None:
    """Cancel tasks and wait until they have ended; None and ended ones are fine.

    What a task raises on its way out was already reported by `spawn`.
    """
    live = [t for t in tasks if t is not None]
    for task in live:
        task.cancel()
    if live:
        await asyncio.gather(*live, return_exceptions=True)


class TaskSet:
    """The eternal tasks of one owner: spawned by name, watched, cancelled together."""

    def __init__(self, *, on_death: DeathObserver | None = None) -> None:
        self._on_death = on_death
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self.deaths: dict[str, str] = {}

    def spawn(self, name: str, coro: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Start a task; a living one of the same name is an error of the caller."""
        old = self._tasks.get(name)
        if old is not None and not old.done():
            coro.close()
            raise RuntimeError(f"task {name!r} is running already")
        task = spawn(name, coro, on_death=self._died)
        self._tasks[name] = task
        return task

    def _died(self, name: str, error: BaseException | None) -> None:
        self.deaths[name] = (str(error) or type(error).__name__) if error else "it returned"
        if self._on_death is not None:
            self._on_death(name, error)

    @property
    def alive(self) -> tuple[str, ...]:
        """Names of the tasks that run."""
        return tuple(n for n, t in self._tasks.items() if not t.done())

    async def cancel(self, name: str | None = None) -> None:
        """End one task, or all of them."""
        names = [name] if name is not None else list(self._tasks)
        await cancel(*(self._tasks.pop(n, None) for n in names))
