"""Manifests as files, folders or standard input: a cluster without a cluster.

Owns which files are read, how objects are told apart and named in messages, and what stands in for
the parts of a cluster that no manifest holds: namespaces, addresses of pods that have none yet,
EndpointSlices. Text is `manifest_text`'s, structure `manifest_schema`'s, values are `decode`'s; what a
policy means is not read here at all.

Nothing is half loaded: the first thing that cannot be read raises InputError with file, document and
field path. What the API would refuse but can be read is loaded and listed in `problems`.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from netpol.k8s import manifest_text
from netpol.k8s.decode import DEFAULT_NAMESPACE, KINDS, decode
from netpol.k8s.errors import DecodeError
from netpol.k8s.manifest_schema import SCHEMAS, StructureError, clean, describe
from netpol.k8s.manifest_slices import derive_slices
from netpol.lib.errors import InputError
from netpol.model.ids import ObjectKey
from netpol.model.labels import NAMESPACE_NAME_LABEL, labels
from netpol.model.net import Prefix, parse_prefix
from netpol.model.networkpolicy import NetworkPolicy
from netpol.model.objects import Endpoint, EndpointSlice, Namespace, Node, Service

#: What kubectl takes for a manifest in a folder.
SUFFIXES = (".json", ".yaml", ".yml")
#: Where pods without a status get addresses from, in order of loading, from .0.1 on.
POD_RANGE = parse_prefix("10.244.0.0/16")
#: Most bytes of all files together.
TOTAL_MAX_BYTES = 512 << 20
#: Lists in lists: kubectl makes one level.
_LIST_DEPTH_MAX = 4

#: RFC 1123, as the API checks names (lower-case labels joined by dots).
_DNS_NAME = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


class Origin(NamedTuple):
    """Where an object was read."""

    file: str
    document: int

    def __str__(self) -> str:
        return f"{self.file}: document {self.document}"


class ManifestProblem(NamedTuple):
    """Something that the API would refuse, in an object that is loaded all the same."""

    origin: Origin
    kind: str
    key: ObjectKey
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.kind} {self.key}: {self.field}: {self.message}"


@dataclass(slots=True)
class Manifests:
    """What was loaded, completed to a cluster.

    Attributes:
        origins: where each object stands, by (kind, key).
        skipped: kinds that are not netpol's, and how many of each.
        problems: what the API would have refused.
        notices: other remarks for the reader (an object given twice).
        assigned: pods whose address was made up.
        headless: Services with clusterIP None (one without clusterIP is not headless).
        external_ips: addresses outside the cluster that lead to a Service.
    """

    namespaces: dict[str, Namespace] = field(default_factory=dict)
    pods: dict[ObjectKey, Endpoint] = field(default_factory=dict)
    policies: dict[ObjectKey, NetworkPolicy] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    services: dict[ObjectKey, Service] = field(default_factory=dict)
    slices: dict[ObjectKey, EndpointSlice] = field(default_factory=dict)
    origins: dict[tuple[str, ObjectKey], Origin] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[ManifestProblem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    assigned: list[ObjectKey] = field(default_factory=list)
    headless: set[ObjectKey] = field(default_factory=set)
    external_ips: dict[bytes, ObjectKey] = field(default_factory=dict)

    @property
    def node_names(self) -> tuple[str, ...]:
        """Nodes that have an object, and those that pods name."""
        named = {p.node for p in self.pods.values() if p.node}
        return tuple(sorted(named | set(self.nodes)))


def load(paths: Sequence[str], *, stdin: BinaryIO | None = None) -> Manifests:
    """Load files, folders (recursively, in order of their paths) and "-" for standard input.

    Raises:
        InputError: something cannot be read; nothing is loaded then.
    """
    out = Manifests()
    total = 0
    for path in paths:
        for name, raw in _files(path, stdin):
            total += len(raw)
            if total > TOTAL_MAX_BYTES:
                raise InputError(
                    f"{name}: manifests too large", needed=f"at most {TOTAL_MAX_BYTES >> 20} MB"
                )
            text = manifest_text.decode_text(raw, name)
            for document in manifest_text.documents(text, name):
                if document.value is not None:
                    _Reader(out, Origin(name, document.number)).read(document.value)
    _complete(out)
    return out


# -- files --------------------------------------------------------------------------------------


def _files(path: str, stdin: BinaryIO | None) -> Iterator[tuple[str, bytes]]:
    if path == "-":
        source = stdin if stdin is not None else sys.stdin.buffer
        yield "stdin", source.read(manifest_text.FILE_MAX_BYTES + 1)
        return
    if "\0" in path or not path:
        raise InputError(f"no such file: {path!r}", needed="a file or folder of manifests")
    if Path(path).is_dir():
        found = sorted(_walk(path))
        if not found:
            raise InputError(f"{path}: no manifests in this folder", needed=", ".join(SUFFIXES))
        for name in found:
            yield name, _read(name)
        return
    yield path, _read(path)


def _walk(folder: str) -> Iterator[str]:
    def fail(e: OSError) -> None:
        raise InputError(f"{e.filename}: cannot be read", got=e.strerror or str(e))

    for base, _, names in os.walk(folder, onerror=fail):
        for name in names:
            full = os.path.join(base, name)  # noqa: PTH118  (keeps "./" as typed)
            if name.endswith(SUFFIXES) and Path(full).is_file():
                yield full


def _read(name: str) -> bytes:
    try:
        with Path(name).open("rb") as f:
            size = os.fstat(f.fileno())
            if stat.S_ISREG(size.st_mode) and size.st_size > manifest_text.FILE_MAX_BYTES:
                return b" " * (manifest_text.FILE_MAX_BYTES + 1)  # refused by its length
            return f.read(manifest_text.FILE_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"no such file: {name}", needed="a file or folder of manifests") from None
    except OSError as e:
        raise InputError(f"{name}: cannot be read", got=e.strerror or str(e)) from None


# -- objects ------------------------------------------------------------------------------------


class _Reader:
    """Reads the objects of one document into a Manifests."""

    def __init__(self, out: Manifests, origin: Origin) -> None:
        self._out, self._origin = out, origin

    def read(self, value: Any, *, path: str = "", inherited: tuple[str, str] = ("", "")) -> None:
        """Read an object or a List of them. `inherited`: kind and apiVersion a typed List gives."""
        at = f"{self._origin}: {path}: " if path else f"{self._origin}: "
        if not isinstance(value, dict):
            raise InputError(f"{at}not an object", needed="a mapping", got=describe(value))
        kind = value.get("kind") or inherited[0]
        api = value.get("apiVersion") or inherited[1] or ""
        if not isinstance(kind, str) or not kind:
            raise InputError(f"{at}kind", needed="a string", got=describe(value.get("kind")))
        if not isinstance(api, str):
            raise InputError(f"{at}apiVersion", needed="a string", got=describe(api))
        if kind.endswith("List") and ("items" in value or kind == "List"):
            self._list(value, kind=kind, api=api, path=path, at=at)
        elif kind in KINDS:
            self._known(value, kind=kind, api=api, at=at)
        else:
            self._out.skipped[kind] += 1

    def _list(self, value: dict[str, Any], *, kind: str, api: str, path: str, at: str) -> None:
        items = value.get("items")
        if items is None:
            return
        if not isinstance(items, list):
            raise InputError(f"{at}items", needed="a list", got=describe(items))
        if path.count("items[") >= _LIST_DEPTH_MAX:
            raise InputError(f"{at}Lists nested too deeply", needed=f"at most {_LIST_DEPTH_MAX}")
        inherited = ("", "") if kind == "List" else (kind.removesuffix("List"), api)
        prefix = f"{path}." if path else ""
        for i, item in enumerate(items):
            self.read(item, path=f"{prefix}items[{i}]", inherited=inherited)

    def _known(self, value: dict[str, Any], *, kind: str, api: str, at: str) -> None:
        resource = KINDS[kind]
        if api != resource.api_version:
            group, wanted = api.rpartition("/")[0], resource.api_version.rpartition("/")[0]
            if not api or group in (wanted, "extensions"):
                raise InputError(
                    f"{at}{kind}: apiVersion", needed=resource.api_version, got=api or "nothing"
                )
            self._out.skipped[f"{kind} ({api})"] += 1  # another project's kind of the same name
            return
        title = f"{at}{kind}{_title(value, namespaced=resource.namespaced)}"
        unknown: list[str] = []
        try:
            plain = clean(value, SCHEMAS[kind], unknown=unknown)
        except StructureError as e:
            raise InputError(f"{title}: {e.path}", needed=e.needed, got=e.got) from None
        try:
            decoded = decode(resource, plain)
        except DecodeError as e:
            if e.path == "metadata.name" and not plain.get("metadata", {}).get("name"):
                raise InputError(
                    f"{title}: metadata.name", needed="a name", got="nothing"
                ) from None
            raise InputError(f"{title}: {e.path or 'object'}", needed=e.needed, got=e.got) from None
        self._store(kind, decoded.key, decoded.value)
        found = [(path, "unknown field, it has no effect") for path in unknown]
        found += [(p.field, p.message) for p in decoded.problems]
        found += _name_problems(kind, decoded.key, plain)
        self._out.problems.extend(
            ManifestProblem(self._origin, kind, decoded.key, where, what) for where, what in found
        )

    def _store(self, kind: str, key: ObjectKey, value: Any) -> None:
        out = self._out
        earlier = out.origins.get((kind, key))
        if earlier is not None:
            out.notices.append(
                f"{self._origin}: {kind} {key} is given again and replaces that of {earlier}"
            )
            out.problems = [p for p in out.problems if (p.kind, p.key) != (kind, key)]
        out.origins[kind, key] = self._origin
        match value:
            case Namespace():
                out.namespaces[value.name] = value
            case Node():
                out.nodes[value.name] = value
            case Endpoint():
                out.pods[key] = value
            case NetworkPolicy():
                out.policies[key] = value
            case Service():
                out.services[key] = value
                out.headless -= {key}
                if value.headless:
                    out.headless.add(key)
                out.external_ips = {a: k for a, k in out.external_ips.items() if k != key}
                out.external_ips.update(dict.fromkeys(value.outside_addresses, key))
            case EndpointSlice():
                out.slices[key] = value


def _title(value: dict[str, Any], *, namespaced: bool) -> str:
    """The object's name for a message, as far as it has one."""
    meta = value.get("metadata")
    name = meta.get("name") if isinstance(meta, dict) else None
    if not isinstance(name, str) or not name or not isinstance(meta, dict):
        return ""
    ns = meta.get("namespace") or DEFAULT_NAMESPACE
    shown = f"{ns}/{name}" if namespaced else name
    return f" {shown}" if len(shown) <= 200 and shown.isprintable() else ""


