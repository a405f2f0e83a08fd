"""Whether what worked before a risky change goes on after it: sessions, and routes to nodes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from netpol.kernel.routes import KernelRoute
from netpol.model.net import Prefix
from routes.bird.engine import BirdEngine
from routes.plan import RoutePlan
from routes.trial import Healthy

#: The share of sessions and routes that a risky change must leave.
HEALTHY_SHARE = 0.9


async def health(
    engine: BirdEngine,
    made: RoutePlan,
    *,
    routes: Callable[[], Awaitable[tuple[KernelRoute, ...]]],
) -> Healthy:
    """Remember what works now; a check that it goes on.

    Args:
        engine: knows the sessions.
        made: the plan that is to be tried.
        routes: reads BIRD's routes in the kernel.
    """
    up = {n for n, alive in (await engine.sessions()).items() if alive}
    # Routes to nodes that stay; what routers outside announce goes with them, as it should.
    lasting = {p for n in made.peers for p in n.accept}

    async def reached() -> set[Prefix]:
        return {r.prefix for r in await routes() if r.reachable} & lasting

    had = await reached()

    async def healthy() -> bool:
        now = await engine.sessions()
        kept = [n for n in up if n in now]
        alive = sum(now[n] for n in kept)
        have = len(await reached() & had)
        return alive >= len(kept) * HEALTHY_SHARE and have >= len(had) * HEALTHY_SHARE

    return healthy
