"""What the lab's controllers ask of the cluster's objects, whoever keeps them.

Owns the interface alone: the embedded API server's store has it in process, `remotestore` over HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from netpol.lab.apiserver.history import Key
from netpol.lab.apiserver.resources import Kinds

Obj = dict[str, Any]
Objs = list[Obj]  # the class below has a method named list


class ObjectStore(Protocol):
    """A cluster's objects, by the names of their kinds (`pods`, `events.events.k8s.io`).

    All but `watch` are plain calls that return when it is done: the lab's decisions are made on what
    is stored at that moment. Refusals are the API server's own `ApiError`.
    """

    kinds: Kinds

    @property
    def resource_version(self) -> int:
        """The version of the newest change."""

    def timestamp(self) -> str:
        """Return the present time as it stands in metadata."""

    def get(self, kind: str, name: str, namespace: str = "") -> Obj:
        """Return an object."""

    def list(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
    ) -> Objs:
        """Return the objects of a kind in the order of their keys."""

    def watch(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: int | None = None,
    ) -> AsyncIterator[tuple[str, Obj]]:
        """Yield (type, object) from a version on, or the present state as ADDED and then changes."""

    def create(self, obj: Obj, *, keep_status: bool = False, manager: str = "") -> Obj:
        """Store a new object, with its status where that is asked for."""

    def update(self, obj: Obj, *, subresource: str = "") -> Obj:
        """Replace an object, or with `subresource="status"` its status."""

    def patch(
        self,
        kind: str,
        name: str,
        namespace: str = "",
        *,
        body: Obj | Objs,
        style: str = "merge",
        subresource: str = "",
    ) -> Obj:
        """Patch an object by `merge`, `strategic` or `json`."""

    def bind(self, key: Key, node: str) -> None:
        """Give a Pod its node, as a scheduler does."""

    def delete(
        self,
        kind: str,
        name: str,
        namespace: str = "",
        *,
        grace_period_s: int | None = None,
        uid: str = "",
    ) -> object:
        """Delete an object; a Pod with a node and a grace period is only marked."""
