"""The EndpointSlice controller: Services with a selector, and the Pods that they select, to slices.

`slices_for` is pure and says which slices a Service should have; `SliceController` follows Services and
Pods and writes the difference. One slice for each family and each distinct list of resolved ports, since a
named targetPort may be another number in another pod (as the reference controller does). A Service
without a selector is left to whoever writes its slices.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import defaultdict
from typing import Any

from netpol.lab.apiserver.errors import ApiError
from netpol.lab.apiserver.history import CompactedError
from netpol.lab.objectstore import ObjectStore
from netpol.lib.naming import digest

Obj = dict[str, Any]

MANAGED_BY = "endpointslice-controller.k8s.io"
_SERVICE_LABEL = "kubernetes.io/service-name"
_MANAGER_LABEL = "endpointslice.kubernetes.io/managed-by"
_HEADLESS_LABEL = "service.kubernetes.io/headless"
_QUIET_S = 0.02  # changes come in bursts; a slice is written once for all of one

#: A port of a slice: name, protocol, number (None where the Service has no ports), application protocol.
_Port = tuple[str, str, int | None, str]


def slices_for(service: Obj, pods: list[Obj]) -> list[Obj]:
    """Return the slices of a Service, given the pods of its namespace."""
    spec, meta = service["spec"], service["metadata"]
    selector = (spec.get("selector") or {}).items()
    if not selector or spec.get("type") == "ExternalName":
        return []
    selected = [
        pod
        for pod in pods
        if selector <= (pod["metadata"].get("labels") or {}).items()
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        and (pod.get("status") or {}).get("podIPs")
    ]
    found = []
    for family in spec.get("ipFamilies") or ["IPv4"]:
        groups: dict[tuple[_Port, ...], list[Obj]] = defaultdict(list)
        for pod in selected:
            address = _address(pod, family)
            if address is not None:
                ports = _ports(spec, pod)
                groups[ports].append(_endpoint(service, pod, address))
        if not groups:
            groups[()] = []  # a Service always has a slice for each family
        for ports, endpoints in groups.items():
            found.append(_slice(meta, spec, family, ports, endpoints))
    return found


def _address(pod: Obj, family: str) -> str | None:
    version = 6 if family == "IPv6" else 4
    for entry in pod["status"]["podIPs"]:
        if ipaddress.ip_address(entry["ip"]).version == version:
            return str(entry["ip"])
    return None


def _ports(spec: Obj, pod: Obj) -> tuple[_Port, ...]:
    """Return the ports that can be resolved in this pod; a name it does not declare is left out."""
    found: list[_Port] = []
    for port in spec.get("ports") or ():
        protocol = port.get("protocol") or "TCP"
        target = port.get("targetPort", port["port"]) or port["port"]
        number = target if isinstance(target, int) else _named(pod, target, protocol)
        if number is not None:
            name, application = port.get("name") or "", port.get("appProtocol") or ""
            found.append((name, protocol, number, application))
    return tuple(sorted(found))


def _named(pod: Obj, name: str, protocol: str) -> int | None:
    spec = pod["spec"]
    for container in [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]:
        for port in container.get("ports") or ():
            if port.get("name") == name and (port.get("protocol") or "TCP") == protocol:
                return int(port["containerPort"])
    return None


def _endpoint(service: Obj, pod: Obj, address: str) -> Obj:
    meta, status = pod["metadata"], pod["status"]
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    serving = conditions.get("Ready") == "True"
    terminating = "deletionTimestamp" in meta
    open_early = bool(service["spec"].get("publishNotReadyAddresses"))
    endpoint: Obj = {
        "addresses": [address],
        "conditions": {
            "ready": open_early or (serving and not terminating),
            "serving": serving,
            "terminating": terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
        },
        "nodeName": pod["spec"]["nodeName"],
    }
    hostname = pod["spec"].get("hostname")
    if hostname and pod["spec"].get("subdomain") == service["metadata"]["name"]:
        endpoint["hostname"] = hostname
    return endpoint


def _slice(
    meta: Obj, spec: Obj, family: str, ports: tuple[_Port, ...], endpoints: list[Obj]
) -> Obj:
    suffix = digest(family, *(repr(port) for port in ports), chars=8)
    labels = {_SERVICE_LABEL: meta["name"], _MANAGER_LABEL: MANAGED_BY}
    if spec.get("clusterIP") == "None":
        labels[_HEADLESS_LABEL] = ""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{meta['name']}-{suffix}",
            "namespace": meta["namespace"],
            "labels": labels,
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "name": meta["name"],
                    "uid": meta["uid"],
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "addressType": family,
        "endpoints": sorted(endpoints, key=lambda endpoint: endpoint["targetRef"]["name"]),
        "ports": [
            {"name": name, "protocol": protocol, "port": number}
            | ({"appProtocol": application} if application else {})
            for name, protocol, number, application in ports
        ],
    }


class SliceController:
    """Keeps the slices of all Services with a selector as `slices_for` says."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow("services"), name="endpointslices services")
            tasks.create_task(self._follow("pods"), name="endpointslices pods")
            tasks.create_task(self._work(), name="endpointslices")

    async def _follow(self, kind: str) -> None:
        while True:
            try:
                async for _, obj in self._store.watch(kind):
                    self._dirty.add(obj["metadata"]["namespace"])
                    self._wake.set()
            except CompactedError:
                continue  # read everything again

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(_QUIET_S)
            self._wake.clear()
            dirty, self._dirty = self._dirty, set()
            for namespace in sorted(dirty):
                try:
                    self.sync(namespace)
                except ApiError as error:
                    # Mostly a namespace that is ending under us; what is left is seen next time.
                    print(f"endpointslices: namespace {namespace}: {error.message}", flush=True)

    def sync(self, namespace: str) -> None:
        """Write what is missing or different in a namespace, delete what should not be there."""
        pods = self._store.list("pods", namespace=namespace)
        wanted: dict[str, Obj] = {}
        for service in self._store.list("services", namespace=namespace):
            if "deletionTimestamp" not in service["metadata"]:
                for entry in slices_for(service, pods):
                    wanted[entry["metadata"]["name"]] = entry
        kept: dict[str, Obj] = {
            entry["metadata"]["name"]: entry
            for entry in self._store.list(
                "endpointslices.discovery.k8s.io",
                namespace=namespace,
                label_selector=f"{_MANAGER_LABEL}={MANAGED_BY}",
            )
        }
        for name, entry in wanted.items():
            old = kept.get(name)
            if old is None:
                self._store.create(entry)
            elif not _equal(old, entry):
                meta = old["metadata"] | {"labels": entry["metadata"]["labels"]}
                self._store.update(old | entry | {"metadata": meta})
        for name in kept.keys() - wanted.keys():
            self._store.delete("endpointslices.discovery.k8s.io", name, namespace)


def _equal(old: Obj, new: Obj) -> bool:
    same_labels = bool(old["metadata"].get("labels") == new["metadata"]["labels"])
    return same_labels and (old.get("endpoints") or []) == new["endpoints"]
