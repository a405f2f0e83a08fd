"""`netpol-ctl services` on a node: what its agent serves, with what the kernel has of it now."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from netpol.admin import client
from netpol.ctl.output import remark
from netpol.ctl.services import print_plans
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import parse_address
from proxy.rows import Backend, RowKey, ServicePlan, ServiceRow


class Real(msgspec.Struct, frozen=True):
    """A real server as the kernel has it."""

    address: str
    port: int
    weight: int
    active: int = 0
    inactive: int = 0
    draining_s: float | None = None

    @property
    def place(self) -> tuple[bytes, int]:
        """What it is known by."""
        return parse_address(self.address), self.port


class Server(msgspec.Struct, frozen=True):
    """A virtual server that the Service needs; one by packet mark has no address."""

    address: str
    port: int
    protocol: str
    fwmark: int
    present: bool
    reals: tuple[Real, ...] = ()


class Live(msgspec.Struct, frozen=True):
    """One Service in the kernel."""

    servers: tuple[Server, ...] = ()
    errors: tuple[str, ...] = ()


class Item(msgspec.Struct, frozen=True):
    """One Service of the agent's answer."""

    plan: ServicePlan
    live: Live | None = None


_Reals = dict[tuple[bytes, int], Real]


class Kernel:
    """What the kernel has of the Services that were asked for."""

    def __init__(self) -> None:
        self._by_address: dict[RowKey, _Reals] = {}
        self._by_mark: dict[ObjectKey, _Reals] = {}

    def take(self, item: Item) -> ServicePlan:
        """Learn of one Service; returns its plan, with the backends that the kernel still drains."""
        for server in item.live.servers if item.live is not None else ():
            reals = {real.place: real for real in server.reals}
            if server.fwmark:
                self._by_mark.setdefault(item.plan.service, {}).update(reals)
            elif server.present:
                key = RowKey(parse_address(server.address), Protocol(server.protocol), server.port)
                self._by_address[key] = reals
        return replace(item.plan, rows=tuple(map(self._with_draining, item.plan.rows)))

    def _with_draining(self, row: ServiceRow) -> ServiceRow:
        known = {(b.address, b.port) for b in (*row.backends, *row.local_client_backends)}
        more = tuple(
            Backend(*place, weight=0)
            for place in sorted(self._by_address.get(row.key, {}))
            if place not in known
        )
        if not more:
            return row
        return replace(
            row,
            backends=(*row.backends, *more),
            local_client_backends=(*row.local_client_backends, *more),
        )

    def of(self, row: ServiceRow, backend: Backend) -> Mapping[str, Any]:
        """Connections and state of a backend."""
        place = backend.address, backend.port
        real = self._by_address.get(row.key, {}).get(place)
        if real is None:
            # Behind a Local policy, what only clients of this node reach has a server by mark.
            real = self._by_mark.get(row.service, {}).get(place)
        if real is None:
            return {"active": 0, "inactive": 0, "state": "missing"}
        state = "serving" if real.weight else "draining"
        return {"active": real.active, "inactive": real.inactive, "state": state}


def run(args: argparse.Namespace) -> int:
    """Print what this node's agent serves."""
    key = _key(args.name, args.namespace) if args.name else ""
    answers = client.follow(args.socket, "services", service=key)
    try:
        head = next(answers, None)
    except InputError as e:
        if "no operation" not in str(e):
            raise
        raise NoAnswerError(
            f"the agent at {args.socket} serves no Services",
            needed="an agent with --proxy, or -f PATH with manifests",
        ) from e
    if not isinstance(head, dict):
        raise NoAnswerError(f"the agent at {args.socket} gave no answer")
    kernel, plans, errors = Kernel(), [], []
    for answer in answers:
        item = _item(answer)
        plans.append(kernel.take(item))
        if item.live is not None:
            errors += [f"Service {item.plan.service}: {e}" for e in item.live.errors]
        if args.output != "text":
            errors += [
                f"Service {item.plan.service}: {r.reason}: {r.message}" for r in item.plan.refused
            ]
    if not head.get("in_sync"):
        remark("not in sync: a change is on its way to the kernel")
    for error in errors:
        remark(error)
    print_plans(plans, node=str(head.get("node")), form=args.output, live=kernel.of)
    return 0


def _item(answer: Any) -> Item:
    try:
        return msgspec.convert(answer, Item)
    except msgspec.MsgspecError as e:
        raise NoAnswerError("the agent's answer is of another version", got=str(e)) from e


def _key(text: str, namespace: str | None) -> str:
    """The Service that NAME names, as NAMESPACE/NAME."""
    name = re.sub("(^|/)(svc|service)/", r"\1", text, count=1)  # svc/NAME, NS/svc/NAME
    given, slash, rest = name.partition("/")
    if not slash:
        return f"{namespace or 'default'}/{name}"
    if namespace and given != namespace:
        raise InputError(f"NAME {text}", needed=f"a Service of -n {namespace}", got=given)
    return f"{given}/{rest}"
