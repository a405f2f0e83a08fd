"""IPVS as values: virtual servers, their real servers, the changes of them, and what the kernel has.

Numbers are those of linux/ip_vs.h. Nothing here talks to the kernel (`netpol.kernel.ipvs_table` does) or
knows what a Service is (`proxy` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from netpol.model.ids import Protocol
from netpol.model.net import Family, format_address


class ForwardMethod(IntEnum):
    """How packets get to a real server (IP_VS_CONN_F_FWD_MASK)."""

    NAT = 0
    LOCAL = 1
    TUNNEL = 2
    ROUTE = 3
    BYPASS = 4


#: Scheduler flags (IP_VS_SVC_F_SCHED1..3); what they mean depends on the scheduler (sh, mh).
SCHED_FLAG_1 = 0x0008
SCHED_FLAG_2 = 0x0010
SCHED_FLAG_3 = 0x0020


class ServerId(NamedTuple):
    """What a virtual server is known by: an address with protocol and port, or a packet mark.

    `fwmark` 0 means by address; else `protocol` is None, `address` empty and `port` 0.
    """

    family: Family
    protocol: Protocol | None
    address: bytes
    port: int
    fwmark: int = 0

    @classmethod
    def by_mark(cls, family: Family, fwmark: int) -> ServerId:
        """A server known by a packet mark."""
        return cls(family, None, b"", 0, fwmark)

    def __str__(self) -> str:
        if self.fwmark:
            return f"mark {self.fwmark:#x} (IPv{self.family.value})"
        host = format_address(self.address)
        return f"{f'[{host}]' if self.family is Family.V6 else host}:{self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """A virtual server.

    Attributes:
        scheduler: its name in the kernel (rr, wrr, lc, ...).
        flags: SCHED_FLAG_* only; the persistence flag follows from `persistence_s`.
        persistence_s: seconds for which a client keeps its real server; 0 for none.
    """

    id: ServerId
    scheduler: str = "rr"
    flags: int = 0
    persistence_s: int = 0


class RealServer(NamedTuple):
    """A real server within its virtual server."""

    address: bytes
    port: int


class RealConfig(NamedTuple):
    """What is set of a real server; weight 0 takes no new connections."""

    weight: int = 1
    forward: ForwardMethod = ForwardMethod.NAT


class RealState(NamedTuple):
    """A real server as the kernel has it, with its connections."""

    config: RealConfig
    active: int = 0
    inactive: int = 0
    persistent: int = 0


@dataclass(frozen=True, slots=True)
class ServerState:
    """A virtual server as the kernel has it."""

    server: VirtualServer
    reals: Mapping[RealServer, RealState] = field(default_factory=dict)


# -- changes ------------------------------------------------------------------------------------


class AddServer(NamedTuple):
    """Add a virtual server that is not there."""

    server: VirtualServer


class SetServer(NamedTuple):
    """Change the settings of a virtual server that is there."""

    server: VirtualServer


class DeleteServer(NamedTuple):
    """Delete a virtual server with its real servers."""

    id: ServerId


class AddReal(NamedTuple):
    """Add a real server that is not there."""

    id: ServerId
    real: RealServer
    config: RealConfig


class SetReal(NamedTuple):
    """Change weight or forwarding of a real server that is there."""

    id: ServerId
    real: RealServer
    config: RealConfig


class DeleteReal(NamedTuple):
    """Delete a real server; its connections go with it as the kernel's settings say."""

    id: ServerId
    real: RealServer


IpvsOp = AddServer | SetServer | DeleteServer | AddReal | SetReal | DeleteReal


class IpvsFailure(NamedTuple):
    """An operation that the kernel refused, and its error number (errno)."""

    op: IpvsOp
    code: int
