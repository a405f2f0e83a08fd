"""A Service's rows become what the kernel must have of it: servers of IPVS, addresses, members of sets.

Pure, one Service at a time; what several Services share is counted in `proxy.desired`.

What the numbers of IPVS do to a row:

- A backend of weight 0 is not wanted: whether it drains is decided where the kernel is known (`drain`).
- With the hash schedulers (sh, mh) a server of weight 0 keeps its share of the clients, and refuses them,
  unless their fallback flag is set; so it always is.
- A server by packet mark has no port of its own, and IPVS gives a persistent connection of such a server
  the port that was dialled instead of the backend's. Affinity is therefore not persistence there but the
  scheduler: mh sends a client to the same backend as long as that is there.
- In a tunnel the packet keeps its address and port, so that the backend's port is the one dialled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from netpol.model.ids import ObjectKey, Protocol, SetName
from netpol.model.ipvs import (
    SCHED_FLAG_1,
    ForwardMethod,
    RealConfig,
    RealServer,
    ServerId,
    VirtualServer,
)
from netpol.model.net import Family, Prefix, host_prefix
from netpol.model.ruleset import AddressPort, AddressPortNet, Member
from proxy import names
from proxy.marks import MarkKey
from proxy.rows import Action, Backend, Kind, ServicePlan, ServiceRow

#: Schedulers that pick by a hash; SCHED_FLAG_1 is the fallback of both (IP_VS_SVC_F_SCHED_SH_FALLBACK,
#: IP_VS_SVC_F_SCHED_MH_FALLBACK).
_HASHING = frozenset({"sh", "mh"})
#: What keeps a client at its backend where persistence cannot.
_STICKY = "mh"

#: Gives a key its mark; None where the field is full.
MarkOf = Callable[[MarkKey], int | None]


class Server(NamedTuple):
    """A virtual server that is wanted.

    Backends are the plan's own tuple, since there may be a hundred thousand of them.

    Attributes:
        backends: those of weight 0 are not wanted, see above.
        protocol: known of servers by mark too.
        mark: who has the mark of a server by mark.
        tunnel: packets go in a tunnel.
        port: the real servers' port where it is not the backends'.
    """

    virtual: VirtualServer
    backends: tuple[Backend, ...]
    protocol: Protocol
    mark: MarkKey | None = None
    tunnel: bool = False
    port: int = 0

    @property
    def reals(self) -> dict[RealServer, RealConfig]:
        """Its real servers, all with a weight."""
        forward = ForwardMethod.TUNNEL if self.tunnel else ForwardMethod.NAT
        return {
            RealServer(b.address, self.port or b.port): RealConfig(b.weight, forward)
            for b in self.backends
            if b.weight > 0
        }


class Entry(NamedTuple):
    """A member of a set that is wanted; `mark` where the set has marks."""

    name: SetName
    member: Member
    mark: int | None = None


@dataclass(frozen=True, slots=True)
class KernelPart:
    """What the kernel must have of one Service.

    Attributes:
        vips: addresses that this node takes on.
        marks: whose marks are in `servers`.
        faults: what cannot be had, in words.
    """

    servers: tuple[Server, ...] = ()
    vips: tuple[bytes, ...] = ()
    entries: tuple[Entry, ...] = ()
    marks: tuple[MarkKey, ...] = ()
    faults: tuple[str, ...] = ()


#: Who wants what `lower_pods` makes; no Service has such a name.
PODS = ObjectKey("", "pods")


def lower_pods(addresses: Iterable[bytes]) -> KernelPart | None:
    """What the kernel must have of pods on this node that are outside of its pod ranges; None for nothing."""
    entries = tuple(Entry(names.POD[_family(a)].name, host_prefix(a)) for a in sorted(addresses))
    return KernelPart(entries=entries) if entries else None


def server_id(row: ServiceRow) -> ServerId:
    """What IPVS knows a row's server by."""
    return ServerId(row.family, row.protocol, row.address, row.port)


