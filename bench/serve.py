"""An API server with a world, as a process of its own: `python -m bench.serve SHAPE` prints its URL."""

from __future__ import annotations

import asyncio
import gc
import json
import sys

from bench import worlds
from netpol.lab.apiserver import ApiServer


async def _serve(shape: worlds.Shape) -> None:
    gc.disable()
    cluster = worlds.make(shape)
    async with ApiServer() as server:
        for group in (cluster.namespaces, cluster.nodes, cluster.pods, cluster.policies):
            for each in group:
                server.store.create(each, keep_status=True, unchecked=True)
        print(server.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(worlds.Shape(**json.loads(sys.argv[1]))))
