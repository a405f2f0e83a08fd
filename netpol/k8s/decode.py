"""Bytes (or plain dicts, from YAML) to model values; the one wall where objects are parsed.

Owns the kinds that netpol reads, the decoding of single objects and of list pages, and the reading of
identity out of an object that does not decode. `DecodeError` is the only exception that leaves this
module, whatever the input. Both routes use the same wire structs and builders, so a manifest and an
API object with the same content are equal.

A bad object never costs its neighbours: a page with one is decoded again item by item.
"""

from __future__ import annotations

import datetime as dt
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from netpol.k8s import build, build_services, wire
from netpol.k8s.errors import DecodeError
from netpol.model.ids import ObjectKey
from netpol.model.networkpolicy import NetworkPolicy
from netpol.model.objects import Endpoint, EndpointSlice, Namespace, Node, Service
from netpol.model.policy import Problem

T = TypeVar("T")
W = TypeVar("W", bound=wire.WireObject)

#: The namespace of a namespaced object that names none, as kubectl would send it.
DEFAULT_NAMESPACE = "default"

#: Printable ASCII without space and slash: what can be a name in any API (a path segment), and what
#: can stand in a comment, a log line or `ns/name` without quoting. The API itself is stricter.
_NAME = re.compile(r"[!-.0-~]{1,253}")

#: msgspec's messages: "Expected `int`, got `str` - at `$.spec.x`".
_EXPECTED = re.compile(r"^Expected `(?P<needed>[^`]*)`(?:, got `(?P<got>[^`]*)`)?")
_AT = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")

#: All that msgspec raises on some input: its own errors, Python's for bad UTF-8, lone surrogates,
#: too deep nesting, and numbers beyond what a C long or a double holds.
DECODING_ERRORS = (
    msgspec.MsgspecError,
    ValueError,
    TypeError,
    RecursionError,
    OverflowError,
)


class Decoded(NamedTuple, Generic[T]):
    """A decoded object.

    `resource_version` is "" in manifests; `problems` name what was left out of `value`.
    """

    key: ObjectKey
    resource_version: str
    value: T
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list: what decoded, what did not, and where to go on ("" after the last)."""

    items: tuple[Decoded[T], ...]
    errors: tuple[DecodeError, ...]
    resource_version: str
    continue_token: str


@dataclass(frozen=True, slots=True, eq=False)
class ResourceKind(Generic[T]):
    """A kind that netpol reads: its place in the API and the way to its model value."""

    name: str
    api_version: str
    plural: str
    namespaced: bool
    struct: type[wire.WireObject]
    build: Callable[[ObjectKey, Any, Any, list[Problem]], T]
    object_decoder: msgspec.json.Decoder[Any] = field(init=False, repr=False)
    list_decoder: msgspec.json.Decoder[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        struct = self.struct
        page = msgspec.defstruct(
            f"{self.name}List",
            [
                ("kind", str | None, None),
                ("metadata", wire.ListMeta | None, None),
                ("items", list[struct] | None, None),  # type: ignore[valid-type]
            ],
            frozen=True,
            gc=False,
        )
        object.__setattr__(self, "object_decoder", msgspec.json.Decoder(struct))
        object.__setattr__(self, "list_decoder", msgspec.json.Decoder(page))

    @property
    def root(self) -> str:
        """The API path under which the group's version lives ("/api/v1", "/apis/GROUP/VERSION")."""
        return (
            f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        )

    def path(self, key: ObjectKey | None = None, *, namespace: str = "") -> str:
        """The API path of the whole kind, of one namespace's part, or of one object."""
        ns = key.namespace if key else namespace
        parts = [self.root]
        if self.namespaced and ns:
            parts.append(f"namespaces/{ns}")
        parts.append(self.plural)
        if key:
            parts.append(key.name)
        return "/".join(parts)

    def __str__(self) -> str:
        return self.name


