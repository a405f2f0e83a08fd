"""Gives every Pod without a node one: the least loaded that its nodeSelector allows.

Owns that choice alone. No resources, taints or affinity: the lab's nodes are equal. A pod that fits
nowhere gets the condition PodScheduled=False and an Event, and is looked at again when nodes change.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from netpol.lab.apiserver.errors import ApiError
from netpol.lab.apiserver.history import CompactedError, Key
from netpol.lab.events import Recorder
from netpol.lab.objectstore import ObjectStore

Obj = dict[str, Any]


def choose(pod: Obj, nodes: list[Obj], load: Counter[str]) -> str | None:
    """Return the node for a pod; of equally loaded ones the first, None where none fits."""
    wanted = (pod["spec"].get("nodeSelector") or {}).items()
    fitting = [
        node["metadata"]["name"]
        for node in nodes
        if wanted <= (node["metadata"].get("labels") or {}).items()
        and not (node.get("spec") or {}).get("unschedulable")
    ]
    return min(fitting, key=lambda name: load[name], default=None)


class Scheduler:
    """Follows Pods and Nodes."""

    def __init__(self, store: ObjectStore, recorder: Recorder) -> None:
        self._store = store
        self._recorder = recorder

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow("pods"), name="scheduler pods")
            tasks.create_task(self._follow("nodes"), name="scheduler nodes")

    async def _follow(self, kind: str) -> None:
        while True:
            try:
                async for event, obj in self._store.watch(kind):
                    if kind == "nodes":
                        self.schedule_all()
                    elif event != "DELETED" and _waits(obj):
                        self._schedule(obj)
            except CompactedError:
                continue  # read everything again

    def schedule_all(self) -> None:
        """Look at every pod that still waits."""
        for pod in self._store.list("pods", field_selector="spec.nodeName="):
            if _waits(pod):
                self._schedule(pod)

    def _schedule(self, pod: Obj) -> None:
        nodes = self._store.list("nodes")
        load = Counter(
            str(other["spec"]["nodeName"])
            for other in self._store.list("pods", field_selector="spec.nodeName!=")
        )
        meta = pod["metadata"]
        node = choose(pod, nodes, load)
        try:
            if node is not None:
                self._store.bind(Key(meta["namespace"], meta["name"]), node)
            elif nodes:
                self._refuse(pod, len(nodes))
        except ApiError as error:
            # 404 and 409: it went, or has a node by now.
            if error.code not in (404, 409):
                print(
                    f"scheduler: pod {meta['namespace']}/{meta['name']}: {error.message}",
                    flush=True,
                )

    def _refuse(self, pod: Obj, node_count: int) -> None:
        selector = pod["spec"].get("nodeSelector")
        message = f"0/{node_count} nodes are available: none has the labels {selector}"
        conditions = (pod.get("status") or {}).get("conditions") or []
        if any(c.get("message") == message for c in conditions):
            return  # said already
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastProbeTime": None,
            "lastTransitionTime": self._store.timestamp(),
        }
        meta = pod["metadata"]
        status = (pod.get("status") or {}) | {"phase": "Pending", "conditions": [condition]}
        body = {"status": status}
        self._store.patch("pods", meta["name"], meta["namespace"], body=body, subresource="status")
        self._recorder.warn(pod, reason="FailedScheduling", message=message)


def _waits(pod: Obj) -> bool:
    return (
        not pod["spec"].get("nodeName")
        and "deletionTimestamp" not in pod["metadata"]
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
    )
