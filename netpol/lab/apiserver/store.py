"""The cluster's objects for whoever runs in process: the lab's controllers and tests.

Owns the plain Python API: kinds by name, objects as dicts that are copies. What happens to an object on
the way in stands in `registry.py`.
"""

from collections.abc import AsyncIterator

from netpol.lab.apiserver import errors, patch, typed
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.history import Key
from netpol.lab.apiserver.query import ListQuery, make_filter
from netpol.lab.apiserver.registry import Deleted, DeleteOptions, Registry
from netpol.lab.apiserver.resources import Resource

Objs = list[Obj]  # the class below has a method named list


class Store(Registry):
    """A cluster's objects, by the names of their kinds (`pods`, `events.events.k8s.io`)."""

    def get(self, kind: str, name: str, namespace: str = "") -> Obj:
        """Return an object by plural (`pods`, `events.events.k8s.io`) and name.

        Raises:
            ApiError: 404 when there is none.
        """
        return self.entry(self.kinds.named(kind), Key(namespace, name)).obj()

    def list(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
    ) -> Objs:
        """Return the objects of a kind in the order of their keys."""
        resource = self.kinds.named(kind)
        wanted = make_filter(
            resource, namespace=namespace, labels=label_selector, fields=field_selector
        )
        return [entry.obj() for entry in self.page(resource, ListQuery(wanted)).entries]

    async def watch(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: int | None = None,
    ) -> AsyncIterator[tuple[str, Obj]]:
        """Yield (type, object) from a version on, or the present state as ADDED and then changes.

        Raises:
            CompactedError: The log no longer reaches back to where the reader stands.
        """
        resource = self.kinds.named(kind)
        wanted = make_filter(
            resource, namespace=namespace, labels=label_selector, fields=field_selector
        )
        shelf = self.history.shelf(resource)
        initial = []
        if resource_version is None:
            initial = self.page(resource, ListQuery(wanted)).entries
        cursor = shelf.cursor(resource_version)
        try:
            for entry in initial:
                yield "ADDED", entry.obj()
            while True:
                for event in cursor.take():
                    kept = wanted.translate(event)
                    if kept is not None:
                        yield kept[0], kept[1].obj()
                await cursor.wake.wait()
        finally:
            cursor.close()

    def bookmark_all(self) -> None:
        """Have every watch that takes bookmarks send one of the present version, at once."""
        self.history.bookmarks_asked += 1
        for shelf in self.history.shelves():
            for cursor in shelf.cursors:
                cursor.wake.set()

    def create(
        self,
        obj: Obj,
        *,
        namespace: str = "",
        dry_run: bool = False,
        keep_status: bool = False,
        manager: str = "",
        unchecked: bool = False,
    ) -> Obj:
        """Store a new object; the argument is not changed.

        Args:
            obj: The object, with apiVersion and kind.
            namespace: Where the object goes that names no namespace itself.
            dry_run: Do everything but store it.
            keep_status: Store the given status too, which HTTP clients cannot.
            manager: Who is noted as the manager of the fields.
            unchecked: Skip the rules of the kind, as for what an older server let through.
        """
        resource = self.kinds.of(obj)
        if not unchecked:
            obj = _read(resource, obj)
        return self.insert(
            resource,
            obj,
            namespace=namespace,
            dry_run=dry_run,
            keep_status=keep_status,
            manager=manager,
            unchecked=unchecked,
        )

    def update(self, obj: Obj, *, subresource: str = "", dry_run: bool = False) -> Obj:
        """Replace an object, or with `subresource="status"` its status.

        Raises:
            ApiError: 409 when the object carries a resourceVersion that is not the stored one.
        """
        resource = self.kinds.of(obj)
        obj = _read(resource, obj)
        meta = obj["metadata"]
        key = Key(meta.get("namespace") or "" if resource.namespaced else "", meta["name"])
        return self.replace(resource, key, obj, subresource=subresource, dry_run=dry_run)

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
        """Patch an object by `merge`, `strategic` or `json`, without a resourceVersion check."""
        resource = self.kinds.named(kind)
        key = Key(namespace, name)
        changed = patch.apply(resource, self.entry(resource, key).obj(), body, style)
        changed = _read(resource, changed)
        return self.replace(resource, key, changed, subresource=subresource)

    def bind(self, key: Key, node: str, *, dry_run: bool = False) -> None:
        """Give a Pod its node, as a scheduler does.

        Raises:
            ApiError: 409 when it has one.
        """
        resource = self.kinds.named("pods")
        obj = self.entry(resource, key).obj()
        if obj["spec"].get("nodeName"):
            why = f"pod {key.name} is already assigned to node {obj['spec']['nodeName']!r}"
            raise errors.conflict("", "pods/binding", key.name, why)
        obj["spec"]["nodeName"] = node
        condition = {
            "type": "PodScheduled",
            "status": "True",
            "lastProbeTime": None,
            "lastTransitionTime": self.timestamp(),
        }
        others = [
            one
            for one in obj["status"].get("conditions") or ()
            if one.get("type") != "PodScheduled"
        ]
        obj["status"]["conditions"] = [*others, condition]
        if not dry_run:
            self.history.put(resource, key, obj)

    def delete(
        self,
        kind: str,
        name: str,
        namespace: str = "",
        *,
        grace_period_s: int | None = None,
        uid: str = "",
    ) -> Deleted:
        """Delete an object; a Pod with a node and a grace period is only marked.

        Raises:
            ApiError: 404 when there is none, 409 when its uid is another.
        """
        options = DeleteOptions(grace_period_s=grace_period_s, uid=uid)
        return self.discard(self.kinds.named(kind), Key(namespace, name), options)


def _read(resource: Resource, obj: Obj) -> Obj:
    """Return a copy of an object without what its kind does not know.

    Raises:
        ApiError: 400 for a field of a wrong type.
    """
    return typed.read(resource, patch.copy(obj), validation="Ignore")[0]
