"""What the kernel refused of what is wanted, in words, and which ports stay shut because of it. Pure."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import assert_never

from netpol.model.ids import ObjectKey
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    DeleteReal,
    DeleteServer,
    IpvsFailure,
    ServerId,
    SetReal,
    SetServer,
)
from netpol.model.net import format_address
from netpol.model.ruleset import AddressPort
from proxy import names
from proxy.desired import Desired, Place
from proxy.steps import id_of

#: What the kernel says of something to delete that is not there.
_NOT_THERE = frozenset({errno.ENOENT, errno.ESRCH})
_VERBS: Mapping[type, str] = {AddReal: "adding", SetReal: "changing", DeleteReal: "deleting"}


class Troubles:
    """What is not as it must be, until it is tried again.

    Attributes:
        servers: of each one, why.
        vips: the same of addresses.
    """

    def __init__(self) -> None:
        self.servers: dict[ServerId, str] = {}
        self.vips: dict[bytes, str] = {}
        # Wanted servers that do not stand.
        self._absent: set[ServerId] = set()

    def __bool__(self) -> bool:
        return bool(self.servers or self.vips)

    def forget(self, id_: ServerId) -> None:
        """A server was read, and is tried again."""
        self.servers.pop(id_, None)
        self._absent.discard(id_)

    def conflict(self, id_: ServerId) -> None:
        """Somebody else's server stands where one of ours shall."""
        self.servers[id_] = "somebody else has this server in IPVS; it is left as it is"

    def refused(self, failure: IpvsFailure) -> bool:
        """The kernel refused an operation; whether that is a trouble."""
        op, code = failure
        id_ = id_of(op)
        match op:
            case DeleteServer() | DeleteReal() if code in _NOT_THERE:
                return False
            case AddServer() if code == errno.EEXIST:
                self.servers[id_] = "it stands already, which the kernel did not say when asked"
            case AddServer(server):
                self.servers[id_] = f"adding it: {_why_no_server(server.scheduler, code)}"
                self._absent.add(id_)
            case SetServer(server):
                self.servers[id_] = f"changing it: {_why_no_server(server.scheduler, code)}"
                if code == errno.ESRCH:
                    self._absent.add(id_)
            case AddReal() | SetReal() | DeleteReal():
                at = f"{format_address(op.real.address)} port {op.real.port}"
                why = f"{_VERBS[type(op)]} backend {at}: {os.strerror(code)}"
                self.servers.setdefault(id_, why)
            case DeleteServer():
                self.servers[id_] = f"deleting it: {os.strerror(code)}"
            case _:
                assert_never(op)
        return True

    def by_service(self, desired: Desired) -> dict[ObjectKey, list[str]]:
        """By the Services that want it; what nobody wants is nobody's."""
        found: dict[ObjectKey, list[str]] = {}
        nobody = (ObjectKey("", ""),)
        for id_, why in self.servers.items():
            for service in desired.servers.services(id_) or nobody:
                found.setdefault(service, []).append(f"{id_}: {why}")
        for vip, why in self.vips.items():
            for service in desired.vips.services(vip) or nobody:
                found.setdefault(service, []).append(f"{format_address(vip)}: {why}")
        return found

    @property
    def shut(self) -> set[Place]:
        """Ports that are wanted and stay shut, since their server does not stand."""
        return {port_of(id_) for id_ in self._absent.copy() if id_.protocol is not None}


def _why_no_server(scheduler: str, code: int) -> str:
    if code == errno.ENOENT:
        return f"the kernel has no scheduler {scheduler} (module ip_vs_{scheduler})"
    return f"{os.strerror(code)} (scheduler {scheduler})"


def port_of(id_: ServerId) -> Place:
    """The member that opens the port of a server by address."""
    assert id_.protocol is not None  # noqa: S101 - servers by mark have no port
    member = AddressPort(id_.address, id_.protocol, id_.port)
    return names.PORT[id_.family].name, member
