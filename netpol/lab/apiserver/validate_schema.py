"""What a CustomResourceDefinition's schema refuses of its objects, and the pruning of unknown fields.

Owns the structural keywords: types, required, enumerations, bounds, sizes and patterns. CEL rules
(`x-kubernetes-validations`), formats and `oneOf` are not evaluated.
"""

import json
import re
from typing import Any

from netpol.lab.apiserver import causes as say
from netpol.lab.apiserver.errors import Cause, Obj

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
_SYSTEM = ("apiVersion", "kind", "metadata")


def check(schema: Any, obj: Obj) -> list[Cause]:
    """Return what is wrong with a custom object."""
    if not isinstance(schema, dict):
        return []
    body = {name: value for name, value in obj.items() if name not in _SYSTEM}
    needed = [name for name in schema.get("required") or () if name not in _SYSTEM]
    return _check(schema | {"required": needed}, body, "")


def _check(schema: Obj, value: Any, where: str) -> list[Cause]:
    if value is None and schema.get("nullable"):
        return []
    if schema.get("x-kubernetes-int-or-string"):
        fits = isinstance(value, (int, str)) and not isinstance(value, bool)
        return [] if fits else [say.wrong(where, value, "must be a number or a string")]
    kind = schema.get("type")
    types = _TYPES.get(str(kind))
    wrong_bool = isinstance(value, bool) and kind != "boolean"
    if types and (not isinstance(value, types) or wrong_bool):
        got = json.dumps(value)[:40]
        text = f"Invalid value: {got}: {where or 'the object'} must be of type {kind}"
        return [Cause(where or "<nil>", "FieldValueTypeInvalid", text)]
    found = []
    allowed = schema.get("enum")
    if allowed and value not in allowed:
        found.append(say.unsupported(where, value, tuple(str(one) for one in allowed)))
    if isinstance(value, dict):
        found += _object(schema, value, where)
    elif isinstance(value, list):
        found += _size(schema, len(value), where, "Items")
        if isinstance(schema.get("items"), dict):
            for place, item in enumerate(value):
                found += _check(schema["items"], item, f"{where}[{place}]")
    elif isinstance(value, str):
        found += _size(schema, len(value), where, "Length")
        if schema.get("pattern") and not re.search(schema["pattern"], value):
            why = f"{where} should match '{schema['pattern']}'"
            found.append(say.wrong(where, value, why))
    elif isinstance(value, (int, float)):
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None and value < low:
            why = f"{where} should be greater than or equal to {low}"
            found.append(say.wrong(where, value, why))
        if high is not None and value > high:
            why = f"{where} should be less than or equal to {high}"
            found.append(say.wrong(where, value, why))
    return found


def _object(schema: Obj, value: Obj, where: str) -> list[Cause]:
    dot = f"{where}." if where else ""
    found = [
        say.required(f"{dot}{name}") for name in schema.get("required") or () if name not in value
    ]
    found += _size(schema, len(value), where, "Properties")
    properties = schema.get("properties") or {}
    more = schema.get("additionalProperties")
    for name, item in value.items():
        below = properties.get(name)
        if below is None and isinstance(more, dict):
            below = more
        if isinstance(below, dict):
            found += _check(below, item, f"{dot}{name}")
    return found


def _size(schema: Obj, size: int, where: str, noun: str) -> list[Cause]:
    low, high = schema.get(f"min{noun}"), schema.get(f"max{noun}")
    if high is not None and size > high:
        text = f"Too many: {size}: must have at most {high} {noun.lower()}"
        return [Cause(where, "FieldValueTooMany", text)]
    if low is not None and size < low:
        return [say.wrong(where, size, f"should have at least {low} {noun.lower()}")]
    return []


def prune(schema: Any, obj: Obj) -> list[str]:
    """Remove from a custom object what its schema does not know; return the paths of it."""
    removed: list[str] = []
    if isinstance(schema, dict):
        properties = (schema.get("properties") or {}) | dict.fromkeys(_SYSTEM, _ANYTHING)
        _prune(schema | {"properties": properties}, obj, "", removed)
    return removed


_ANYTHING = {"x-kubernetes-preserve-unknown-fields": True}


def _prune(schema: Obj, value: Any, where: str, removed: list[str]) -> None:
    if isinstance(value, list):
        if isinstance(schema.get("items"), dict):
            for place, item in enumerate(value):
                _prune(schema["items"], item, f"{where}[{place}]", removed)
        return
    if not isinstance(value, dict):
        return
    properties = schema.get("properties") or {}
    more = schema.get("additionalProperties")
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or more
    for name in list(value):
        path = f"{where}.{name}" if where else name
        below = properties.get(name, more)
        if isinstance(below, dict):
            _prune(below, value[name], path, removed)
        elif not keeps:
            del value[name]
            removed.append(path)
