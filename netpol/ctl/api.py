"""The cluster as the API server has it now: one paged list of each kind, no watch."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, TypeVar

from netpol.ctl import kubeconfig
from netpol.ctl.output import remark
from netpol.ctl.source import Cluster, compiled
from netpol.k8s.decode import (
    ENDPOINT_SLICE,
    NAMESPACE,
    NETWORK_POLICY,
    NODE,
    POD,
    SERVICE,
    Decoded,
    ResourceKind,
    decode_list,
)
from netpol.k8s.errors import ApiError, DecodeError
from netpol.k8s.manifests import service_extras
from netpol.model.ids import ObjectKey
from netpol.policy.world import World

T = TypeVar("T")

#: Objects of one page, as kubectl asks for.
PAGE = 500
TIMEOUT_S = 20.0


def cluster(path: str | None, *, context: str | None = None) -> Cluster:
    """Read what policy needs from the API server.

    Raises:
        ApiError: it refuses or does not answer.
        NoAnswerError, InputError: no server, or an unusable kubeconfig.
    """
    access = kubeconfig.load(path, context=context)
    headless: set[ObjectKey] = set()
    external: dict[bytes, ObjectKey] = {}

    def look(body: bytes) -> None:
        for item in json.loads(body).get("items") or ():
            meta = item.get("metadata") or {}
            key = ObjectKey(meta.get("namespace", ""), meta.get("name", ""))
            none, addresses = service_extras(item)
            if none:
                headless.add(key)
            external.update(dict.fromkeys(addresses, key))

    services = [d.value for page in _pages(access, SERVICE, look) for d in page]
    policies = compiled(d.value for page in _pages(access, NETWORK_POLICY) for d in page)
    nodes = [d.value for page in _pages(access, NODE) for d in page]
    pods = [d.value for page in _pages(access, POD) for d in page]
    world = World.build(
        namespaces=[d.value for page in _pages(access, NAMESPACE) for d in page],
        pods=pods,
        policies=policies,
        nodes=nodes,
        services=services,
        slices=[d.value for page in _pages(access, ENDPOINT_SLICE) for d in page],
    )
    names = {n.name for n in nodes} | {p.node for p in pods if p.node}
    return Cluster(
        world=world,
        headless=frozenset(headless),
        external_ips=external,
        node_names=tuple(sorted(names)),
    )


def _pages(
    access: kubeconfig.Access, kind: ResourceKind[T], look: Any = None
) -> Iterator[tuple[Decoded[T], ...]]:
    token = ""
    while True:
        body = _get(access, f"{kind.path()}?limit={PAGE}" + _continue(token))
        try:
            page = decode_list(kind, body)
            if look is not None:
                look(body)
        except (DecodeError, ValueError, AttributeError) as e:
            raise ApiError(f"list of {kind} from {access.server}", message=str(e)[:500]) from e
        for error in page.errors:
            remark(f"left out: {error}")
        yield page.items
        token = page.continue_token
        if not token:
            return


def _continue(token: str) -> str:
    return f"&continue={urllib.parse.quote(token, safe='')}" if token else ""


def _get(access: kubeconfig.Access, path: str) -> bytes:
    request = urllib.request.Request(  # noqa: S310  (the scheme is checked where it is read)
        access.server + path, headers={**access.headers, "Accept": "application/json"}
    )
    handlers: list[urllib.request.BaseHandler] = []
    if access.tls is not None:
        handlers.append(urllib.request.HTTPSHandler(context=access.tls))
    opener = urllib.request.build_opener(*handlers)
    what = f"GET {access.server}{path.partition('?')[0]}"
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as e:
        with e:
            raise ApiError(what, status=e.code, message=_message(e.read(65536))) from None
    except urllib.error.URLError as e:
        raise ApiError(what, message=f"no answer: {e.reason}") from None
    except (OSError, http.client.HTTPException) as e:
        raise ApiError(what, message=f"no answer: {e}") from None


def _message(body: bytes) -> str:
    """The message of a Status object, or the start of whatever came."""
    try:
        found = json.loads(body).get("message")
    except (ValueError, AttributeError):
        found = None
    return found if isinstance(found, str) else body[:200].decode("utf-8", "replace")
