"""The table of kinds: what is served under which path, name and shape.

Owns names, short names, categories, subresources and selectable fields, also of kinds that a stored
CustomResourceDefinition adds. Holds no objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from netpol.lab.apiserver.errors import Obj, no_such_path

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")

_POD_FIELDS = (
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "spec.hostNetwork",
    "status.phase",
    "status.podIP",
    "status.nominatedNodeName",
)
_EVENT_FIELDS = tuple(
    f"involvedObject.{name}"
    for name in (
        "kind",
        "namespace",
        "name",
        "uid",
        "apiVersion",
        "resourceVersion",
        "fieldPath",
    )
)
_EVENT_FIELDS += ("reason", "reportingComponent", "source.component", "type")


@dataclass(frozen=True, slots=True, eq=False)
class Resource:
    """One served kind in one version.

    Attributes:
        fields: Selectable fields beside metadata.name and metadata.namespace, as dotted paths of
            the stored form.
        generation: Whether metadata.generation counts the changes of spec.
        has_status: Whether status is a subresource of its own.
        stored_as: The key of the shelf; two versions of one kind share a shelf.
        columns: Printer columns of a CustomResourceDefinition's version.
        schema: openAPIV3Schema of a CustomResourceDefinition's version.
    """

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    has_status: bool = False
    keeps_status_on_create: bool = False
    generation: bool = False
    returns_deleted: bool = False
    custom: bool = False
    stored_as: str = ""
    singular: str = ""
    list_kind: str = ""
    columns: tuple[Any, ...] = field(default=())
    schema: Any = None
    verbs: tuple[str, ...] = VERBS

    @property
    def api_version(self) -> str:
        """The apiVersion of its objects."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def key(self) -> str:
        """The qualified plural, under which the objects are stored."""
        return self.stored_as or self.qualified

    @property
    def qualified(self) -> str:
        """The plural, qualified by its group where it has one."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def single(self) -> str:
        """The singular name."""
        return self.singular or self.kind.lower()

    @property
    def list_name(self) -> str:
        """The kind of a list of its objects."""
        return self.list_kind or f"{self.kind}List"


_RBAC = "rbac.authorization.k8s.io"

BUILTIN = (
    Resource(
        "",
        "v1",
        "Namespace",
        "namespaces",
        namespaced=False,
        short=("ns",),
        fields=("status.phase",),
        has_status=True,
        subresources=("finalize",),
    ),
    Resource(
        "",
        "v1",
        "Pod",
        "pods",
        short=("po",),
        categories=("all",),
        fields=_POD_FIELDS,
        has_status=True,
        generation=True,
        returns_deleted=True,
        subresources=("log", "exec", "binding"),
    ),
    Resource(
        "",
        "v1",
        "Service",
        "services",
        short=("svc",),
        categories=("all",),
        fields=("spec.clusterIP", "spec.type"),
        has_status=True,
        returns_deleted=True,
    ),
    Resource(
        "",
        "v1",
        "Node",
        "nodes",
        namespaced=False,
        short=("no",),
        fields=("spec.unschedulable",),
        has_status=True,
        keeps_status_on_create=True,
    ),
    Resource("", "v1", "ConfigMap", "configmaps", short=("cm",)),
    Resource("", "v1", "Secret", "secrets", fields=("type",)),
    Resource(
        "",
        "v1",
        "ServiceAccount",
        "serviceaccounts",
        short=("sa",),
        returns_deleted=True,
        subresources=("token",),
    ),
    Resource("", "v1", "Event", "events", short=("ev",), fields=_EVENT_FIELDS),
    Resource(
        "events.k8s.io",
        "v1",
        "Event",
        "events",
        short=("ev",),
        fields=_EVENT_FIELDS,
        stored_as="events",
    ),
    Resource(
        "apps",
        "v1",
        "DaemonSet",
        "daemonsets",
        short=("ds",),
        categories=("all",),
        has_status=True,
        generation=True,
    ),
    Resource(
        "apps",
        "v1",
        "Deployment",
        "deployments",
        short=("deploy",),
        categories=("all",),
        has_status=True,
        generation=True,
    ),
    Resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", generation=True),
    Resource(
        "networking.k8s.io",
        "v1",
        "NetworkPolicy",
        "networkpolicies",
        short=("netpol",),
        generation=True,
    ),
    Resource("coordination.k8s.io", "v1", "Lease", "leases"),
    Resource(_RBAC, "v1", "Role", "roles"),
    Resource(_RBAC, "v1", "RoleBinding", "rolebindings"),
    Resource(_RBAC, "v1", "ClusterRole", "clusterroles", namespaced=False),
    Resource(_RBAC, "v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
    Resource(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        namespaced=False,
        short=("crd", "crds"),
        categories=("api-extensions",),
        has_status=True,
        generation=True,
    ),
    Resource(
        "authorization.k8s.io",
        "v1",
        "SelfSubjectAccessReview",
        "selfsubjectaccessreviews",
        namespaced=False,
        verbs=("create",),
    ),
    Resource(
        "authentication.k8s.io",
        "v1",
        "SelfSubjectReview",
        "selfsubjectreviews",
        namespaced=False,
        verbs=("create",),
    ),
)
STORED = tuple(resource for resource in BUILTIN if "list" in resource.verbs)


class Kinds:
    """The kinds that are served now, looked up by path and by kind."""

    def __init__(self) -> None:
        self._by_path: dict[tuple[str, str, str], Resource] = {}
        self._by_kind: dict[tuple[str, str], Resource] = {}
        self._of_crd: dict[str, list[Resource]] = {}
        for resource in BUILTIN:
            self._add(resource)

    def __iter__(self) -> Iterator[Resource]:
        """Iterate over all served kinds, in the order in which they were added."""
        return iter(self._by_path.values())

    def _add(self, resource: Resource) -> None:
        self._by_path[resource.group, resource.version, resource.plural] = resource
        self._by_kind[resource.api_version, resource.kind] = resource

    def at(self, group: str, version: str, plural: str) -> Resource | None:
        """Return the kind under a path, if it is served."""
        return self._by_path.get((group, version, plural))

    def of(self, obj: Obj) -> Resource:
        """Return the kind of an object by its apiVersion and kind.

        Raises:
            ApiError: 404 when no such kind is served.
        """
        found = self._by_kind.get((str(obj.get("apiVersion")), str(obj.get("kind"))))
        if found is None:
            raise no_such_path()
        return found

    def named(self, name: str) -> Resource:
        """Return a kind by `plural`, or by `plural.group` where the plural is ambiguous.

        Raises:
            ApiError: 404 when no such kind is served.
        """
        for resource in self._by_path.values():
            if name in (resource.plural, resource.qualified):
                return resource
        raise no_such_path()

    def groups(self) -> dict[str, list[str]]:
        """Return the served versions of every group."""
        found: dict[str, list[str]] = {}
        for resource in self._by_path.values():
            versions = found.setdefault(resource.group, [])
            if resource.version not in versions:
                versions.append(resource.version)
        return found

    def register(self, crd: Obj) -> None:
        """Serve what a CustomResourceDefinition defines, in place of what it defined before."""
        self.unregister(crd["metadata"]["name"])
        served = list(custom_resources(crd))
        for resource in served:
            self._add(resource)
        self._of_crd[crd["metadata"]["name"]] = served

    def unregister(self, crd_name: str) -> None:
        """Serve no longer what the CustomResourceDefinition of that name defined."""
        for resource in self._of_crd.pop(crd_name, ()):
            self._by_path.pop((resource.group, resource.version, resource.plural), None)
            self._by_kind.pop((resource.api_version, resource.kind), None)


def custom_resources(crd: Obj) -> Iterator[Resource]:
    """Yield one kind per served version of a CustomResourceDefinition."""
    spec = crd["spec"]
    names = spec["names"]
    for version in spec.get("versions") or ():
        if not version.get("served"):
            continue
        selectable = tuple(
            item["jsonPath"].lstrip(".") for item in version.get("selectableFields") or ()
        )
        yield Resource(
            spec["group"],
            version["name"],
            names["kind"],
            names["plural"],
            namespaced=spec.get("scope") == "Namespaced",
            short=tuple(names.get("shortNames") or ()),
            categories=tuple(names.get("categories") or ()),
            fields=selectable,
            has_status="status" in (version.get("subresources") or {}),
            generation=True,
            custom=True,
            singular=names.get("singular") or "",
            list_kind=names.get("listKind") or "",
            columns=tuple(version.get("additionalPrinterColumns") or ()),
            schema=(version.get("schema") or {}).get("openAPIV3Schema"),
        )
