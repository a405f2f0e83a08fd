"""From what the kernel has to what it must have: operations, in the order that lets nothing forbidden pass.

     1  members that restrict: our addresses, drops, and who is restricted to sources, after these;
        and what opens and goes: ports, sources that are not allowed any more
     2  addresses that go leave the link
     3  servers of IPVS: new and changed ones, then their real servers: new, changed, deleted
     4  members that open: more sources, marks, ports; marks that go
     5  servers that go
     6  addresses that come enter the link
     7  members that restricted and go: drops, who was restricted, then the sources, our addresses

So a packet to an address of ours meets a server or is refused by the rules, at every moment in between:
the port is open (4) only while its server stands (3 to 5), and the rules know the address (1 to 7) for
longer than the link does (6 to 2). A new backend takes packets before an old one goes; an old one is gone
before anybody gets in who was kept out before, and who is kept out now is before a new one comes.

Pure: what is done is decided here, `proxy.apply` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from netpol.kernel.drivers import AddMembers, DeleteMembers, FlowMatch, SetOp, SetTransaction
from netpol.model.ids import Protocol, SetName
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    DeleteReal,
    DeleteServer,
    IpvsOp,
    RealConfig,
    RealServer,
    ServerId,
    ServerState,
    SetReal,
    SetServer,
    VirtualServer,
)
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import AddressPort, AddressPortNet, Member, SetSpec
from proxy import names
from proxy.drain import TRANSITIONS, Deed, Event, Life, leaves_by
from proxy.lower import Server

Added = Mapping[SetName, Mapping[Member, int | None]]
Deleted = Mapping[SetName, Iterable[Member]]
Changed = Added | Deleted


class Have(NamedTuple):
    """A virtual server that the kernel has, without its connections."""

    virtual: VirtualServer
    reals: Mapping[RealServer, RealConfig]


def have_of(state: ServerState) -> Have:
    """A server without its connections."""
    return Have(state.server, {real: s.config for real, s in state.reals.items()})


def id_of(op: IpvsOp) -> ServerId:
    """The virtual server of an operation."""
    return op.server.id if isinstance(op, AddServer | SetServer) else op.id


def life_of(config: RealConfig | None) -> Life:
    """Where a real server is in its life, by what the kernel has of it."""
    if config is None:
        return Life.ABSENT
    return Life.ACTIVE if config.weight else Life.DRAINING


@dataclass(slots=True)
class ServerOps:
    """What happens to virtual servers and their real servers, by the steps in which it does.

    Attributes:
        drain, settle: real servers that begin to drain, and that do not any more.
        flows: whose conntrack entries go, after everything else.
    """

    servers: list[AddServer | SetServer] = field(default_factory=list)
    add: list[IpvsOp] = field(default_factory=list)
    set: list[IpvsOp] = field(default_factory=list)
    delete: list[IpvsOp] = field(default_factory=list)
    end: list[DeleteServer] = field(default_factory=list)
    drain: list[tuple[ServerId, RealServer]] = field(default_factory=list)
    settle: list[tuple[ServerId, RealServer]] = field(default_factory=list)
    flows: list[FlowMatch] = field(default_factory=list)

    def plan(self, id_: ServerId, have: Have | None, want: Server | None) -> None:
        """Add what brings one virtual server from what it is to what it must be."""
        if want is None:
            if have is not None:
                self._end(id_, have)
            return
        if have is None:
            self.servers.append(AddServer(want.virtual))
        elif have.virtual != want.virtual:
            self.servers.append(SetServer(want.virtual))
        there = {} if have is None else have.reals
        wanted = want.reals
        for real, config in wanted.items():
            self._real(want, real, there.get(real), config)
        for real, config in there.items():
            if real not in wanted:
                self._real(want, real, config, None)

    def _end(self, id_: ServerId, have: Have) -> None:
        self.end.append(DeleteServer(id_))
        # A server by mark says no protocol: its backends' entries are looked for under both.
        protocols = (id_.protocol,) if id_.protocol else (Protocol.UDP, Protocol.SCTP)
        for real in have.reals:
            for protocol in protocols:
                self._forget(id_, protocol, real)

    def _real(
        self, want: Server, real: RealServer, have: RealConfig | None, config: RealConfig | None
    ) -> None:
        id_ = want.virtual.id
        leaving = leaves_by(want.protocol, want.virtual.scheduler)
        event = leaving if config is None else Event.PLANNED
        life = life_of(have)
        _, deed = TRANSITIONS[life, event]
        match deed:
            case Deed.ADD if config is not None:
                self.add.append(AddReal(id_, real, config))
            case Deed.SET if config is not None:
                if have != config:
                    self.set.append(SetReal(id_, real, config))
                if life is Life.DRAINING:
                    self.settle.append((id_, real))
            case Deed.ZERO if have is not None:
                if have.weight:
                    self.set.append(SetReal(id_, real, have._replace(weight=0)))
                self.drain.append((id_, real))
            case Deed.DELETE:
                self.delete.append(DeleteReal(id_, real))
                self.settle.append((id_, real))
                self._forget(id_, want.protocol, real)
            case _:
                pass

    def _forget(self, id_: ServerId, protocol: Protocol, real: RealServer) -> None:
        """Conntrack's entries of a backend go; a server by mark does not tell what was dialled."""
        if protocol in (Protocol.UDP, Protocol.SCTP):
            self.flows.append(FlowMatch(protocol, real.address, real.port, id_.address, id_.port))

    @property
    def count(self) -> int:
        """How many operations of IPVS there are."""
        groups = (self.servers, self.add, self.set, self.delete, self.end)
        return sum(len(group) for group in groups)


