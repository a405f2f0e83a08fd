"""What the API server refuses: names, labels and the rules of each kind.

Owns which checks a kind has. The answers are causes with field paths; nothing is raised or changed.
"""

from collections.abc import Callable
from typing import Any

from netpol.lab.apiserver import causes as say
from netpol.lab.apiserver import validate_core, validate_policy, validate_schema
from netpol.lab.apiserver.errors import Cause, Obj
from netpol.lab.apiserver.resources import Resource

_ANNOTATIONS_MAX_BYTES = 256 * 1024


def shape(resource: Resource, obj: Obj) -> list[Cause]:
    """Return what is wrong with an object's metadata, before defaults."""
    meta = obj["metadata"]
    name = meta.get("name")
    if not name:
        return [say.required("metadata.name", "name or generateName is required")]
    check_name: Callable[[str, Any], list[Cause]] = _NAMES.get(resource.key, say.dns_subdomain)
    found = check_name("metadata.name", name)
    found += say.labels("metadata.labels", meta.get("labels"))
    size = 0
    for key, value in (meta.get("annotations") or {}).items():
        found += say.label_key("metadata.annotations", key.lower())
        size += len(key) + len(str(value))
    if size > _ANNOTATIONS_MAX_BYTES:
        text = f"Too long: may not be more than {_ANNOTATIONS_MAX_BYTES} bytes"
        found.append(Cause("metadata.annotations", "FieldValueTooLong", text))
    for place, one in enumerate(meta.get("finalizers") or ()):
        found += say.label_key(f"metadata.finalizers[{place}]", one)
    return found


def check(resource: Resource, obj: Obj, old: Obj | None) -> list[Cause]:
    """Return what is wrong with an object after defaults."""
    if resource.custom:
        return validate_schema.check(resource.schema, obj)
    rules = _RULES.get(resource.key)
    return rules(obj, old) if rules else []


def _workload(obj: Obj, old: Obj | None) -> list[Cause]:
    spec = obj["spec"]
    selector = spec.get("selector")
    if not selector:
        return [say.required("spec.selector")]
    found = say.selector("spec.selector", selector)
    template = spec["template"]
    labels = (template.get("metadata") or {}).get("labels") or {}
    wanted = selector.get("matchLabels") or {}
    if not wanted.items() <= labels.items():
        why = "`selector` does not match template `labels`"
        found.append(say.wrong("spec.template.metadata.labels", labels, why))
    if old is not None and (old.get("spec") or {}).get("selector") != selector:
        found.append(say.wrong("spec.selector", selector, "field is immutable"))
    return found + validate_core.pod_spec("spec.template.spec", template["spec"])


def _binding(obj: Obj, old: Obj | None) -> list[Cause]:
    role = obj.get("roleRef") or {}
    found = [] if role.get("name") else [say.required("roleRef.name")]
    if role.get("kind") not in ("Role", "ClusterRole"):
        found.append(say.unsupported("roleRef.kind", role.get("kind"), ("Role", "ClusterRole")))
    if old is not None and old.get("roleRef") != role:
        found.append(say.wrong("roleRef", role, "cannot change roleRef"))
    return found


def _crd(obj: Obj, _old: Obj | None) -> list[Cause]:
    spec = obj["spec"]
    found = [
        say.required(f"spec.{name}")
        for name in ("group", "scope", "versions")
        if not spec.get(name)
    ]
    names = spec.get("names") or {}
    found += [
        say.required(f"spec.names.{name}") for name in ("kind", "plural") if not names.get(name)
    ]
    if not found:
        wanted = f"{names['plural']}.{spec['group']}"
        if obj["metadata"]["name"] != wanted:
            why = f'must be spec.names.plural+"."+spec.group, needed {wanted}'
            found.append(say.wrong("metadata.name", obj["metadata"]["name"], why))
        if sum(1 for one in spec["versions"] if one.get("storage")) != 1:
            why = "must have exactly one version marked as storage version"
            found.append(say.wrong("spec.versions", len(spec["versions"]), why))
    return found


_NAMES: dict[str, Callable[[str, Any], list[Cause]]] = {
    "namespaces": say.dns_label,
    "services": say.dns_label,
    **{
        f"{plural}.rbac.authorization.k8s.io": say.path_segment
        for plural in ("roles", "rolebindings", "clusterroles", "clusterrolebindings")
    },
}
_RULES: dict[str, Callable[[Obj, Obj | None], list[Cause]]] = {
    "pods": validate_core.pod,
    "services": validate_core.service,
    "nodes": validate_core.node,
    "endpointslices.discovery.k8s.io": validate_core.endpoint_slice,
    "networkpolicies.networking.k8s.io": validate_policy.check,
    "deployments.apps": _workload,
    "daemonsets.apps": _workload,
    "rolebindings.rbac.authorization.k8s.io": _binding,
    "clusterrolebindings.rbac.authorization.k8s.io": _binding,
    "customresourcedefinitions.apiextensions.k8s.io": _crd,
}
