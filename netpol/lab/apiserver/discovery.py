"""What the server says about itself: groups, kinds and versions.

Owns the aggregated (v2) and the legacy discovery documents, made from the kind table on each request.
"""

from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.resources import Kinds, Resource

# What the lab behaves like. Clients compare major and minor.
VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0+netpol-lab",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "none",
    "compiler": "none",
    "platform": "linux/amd64",
}
_POST_ONLY = {"binding": ["create"], "token": ["create"]}
_CALLED = {"exec": ["create", "get"], "log": ["get"], "finalize": ["update"]}


def aggregated(kinds: Kinds, *, core: bool, beta: bool) -> Obj:
    """Return the APIGroupDiscoveryList of /api or of /apis."""
    version = "v2beta1" if beta else "v2"
    groups = []
    for group, versions in kinds.groups().items():
        if (group == "") is not core:
            continue
        groups.append(
            {
                "metadata": {"name": group, "creationTimestamp": None},
                "versions": [
                    {
                        "version": name,
                        "freshness": "Current",
                        "resources": [
                            _aggregated_resource(resource)
                            for resource in kinds
                            if (resource.group, resource.version) == (group, name)
                        ],
                    }
                    for name in versions
                ],
            }
        )
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{version}",
        "metadata": {},
        "items": groups,
    }


def _aggregated_resource(resource: Resource) -> Obj:
    kind = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    found: Obj = {
        "resource": resource.plural,
        "responseKind": kind,
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.single,
        "verbs": list(resource.verbs),
    }
    if resource.short:
        found["shortNames"] = list(resource.short)
    if resource.categories:
        found["categories"] = list(resource.categories)
    below = [
        {"subresource": name, "responseKind": kind, "verbs": verbs}
        for name, verbs in _subresources(resource)
    ]
    if below:
        found["subresources"] = below
    return found


def _subresources(resource: Resource) -> list[tuple[str, list[str]]]:
    found = [("status", ["get", "patch", "update"])] if resource.has_status else []
    return found + [(name, _POST_ONLY.get(name) or _CALLED[name]) for name in resource.subresources]


def legacy_versions() -> Obj:
    """Return the APIVersions of /api."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def legacy_groups(kinds: Kinds) -> Obj:
    """Return the APIGroupList of /apis."""
    groups = [legacy_group(group, versions) for group, versions in kinds.groups().items() if group]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def legacy_group(group: str, versions: list[str]) -> Obj:
    """Return the APIGroup of one group."""
    found = [{"groupVersion": f"{group}/{name}", "version": name} for name in versions]
    return {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": group,
        "versions": found,
        "preferredVersion": found[0],
    }


def legacy_resources(kinds: Kinds, group: str, version: str) -> Obj:
    """Return the APIResourceList of one group and version."""
    found = []
    for resource in kinds:
        if (resource.group, resource.version) != (group, version):
            continue
        one: Obj = {
            "name": resource.plural,
            "singularName": resource.single,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": list(resource.verbs),
        }
        if resource.short:
            one["shortNames"] = list(resource.short)
        if resource.categories:
            one["categories"] = list(resource.categories)
        found.append(one)
        found.extend(
            {
                "name": f"{resource.plural}/{name}",
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": resource.kind,
                "verbs": verbs,
            }
            for name, verbs in _subresources(resource)
        )
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/{version}" if group else version,
        "resources": found,
    }
