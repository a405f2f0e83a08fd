"""A node's policy room as the agent wires it, fed with bytes as the watches would deliver them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from bench.worlds import LOCAL_NODE, Cluster, Json, as_list
from netpol.enforce.feed import Feed
from netpol.enforce.worker import PolicyRoom
from netpol.k8s.cache import Store
from netpol.k8s.decode import KINDS, Decoded, Page, decode, decode_list
from netpol.kernel.drivers import Variant
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.net import parse_address, parse_prefix
from netpol.policy.graph import Graph
from netpol.render.options import RenderOptions

#: What a node with a bridge has: its range held, the gateway open, the source check on.
OPTIONS = RenderOptions(
    pod_interfaces=("cni0",),
    hold_ranges=(parse_prefix("10.64.1.0/24"),),
    own_addresses=(parse_address("10.64.1.1"),),
)

Lists = dict[str, bytes]


def lists(cluster: Cluster) -> Lists:
    """The list answers of the four watches that policy needs."""
    by_kind: dict[str, list[Json]] = {
        "Namespace": cluster.namespaces,
        "NetworkPolicy": cluster.policies,
        "Pod": cluster.pods,
        "local": cluster.local,
    }
    return {
        kind: msgspec.json.encode(as_list("Pod" if kind == "local" else kind, items))
        for kind, items in by_kind.items()
    }


class Node:
    """Stores, feed, graph and room of `node1`, in the network namespace of the calling thread."""

    def __init__(self, options: RenderOptions = OPTIONS, variant: Variant = Variant.NFT) -> None:
        self.graph = Graph(LOCAL_NODE)
        self.sets, self.tables = NetlinkSets(), RestoreTables(variant)
        self.room = PolicyRoom(self.graph, sets=self.sets, tables=self.tables, options=options)
        self.feed = Feed(self.graph, self.room.changed)
        self.stores: dict[str, Store[Any]] = {
            name: Store(name) for name in ("Namespace", "NetworkPolicy", "Pod", "local")
        }
        self.stores["Namespace"].subscribe(self.feed.namespace)
        self.stores["NetworkPolicy"].subscribe(self.feed.policy)
        self.stores["Pod"].subscribe(self.feed.cluster_pod)
        self.stores["local"].subscribe(self.feed.local_pod)
        self._version = 1000

    def listed(self, answers: Lists) -> None:
        """Take lists as the informers do."""
        for kind, body in answers.items():
            page: Page[Any] = decode_list("Pod" if kind == "local" else kind, body)
            listing = self.stores[kind].listing()
            for item in page.items:
                listing.put(item)
            listing.finish(page.resource_version)

    def event(self, kind: str, raw: bytes, *, deleted: bool = False) -> None:
        """Take one watch event: the object's bytes to whatever it changes."""
        self._version += 1
        item: Decoded[Any] = decode(KINDS["Pod" if kind == "local" else kind], raw)
        newer = item._replace(resource_version=str(self._version))
        store = self.stores[kind]
        if deleted:
            store.remove(newer.key, uid=newer.value.uid, resource_version=newer.resource_version)
        else:
            store.put(newer)

    async def applied(self) -> None:
        """Wait until the kernel has everything that was told."""
        await self.room.runner.wait_idle()
        if self.room.status.error:
            raise RuntimeError(self.room.status.error)

    async def start(self, answers: Lists) -> asyncio.Task[None]:
        """From lists to the first apply; returns the task that runs the room."""
        task = asyncio.create_task(self.room.run_forever())
        self.listed(answers)
        self.room.start()
        await self.applied()
        return task

    async def stop(self, task: asyncio.Task[None]) -> None:
        """End the room; its rules go with the namespace."""
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.room.close()
