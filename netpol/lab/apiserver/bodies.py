"""Request bodies: JSON, YAML and the protobuf of a few kinds, to plain objects.

Owns the choice by content type and the refusal of what cannot be read.
"""

from typing import Any

from netpol.lab.apiserver import apply, errors, forms, protobuf
from netpol.lab.apiserver.errors import Obj

_YAML = ("application/yaml", "text/yaml", "application/x-yaml")


def read(content_type: str, data: bytes) -> Obj:
    """Return the object in a body.

    Raises:
        ApiError: 400 when it cannot be parsed, 415 for a content type that is not read.
    """
    media = content_type.partition(";")[0].strip().lower()
    if media in ("", "application/json", "application/octet-stream"):
        return forms.read_json(data)
    if media in _YAML:
        return _mapping(read_yaml(data))
    if media == protobuf.MEDIA_TYPE:
        return protobuf.read(data)
    text = (
        "the body of the request was in an unknown format - accepted media types include: "
        "application/json, application/yaml"
    )
    raise errors.unsupported_media_type(text)


def read_yaml(data: bytes) -> Any:
    """Return what a YAML or JSON text holds.

    Raises:
        ApiError: 400 when it is neither.
    """
    try:
        return apply.read(data)
    except ValueError as fault:
        raise errors.bad_request(f"the body is neither JSON nor YAML: {fault}") from None


def _mapping(value: Any) -> Obj:
    if not isinstance(value, dict):
        raise errors.bad_request("the body holds no object")
    return value
