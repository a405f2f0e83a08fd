"""Namespaces on a real API server: a default account for a new one, and the end of one that is deleted.

Owns what a controller manager does about Namespaces, which no lab runs: without it a deleted Namespace
stays Terminating for ever. The embedded server does the same by itself.
"""

from __future__ import annotations

import asyncio
from typing import Any

from netpol.lab.apiserver.errors import ApiError
from netpol.lab.apiserver.history import CompactedError
from netpol.lab.remotestore import RemoteStore

Obj = dict[str, Any]

_POLL_S = 0.05
_DISCOVERY_S = 10.0  # how old the list of kinds may be, in the life of one namespace's end


class NamespaceController:
    """Follows Namespaces."""

    def __init__(self, store: RemoteStore) -> None:
        self._store = store
        self._ending: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                try:
                    async for event, obj in self._store.watch("namespaces"):
                        await self._see(event, obj)
                except CompactedError:
                    continue  # read everything again
        finally:
            for task in self._ending.values():
                task.cancel()

    async def _see(self, event: str, obj: Obj) -> None:
        name = obj["metadata"]["name"]
        if event == "DELETED":
            return
        if "deletionTimestamp" in obj["metadata"]:
            if name not in self._ending:
                task = asyncio.create_task(self._end(name), name=f"end of namespace {name}")
                self._ending[name] = task
                task.add_done_callback(lambda _: self._ending.pop(name, None))
        elif event == "ADDED":
            await self._tolerate(
                "POST",
                f"/api/v1/namespaces/{name}/serviceaccounts",
                {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}},
            )

    async def _tolerate(self, method: str, path: str, body: Obj | None = None) -> Obj:
        """Ask something that is pointless by now when it is refused by 404, 405 or 409."""
        try:
            return await self._store.call(method, path, body=body)
        except ApiError as error:
            if error.code not in (404, 405, 409):
                print(f"namespaces: {method} {path}: {error.message}", flush=True)
            return {}

    async def _end(self, name: str) -> None:
        """Delete what is in a namespace, wait until it is gone, and let the namespace go."""
        loop = asyncio.get_running_loop()
        kinds: list[str] = []
        read_at = -_DISCOVERY_S
        asked: set[str] = set()
        while True:
            if loop.time() - read_at >= _DISCOVERY_S:
                kinds, read_at = await self._kinds(), loop.time()
            left = False
            for path in kinds:
                place = path.replace("{namespace}", name)
                found = await self._tolerate("GET", f"{place}?limit=1")
                if not found.get("items"):
                    continue
                left = True
                if place not in asked:
                    await self._tolerate("DELETE", place)
                    asked.add(place)
            if not left and kinds:
                break
            await asyncio.sleep(_POLL_S)
        current = await self._tolerate("GET", f"/api/v1/namespaces/{name}")
        if "deletionTimestamp" in (current.get("metadata") or {}):
            spec = current.get("spec") or {}
            others = [one for one in spec.get("finalizers") or () if one != "kubernetes"]
            body = current | {"spec": spec | {"finalizers": others}}
            await self._tolerate("PUT", f"/api/v1/namespaces/{name}/finalize", body)

    async def _kinds(self) -> list[str]:
        """Return the paths of all kinds that stand in namespaces and can be listed and deleted."""
        groups = (await self._tolerate("GET", "/apis")).get("groups") or ()
        versions = ["/api/v1"]
        versions += [f"/apis/{group['preferredVersion']['groupVersion']}" for group in groups]
        found = []
        for version in versions:
            for resource in (await self._tolerate("GET", version)).get("resources") or ():
                verbs = set(resource.get("verbs") or ())
                if resource.get("namespaced") and verbs >= {"list", "deletecollection"}:
                    found.append(f"{version}/namespaces/{{namespace}}/{resource['name']}")
        # Whoever holds others goes first: slices of a Service that stands would be made again.
        first = ("pods", "services")
        return sorted(found, key=lambda path: path.rpartition("/")[2] not in first)
