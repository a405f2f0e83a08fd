"""Kubernetes' protobuf envelope, read for the kinds that typed clients send in it.

Owns a reader of the wire format and the field numbers of those kinds. `kubectl create namespace`,
`configmap`, `secret`, `serviceaccount`, `service`, the RBAC kinds and `auth can-i` post such bodies.
Nothing is written in protobuf: the answers are JSON, which those clients read too.
"""

import base64
from collections.abc import Iterator
from typing import Any, NamedTuple

from netpol.lab.apiserver import errors
from netpol.lab.apiserver.errors import Obj

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"
_FIXED64 = 1  # wire type


class _Field(NamedTuple):
    """One field: how it is called and read; `repeated` ones become lists."""

    name: str
    kind: str
    message: "_Message | None" = None
    repeated: bool = False


_Message = dict[int, _Field]


def _strings(*names: str) -> _Message:
    """Return a message of plain strings, numbered from 1."""
    return {number: _Field(name, "str") for number, name in enumerate(names, start=1)}


# Field numbers from the generated.proto files of the v1 API packages.
_INT_OR_STRING: _Message = {
    1: _Field("type", "int"),
    2: _Field("intVal", "int"),
    3: _Field("strVal", "str"),
}
_OWNER: _Message = {
    1: _Field("kind", "str"),
    3: _Field("name", "str"),
    4: _Field("uid", "str"),
    5: _Field("apiVersion", "str"),
    6: _Field("controller", "bool"),
    7: _Field("blockOwnerDeletion", "bool"),
}
_META: _Message = {
    1: _Field("name", "str"),
    2: _Field("generateName", "str"),
    3: _Field("namespace", "str"),
    5: _Field("uid", "str"),
    6: _Field("resourceVersion", "str"),
    11: _Field("labels", "map"),
    12: _Field("annotations", "map"),
    13: _Field("ownerReferences", "message", _OWNER, repeated=True),
    14: _Field("finalizers", "str", repeated=True),
}
_META_FIELD = _Field("metadata", "message", _META)
_SERVICE_PORT: _Message = {
    1: _Field("name", "str"),
    2: _Field("protocol", "str"),
    3: _Field("port", "int"),
    4: _Field("targetPort", "int_or_string", _INT_OR_STRING),
    5: _Field("nodePort", "int"),
    6: _Field("appProtocol", "str"),
}
_SERVICE_SPEC: _Message = {
    1: _Field("ports", "message", _SERVICE_PORT, repeated=True),
    2: _Field("selector", "map"),
    3: _Field("clusterIP", "str"),
    4: _Field("type", "str"),
    5: _Field("externalIPs", "str", repeated=True),
    7: _Field("sessionAffinity", "str"),
    8: _Field("loadBalancerIP", "str"),
    9: _Field("loadBalancerSourceRanges", "str", repeated=True),
    10: _Field("externalName", "str"),
    11: _Field("externalTrafficPolicy", "str"),
    12: _Field("healthCheckNodePort", "int"),
    13: _Field("publishNotReadyAddresses", "bool"),
    17: _Field("ipFamilyPolicy", "str"),
    18: _Field("clusterIPs", "str", repeated=True),
    19: _Field("ipFamilies", "str", repeated=True),
    20: _Field("allocateLoadBalancerNodePorts", "bool"),
    21: _Field("loadBalancerClass", "str"),
    22: _Field("internalTrafficPolicy", "str"),
}
_DELETE_OPTIONS: _Message = {
    1: _Field("gracePeriodSeconds", "int"),
    2: _Field(
        "preconditions",
        "message",
        {1: _Field("uid", "str"), 2: _Field("resourceVersion", "str")},
    ),
    4: _Field("propagationPolicy", "str"),
    5: _Field("dryRun", "str", repeated=True),
}
_RULE: _Message = {
    number: _Field(name, "str", repeated=True)
    for number, name in enumerate(
        ("verbs", "apiGroups", "resources", "resourceNames", "nonResourceURLs"), start=1
    )
}
_SUBJECT = _strings("kind", "apiGroup", "name", "namespace")
_ROLE: _Message = {1: _META_FIELD, 2: _Field("rules", "message", _RULE, repeated=True)}
_BINDING: _Message = {
    1: _META_FIELD,
    2: _Field("subjects", "message", _SUBJECT, repeated=True),
    3: _Field("roleRef", "message", _strings("apiGroup", "kind", "name")),
}
_ATTRIBUTES = _strings("namespace", "verb", "group", "version", "resource", "subresource", "name")
_REVIEW_SPEC: _Message = {
    1: _Field("resourceAttributes", "message", _ATTRIBUTES),
    2: _Field("nonResourceAttributes", "message", _strings("path", "verb")),
}
_TOKEN_SPEC: _Message = {
    1: _Field("audiences", "str", repeated=True),
    4: _Field("expirationSeconds", "int"),
}
_RBAC = "rbac.authorization.k8s.io/v1"
_KINDS: dict[tuple[str, str], _Message] = {
    ("v1", "Namespace"): {1: _META_FIELD},
    ("v1", "ConfigMap"): {
        1: _META_FIELD,
        2: _Field("data", "map"),
        3: _Field("binaryData", "bytes_map"),
        4: _Field("immutable", "bool"),
    },
    ("v1", "Secret"): {
        1: _META_FIELD,
        2: _Field("data", "bytes_map"),
        3: _Field("type", "str"),
        4: _Field("stringData", "map"),
        5: _Field("immutable", "bool"),
    },
    ("v1", "ServiceAccount"): {
        1: _META_FIELD,
        4: _Field("automountServiceAccountToken", "bool"),
    },
    ("v1", "Service"): {1: _META_FIELD, 2: _Field("spec", "message", _SERVICE_SPEC)},
    (_RBAC, "Role"): _ROLE,
    (_RBAC, "ClusterRole"): _ROLE,
    (_RBAC, "RoleBinding"): _BINDING,
    (_RBAC, "ClusterRoleBinding"): _BINDING,
    ("authorization.k8s.io/v1", "SelfSubjectAccessReview"): {
        1: _META_FIELD,
        2: _Field("spec", "message", _REVIEW_SPEC),
    },
    ("authentication.k8s.io/v1", "SelfSubjectReview"): {1: _META_FIELD},
    ("authentication.k8s.io/v1", "TokenRequest"): {
        1: _META_FIELD,
        2: _Field("spec", "message", _TOKEN_SPEC),
    },
}


