"""The fields of the built-in kinds: what is unknown, what has a wrong type, what the wire leaves out.

Owns the reading of a request's object as a typed server would read it: unknown fields are reported and
dropped, nulls and empty lists and maps vanish, a wrong type refuses the request. The field lists come
from the models of the `kubernetes` package and so are those of its API version.
"""

import importlib
import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from netpol.lab.apiserver import errors, validate_schema
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.resources import Resource

_MODELS = {("", "Event"): "CoreV1Event", ("events.k8s.io", "Event"): "EventsV1Event"}
# Lists that the API types write even when they are empty.
_KEPT_EMPTY = {"containers", "endpoints", "rules", "ports@V1EndpointSlice", "versions"}
_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "datetime": (str,),
    "date": (str,),
    "bytes": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "object": (object,),
}
_GENERIC = re.compile(r"(?P<outer>[Ll]ist|[Dd]ict)[\[(](?P<inner>.*)[\])]")
# Quantities are read from numbers too.
_QUANTITIES = ("limits", "requests", "capacity", "allocatable", "overhead", "hard", "used")


class Form(NamedTuple):
    """One field's type: `outer` is list, dict, model or empty for a scalar; `inner` its name."""

    outer: str
    inner: str


def read(resource: Resource, obj: Obj, *, validation: str) -> tuple[Obj, list[str]]:
    """Return an object as the server reads it, and the warnings that go with the answer.

    Args:
        resource: The kind.
        obj: The object, which is consumed.
        validation: The fieldValidation parameter: Strict, Warn or Ignore; empty is Warn.

    Raises:
        ApiError: 400 for a field of a wrong type, and with Strict for unknown fields.
    """
    if validation not in ("", "Strict", "Warn", "Ignore"):
        raise errors.bad_request(f"invalid fieldValidation {validation!r}")
    unknown: list[str] = []
    try:
        if resource.custom:
            metadata = _model("V1ObjectMeta", obj.get("metadata") or {}, "metadata", unknown)
            obj = obj | {"metadata": metadata}
            unknown += validate_schema.prune(resource.schema, obj)
        else:
            obj = _model(model_of(resource), obj, "", unknown)
    except _TypeFaultError as fault:
        text = (
            f'{resource.kind} in version "{resource.version}" cannot be handled as a '
            f"{resource.kind}: {fault}"
        )
        raise errors.bad_request(text) from None
    if unknown and validation == "Strict":
        text = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise errors.bad_request(
            f'{resource.kind} in version "{resource.version}" cannot be handled as a '
            f"{resource.kind}: strict decoding error: {text}"
        )
    if validation == "Ignore":
        return obj, []
    return obj, [f'unknown field "{path}"' for path in unknown]


class _TypeFaultError(Exception):
    """A value has not the type of its field."""

    def __init__(self, where: str, needed: str, value: Any) -> None:
        got = json.dumps(value)
        super().__init__(f"{where or 'the object'}: needed {needed}, got {got:.60}")


def model_of(resource: Resource) -> str:
    """Return the name of a built-in kind's model in the `kubernetes` package."""
    return _MODELS.get((resource.group, resource.kind), f"V1{resource.kind}")


@lru_cache(maxsize=512)
def fields_of(model: str) -> dict[str, Form]:
    """Return the fields of a model by their names in JSON."""
    client = importlib.import_module("kubernetes.client")
    found = getattr(client, model)
    names = found.attribute_map
    return {names[name]: form_of(text) for name, text in found.openapi_types.items()}


@lru_cache(maxsize=1024)
def form_of(text: str) -> Form:
    """Return the type that a model's text names."""
    if generic := _GENERIC.fullmatch(text):
        outer, inner = generic["outer"].lower(), generic["inner"]
        return Form(outer, inner.partition(",")[2].strip() if outer == "dict" else inner)
    return Form("" if text in _SCALARS else "model", text)


def _model(model: str, obj: Any, where: str, unknown: list[str]) -> Obj:
    if not isinstance(obj, dict):
        raise _TypeFaultError(where, "an object", obj)
    fields = fields_of(model)
    result: Obj = {}
    for name, value in obj.items():
        path = f"{where}.{name}" if where else str(name)
        form = fields.get(name)
        if form is None:
            unknown.append(path)
            continue
        if value is None:
            continue
        read_value = _value(form, value, path, unknown, name)
        empty = form.outer in ("list", "dict") and not read_value
        if empty and not {name, f"{name}@{model}"} & _KEPT_EMPTY:
            continue
        result[name] = read_value
    return result


def _value(form: Form, value: Any, path: str, unknown: list[str], name: str) -> Any:
    if form.outer == "model":
        if name == "fieldsV1":
            return value
        return _model(form.inner, value, path, unknown)
    inner = form_of(form.inner)
    if form.outer == "list":
        if not isinstance(value, list):
            raise _TypeFaultError(path, "a list", value)
        return [
            _value(inner, item, f"{path}[{place}]", unknown, name)
            for place, item in enumerate(value)
        ]
    if form.outer == "dict":
        if not isinstance(value, dict):
            raise _TypeFaultError(path, "an object", value)
        if name in _QUANTITIES:
            return {key: str(item) for key, item in value.items()}
        return {
            key: _value(inner, item, f"{path}.{key}", unknown, "")
            for key, item in value.items()
            if item is not None
        }
    types = _SCALARS[form.inner]
    wrong_bool = isinstance(value, bool) and form.inner in ("int", "float")
    if not isinstance(value, types) or wrong_bool:
        raise _TypeFaultError(path, _NAMES.get(form.inner, "a value"), value)
    return value


_NAMES = {
    "str": "a string",
    "datetime": "a time stamp",
    "bytes": "a base64 string",
    "int": "a whole number",
    "float": "a number",
    "bool": "a boolean",
}