def _name_problems(kind: str, key: ObjectKey, plain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and labels that the API refuses (labels of a policy's selectors are not read here)."""
    if not _DNS_NAME.fullmatch(key.name):
        yield "metadata.name", f"needed a lower-case DNS name, got {key.name!r}"
    if key.namespace and not _DNS_NAME.fullmatch(key.namespace):
        yield "metadata.namespace", f"needed a lower-case DNS name, got {key.namespace!r}"
    if kind in ("Pod", "Namespace"):
        for name, value in plain.get("metadata", {}).get("labels", {}).items():
            if not _LABEL_VALUE.fullmatch(value):
                yield f"metadata.labels[{name}]", f"{value[:80]!r} is not a label value"


# -- what no manifest holds ---------------------------------------------------------------------


def _complete(out: Manifests) -> None:
    """Make the namespaces that are only named, the addresses, and the EndpointSlices."""
    for keys in (out.pods, out.policies, out.services):
        for key in keys:
            if key.namespace not in out.namespaces:
                out.namespaces[key.namespace] = Namespace(
                    name=key.namespace, labels=labels({NAMESPACE_NAME_LABEL: key.namespace})
                )
    taken = {a for p in out.pods.values() for a in p.addresses}
    free = (a for a in _hosts(POD_RANGE) if a not in taken)
    for key, pod in out.pods.items():
        if pod.phase in ("Succeeded", "Failed"):
            continue
        addresses = pod.addresses
        if not addresses and not pod.phase:  # no status at all
            own = out.nodes.get(pod.node) if pod.host_network else None
            if own is not None and own.addresses:
                addresses = own.addresses
            else:
                address = next(free, None)
                if address is None:
                    raise InputError(
                        f"{out.origins['Pod', key]}: Pod {key}: no address left in {POD_RANGE}",
                        needed="status.podIPs for so many pods",
                    )
                addresses = (address,)
                out.assigned.append(key)
        out.pods[key] = _running(pod, addresses)
    derived = derive_slices(
        out.services.values(),
        out.pods.values(),
        out.slices.values(),
        zones={n.name: n.zone for n in out.nodes.values()},
    )
    out.slices.update({s.key: s for s in derived})


def _running(pod: Endpoint, addresses: tuple[bytes, ...]) -> Endpoint:
    return Endpoint(
        key=pod.key,
        uid=pod.uid,
        labels=pod.labels,
        node=pod.node,
        phase="Running",
        addresses=addresses,
        ports=pod.ports,
        host_network=pod.host_network,
        terminating=pod.terminating,
        created=pod.created,
    )


def _hosts(block: Prefix) -> Iterator[bytes]:
    """Addresses of a block in order, without its first and last."""
    size = len(block.address)
    start = int.from_bytes(block.address, "big")
    for value in range(start + 1, start + (1 << (size * 8 - block.length)) - 1):
        yield value.to_bytes(size, "big")