def read(data: bytes) -> Obj:
    """Return the object in a protobuf body.

    Raises:
        ApiError: 415 for kinds that are not read, 400 for what is no such body.
    """
    if not data.startswith(_MAGIC):
        raise errors.bad_request("the body does not begin as Kubernetes protobuf does")
    try:
        envelope = {number: value for number, _, value in _fields(data[len(_MAGIC) :])}
        names = {number: value.decode() for number, _, value in _fields(envelope[1])}
        version, kind = names.get(1, ""), names.get(2, "")
        message = _DELETE_OPTIONS if kind == "DeleteOptions" else _KINDS.get((version, kind))
        if message is None:
            text = (
                f"protobuf of {version} {kind} is not read here: "
                "send the manifest as JSON or YAML with `kubectl apply -f -`"
            )
            raise errors.unsupported_media_type(text)
        body = _message(envelope.get(2, b""), message)
    except (IndexError, KeyError, ValueError, AttributeError, TypeError) as fault:
        raise errors.bad_request(f"the protobuf body is broken: {fault}") from None
    return {"apiVersion": version, "kind": kind} | body


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield (number, wire type, value) of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        value: Any
        match wire:
            case 0:
                value, at = _varint(data, at)
            case 2:
                size, at = _varint(data, at)
                value, at = data[at : at + size], at + size
            case 1 | 5:
                size = 8 if wire == _FIXED64 else 4
                value, at = data[at : at + size], at + size
            case _:
                raise ValueError(f"unknown wire type {wire}")
        if at > len(data):
            raise ValueError("it ends inside a field")
        yield tag >> 3, wire, value


def _message(data: bytes, fields: _Message) -> Obj:
    result: Obj = {}
    for number, _, value in _fields(data):
        field = fields.get(number)
        if field is None:
            continue
        if field.kind in ("map", "bytes_map"):
            pair = {place: item for place, _, item in _fields(value)}
            raw = pair.get(2, b"")
            text = base64.b64encode(raw) if field.kind == "bytes_map" else raw
            result.setdefault(field.name, {})[pair.get(1, b"").decode()] = text.decode()
            continue
        found = _value(field, value)
        if field.repeated:
            result.setdefault(field.name, []).append(found)
        elif found not in ("", 0) or field.kind == "bool":
            result[field.name] = found
    return result


def _value(field: _Field, value: Any) -> Any:
    match field.kind:
        case "str":
            return value.decode()
        case "int":
            return value - (1 << 64) if value >> 63 else value
        case "bool":
            return bool(value)
        case "int_or_string":
            found = _message(value, _INT_OR_STRING)
            return found.get("strVal", "") if found.get("type") else found.get("intVal", 0)
        case _:
            return _message(value, field.message or {})
