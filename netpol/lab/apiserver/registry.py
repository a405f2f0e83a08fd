"""The objects of the cluster and what the API server does to them on the way in.

Owns insert, replace and discard with their admission order: identity, defaults, validation, concurrency,
finalizers, graceful deletion, the cascade of a namespace. Objects handed out are copies; `store.py` is
the same by names, for callers in process.

Deletion of a Pod that has a node only marks it; whoever plays the kubelet deletes it again with a grace
period of 0. Owner references are stored, nothing is collected by them.
"""

import secrets
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from netpol.lab.apiserver import apply, defaults, errors, patch, validate
from netpol.lab.apiserver.errors import Cause, Obj
from netpol.lab.apiserver.history import Entry, History, Key
from netpol.lab.apiserver.query import Filter, ListQuery, Page, list_page, make_filter
from netpol.lab.apiserver.resources import Kinds, Resource

# apimachinery's names/generate.go: vowels and look-alikes are left out.
_SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_SYSTEM_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")
_IMMORTAL_NAMESPACES = ("default", "kube-public", "kube-system")
_CLOSED_PHASES = ("Succeeded", "Failed")


class DeleteOptions(NamedTuple):
    """What a deletion asks for; None means the kind's default."""

    grace_period_s: int | None = None
    uid: str = ""
    resource_version: str = ""
    dry_run: bool = False
    propagation: str = ""


class Deleted(NamedTuple):
    """The last state of an object; `gone` is False while finalizers or a kubelet hold it."""

    obj: Obj
    gone: bool


def utc_now() -> datetime:
    """Return the time by the machine's clock."""
    return datetime.now(tz=UTC)


