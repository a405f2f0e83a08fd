"""The cluster as the API server has it now: one paged list of each kind, no watch.

Asked directly by a kubeconfig, or through the agent of this node, which lends its connection.
"""

from __future__ import annotations

import argparse
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from netpol.admin import client
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
from netpol.lib.errors import NoAnswerError
from netpol.policy.world import World

T = TypeVar("T")

#: Objects of one page, as kubectl asks for.
PAGE = 500
TIMEOUT_S = 20.0


class Source(Protocol):
    """Gives pages of lists."""

    name: str

    def page(self, kind: ResourceKind[Any], token: str) -> bytes:
        """The page of a list that `token` leads to ("" is the first)."""
        ...


class Direct:
    """The API server by HTTP."""

    def __init__(self, access: kubeconfig.Access) -> None:
        self._access, self.name = access, access.server

    def page(self, kind: ResourceKind[Any], token: str) -> bytes:
        """See Source."""
        query = {"limit": str(PAGE), **({"continue": token} if token else {})}
        return _get(self._access, f"{kind.path()}?{urllib.parse.urlencode(query)}")


class Relayed:
    """The API server through this node's agent."""

    def __init__(self, socket: str) -> None:
        self._socket, self.name = socket, f"the agent at {socket}"

    def page(self, kind: ResourceKind[Any], token: str) -> bytes:
        """See Source."""
        args = {"kind": kind.name, "continue": token}
        answer = client.call(self._socket, "list", timeout_s=TIMEOUT_S, **args)
        body = answer.get("body") if isinstance(answer, dict) else None
        if not isinstance(body, str):
            raise NoAnswerError(f"{self.name} gave no list")
        return body.encode()


def source(args: argparse.Namespace) -> Source:
    """Who is asked: a kubeconfig that is named, the agent if there is one, what else is found.

    Raises:
        NoAnswerError: nobody can be asked.
    """
    access = kubeconfig.named(args.kubeconfig, context=args.context)
    if access is not None:
        return Direct(access)
    if args.socket_given or Path(args.socket).exists():
        return Relayed(args.socket)
    return Direct(kubeconfig.found(context=args.context))


def cluster(asked: Source) -> Cluster:
    """Read what policy needs.

    Raises:
        ApiError: the server refuses or does not answer.
        NoAnswerError: the agent does not answer.
    """
    services = [d.value for page in _pages(asked, SERVICE) for d in page]
    policies = compiled(d.value for page in _pages(asked, NETWORK_POLICY) for d in page)
    nodes = [d.value for page in _pages(asked, NODE) for d in page]
    pods = [d.value for page in _pages(asked, POD) for d in page]
    world = World.build(
        namespaces=[d.value for page in _pages(asked, NAMESPACE) for d in page],
        pods=pods,
        policies=policies,
        nodes=nodes,
        services=services,
        slices=[d.value for page in _pages(asked, ENDPOINT_SLICE) for d in page],
    )
    names = {n.name for n in nodes} | {p.node for p in pods if p.node}
    return Cluster(
        world=world,
        headless=frozenset(s.key for s in services if s.headless),
        external_ips={a: s.key for s in services for a in s.outside_addresses},
        node_names=tuple(sorted(names)),
    )


def _pages(asked: Source, kind: ResourceKind[T]) -> Iterator[tuple[Decoded[T], ...]]:
    token = ""
    while True:
        body = asked.page(kind, token)
        try:
            page = decode_list(kind, body)
        except DecodeError as e:
            raise ApiError(f"list of {kind} from {asked.name}", message=str(e)[:500]) from e
        for error in page.errors:
            remark(f"left out: {error}")
        yield page.items
        token = page.continue_token
        if not token:
            return


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
