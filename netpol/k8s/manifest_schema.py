"""The structure of the objects that netpol reads, and the check of a manifest against it.

`clean` copies the fields that are read out of an object, with nulls read as Go reads them, and names
the first field whose JSON type is wrong. Values (ranges, names, selectors) are checked elsewhere.
Where a misspelt field would change what a policy says, unknown fields are reported too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, assert_never

#: Integers of the API's port fields are int32.
_INT32 = 1 << 31


class Leaf(StrEnum):
    """Types without parts; the value is how a message names what is needed."""

    TEXT = "a string"
    INT = "an integer"
    BOOL = "true or false"
    INT_OR_TEXT = "an integer or a string"
    TEXTS = "a mapping of strings to strings"


@dataclass(frozen=True, slots=True)
class Items:
    """A list of equal things."""

    of: Schema


@dataclass(frozen=True, slots=True)
class Fields:
    """An object; with `closed`, fields that are neither listed nor ignored are reported."""

    of: dict[str, Schema]
    closed: bool = False
    ignored: frozenset[str] = frozenset()


Schema = Leaf | Items | Fields


class StructureError(Exception):
    """A field has the wrong JSON type."""

    def __init__(self, path: str, needed: str, got: str) -> None:
        self.path, self.needed, self.got = path, needed, got
        super().__init__(f"{path}: needed {needed}, got {got}")


_T, _I, _B, _IT, _M = Leaf.TEXT, Leaf.INT, Leaf.BOOL, Leaf.INT_OR_TEXT, Leaf.TEXTS

_META: dict[str, Schema] = {
    "name": _T,
    "namespace": _T,
    "uid": _T,
    "labels": _M,
    "creationTimestamp": _T,
    "deletionTimestamp": _T,
}
META = Fields(_META)
ANNOTATED_META = Fields({**_META, "annotations": _M})
_SELECTOR = Fields(
    {
        "matchLabels": _M,
        "matchExpressions": Items(
            Fields({"key": _T, "operator": _T, "values": Items(_T)}, closed=True)
        ),
    },
    closed=True,
)
_PEERS = Items(
    Fields(
        {
            "podSelector": _SELECTOR,
            "namespaceSelector": _SELECTOR,
            "ipBlock": Fields({"cidr": _T, "except": Items(_T)}, closed=True),
        },
        closed=True,
    )
)
_PORTS = Items(Fields({"protocol": _T, "port": _IT, "endPort": _I}, closed=True))
_POLICY_SPEC = Fields(
    {
        "podSelector": _SELECTOR,
        "ingress": Items(Fields({"from": _PEERS, "ports": _PORTS}, closed=True)),
        "egress": Items(Fields({"to": _PEERS, "ports": _PORTS}, closed=True)),
        "policyTypes": Items(_T),
    },
    closed=True,
)
_CONTAINERS = Items(
    Fields(
        {
            "name": _T,
            "restartPolicy": _T,
            "ports": Items(Fields({"name": _T, "containerPort": _I, "protocol": _T})),
        }
    )
)
_POD_SPEC = Fields(
    {
        "nodeName": _T,
        "hostNetwork": _B,
        "containers": _CONTAINERS,
        "initContainers": _CONTAINERS,
    }
)
_SERVICE_SPEC = Fields(
    {
        "type": _T,
        "clusterIP": _T,
        "clusterIPs": Items(_T),
        "externalIPs": Items(_T),
        "externalName": _T,
        "selector": _M,
        "ports": Items(
            Fields({"name": _T, "protocol": _T, "port": _I, "targetPort": _IT, "nodePort": _I})
        ),
        "internalTrafficPolicy": _T,
        "externalTrafficPolicy": _T,
        "trafficDistribution": _T,
        "sessionAffinity": _T,
        "sessionAffinityConfig": Fields({"clientIP": Fields({"timeoutSeconds": _I})}),
        "loadBalancerSourceRanges": Items(_T),
        "loadBalancerClass": _T,
        "loadBalancerIP": _T,
        "healthCheckNodePort": _I,
        "publishNotReadyAddresses": _B,
    }
)
_HINTS = Items(Fields({"name": _T}))
_ENDPOINT = Fields(
    {
        "addresses": Items(_T),
        "conditions": Fields({"ready": _B, "serving": _B, "terminating": _B}),
        "nodeName": _T,
        "zone": _T,
        "hints": Fields({"forZones": _HINTS, "forNodes": _HINTS}),
        "targetRef": Fields({"kind": _T, "namespace": _T, "name": _T}),
    }
)

#: What is read of each kind, by kind.
SCHEMAS: dict[str, Fields] = {
    "Namespace": Fields({"metadata": META}),
    "Pod": Fields(
        {
            "metadata": META,
            "spec": _POD_SPEC,
            "status": Fields({"phase": _T, "podIP": _T, "podIPs": Items(Fields({"ip": _T}))}),
        }
    ),
    "NetworkPolicy": Fields(
        {"metadata": META, "spec": _POLICY_SPEC},
        closed=True,
        ignored=frozenset(("apiVersion", "kind", "status")),
    ),
    "Node": Fields(
        {
            "metadata": ANNOTATED_META,
            "spec": Fields({"podCIDR": _T, "podCIDRs": Items(_T)}),
            "status": Fields({"addresses": Items(Fields({"type": _T, "address": _T}))}),
        }
    ),
    "Service": Fields(
        {
            "metadata": ANNOTATED_META,
            "spec": _SERVICE_SPEC,
            "status": Fields(
                {
                    "loadBalancer": Fields(
                        {"ingress": Items(Fields({"ip": _T, "hostname": _T, "ipMode": _T}))}
                    )
                },
            ),
        }
    ),
    "EndpointSlice": Fields(
        {
            "metadata": ANNOTATED_META,
            "addressType": _T,
            "ports": Items(Fields({"name": _T, "protocol": _T, "port": _I})),
            "endpoints": Items(_ENDPOINT),
        }
    ),
}


def clean(value: Any, schema: Schema, *, path: str = "", unknown: list[str]) -> Any:
    """Copy what `schema` names out of a value.

    Args:
        value: plain values.
        schema: what is read.
        path: field path of the value.
        unknown: receives the paths of unknown fields of closed objects.

    Raises:
        StructureError: the first field of the wrong type.
    """
    match schema:
        case Fields():
            return _fields(value, schema, path, unknown)
        case Items(of):
            if not isinstance(value, list):
                raise StructureError(path, "a list", describe(value))
            return [
                _null(of) if v is None else clean(v, of, path=f"{path}[{i}]", unknown=unknown)
                for i, v in enumerate(value)
            ]
        case Leaf():
            return _leaf(value, schema, path)
        case _:
            assert_never(schema)


def _fields(value: Any, schema: Fields, path: str, unknown: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StructureError(path or "the object", "a mapping", describe(value))
    out: dict[str, Any] = {}
    for name, part in value.items():
        at = f"{path}.{name}" if path else name
        below = schema.of.get(name)
        if below is None:
            if schema.closed and name not in schema.ignored:
                unknown.append(at)
        elif part is not None:  # null is "not set" to Go
            out[name] = clean(part, below, path=at, unknown=unknown)
    return out


def _leaf(value: Any, leaf: Leaf, path: str) -> Any:
    match leaf:
        case Leaf.TEXT if isinstance(value, str):
            return value
        case Leaf.BOOL if isinstance(value, bool):
            return value
        case Leaf.INT:
            return _integer(value, leaf, path)
        case Leaf.INT_OR_TEXT:
            return value if isinstance(value, str) else _integer(value, leaf, path)
        case Leaf.TEXTS if isinstance(value, dict):
            for key, text in value.items():
                if text is not None and not isinstance(text, str):
                    raise StructureError(f"{path}[{key}]", Leaf.TEXT, describe(text))
            return {k: v or "" for k, v in value.items()}
        case _:
            raise StructureError(path, leaf, describe(value))


def _integer(value: Any, leaf: Leaf, path: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise StructureError(path, leaf, describe(value))
    if not -_INT32 <= value < _INT32:
        raise StructureError(path, "an integer of 32 bits", describe(value))
    return value


def _null(schema: Schema) -> Any:
    """What a null in a list decodes to in Go: the zero value."""
    match schema:
        case Fields():
            return {}
        case Items():
            return []
        case Leaf.INT | Leaf.INT_OR_TEXT:
            return 0
        case Leaf.BOOL:
            return False
        case Leaf.TEXTS:
            return {}
        case _:
            return ""


def describe(value: Any) -> str:
    """A value and its type in a few words, for `got`."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"{str(value).lower()} (true or false, not text)"
        case int() | float():
            text = str(value)
            return f"{text if len(text) <= 24 else text[:21] + '...'} (a number)"
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case list():
            return "a list"
        case _:
            return "a mapping"
