"""Events of the lab's own components, as `kubectl describe` and `kubectl get events` show them.

Owns their shape and that the same thing said again raises a count instead of making another Event.
"""

from __future__ import annotations

from typing import Any

from netpol.lab.apiserver.errors import ApiError
from netpol.lab.objectstore import ObjectStore
from netpol.lib.naming import digest

Obj = dict[str, Any]


class Recorder:
    """Writes Events into the store.

    Args:
        store: where to.
        component: who says it.
    """

    def __init__(self, store: ObjectStore, component: str) -> None:
        self._store = store
        self._component = component

    def warn(self, about: Obj, *, reason: str, message: str) -> None:
        """Say that something went wrong with an object."""
        self._record(about, kind="Warning", reason=reason, message=message)

    def note(self, about: Obj, *, reason: str, message: str) -> None:
        """Say that something happened to an object."""
        self._record(about, kind="Normal", reason=reason, message=message)

    def _record(self, about: Obj, *, kind: str, reason: str, message: str) -> None:
        meta = about["metadata"]
        message = message[:1024]  # core/v1 Event
        namespace = meta.get("namespace") or "default"
        suffix = digest(self._component, reason, message, meta.get("uid") or "", chars=16)
        name = f"{meta['name'][:200]}.{suffix}"
        now = self._store.timestamp()
        try:
            try:
                event = self._store.get("events", name, namespace)
                again = {"count": int(event.get("count") or 1) + 1, "lastTimestamp": now}
                self._store.update(event | again)
            except ApiError as error:
                if error.code != 404:
                    raise
                said = {"type": kind, "reason": reason, "message": message}
                self._store.create(self._event(about, namespace, name) | said)
        except ApiError as error:
            # The namespace ends, or the object is gone: nobody is left to read it.
            print(f"events: {reason} of {namespace}/{meta['name']}: {error.message}", flush=True)

    def _event(self, about: Obj, namespace: str, name: str) -> Obj:
        now = self._store.timestamp()
        meta = about["metadata"]
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {
                "apiVersion": about.get("apiVersion", "v1"),
                "kind": about.get("kind", ""),
                "name": meta["name"],
                "namespace": meta.get("namespace", ""),
                "uid": meta.get("uid", ""),
            },
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": "",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
