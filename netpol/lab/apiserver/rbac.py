"""Who may do what: the stored Roles and bindings, evaluated per request.

Owns the decision and the text of its refusal. `system:masters` may do everything; the roles that every
cluster has (`cluster-admin`, `admin`, `edit`, `view`) hold without being stored. Aggregated roles are
not computed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.auth import AUTHENTICATED, MASTERS, User
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.history import Key
from netpol.lab.apiserver.request import Call
from netpol.lab.apiserver.store import Store

_READ = ["get", "list", "watch"]
_BUILT_IN: dict[str, list[Obj]] = {
    "cluster-admin": [
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
        {"nonResourceURLs": ["*"], "verbs": ["*"]},
    ],
    "admin": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}],
    "edit": [
        {
            "apiGroups": ["", "apps", "networking.k8s.io", "discovery.k8s.io"],
            "resources": ["*"],
            "verbs": ["*"],
        }
    ],
    "view": [
        {
            "apiGroups": ["", "apps", "networking.k8s.io", "discovery.k8s.io"],
            "resources": [
                "configmaps",
                "daemonsets",
                "deployments",
                "endpointslices",
                "events",
                "namespaces",
                "networkpolicies",
                "pods",
                "pods/log",
                "pods/status",
                "serviceaccounts",
                "services",
            ],
            "verbs": _READ,
        }
    ],
}
_FOR_ALL_USERS = ("selfsubjectaccessreviews", "selfsubjectreviews")


class Attributes(NamedTuple):
    """What somebody wants to do; `namespace` is empty for cluster scope and for all namespaces."""

    verb: str
    group: str
    resource: str
    subresource: str = ""
    namespace: str = ""
    name: str = ""


def attributes(call: Call) -> Attributes:
    """Return what a request wants to do."""
    resource = call.resource
    namespace = call.namespace or ""
    if resource.key == "namespaces" and call.name:
        namespace = call.name
    name = call.name
    if not name:  # a list by name may be granted as the name is
        wanted = call.query.get("fieldSelector", "")
        if wanted.startswith("metadata.name=") and "," not in wanted:
            name = wanted.partition("=")[2].lstrip("=")
    return Attributes(call.verb, resource.group, resource.plural, call.subresource, namespace, name)


def authorize(store: Store, user: User, call: Call) -> None:
    """Let a request through.

    Raises:
        ApiError: 403 when no role of the user allows it.
    """
    wanted = attributes(call)
    if allowed(store, user, wanted):
        return
    where = f'in the namespace "{call.namespace}"' if call.namespace else "at the cluster scope"
    name = wanted.resource + (f"/{wanted.subresource}" if wanted.subresource else "")
    why = (
        f'User "{user.name}" cannot {wanted.verb} resource "{name}" '
        f'in API group "{wanted.group}" {where}'
    )
    raise errors.forbidden(wanted.group, wanted.resource, call.name, why)


def allowed(store: Store, user: User, wanted: Attributes) -> bool:
    """Tell whether some role of the user allows it."""
    if MASTERS in user.groups:
        return True
    if wanted.resource in _FOR_ALL_USERS and AUTHENTICATED in user.groups:
        return True
    return any(_rule_allows(rule, wanted) for rule in _rules(store, user, wanted.namespace))


def allowed_path(store: Store, user: User, path: str) -> bool:
    """Tell whether the user may read a path that is no object."""
    if AUTHENTICATED in user.groups:
        return True
    return path in ("/version", "/healthz", "/livez", "/readyz") or any(
        _holds_path(rule.get("nonResourceURLs"), path) and _holds(rule.get("verbs"), "get")
        for rule in _rules(store, user, "")
    )


def _rules(store: Store, user: User, namespace: str) -> Iterator[Obj]:
    for binding in store.list("clusterrolebindings"):
        if _is_subject(user, binding, ""):
            yield from _role_rules(store, binding, "")
    if namespace:
        for binding in store.list("rolebindings", namespace=namespace):
            if _is_subject(user, binding, namespace):
                yield from _role_rules(store, binding, namespace)


def _is_subject(user: User, binding: Obj, namespace: str) -> bool:
    for subject in binding.get("subjects") or ():
        name = subject.get("name")
        match subject.get("kind"):
            case "User":
                found = user.name == name
            case "Group":
                found = name in user.groups
            case "ServiceAccount":
                home = subject.get("namespace") or namespace
                found = user.name == f"system:serviceaccount:{home}:{name}"
            case _:
                found = False
        if found:
            return True
    return False


def _role_rules(store: Store, binding: Obj, namespace: str) -> list[Obj]:
    role = binding.get("roleRef") or {}
    name = str(role.get("name"))
    if role.get("kind") == "Role":
        kind, key = store.kinds.named("roles"), Key(namespace, name)
    else:
        kind, key = store.kinds.named("clusterroles"), Key("", name)
    entry = store.history.shelf(kind).entries.get(key)
    if entry is None:
        return _BUILT_IN.get(name, []) if kind.kind == "ClusterRole" else []
    return list(entry.obj().get("rules") or ())


def _rule_allows(rule: Obj, wanted: Attributes) -> bool:
    if not _holds(rule.get("verbs"), wanted.verb) or not _holds(
        rule.get("apiGroups"), wanted.group
    ):
        return False
    names = rule.get("resourceNames") or ()
    if names and wanted.name not in names:
        return False
    resources = rule.get("resources") or ()
    if not wanted.subresource:
        return _holds(resources, wanted.resource)
    full = f"{wanted.resource}/{wanted.subresource}"
    return _holds(resources, full) or f"*/{wanted.subresource}" in resources


def _holds(values: Any, wanted: str) -> bool:
    return any(value in ("*", wanted) for value in values or ())


def _holds_path(patterns: Any, path: str) -> bool:
    """Tell whether a pattern is the path, or its beginning where it ends in a star."""
    return any(
        path == one or (one.endswith("*") and path.startswith(one[:-1])) for one in patterns or ()
    )


def self_review(store: Store, user: User, review: Obj) -> Obj:
    """Return a SelfSubjectAccessReview with its answer."""
    spec = review.get("spec") or {}
    wanted = spec.get("resourceAttributes")
    if wanted is not None:
        can = allowed(
            store,
            user,
            Attributes(
                wanted.get("verb") or "",
                wanted.get("group") or "",
                wanted.get("resource") or "",
                wanted.get("subresource") or "",
                wanted.get("namespace") or "",
                wanted.get("name") or "",
            ),
        )
    else:
        path = (spec.get("nonResourceAttributes") or {}).get("path") or ""
        can = allowed_path(store, user, path)
    return review | {"status": {"allowed": can}}


def who_am_i(user: User, review: Obj) -> Obj:
    """Return a SelfSubjectReview with its answer."""
    info = {"username": user.name, "groups": sorted(user.groups)}
    return review | {"status": {"userInfo": info}}