def lower(plan: ServicePlan, mark_of: MarkOf) -> KernelPart:
    """What the kernel must have of a Service."""
    servers: list[Server] = []
    entries: list[Entry] = []
    faults: list[str] = []
    vips = sorted({row.address for row in plan.rows if row.is_vip})
    for row in plan.rows:
        servers.append(_by_address(row))
        entries.extend(_entries(row))
    marks: list[MarkKey] = []
    for key, rows in _local_groups(plan):
        value = mark_of(key)
        if value is None:
            faults.append(
                f"port {key.port_name or rows[0].port}: no packet mark is left; clients on this node "
                "are served like external ones"
            )
            continue
        marks.append(key)
        servers.append(_by_mark(rows[0], key, value))
        name = names.MARK[key.family].name
        entries += [Entry(name, AddressPort(r.address, r.protocol, r.port), value) for r in rows]
    entries += [Entry(names.VIP[_family(vip)].name, vip) for vip in vips]
    return KernelPart(tuple(servers), tuple(vips), tuple(entries), tuple(marks), tuple(faults))


def _by_address(row: ServiceRow) -> Server:
    flags = row.scheduler_flags | (SCHED_FLAG_1 if row.scheduler in _HASHING else 0)
    virtual = VirtualServer(server_id(row), row.scheduler, flags, row.affinity_s)
    port = row.port if row.tunnel else 0
    return Server(virtual, row.backends, row.protocol, None, row.tunnel, port)


def _by_mark(row: ServiceRow, key: MarkKey, value: int) -> Server:
    scheduler = _STICKY if row.affinity_s else row.scheduler
    flags = row.scheduler_flags if scheduler == row.scheduler else 0
    if scheduler in _HASHING:
        flags |= SCHED_FLAG_1
    virtual = VirtualServer(ServerId.by_mark(row.family, value), scheduler, flags)
    return Server(virtual, row.local_client_backends, row.protocol, key)


def _entries(row: ServiceRow) -> Iterable[Entry]:
    family = row.family
    here = AddressPort(row.address, row.protocol, row.port)
    yield Entry(names.PORT[family].name, here)
    if row.action is Action.DROP:
        yield Entry(names.DROP[family].name, here)
    if row.action is Action.REJECT:
        yield Entry(names.REJECT[family].name, here)
    if row.source_ranges:
        yield Entry(names.LB[family].name, here)
        for net in row.source_ranges:
            for half in _halves(net):
                yield Entry(
                    names.SRC[family].name,
                    AddressPortNet(row.address, row.protocol, row.port, half),
                )


def _halves(net: Prefix) -> tuple[Prefix, ...]:
    """The kernel's sets have no member of length 0; two halves are as much."""
    if net.length:
        return (net,)
    upper = b"\x80" + bytes(len(net.address) - 1)
    return Prefix(net.address, 1), Prefix(upper, 1)


def _local_groups(plan: ServicePlan) -> Iterable[tuple[MarkKey, list[ServiceRow]]]:
    """Rows that serve clients on this node otherwise, together where one server does for them."""
    groups: dict[MarkKey, list[ServiceRow]] = {}
    for row in plan.rows:
        if not _apart(plan, row):
            continue
        variant = 0
        while True:
            key = MarkKey(row.service, row.port_name, row.family, variant)
            group = groups.setdefault(key, [])
            if not group or _alike(group[0], row):
                group.append(row)
                break
            variant += 1
    return groups.items()


def _apart(plan: ServicePlan, row: ServiceRow) -> bool:
    """Whether clients on this node have a server of their own.

    With a Local policy always: it must not come and go, with all its connections, whenever the last
    endpoint of another node does. With tunnels as well: the answer to a client of this node would come
    from an address that is this node's own, and policy would judge the client by the tunnel.
    """
    if row.tunnel:
        return True
    if plan.policy_local and row.kind is not Kind.CLUSTER_IP:
        return True
    return _weighted(row.local_client_backends) != _weighted(row.backends)


def _weighted(backends: tuple[Backend, ...]) -> list[Backend]:
    return [b for b in backends if b.weight > 0]


def _alike(one: ServiceRow, other: ServiceRow) -> bool:
    return (
        one.protocol is other.protocol
        and one.local_client_backends == other.local_client_backends
        and one.scheduler == other.scheduler
        and one.scheduler_flags == other.scheduler_flags
        and bool(one.affinity_s) == bool(other.affinity_s)
    )


def _family(address: bytes) -> Family:
    return Family.V4 if len(address) == 4 else Family.V6
