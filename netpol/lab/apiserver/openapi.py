"""The OpenAPI v3 documents: what `kubectl explain` prints, and that validation is the server's.

Owns the schemas of the built-in kinds, made of the models of the `kubernetes` package, and those of stored
CustomResourceDefinitions. The patch operations name no strategic merge patch, so that kubectl uses the
merge keys it has built in.
"""

import importlib
from functools import lru_cache
from typing import Any

from netpol.lab.apiserver.discovery import VERSION
from netpol.lab.apiserver.errors import Obj
from netpol.lab.apiserver.history import encode
from netpol.lab.apiserver.resources import BUILTIN, Kinds, Resource
from netpol.lab.apiserver.typed import Form, fields_of, form_of, model_of

_SCALARS: dict[str, Obj] = {
    "str": {"type": "string"},
    "datetime": {"type": "string", "format": "date-time"},
    "date": {"type": "string", "format": "date"},
    "bytes": {"type": "string", "format": "byte"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {"type": "object"},
}


def index(kinds: Kinds) -> Obj:
    """Return the index of /openapi/v3."""
    paths = {}
    for group, versions in kinds.groups().items():
        for version in versions:
            path = f"apis/{group}/{version}" if group else f"api/{version}"
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash=lab"}
    return {"paths": paths}


def document(kinds: Kinds, group: str, version: str) -> bytes:
    """Return the encoded OpenAPI document of one group and version."""
    served = tuple(one for one in kinds if (one.group, one.version) == (group, version))
    if all(one in BUILTIN for one in served):
        return _built_in(served)
    return encode(_document(served))


@lru_cache(maxsize=32)
def _built_in(served: tuple[Resource, ...]) -> bytes:
    return encode(_document(served))


def _document(served: tuple[Resource, ...]) -> Obj:
    schemas: dict[str, Obj] = {}
    paths: Obj = {}
    for resource in served:
        if resource.custom:
            name = f"{resource.group}.{resource.version}.{resource.kind}"
            schemas[name] = dict(resource.schema or {"type": "object"})
        else:
            name = model_of(resource)
            _collect(name, schemas)
        group_kind = {
            "group": resource.group,
            "version": resource.version,
            "kind": resource.kind,
        }
        schemas[name]["x-kubernetes-group-version-kind"] = [group_kind]
        paths[_path(resource)] = {"patch": _patch_operation(resource, group_kind)}
    return {
        "openapi": "3.0.0",
        "info": {"title": "netpol lab", "version": VERSION["gitVersion"]},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _path(resource: Resource) -> str:
    base = f"/apis/{resource.api_version}" if resource.group else f"/api/{resource.version}"
    if resource.namespaced:
        base += "/namespaces/{namespace}"
    return f"{base}/{resource.plural}/{{name}}"


def _patch_operation(resource: Resource, group_kind: Obj) -> Obj:
    # kubectl looks for fieldValidation here before it leaves validation to the server.
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string"}}
        for name in ("dryRun", "fieldManager", "fieldValidation")
    ]
    return {
        "operationId": f"patch{resource.kind}",
        "parameters": parameters,
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind": group_kind,
    }


def _collect(model: str, schemas: dict[str, Obj]) -> None:
    """Add the schema of a model, and of every model that it names."""
    if model in schemas:
        return
    found = getattr(importlib.import_module("kubernetes.client"), model)
    texts = _descriptions(found)
    schema: Obj = {"type": "object", "properties": {}}
    text = (found.__doc__ or "").partition("Attributes:")[0].strip()
    if text:
        schema["description"] = text
    schemas[model] = schema
    for name, form in fields_of(model).items():
        described = _schema(form, schemas)
        if "$ref" in described:
            described = {"allOf": [described]}
        if name in texts:
            described = {"description": texts[name]} | described
        schema["properties"][name] = described


def _descriptions(model: Any) -> dict[str, str]:
    names = model.attribute_map
    return {
        names.get(name, info.serialization_alias or name): info.description
        for name, info in model.model_fields.items()
        if info.description
    }


def _schema(form: Form, schemas: dict[str, Obj]) -> Obj:
    if form.outer == "model":
        _collect(form.inner, schemas)
        return {"$ref": f"#/components/schemas/{form.inner}"}
    if form.outer == "list":
        return {"type": "array", "items": _schema(form_of(form.inner), schemas)}
    if form.outer == "dict":
        below = _schema(form_of(form.inner), schemas)
        return {"type": "object", "additionalProperties": below}
    return dict(_SCALARS[form.inner])
