"""Pods come to life here: namespace, CNI, servers, status; and go again. One kubelet for all nodes.

Owns the life of every pod on the lab's nodes, one task each. Reads Pods from the API server's store and
writes nothing but their status and their end. Images and commands mean nothing to it: a pod is a
namespace with a server on every containerPort. Which node a pod is on was decided before (`controllers`).

A pod that fails to start stays Pending with the reason in its status and an Event, and is tried again;
a pod that is being deleted leaves in this order: servers, CNI DEL, namespace, API object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from netpol.kernel.netns import in_netns
from netpol.lab import network, podstatus, spaces
from netpol.lab.apiserver.errors import ApiError
from netpol.lab.apiserver.history import CompactedError
from netpol.lab.cni import CniRuntime
from netpol.lab.events import Recorder
from netpol.lab.objectstore import ObjectStore
from netpol.lab.plan import LabPlan, NodePlan
from netpol.lab.podserver import PodServers
from netpol.lib.errors import NetpolError
from netpol.model.ids import ObjectKey
from netpol.model.objects import ContainerPort

Obj = dict[str, Any]

_RETRY_S = (0.5, 1.0, 2.0, 5.0)
_OVER = ("Succeeded", "Failed")
_CONFLICTS_MAX = 5  # a real API server lets somebody else write between our read and our write


class PodView(NamedTuple):
    """A pod as the probes see it; `addresses` is empty until it runs."""

    key: ObjectKey
    uid: str
    node: str
    netns: str
    addresses: tuple[str, ...]
    ports: tuple[ContainerPort, ...]
    host_network: bool
    problem: str


@dataclass(slots=True)
class _Life:
    """A pod on one of our nodes; `gone` once its API object is no more."""

    obj: Obj
    key: ObjectKey
    node: NodePlan
    netns: str
    ports: tuple[ContainerPort, ...]
    host_network: bool
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False
    plugged: bool = False
    addresses: tuple[str, ...] = ()
    problem: str = ""
    task: asyncio.Task[None] | None = None


class Kubelet:
    """Runs the pods of all nodes.

    Args:
        store: the API server's objects.
        plan: the lab.
        runtimes: the CNI runtime of every node, by the node's name.
        servers: what answers on the pods' ports.
        recorder: where Events go.
        on_running: called with every pod that has come to run.
    """

    def __init__(
        self,
        *,
        store: ObjectStore,
        plan: LabPlan,
        runtimes: Mapping[str, CniRuntime],
        servers: PodServers,
        recorder: Recorder,
        on_running: Callable[[PodView], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._plan = plan
        self._nodes = {node.name: node for node in plan.nodes}
        self._runtimes = runtimes
        self._servers = servers
        self._recorder = recorder
        self._on_running = on_running
        self._lives: dict[str, _Life] = {}
        self._namespaces = asyncio.Semaphore(4)  # `ip` is one process each

    def pods(self) -> list[PodView]:
        """Return every pod that is on a node and not over, in the order of names."""
        return sorted((_view(life) for life in self._lives.values()), key=lambda view: view.key)

    def pod(self, key: ObjectKey) -> PodView | None:
        """Return the pod of that name."""
        return next((_view(life) for life in self._lives.values() if life.key == key), None)

    async def run(self) -> None:
        """Follow the Pods until cancelled; then end all of them here, not in the API."""
        try:
            while True:
                try:
                    await self._follow()
                except CompactedError:
                    continue  # the log was cut behind us: read everything again
        finally:
            for life in self._lives.values():
                if life.task is not None:
                    life.task.cancel()

    async def _follow(self) -> None:
        rv = self._store.resource_version
        present = self._store.list("pods")
        uids = {pod["metadata"]["uid"] for pod in present}
        for uid, life in list(self._lives.items()):
            if uid not in uids:
                life.gone = True
                life.stop.set()
        for pod in present:
            self._see("ADDED", pod)
        async for kind, pod in self._store.watch("pods", resource_version=rv):
            self._see(kind, pod)

    def _see(self, kind: str, pod: Obj) -> None:
        meta = pod["metadata"]
        life = self._lives.get(meta["uid"])
        over = kind == "DELETED" or (pod.get("status") or {}).get("phase") in _OVER
        if life is None:
            node = self._nodes.get(pod["spec"].get("nodeName") or "")
            if node is not None and not over:
                self._begin(pod, node)
            return
        life.obj = pod
        if over or "deletionTimestamp" in meta:
            life.gone = life.gone or kind == "DELETED"
            life.stop.set()

    def _begin(self, pod: Obj, node: NodePlan) -> None:
        meta = pod["metadata"]
        host_network = bool(pod["spec"].get("hostNetwork"))
        names = {"namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]}
        life = _Life(
            obj=pod,
            key=ObjectKey(meta["namespace"], meta["name"]),
            node=node,
            netns=node.netns if host_network else self._plan.pod_netns(**names),
            ports=podstatus.container_ports(pod),
            host_network=host_network,
        )
        if "deletionTimestamp" in meta:
            life.stop.set()
        before = [old.task for old in self._lives.values() if old.key == life.key and old.task]
        self._lives[meta["uid"]] = life
        life.task = asyncio.create_task(
            self._live(meta["uid"], life, before), name=f"pod {life.key}"
        )
        life.task.add_done_callback(lambda task: self._ended(life, task))

    def _ended(self, life: _Life, task: asyncio.Task[None]) -> None:
        """A fault of ours in one pod's life is told and shown, and stays that pod's."""
        if not task.cancelled() and (error := task.exception()) is not None:
            life.problem = f"the lab failed: {error!r}"
            print(f"kubelet: pod {life.key}: {life.problem}", flush=True)

    async def _live(self, uid: str, life: _Life, before: list[asyncio.Task[None]]) -> None:
        if before:
            # A pod of the same name that was deleted by force: servers know a pod by its name.
            await asyncio.wait(before)
        attempt = 0
        while not life.stop.is_set():
            try:
                await self._start(life)
            except (NetpolError, OSError) as error:
                self._report(life, str(error))
                await self._stop(life)
                delay_s = _RETRY_S[min(attempt, len(_RETRY_S) - 1)]
                attempt += 1
                try:
                    await asyncio.wait_for(life.stop.wait(), delay_s)
                except TimeoutError:
                    continue
            else:
                await life.stop.wait()
        await self._stop(life)
        self._lives.pop(uid, None)
        self._delete_object(uid, life)

    async def _start(self, life: _Life) -> None:
        if life.host_network:
            addresses = life.node.addresses
        else:
            async with self._namespaces:
                await asyncio.to_thread(_make_namespace, life.netns)
            life.plugged = True  # from here on there is something to unplug
            mappings = podstatus.port_mappings(life.obj)
            runtime = self._runtimes[life.node.name]
            addresses = await runtime.add(life.netns, life.netns, ports=mappings)
        await self._servers.add(
            life.key, life.netns, [(port.protocol, port.number) for port in life.ports]
        )
        faults = await self._servers.check(life.key)
        if faults:
            raise NetpolError("its servers do not answer", got="; ".join(faults)[:500])
        status = podstatus.running(
            life.obj,
            addresses=addresses,
            host_addresses=life.node.addresses,
            now=self._store.timestamp(),
        )
        if self._write_status(life, status):
            life.addresses = addresses
            life.problem = ""
            self._on_running(_view(life))

    async def _stop(self, life: _Life) -> None:
        """Undo what `_start` did; each step is tried, and what a step says is reported."""
        life.addresses = ()
        steps: list[Any] = [self._servers.remove(life.key)]
        if life.plugged:
            steps.append(self._runtimes[life.node.name].delete(life.netns, life.netns))
        if not life.host_network:
            steps.append(asyncio.to_thread(_remove_namespace, life.netns))
        for step in steps:
            try:
                await step
            except (NetpolError, OSError) as error:
                print(f"kubelet: pod {life.key}: while it ends: {error}", flush=True)
        life.plugged = False

    def _report(self, life: _Life, problem: str) -> None:
        life.problem = problem
        print(f"kubelet: pod {life.key} on {life.node.name}: {problem}", flush=True)
        self._recorder.warn(life.obj, reason="FailedCreatePodSandBox", message=problem)
        status = podstatus.waiting(
            life.obj,
            reason="ContainerCreating",
            message=problem,
            now=self._store.timestamp(),
        )
        self._write_status(life, status)

    def _write_status(self, life: _Life, status: Obj) -> bool:
        for _ in range(_CONFLICTS_MAX):
            try:
                current = self._store.get("pods", life.key.name, life.key.namespace)
                if current["metadata"]["uid"] != life.obj["metadata"]["uid"]:
                    return False
                self._store.update(current | {"status": status}, subresource="status")
            except ApiError as error:
                if error.code == 404:
                    return False
                if error.code != 409:
                    raise NetpolError(f"status of pod {life.key}", got=error.message) from error
            else:
                return True
        raise NetpolError(f"status of pod {life.key}", got=f"{_CONFLICTS_MAX} conflicts in a row")

    def _delete_object(self, uid: str, life: _Life) -> None:
        if life.gone or "deletionTimestamp" not in life.obj["metadata"]:
            return
        try:
            self._store.delete("pods", life.key.name, life.key.namespace, grace_period_s=0, uid=uid)
        except ApiError as error:
            if error.code not in (404, 409):  # 409: another pod of that name by now
                print(f"kubelet: delete of pod {life.key}: {error.message}", flush=True)


def _view(life: _Life) -> PodView:
    return PodView(
        key=life.key,
        uid=life.obj["metadata"]["uid"],
        node=life.node.name,
        netns=life.netns,
        addresses=life.addresses,
        ports=life.ports,
        host_network=life.host_network,
        problem=life.problem,
    )


def _make_namespace(name: str) -> None:
    spaces.create([name])

    def prepare() -> None:
        spaces.write_sysctls(network.NO_DAD)
        spaces.loopback_up()

    in_netns(name, prepare)


def _remove_namespace(name: str) -> None:
    spaces.kill_inside([name])
    spaces.remove([name])