POD: ResourceKind[Endpoint] = ResourceKind("Pod", "v1", "pods", True, wire.WirePod, build.pod)
NAMESPACE: ResourceKind[Namespace] = ResourceKind(
    "Namespace", "v1", "namespaces", False, wire.WireNamespace, build.namespace
)
NODE: ResourceKind[Node] = ResourceKind("Node", "v1", "nodes", False, wire.WireNode, build.node)
NETWORK_POLICY: ResourceKind[NetworkPolicy] = ResourceKind(
    "NetworkPolicy",
    "networking.k8s.io/v1",
    "networkpolicies",
    True,
    wire.WireNetworkPolicy,
    build.network_policy,
)
SERVICE: ResourceKind[Service] = ResourceKind(
    "Service", "v1", "services", True, wire.WireService, build_services.service
)
ENDPOINT_SLICE: ResourceKind[EndpointSlice] = ResourceKind(
    "EndpointSlice",
    "discovery.k8s.io/v1",
    "endpointslices",
    True,
    wire.WireEndpointSlice,
    build_services.endpoint_slice,
)

#: Every kind by its name, as `kind:` in a manifest has it.
KINDS: dict[str, ResourceKind[Any]] = {
    k.name: k for k in (POD, NAMESPACE, NODE, NETWORK_POLICY, SERVICE, ENDPOINT_SLICE)
}

#: A model value of any of the kinds.
Model = Endpoint | Namespace | Node | NetworkPolicy | Service | EndpointSlice


class _Rawlist(msgspec.Struct, frozen=True, gc=False):
    kind: str | None = None
    metadata: wire.ListMeta | None = None
    items: list[msgspec.Raw] | None = None


_RAW_LIST = msgspec.json.Decoder(_Rawlist)


def decode_object(
    kind: str, raw: bytes | dict[str, Any], *, namespace: str = DEFAULT_NAMESPACE
) -> Model:
    """Decode an object of a kind given by name; see `decode`, which also returns the problems."""
    value: Model = decode(KINDS[kind], raw, namespace=namespace).value
    return value


def decode(
    kind: ResourceKind[T], raw: bytes | dict[str, Any], *, namespace: str = DEFAULT_NAMESPACE
) -> Decoded[T]:
    """Decode one object.

    Args:
        kind: what it must be; an object that says another kind is refused.
        raw: JSON, or what a YAML parser made of a manifest.
        namespace: for an object of a namespaced kind that does not say where it is.

    Raises:
        DecodeError: it does not have the structure of its kind.
    """
    return from_wire(kind, _read(kind, raw), namespace=namespace)


def _read(kind: ResourceKind[Any], raw: bytes | dict[str, Any]) -> wire.WireObject:
    try:
        if isinstance(raw, bytes):
            obj: wire.WireObject = kind.object_decoder.decode(raw)
            return obj
        return _convert(kind, raw)
    except DECODING_ERRORS as first:
        # null where no null can be, dates that a YAML parser made: rare, so read only now.
        try:
            plain = msgspec.json.decode(raw) if isinstance(raw, bytes) else raw
            return _convert(kind, _as_go_reads(plain, {}))
        except DECODING_ERRORS:
            raise _explain(kind, raw, first) from first


def _convert(kind: ResourceKind[Any], plain: Any) -> wire.WireObject:
    obj = msgspec.convert(plain, kind.struct)
    # A lone surrogate (YAML can write one) would fail far from here, where a name is hashed.
    msgspec.json.encode(obj)
    return obj


def from_wire(
    kind: ResourceKind[T], obj: wire.WireObject, *, namespace: str = DEFAULT_NAMESPACE
) -> Decoded[T]:
    """Build the model value of a wire object.

    Raises:
        DecodeError: no usable name, or another kind.
    """
    meta = obj.metadata or wire.Meta()
    name = meta.name or ""
    where = sys.intern(meta.namespace or namespace) if kind.namespaced else ""
    key = ObjectKey(where, name)
    if obj.kind and obj.kind != kind.name:
        raise DecodeError(
            kind=kind.name, key=key, path="kind", needed=kind.name, got=_short(obj.kind)
        )
    if not _NAME.fullmatch(name):
        raise DecodeError(
            kind=kind.name, key=key, path="metadata.name", needed="a name", got=_short(name)
        )
    if kind.namespaced and not _NAME.fullmatch(where):
        raise DecodeError(
            kind=kind.name, key=key, path="metadata.namespace", needed="a name", got=_short(where)
        )
    problems: list[Problem] = []
    value = kind.build(key, meta, obj, problems)
    return Decoded(key, meta.resource_version or "", value, tuple(problems))


