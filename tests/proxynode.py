"""A node of stateful fakes for the proxy's room: its kernel outlives a room, which can die anywhere."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from netpol.aio.clock import ManualClock
from netpol.kernel.drivers import SetOp, TableTransaction
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.kernel.testing_ipvs import FakeFlows, FakeIpvs, FakeVips
from netpol.lib.errors import NetpolError
from netpol.model.ids import SERVICES, ChainName, ObjectKey, Protocol
from netpol.model.ipvs import IpvsOp, RealServer, ServerId
from netpol.model.net import FAMILIES, parse_address, parse_prefix
from netpol.model.ruleset import Drop, Hook, Rule, Ruleset, SetMatch, Side
from proxy import names
from proxy.apply import Drivers
from proxy.ledger_file import LedgerFile
from proxy.rows import Action, Backend, Kind, ServicePlan, ServiceRow
from proxy.status import SyncOptions
from proxy.sync import ProxyRoom
from proxy.work import Static

GRACE_S = 60.0
#: Another field than the agent's own, whose lowest bit is not the mark's.
MASK = 0x000F_FF00


class KilledError(BaseException):
    """kill -9."""


class Fuse:
    """Counts what is done to the kernel; before a chosen deed it kills, or fails once."""

    def __init__(self) -> None:
        self.burnt = 0
        self.at: int | None = None
        self.error: NetpolError | None = None
        self.watch: Callable[[], None] = lambda: None

    def burn(self) -> None:
        self.watch()
        if self.at is not None and self.burnt >= self.at:
            if self.error is not None:
                self.at = None
                raise self.error
            raise KilledError
        self.burnt += 1


class MortalIpvs(FakeIpvs):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse
        self.veto: Callable[[IpvsOp], int] = lambda _: 0

    def dump(self) -> Any:
        self.fuse.burn()
        return super().dump()

    def read(self, ids: Sequence[ServerId]) -> Any:
        self.fuse.burn()
        return super().read(ids)

    def _apply_one(self, op: IpvsOp) -> int:
        self.fuse.burn()
        return self.veto(op) or super()._apply_one(op)


class MortalVips(FakeVips):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def apply(self, *, add: Sequence[bytes], remove: Sequence[bytes], **more: Any) -> Any:
        refused: list[tuple[bytes, int]] = []
        for address in add:
            self.fuse.burn()
            refused += super().apply(add=[address], remove=[], **more)
        for address in remove:
            self.fuse.burn()
            super().apply(add=[], remove=[address], **more)
        return tuple(refused)

    def remove_link(self) -> None:
        self.fuse.burn()
        super().remove_link()


class MortalSets(FakeSets):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__(SERVICES)
        self.fuse = fuse

    def _apply_one(self, op: SetOp) -> None:
        self.fuse.burn()
        super()._apply_one(op)


class MortalTables(FakeTables):
    def __init__(self, fuse: Fuse, sets: FakeSets) -> None:
        super().__init__(sets=sets, owner=SERVICES)
        self.fuse = fuse

    def apply(self, tx: TableTransaction) -> None:
        self.fuse.burn()
        super().apply(tx)


class FakeNode:
    """The kernel, the run folder and the clock of a node."""

    def __init__(self, run_dir: Path) -> None:
        self.fuse = Fuse()
        self.ipvs, self.vips = MortalIpvs(self.fuse), MortalVips(self.fuse)
        self.sets = MortalSets(self.fuse)
        self.tables = MortalTables(self.fuse, self.sets)
        self.flows = FakeFlows()
        self.clock = ManualClock()
        self.path = run_dir / "ipvs.ledger"
        self.told = 0
        self.rooms: list[ProxyRoom] = []

    def room(self, **options: Any) -> ProxyRoom:
        """A room that begins from what there is; the one before it is dead."""
        self.close()
        room = ProxyRoom(
            Drivers(self.ipvs, self.vips, self.sets, self.tables, self.flows, eyes=self.ipvs),
            ledger=LedgerFile(self.path),
            static=static,
            options=SyncOptions(mark_mask=MASK, drain_s=GRACE_S, **options),
            clock=self.clock,
            applied=self._tell,
        )
        room.start()
        self.rooms.append(room)
        return room

    def close(self) -> None:
        """Close what rooms left open."""
        while self.rooms:
            self.rooms.pop().close()

    def _tell(self) -> None:
        self.told += 1

    def reals(self, id_: ServerId) -> dict[RealServer, int]:
        """Real servers of a virtual server, with their weights."""
        return {real: s.config.weight for real, s in self.ipvs.state[id_].reals.items()}


def static() -> Static:
    """Some rules that need the sets, in place of the real ones."""
    chain = ChainName("KNP-SVC-IN")
    rulesets = {
        ("filter", f): Ruleset(
            {chain: (Rule(Drop(), (SetMatch(names.DROP[f].name, (Side.DST, Side.DST)),)),)},
            {Hook.INPUT: chain},
        )
        for f in FAMILIES
    }
    pods = {names.POD[FAMILIES[0]].name: {parse_prefix("10.0.1.0/24"): None}}
    return Static(rulesets, pods)


async def run(room: ProxyRoom, plans: Mapping[ObjectKey, ServicePlan | None] | None = None) -> None:
    """One run of the room, as its runner does it."""
    room.changed(plans or {})
    with contextlib.suppress(NetpolError):
        try:
            await room._run()
        except NetpolError as e:
            room._failed(e)
            raise


async def serve(room: ProxyRoom) -> None:
    """What of the housekeeping is due, but for looks."""
    now_s = room._clock.monotonic()
    if room._due.retry_at_s <= now_s:
        await room._retry()
    if room._due.drain_at_s <= now_s:
        await room._drain()


@contextlib.contextmanager
def fake_node() -> Iterator[FakeNode]:
    with tempfile.TemporaryDirectory() as folder:
        node = FakeNode(Path(folder))
        try:
            yield node
        finally:
            node.close()


# -- plans --------------------------------------------------------------------------------------


def backends(*texts: str, port: int = 8080) -> tuple[Backend, ...]:
    return tuple(Backend(parse_address(t), port) for t in texts)


def row(
    service: str,
    address: str,
    port: int = 80,
    *to: str,
    protocol: Protocol = Protocol.TCP,
    kind: Kind = Kind.CLUSTER_IP,
    **more: Any,
) -> ServiceRow:
    """A row of the Service ns/NAME; `to` are backends for everybody."""
    there = backends(*to)
    more.setdefault("backends", there)
    more.setdefault("local_client_backends", there)
    if not more["backends"]:
        more.setdefault("action", Action.REJECT)
    return ServiceRow(
        ObjectKey("ns", service), "", kind, parse_address(address), port, protocol, **more
    )


def plan(*rows: ServiceRow) -> dict[ObjectKey, ServicePlan | None]:
    """The plans of the rows' Services."""
    services = {r.service for r in rows}
    return {s: ServicePlan(s, rows=tuple(r for r in rows if r.service == s)) for s in services}


def id_of(address: str, port: int = 80, protocol: Protocol = Protocol.TCP) -> ServerId:
    packed = parse_address(address)
    return ServerId(FAMILIES[len(packed) == 16], protocol, packed, port)


def real(address: str, port: int = 8080) -> RealServer:
    return RealServer(parse_address(address), port)
