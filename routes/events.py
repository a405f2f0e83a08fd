"""Tells the routes room when somebody changed what is in the kernel, until cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from netpol.kernel.route_events import RouteMonitor, Stirred
from routes.bird.render import METRIC
from routes.overlay import LINK_PREFIXES


async def listen(tell: Callable[[Stirred], None], *, underlay: Callable[[], int]) -> None:
    """Listen in this thread's network namespace.

    Args:
        tell: given what there is a reason to look at.
        underlay: the number of the node's own link, 0 where it is not known.
    """
    loop, monitor = asyncio.get_running_loop(), RouteMonitor(LINK_PREFIXES, metric=METRIC)

    def readable() -> None:
        monitor.underlay = underlay()
        tell(monitor.drain())

    loop.add_reader(monitor.fileno(), readable)
    try:
        await asyncio.Event().wait()
    finally:
        loop.remove_reader(monitor.fileno())
        monitor.close()
