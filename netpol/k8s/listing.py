"""One list, asked once: for the command line and for questions beyond what is watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from netpol.k8s.api import Api
from netpol.k8s.decode import Decoded, ResourceKind, decode_list
from netpol.k8s.errors import ApiError, DecodeError
from netpol.k8s.watching import Selection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """All objects of a selection at one resourceVersion; `errors` are those that cannot be read."""

    items: tuple[Decoded[T], ...]
    errors: tuple[DecodeError, ...]
    resource_version: str


async def list_all(
    api: Api, kind: ResourceKind[T], *, selection: Selection | None = None, page_size: int = 500
) -> Listed[T]:
    """List a kind, page by page.

    Raises:
        ApiError: a request failed.
        DecodeError: an answer is no list of this kind.
    """
    selection = selection or Selection()
    try:
        return await _list(api, kind, selection, page_size)
    except ApiError as e:
        if not e.expired:
            raise
        return await _list(api, kind, selection, None)  # the pages took too long: all in one


async def _list(
    api: Api, kind: ResourceKind[T], selection: Selection, page_size: int | None
) -> Listed[T]:
    path = kind.path(namespace=selection.namespace)
    items: list[Decoded[T]] = []
    errors: list[DecodeError] = []
    token = version = ""
    while True:
        query = {**selection.query(optional=False), "limit": page_size, "continue": token}
        page = decode_list(kind, await api.get(path, **query))
        items += page.items
        errors += page.errors
        version = version or page.resource_version
        token = page.continue_token
        if not token:
            return Listed(tuple(items), tuple(errors), version)
