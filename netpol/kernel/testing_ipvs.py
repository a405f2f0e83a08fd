"""Drivers of the service proxy in memory, for tests: they keep state and refuse what the kernel refuses.

They pass the contracts that the drivers of the real kernel pass (`tests/uml/inside/contract_*.py`), on
which every refusal here was first seen. What they add: state that a test can look at and change behind
the caller's back, a count of calls, refusals and failures on demand.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, assert_never

from netpol.kernel.drivers import FlowMatch, Timeouts
from netpol.kernel.testing import Failures
from netpol.model.ids import Protocol
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    DeleteReal,
    DeleteServer,
    ForwardMethod,
    IpvsFailure,
    IpvsOp,
    RealConfig,
    RealServer,
    RealState,
    ServerId,
    ServerState,
    SetReal,
    SetServer,
    VirtualServer,
)
from netpol.model.net import Family, family_of

#: Those that the tests' kernel has as modules, or built in.
SCHEDULERS = frozenset(
    ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh")
)
#: The kernel's own (IP_VS_DFT timeouts): established TCP, TCP after FIN, UDP.
DEFAULT_TIMEOUTS = Timeouts(900, 120, 300)


@dataclass(slots=True)
class FakeServer:
    """One virtual server and its real servers."""

    server: VirtualServer
    reals: dict[RealServer, RealState] = field(default_factory=dict)


class FakeIpvs:
    """IpvsDriver in memory.

    Attributes:
        state: all virtual servers; a test may change it behind our back.
        schedulers: those that "this kernel" has.
        refuse: operations that are refused with an errno, as often as they come.
        failures: see Failures; a step is one call of dump, read or apply.
        calls: how often each method, and each kind of operation, was called.
        applied: the operations of all calls of apply, those that were refused too, in order.
    """

    def __init__(self) -> None:
        self.state: dict[ServerId, FakeServer] = {}
        self.schedulers = set(SCHEDULERS)
        self.refuse: dict[IpvsOp, int] = {}
        self.failures = Failures()
        self.calls: Counter[str] = Counter()
        self.applied: list[IpvsOp] = []
        self.closed = False
        self._timeouts = DEFAULT_TIMEOUTS

    def put(self, server: VirtualServer, reals: Mapping[RealServer, RealConfig]) -> None:
        """Put a virtual server there, as another program does."""
        states = {real: RealState(config) for real, config in reals.items()}
        self.state[server.id] = FakeServer(server, states)

    def connect(
        self, id_: ServerId, real: RealServer, *, active: int = 0, inactive: int = 0
    ) -> None:
        """Have a real server have so many connections."""
        reals = self.state[id_].reals
        reals[real] = reals[real]._replace(active=active, inactive=inactive)

    def dump(self) -> dict[ServerId, ServerState]:
        """See IpvsDriver."""
        self.calls["dump"] += 1
        self.failures.step()
        return {id_: _state_of(found) for id_, found in self.state.items()}

    def read(self, ids: Sequence[ServerId]) -> dict[ServerId, ServerState]:
        """See IpvsDriver."""
        self.calls["read"] += 1
        self.failures.step()
        return {id_: _state_of(self.state[id_]) for id_ in ids if id_ in self.state}

    def apply(self, ops: Sequence[IpvsOp]) -> tuple[IpvsFailure, ...]:
        """See IpvsDriver."""
        self.calls["apply"] += 1
        self.failures.step()
        failures = []
        for op in ops:
            self.calls[type(op).__name__] += 1
            self.applied.append(op)
            code = self.refuse.get(op, 0) or self._apply_one(op)
            if code:
                failures.append(IpvsFailure(op, code))
        return tuple(failures)

    def set_timeouts(self, *, tcp_s: int, tcp_fin_s: int, udp_s: int) -> None:
        """See IpvsDriver."""
        self.calls["set_timeouts"] += 1
        old = self._timeouts
        self._timeouts = Timeouts(
            tcp_s or old.tcp_s, tcp_fin_s or old.tcp_fin_s, udp_s or old.udp_s
        )

    def timeouts(self) -> Timeouts:
        """See IpvsDriver."""
        return self._timeouts

    def close(self) -> None:
        """See IpvsDriver."""
        self.closed = True

    def _apply_one(self, op: IpvsOp) -> int:
        """Do one operation; returns why not, as errno, or 0."""
        match op:
            case AddServer(server):
                if server.id in self.state:
                    return errno.EEXIST
                if server.scheduler not in self.schedulers:
                    return errno.ENOENT
                self.state[server.id] = FakeServer(server)
                return 0
            case SetServer(server):
                found = self.state.get(server.id)
                if found is None:
                    return errno.ESRCH
                if server.scheduler not in self.schedulers:
                    return errno.ENOENT
                found.server = server
                return 0
            case DeleteServer(id_):
                return 0 if self.state.pop(id_, None) else errno.ESRCH
            case AddReal() | SetReal() | DeleteReal():
                found = self.state.get(op.id)
                return errno.ESRCH if found is None else _apply_real(found, op)
            case _:
                assert_never(op)


def _apply_real(found: FakeServer, op: AddReal | SetReal | DeleteReal) -> int:
    there = op.real in found.reals
    if isinstance(op, DeleteReal):
        if not there:
            return errno.ENOENT
        del found.reals[op.real]
        return 0
    # A virtual server sends to the other family by tunnel alone.
    other_family = family_of(op.real.address) is not found.server.id.family
    if other_family and op.config.forward is not ForwardMethod.TUNNEL:
        return errno.EINVAL
    if op.config.weight < 0:
        return errno.ERANGE
    if there != isinstance(op, SetReal):
        return errno.EEXIST if there else errno.ENOENT
    old = found.reals.get(op.real, RealState(op.config))
    found.reals[op.real] = old._replace(config=op.config)
    return 0


def _state_of(found: FakeServer) -> ServerState:
    return ServerState(replace(found.server), dict(found.reals))


class FakeVips:
    """VipDriver in memory.

    Attributes:
        state: the addresses on the link, each with the source of its route: itself where the kernel
            made the route, None where the kernel dropped it. None where there is no link.
        node_addresses: what a source must be one of; everything is where this is None.
        refuse: addresses that are refused with an errno.
        failures: see Failures; a step is one call.
        calls: how often each method was called.
    """

    def __init__(self) -> None:
        self.state: dict[bytes, bytes | None] | None = None
        self.node_addresses: set[bytes] | None = None
        self.refuse: dict[bytes, int] = {}
        self.failures = Failures()
        self.calls: Counter[str] = Counter()
        self.closed = False

    def lose(self, source: bytes) -> None:
        """Take an address from the node, with the routes that have it as their source."""
        if self.node_addresses is not None:
            self.node_addresses.discard(source)
        for address, at in (self.state or {}).items():
            if at == source and self.state is not None:
                self.state[address] = None

    def dump(self) -> frozenset[bytes] | None:
        """See VipDriver."""
        self.calls["dump"] += 1
        self.failures.step()
        return None if self.state is None else frozenset(self.state)

    def misrouted(self, sources: Mapping[Family, bytes]) -> frozenset[bytes]:
        """See VipDriver."""
        self.calls["misrouted"] += 1
        self.failures.step()
        return frozenset(
            address
            for address, at in (self.state or {}).items()
            if at != sources.get(family_of(address), at or address)
        )

    def apply(
        self,
        *,
        add: Sequence[bytes],
        remove: Sequence[bytes],
        sources: Mapping[Family, bytes] | None = None,
    ) -> tuple[tuple[bytes, int], ...]:
        """See VipDriver."""
        self.calls["apply"] += 1
        self.failures.step()
        if self.state is None:
            if not add:
                return ()
            self.state = {}
        refused = []
        for address in add:
            if address in self.refuse:
                refused.append((address, self.refuse[address]))
                continue
            source = (sources or {}).get(family_of(address))
            self.state.setdefault(address, address)
            if source is None:
                self.state[address] = self.state[address] or address
            elif self.node_addresses is not None and source not in self.node_addresses:
                refused.append((address, errno.EINVAL))
            else:
                self.state[address] = source
        for address in remove:
            self.state.pop(address, None)
        return tuple(refused)

    def remove_link(self) -> None:
        """See VipDriver."""
        self.calls["remove_link"] += 1
        self.state = None

    def close(self) -> None:
        """See VipDriver."""
        self.closed = True


class FakeFlow(NamedTuple):
    """One flow as conntrack knows it: what was dialled, and the backend that answers."""

    protocol: Protocol
    address: bytes
    port: int
    backend: bytes
    backend_port: int


class FakeFlows:
    """FlowDriver in memory.

    Attributes:
        state: the flows; a test puts them here.
        failures: see Failures; a step is one call.
        ended: all matches that were asked for, in order.
    """

    def __init__(self) -> None:
        self.state: list[FakeFlow] = []
        self.failures = Failures()
        self.ended: list[FlowMatch] = []
        self.closed = False

    def end(self, matches: Collection[FlowMatch]) -> int:
        """See FlowDriver."""
        self.failures.step()
        self.ended += matches
        left = [flow for flow in self.state if not any(_is_of(flow, m) for m in matches)]
        count = len(self.state) - len(left)
        self.state = left
        return count

    def close(self) -> None:
        """See FlowDriver."""
        self.closed = True


def _is_of(flow: FakeFlow, match: FlowMatch) -> bool:
    return (
        flow.protocol is match.protocol
        and flow.backend == match.backend
        and match.backend_port in (0, flow.backend_port)
        and match.address in (b"", flow.address)
        and match.port in (0, flow.port)
    )
