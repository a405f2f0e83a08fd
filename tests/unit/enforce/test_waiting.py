"""A new pod whose policy comes with it, in a room: held for as long as the kernel refuses the policy."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from netpol.kernel.drivers import TableTransaction
from netpol.model.ids import ObjectKey
from netpol.model.net import FAMILIES
from netpol.render.options import FIRST_CLASS, UNKNOWN
from tests import builders as make
from tests.unit.enforce.rooms import Scene, nameless, until


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.mark.parametrize("hold", [True, False])
async def test_it_is_held_while_its_policy_is_refused(scene: Scene, hold: bool) -> None:
    if not hold:
        scene.options = replace(scene.options, hold_ranges=())
    async with scene.running() as room:
        assert await until(lambda: room.in_sync)
        scene.pod("web", 5, role="web")
        scene.policy("web", make.pods(role="friend"))
        refused: list[int | None] = []

        def refuses(tx: TableTransaction) -> Exception | None:
            error = nameless(scene.chain("web"))(tx)
            if error is not None:
                refused.extend(scene.number(5, f) for f in FAMILIES)
            return error

        scene.tables.refuses = refuses
        assert await scene.told()
        # Nothing of the pod was written before its policy was tried.
        assert set(refused) <= {None, UNKNOWN}
        assert refused
        scene.pod("other", 6)
        assert await scene.told()
        assert [scene.number(5, f) for f in FAMILIES] == [UNKNOWN] * 2
        assert "a/web" in map(str, room.dataplane.refusals.reasons())
        scene.tables.refuses = lambda _: None
        scene.policy("web", make.pods(role="another"))
        assert await scene.told()
        assert all((scene.number(5, f) or 0) >= FIRST_CLASS for f in FAMILIES)


async def test_pods_that_come_all_the_time_keep_no_new_pod_waiting(scene: Scene) -> None:
    async with scene.running() as room:
        assert await until(lambda: room.in_sync)

        async def churn() -> None:
            for number in range(10_000):
                scene.pod(f"r{number % 9}", 10 + number % 200)
                scene.tell()
                await asyncio.sleep(0)

        churning = asyncio.create_task(churn())
        try:
            for number in range(5):
                scene.pod("web", 5, role=f"web{number}")
                scene.policy(f"web{number}", make.pods(role="friend"))
                assert await scene.told()
                here = room.dataplane.graph.local_pods[ObjectKey("a", "web")]
                assert here.addresses
                assert here.ingress is not None
                assert [str(p.key) for p in here.ingress.policies] == [f"a/web{number}"]
        finally:
            churning.cancel()
            await asyncio.gather(churning, return_exceptions=True)