def decode_list(kind: ResourceKind[T] | str, body: bytes) -> Page[T]:
    """Decode a list page; an object that does not decode is in `errors`, the others are there.

    Raises:
        DecodeError: the body is no list of this kind at all.
    """
    spec: ResourceKind[T] = KINDS[kind] if isinstance(kind, str) else kind
    errors: list[DecodeError] = []
    items: list[Decoded[T]] = []
    try:
        page = spec.list_decoder.decode(body)
    except DECODING_ERRORS as first:
        page = _raw_page(spec, body, first)
    if page.kind not in (None, f"{spec.name}List", "List"):
        raise DecodeError(
            kind=f"{spec.name}List",
            key=ObjectKey("", ""),
            path="kind",
            needed=f"{spec.name}List",
            got=_short(page.kind),
        )
    for item in page.items or ():
        try:
            items.append(
                decode(spec, bytes(item))
                if isinstance(item, msgspec.Raw)
                else from_wire(spec, item)
            )
        except DecodeError as e:
            errors.append(e)
    meta = page.metadata or wire.ListMeta()
    return Page(tuple(items), tuple(errors), meta.resource_version or "", meta.continue_ or "")


def _raw_page(kind: ResourceKind[Any], body: bytes, first: Exception) -> _Rawlist:
    try:
        return _RAW_LIST.decode(body)
    except DECODING_ERRORS:
        raise _explain(kind, b"", first) from first


def _as_go_reads(value: Any, seen: dict[int, Any]) -> Any:
    """Rewrite a plain tree the way Go's decoder reads JSON: null is "not set", in a list the zero value.

    Dates become the text they were parsed from. `seen` makes a value that YAML aliases share be
    rewritten once; one that contains itself ends in RecursionError.
    """
    if isinstance(value, dict):
        done = seen.get(id(value))
        if done is None:
            done = {k: _as_go_reads(v, seen) for k, v in value.items() if v is not None}
            seen[id(value)] = done
        return done
    if isinstance(value, list):
        done = seen.get(id(value))
        if done is None:
            done = [{} if v is None else _as_go_reads(v, seen) for v in value]
            seen[id(value)] = done
        return done
    if isinstance(value, dt.datetime):
        utc = value.astimezone(dt.UTC) if value.tzinfo else value
        return utc.strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, dt.date):
        return value.isoformat()
    return value


class _AnyMeta(msgspec.Struct, rename="camel"):
    name: Any = None
    namespace: Any = None
    uid: Any = None
    resource_version: Any = None


class _AnyObject(msgspec.Struct):
    metadata: Any = None


def _explain(kind: ResourceKind[Any], raw: bytes | dict[str, Any], error: Exception) -> DecodeError:
    """Turn a parser's error into ours, with the object's key if that much can be read."""
    text = str(error)
    at, expected = _AT.search(text), _EXPECTED.match(text)
    path = at["path"] if at else ""
    if isinstance(error, RecursionError):
        text = "nested too deeply"
    return DecodeError(
        kind=kind.name,
        key=identify(kind, raw),
        path=path,
        needed=expected["needed"] if expected else "",
        got=(expected["got"] or "") if expected else _short(text),
    )


class Peeked(NamedTuple):
    """What could be read of an object that does not decode; "" for what could not."""

    key: ObjectKey
    uid: str = ""
    resource_version: str = ""


def identify(kind: ResourceKind[Any], raw: bytes | dict[str, Any]) -> ObjectKey:
    """The key of an object that may be broken elsewhere; the name is "" when it cannot be read."""
    return peek(kind, raw).key


def peek(kind: ResourceKind[Any], raw: bytes | dict[str, Any]) -> Peeked:
    """The identity of an object that may be broken elsewhere."""
    try:
        outer = (
            msgspec.json.decode(raw, type=_AnyObject)
            if isinstance(raw, bytes)
            else msgspec.convert(raw, _AnyObject)
        )
        meta = msgspec.convert(outer.metadata, _AnyMeta)
    except DECODING_ERRORS:
        return Peeked(ObjectKey("", ""))
    name, ns, uid, version = (
        v if isinstance(v, str) and _NAME.fullmatch(v) else ""
        for v in (meta.name, meta.namespace, meta.uid, meta.resource_version)
    )
    if not kind.namespaced or not name:
        ns = ""
    elif not ns:
        ns = DEFAULT_NAMESPACE
    return Peeked(ObjectKey(ns, name), uid, version)


def _short(text: str | None) -> str:
    """A foreign text fit for a message: printable and not long."""
    shown = repr(text)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