# -- sets ---------------------------------------------------------------------------------------


def _both(*pairs: Mapping[Family, SetSpec]) -> tuple[SetName, ...]:
    return tuple(pair[f].name for pair in pairs for f in FAMILIES)


_MARKS = _both(names.MARK)
_OPENING = _both(names.SRC, names.MARK, names.PORT)
_OPEN_DELETED = _both(names.PORT, names.POD)
_RESTRICTING_ADDED = _both(names.POD, names.SRC, names.LB, names.VIP, names.DROP, names.REJECT)
_RESTRICTING_DELETED = _both(names.DROP, names.REJECT, names.LB, names.SRC, names.VIP)
_SOURCES = {names.SRC[f].name: names.LB[f].name for f in FAMILIES}


def restrict(add: Added, delete: Deleted) -> SetTransaction:
    """Step 1."""
    come = dict(add) | {n: _sources(n, add, rows_too=True) for n in _SOURCES}
    ops: list[SetOp] = [*_adds(_RESTRICTING_ADDED, come), *_deletes(_OPEN_DELETED, delete)]
    ops += _deletes(_SOURCES, {n: _sources(n, delete, rows_too=False) for n in _SOURCES})
    return SetTransaction(tuple(ops))


def open_up(add: Added, delete: Deleted) -> SetTransaction:
    """Step 4."""
    come = dict(add) | {n: _sources(n, add, rows_too=False) for n in _SOURCES}
    return SetTransaction((*_adds(_OPENING, come), *_deletes(_MARKS, delete)))


def release(delete: Deleted) -> SetTransaction:
    """Step 7."""
    left = {n: delete.get(n, ()) for n in _RESTRICTING_DELETED}
    left |= {n: _sources(n, delete, rows_too=True) for n in _SOURCES}
    return SetTransaction(tuple(_deletes(_RESTRICTING_DELETED, left)))


def _sources(name: SetName, members: Changed, *, rows_too: bool) -> dict[Member, None]:
    """Sources that come or go: of rows that become restricted or free as a whole, or of the others."""
    rows = set(members.get(_SOURCES[name], ()))
    return {
        m: None
        for m in members.get(name, ())
        if isinstance(m, AddressPortNet)
        and (AddressPort(m.address, m.protocol, m.port) in rows) is rows_too
    }


def _adds(order: Iterable[SetName], add: Added) -> list[AddMembers]:
    return [AddMembers(names.SPECS[n], dict(add[n])) for n in order if add.get(n)]


def _deletes(order: Iterable[SetName], delete: Deleted) -> list[DeleteMembers]:
    lists = ((n, list(delete.get(n, ()))) for n in order)
    return [DeleteMembers(names.SPECS[n], members) for n, members in lists if members]
