"""The manifests of `lab up -f`, made ready for the API server: found, read, checked, put in order.

Owns what is decided before anything is created: kinds that are skipped, Namespaces that must be added,
nodes that do not exist. Creates nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol.k8s.manifest_text import decode_text, documents
from netpol.lib.errors import InputError

Obj = dict[str, Any]

_SUFFIXES = (".yaml", ".yml", ".json")
#: What the API server set itself when the manifest was exported.
_SYSTEM_FIELDS = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "managedFields",
    "resourceVersion",
    "selfLink",
    "uid",
)
_FIRST = ("CustomResourceDefinition", "Namespace", "ServiceAccount")
#: Kinds that the API server keeps but for which the lab has no controller.
_INERT = ("Deployment", "DaemonSet", "StatefulSet", "ReplicaSet", "Job", "CronJob")


@dataclass(frozen=True, slots=True)
class Manifest:
    """An object and where it stands: file and document."""

    source: str
    obj: Obj

    @property
    def identity(self) -> tuple[str, str, str]:
        """Kind, namespace and name."""
        meta = self.obj["metadata"]
        return self.obj["kind"], meta.get("namespace") or "", meta["name"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What `lab up` will create, and what it says about the rest."""

    manifests: tuple[Manifest, ...]
    node_labels: dict[str, dict[str, str]]
    notes: tuple[str, ...]


def read(paths: Sequence[str]) -> list[Manifest]:
    """Read files and folders (deep, in the order of their names), Lists taken apart.

    Raises:
        InputError: A path or a document cannot be used; the message names file and document.
    """
    found: list[Manifest] = []
    for path in paths:
        for file in _files(Path(path)):
            where = str(file)
            try:
                raw = file.read_bytes()
            except OSError as error:
                raise InputError(
                    where, needed="a readable file", got=str(error.strerror)
                ) from error
            for document in documents(decode_text(raw, where), where):
                if document.value is not None:
                    source = f"{where}: document {document.number}"
                    found.extend(_objects(document.value, source))
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"-f {path}", needed="manifests (*.yaml, *.yml, *.json)", got="none")
        return files
    if not path.exists():
        raise InputError(f"-f {path}", needed="a file or folder", got="nothing of that name")
    return [path]


def _objects(value: Any, source: str) -> Iterable[Manifest]:
    if not isinstance(value, dict):
        raise InputError(source, needed="a Kubernetes object", got=type(value).__name__)
    kind = value.get("kind")
    if not isinstance(kind, str) or not kind:
        raise InputError(f"{source}: kind", needed="the kind of the object", got=repr(kind))
    if not isinstance(value.get("apiVersion"), str):
        got = repr(value.get("apiVersion"))
        raise InputError(f"{source}: apiVersion", needed="the API version of the object", got=got)
    if kind.endswith("List") and isinstance(value.get("items"), list):
        for index, item in enumerate(value["items"]):
            yield from _objects(item, f"{source}: items[{index}]")
        return
    if kind == "Kustomization":
        raise InputError(source, needed="manifests as kubectl apply -f takes them", got=kind)
    meta = value.get("metadata")
    if not isinstance(meta, dict) or not isinstance(meta.get("name"), str) or not meta["name"]:
        raise InputError(f"{source}: metadata.name", needed="a name", got=repr(meta)[:60])
    yield Manifest(source, value)


def select(
    manifests: Sequence[Manifest], *, nodes: Sequence[str], served: dict[tuple[str, str], bool]
) -> Selection:
    """Decide what is created, in order.

    Args:
        manifests: what was read; of two with one identity the later counts.
        nodes: the names of the lab's nodes.
        served: (apiVersion, kind) that the API server knows, and whether it is namespaced.

    Raises:
        InputError: A Pod asks for a node that will not exist.
    """
    chosen: dict[tuple[str, str, str], Manifest] = {}
    node_labels: dict[str, dict[str, str]] = {}
    skipped: dict[str, None] = {}
    served = served | _custom(manifests)
    for manifest in manifests:
        obj = manifest.obj
        kind = obj["kind"]
        namespaced = served.get((obj["apiVersion"], kind))
        if kind in _INERT:
            skipped[f"{kind} (the lab has no controller for it, write Pods)"] = None
        elif namespaced is None:
            skipped[kind] = None
        elif kind == "Node":
            name = obj["metadata"]["name"]
            if name in nodes:
                node_labels.setdefault(name, {}).update(obj["metadata"].get("labels") or {})
            else:
                skipped[f"Node {name} (the lab's nodes are {', '.join(nodes)})"] = None
        else:
            if kind == "Pod":
                _check_node(manifest, nodes)
            clean = Manifest(manifest.source, _clean(obj, namespaced=namespaced))
            chosen.pop(clean.identity, None)
            chosen[clean.identity] = clean
    notes = [f"skipped: {', '.join(skipped)}"] if skipped else []
    ordered = sorted(chosen.values(), key=lambda m: _rank(m.obj["kind"]))
    return Selection(
        manifests=tuple(_with_namespaces(ordered)), node_labels=node_labels, notes=tuple(notes)
    )


def _custom(manifests: Sequence[Manifest]) -> dict[tuple[str, str], bool]:
    """Return the kinds that CustomResourceDefinitions among the manifests will add."""
    found = {}
    for manifest in manifests:
        if manifest.obj["kind"] == "CustomResourceDefinition":
            spec = manifest.obj.get("spec") or {}
            kind = (spec.get("names") or {}).get("kind")
            for version in spec.get("versions") or ():
                group_version = f"{spec.get('group')}/{version.get('name')}"
                found[group_version, str(kind)] = spec.get("scope") == "Namespaced"
    return found


def _rank(kind: str) -> int:
    return _FIRST.index(kind) if kind in _FIRST else len(_FIRST)


def _check_node(manifest: Manifest, nodes: Sequence[str]) -> None:
    spec = manifest.obj.get("spec")
    node = spec.get("nodeName") if isinstance(spec, dict) else None
    if node and node not in nodes:
        raise InputError(
            f"{manifest.source}: Pod {manifest.obj['metadata']['name']}: spec.nodeName",
            needed=f"one of {', '.join(nodes)}, or none (more nodes: --nodes)",
            got=repr(node),
        )


def _clean(obj: Obj, *, namespaced: bool) -> Obj:
    meta = {k: v for k, v in obj["metadata"].items() if k not in _SYSTEM_FIELDS}
    if namespaced:
        meta["namespace"] = meta.get("namespace") or "default"
    else:
        meta.pop("namespace", None)
    return {k: v for k, v in obj.items() if k != "status"} | {"metadata": meta}


def _with_namespaces(manifests: list[Manifest]) -> Iterable[Manifest]:
    """Yield the manifests, each Namespace that nothing defines before the first that needs it."""
    known = {"default", "kube-system", "kube-public", "kube-node-lease"}
    known |= {m.obj["metadata"]["name"] for m in manifests if m.obj["kind"] == "Namespace"}
    for manifest in manifests:
        namespace = manifest.obj["metadata"].get("namespace")
        if namespace and namespace not in known:
            known.add(namespace)
            made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
            yield Manifest(f"{manifest.source} (its namespace)", made)
        yield manifest