class Registry:
    """A cluster's objects.

    Args:
        history: How many events per kind can be resumed from.
        service_cidrs: Where cluster IPs come from, the primary family first.
        clock: The time that goes into time stamps.
    """

    def __init__(
        self,
        *,
        history: int = 10_000,
        service_cidrs: tuple[str, ...] = ("10.96.0.0/16",),
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.kinds = Kinds()
        self.history = History(history)
        self.clock = clock
        self._services = defaults.ServiceAddresses(service_cidrs)
        for name in _SYSTEM_NAMESPACES:
            self.insert(self.kinds.named("namespaces"), {"metadata": {"name": name}})

    @property
    def resource_version(self) -> int:
        """The version of the newest change."""
        return self.history.rv

    def timestamp(self) -> str:
        """Return the present time as it stands in metadata."""
        return self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    # Reading

    def entry(self, resource: Resource, key: Key) -> Entry:
        """Return the stored version of an object.

        Raises:
            ApiError: 404 when there is none.
        """
        found = self.history.shelf(resource).entries.get(key)
        if found is None:
            raise errors.not_found(resource.group, resource.plural, key.name)
        return found

    def page(self, resource: Resource, query: ListQuery) -> Page:
        """Return one page of a list as the API defines it."""
        return list_page(self.history, resource, query)

    # Writing

    def insert(
        self,
        resource: Resource,
        given: Obj,
        *,
        namespace: str = "",
        dry_run: bool = False,
        keep_status: bool = False,
        manager: str = "",
        applied: Obj | None = None,
        unchecked: bool = False,
    ) -> Obj:
        """Store a new object of a known kind; `applied` is what a server-side apply sent."""
        obj = patch.copy(given)
        obj = {"apiVersion": resource.api_version, "kind": resource.kind} | obj
        meta = obj["metadata"] = dict(obj.get("metadata") or {})
        if resource.namespaced:
            namespace = meta.get("namespace") or namespace or "default"
            meta["namespace"] = namespace
            self._check_namespace(resource, namespace, str(meta.get("name") or ""))
        else:
            namespace = ""
            meta.pop("namespace", None)
        if not meta.get("name") and meta.get("generateName"):
            suffix = "".join(secrets.choice(_SUFFIX_ALPHABET) for _ in range(5))
            meta["name"] = f"{meta['generateName'][:58]}{suffix}"
        name = str(meta.get("name") or "")
        if meta.get("resourceVersion"):
            raise errors.bad_request("resourceVersion should not be set on objects to be created")
        key = Key(namespace, name)
        if key in self.history.shelf(resource).entries:
            raise errors.already_exists(resource.group, resource.plural, name)
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = self.timestamp()
        for stale in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"):
            meta.pop(stale, None)
        if resource.generation:
            meta["generation"] = 1
        if resource.has_status and not (keep_status or resource.keeps_status_on_create):
            obj.pop("status", None)
        obj = self._admit(resource, obj, None, unchecked=unchecked)
        apply.note_manager(
            obj, None, manager=manager, applied=applied, now=self.timestamp(), subresource=""
        )
        if dry_run:
            return obj
        stored = self._put(resource, key, obj, None)
        if resource.kind == "Namespace":
            account = {"metadata": {"name": "default", "namespace": name}}
            self.insert(self.kinds.named("serviceaccounts"), account)
        return stored

    def replace(
        self,
        resource: Resource,
        key: Key,
        given: Obj,
        *,
        subresource: str = "",
        dry_run: bool = False,
        manager: str = "",
        applied: Obj | None = None,
    ) -> Obj:
        """Replace an object of a known kind; an equal object changes nothing and no version."""
        old_entry = self.entry(resource, key)
        old = old_entry.obj()
        obj = patch.copy(given)
        obj = {"apiVersion": resource.api_version, "kind": resource.kind} | obj
        meta = obj["metadata"] = dict(obj.get("metadata") or {})
        self._check_identity(resource, key, meta, old["metadata"])
        if subresource == "status":
            obj = old | {"status": obj.get("status") or {}}
            obj["metadata"] = dict(old["metadata"])
            if not resource.group:
                # The core kinds take these with a status too; of the spec and all else nothing.
                for name in ("labels", "annotations", "finalizers"):
                    obj["metadata"].pop(name, None)
                    if meta.get(name):
                        obj["metadata"][name] = meta[name]
        else:
            for system in _SYSTEM_FIELDS:
                meta.pop(system, None)
                if system in old["metadata"]:
                    meta[system] = old["metadata"][system]
            if resource.has_status:
                obj.pop("status", None)
                if "status" in old:
                    obj["status"] = old["status"]
        obj = self._admit(resource, obj, old)
        if resource.generation and not _same(obj, old, ignore=("metadata", "status")):
            obj["metadata"]["generation"] = int(old["metadata"].get("generation") or 0) + 1
        if obj == old and applied is None:
            return old
        apply.note_manager(
            obj,
            old,
            manager=manager,
            applied=applied,
            now=self.timestamp(),
            subresource=subresource,
        )
        if dry_run or apply.equal_but_times(obj, old):
            return obj if dry_run else old
        if obj["metadata"].get("deletionTimestamp") and not self._held(resource, obj):
            return self._remove(resource, key, obj)
        stored = self._put(resource, key, obj, old)
        if resource.kind == "Namespace":
            self._finish_namespace(key.name)
        return stored

    def _put(self, resource: Resource, key: Key, obj: Obj, old: Obj | None) -> Obj:
        stored = self.history.put(resource, key, obj).obj()
        if resource.key == "services":
            self._services.hold(stored, old)
        elif resource.kind == "CustomResourceDefinition":
            self.kinds.register(stored)
        return stored

    def discard(self, resource: Resource, key: Key, options: DeleteOptions) -> Deleted:
        """Delete an object of a known kind."""
        obj = self.entry(resource, key).obj()
        meta = obj["metadata"]
        for wanted, found in (
            (options.uid, meta["uid"]),
            (options.resource_version, meta["resourceVersion"]),
        ):
            if wanted and wanted != found:
                why = f"the precondition {wanted} does not meet {found}"
                raise errors.conflict(resource.group, resource.plural, key.name, why)
        if resource.kind == "Namespace" and key.name in _IMMORTAL_NAMESPACES:
            why = "this namespace may not be deleted"
            raise errors.forbidden(resource.group, resource.plural, key.name, why)
        if options.dry_run:
            return Deleted(obj, gone=True)
        if resource.kind == "Namespace":
            return self._delete_namespace(resource, key, obj)
        grace_s = _grace_s(resource, obj, options.grace_period_s)
        finalizers = list(meta.get("finalizers") or ())
        if options.propagation == "Foreground" and "foregroundDeletion" in finalizers:
            finalizers.remove("foregroundDeletion")
        if grace_s == 0 and not finalizers:
            return Deleted(self._remove(resource, key, obj), gone=True)
        marked = "deletionTimestamp" in meta
        if not marked or grace_s < int(meta.get("deletionGracePeriodSeconds") or 0):
            self._mark(resource, obj, grace_s)
            obj = self.history.put(resource, key, obj).obj()
        return Deleted(obj, gone=False)

    def _mark(self, resource: Resource, obj: Obj, grace_s: int) -> None:
        meta = obj["metadata"]
        at = datetime.fromtimestamp(self.clock().timestamp() + grace_s, tz=UTC)
        meta["deletionTimestamp"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
        meta["deletionGracePeriodSeconds"] = grace_s
        if resource.generation:
            meta["generation"] = int(meta.get("generation") or 0) + 1

    def _remove(self, resource: Resource, key: Key, last: Obj) -> Obj:
        removed = self.history.remove(resource, key, last).obj()
        if resource.key == "services":
            self._services.release(removed)
        if resource.kind == "CustomResourceDefinition":
            for kind in self.kinds:
                if kind.custom and kind.qualified == key.name:
                    self.history.drop(kind)
            self.kinds.unregister(key.name)
        if resource.namespaced:
            self._finish_namespace(key.namespace)
        return removed

    # Namespaces

    def _check_namespace(self, resource: Resource, namespace: str, name: str) -> None:
        home = self.kinds.named("namespaces")
        found = self.history.shelf(home).entries.get(Key("", namespace))
        if found is None:
            raise errors.not_found("", "namespaces", namespace)
        if found.fields[0] == "Terminating":
            why = (
                f"unable to create new content in namespace {namespace} "
                "because it is being terminated"
            )
            refusal = errors.forbidden(resource.group, resource.plural, name, why)
            cause = {
                "reason": "NamespaceTerminating",
                "message": f"namespace {namespace} is being terminated",
                "field": "metadata.namespace",
            }
            refusal.details = (refusal.details or {}) | {"causes": [cause]}
            raise refusal

    def _delete_namespace(self, resource: Resource, key: Key, obj: Obj) -> Deleted:
        if "deletionTimestamp" not in obj["metadata"]:
            self._mark(resource, obj, 0)
            del obj["metadata"]["deletionGracePeriodSeconds"]
            obj["status"] = (obj.get("status") or {}) | {"phase": "Terminating"}
            self.history.put(resource, key, obj)
        last = obj
        for kind in list(self.kinds):
            if not kind.namespaced or "list" not in kind.verbs:
                continue
            wanted = make_filter(kind, namespace=key.name)
            for entry in self.page(kind, ListQuery(wanted)).entries:
                if entry.key in self.history.shelf(kind).entries:
                    self.discard(kind, entry.key, DeleteOptions())
        self._finish_namespace(key.name)
        return Deleted(last, gone=key not in self.history.shelf(resource).entries)

    def _finish_namespace(self, namespace: str) -> None:
        home = self.kinds.named("namespaces")
        key = Key("", namespace)
        entry = self.history.shelf(home).entries.get(key)
        if entry is None or entry.fields[0] != "Terminating":
            return
        if any(shelf.counts[namespace] for shelf in self.history.shelves()):
            return
        obj = entry.obj()
        spec = obj.get("spec") or {}
        if set(spec.get("finalizers") or ()) <= {"kubernetes"}:
            if obj["metadata"].get("finalizers"):
                return
            obj["spec"] = {}
            self.history.remove(home, key, obj)

    # Admission

    def _check_identity(self, resource: Resource, key: Key, meta: Obj, old: Obj) -> None:
        if meta.setdefault("name", key.name) != key.name:
            text = (
                f"the name of the object ({meta['name']}) does not match "
                f"the name on the URL ({key.name})"
            )
            raise errors.bad_request(text)
        if key.namespace and meta.setdefault("namespace", key.namespace) != key.namespace:
            raise errors.bad_request(
                "the namespace of the provided object does not match the namespace sent on the "
                f"request: {meta['namespace']} != {key.namespace}"
            )
        if meta.get("uid") and meta["uid"] != old["uid"]:
            why = f"Precondition failed: UID in precondition: {meta['uid']}, UID in object meta: "
            raise errors.conflict(resource.group, resource.plural, key.name, why + old["uid"])
        if meta.get("resourceVersion") not in (None, "", "0", old["resourceVersion"]):
            raise errors.conflict(resource.group, resource.plural, key.name)

    def _admit(
        self, resource: Resource, obj: Obj, old: Obj | None, *, unchecked: bool = False
    ) -> Obj:
        name = str(obj["metadata"].get("name") or "")
        causes = validate.shape(resource, obj)
        if not causes:
            obj = defaults.apply(resource, obj, old)
            if resource.key == "services":
                causes = self._services.assign(obj, old)
            if not unchecked:
                causes = causes + validate.check(resource, obj, old)
        if causes:
            raise errors.invalid(resource.group, resource.kind, name, _unique(causes))
        return obj

    def _held(self, resource: Resource, obj: Obj) -> bool:
        meta = obj["metadata"]
        if resource.kind == "Namespace" and not resource.group:
            return True
        return bool(meta.get("finalizers") or meta.get("deletionGracePeriodSeconds"))

    def filter(self, resource: Resource, namespace: str | None = None) -> Filter:
        """Return a filter that keeps everything, or one namespace."""
        return make_filter(resource, namespace=namespace)


_SYSTEM_FIELDS = (
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "resourceVersion",
    "selfLink",
    "managedFields",
)


def _same(one: Obj, other: Obj, *, ignore: tuple[str, ...]) -> bool:
    return all(
        one.get(name) == other.get(name)
        for name in (one.keys() | other.keys())
        if name not in ignore
    )


def _unique(causes: list[Cause]) -> list[Cause]:
    return list(dict.fromkeys(causes))


def _grace_s(resource: Resource, obj: Obj, wanted: int | None) -> int:
    """Return the seconds of grace; only Pods that may have running containers get any."""
    if resource.key != "pods":
        return 0
    spec = obj.get("spec") or {}
    phase = (obj.get("status") or {}).get("phase")
    if not spec.get("nodeName") or phase in _CLOSED_PHASES:
        return 0
    if wanted is not None:
        return max(wanted, 0)
    return int(spec.get("terminationGracePeriodSeconds", 30))
