"""The proxy's room under random plans: changes end where a fresh start ends, also killed on the way."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from netpol.lib.errors import KernelError
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.ipvs import ForwardMethod, RealConfig, RealServer, ServerId, VirtualServer
from netpol.model.net import FAMILIES, Prefix, family_of, parse_address, parse_prefix
from netpol.model.ruleset import AddressPort, AddressPortNet
from proxy import names
from proxy.ledger import Ledger, parse, text
from proxy.marks import MarkKey
from proxy.rows import Action, Backend, Kind, RowKey, ServicePlan, ServiceRow
from proxy.sync import ProxyRoom
from tests.proxynode import GRACE_S, FakeNode, KilledError, fake_node, run, serve

Plans = dict[ObjectKey, ServicePlan | None]

SHARED = parse_address("192.0.2.1")  # an external address that several Services have
NODES = (parse_address("172.18.0.2"), parse_address("fd00:18::2"))
LOCAL, REMOTE = ("10.0.1.1", "10.0.1.2"), ("10.0.2.1", "10.0.2.2")
RANGES = tuple(parse_prefix(t) for t in ("198.51.100.0/24", "203.0.113.0/24", "0.0.0.0/0"))

#: Somebody else's servers: one where nobody plans, one at a node port of ours, one at the shared address,
#: one by a mark of our field.
FOREIGN_SCHEDULER = "wlc"
FOREIGN = {
    ServerId(FAMILIES[0], Protocol.TCP, parse_address("192.0.2.99"), 80),
    ServerId(FAMILIES[0], Protocol.TCP, NODES[0], 30001),
    ServerId(FAMILIES[0], Protocol.TCP, SHARED, 82),
    ServerId.by_mark(FAMILIES[0], 0x100),
}


@st.composite
def plans(draw: Any, number: int) -> ServicePlan | None:
    """One Service, or none."""
    if draw(st.integers(0, 5)) == 0:
        return None
    service = ObjectKey("ns", f"s{number}")
    protocol = (Protocol.TCP, Protocol.TCP, Protocol.UDP)[number % 3]
    v6 = number == 3
    pool = [f"fd00:0:{t.split('.')[2]}::{t[-1]}" if v6 else t for t in LOCAL + REMOTE]
    chosen = draw(st.lists(st.sampled_from(pool), unique=True))
    weights = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    cluster = tuple(
        Backend(parse_address(t), 8080, w) for t, w in zip(sorted(chosen), weights, strict=False)
    )
    local = tuple(b for b in cluster if b.address in {parse_address(t) for t in pool[:2]})
    policy_local = draw(st.booleans())
    external = local if policy_local else cluster
    common: dict[str, Any] = {
        "scheduler": draw(st.sampled_from(("rr", "mh"))),
        "affinity_s": draw(st.sampled_from((0, 60))),
        "tunnel": False,
    }

    def made(kind: Kind, address: bytes, port: int, **more: Any) -> ServiceRow:
        to = cluster if kind is Kind.CLUSTER_IP else external
        action = Action.FORWARD if any(b.weight for b in to) else Action.REJECT
        if action is Action.REJECT and any(b.weight for b in cluster):
            action = Action.DROP
        return ServiceRow(
            service,
            "",
            kind,
            address,
            port,
            protocol,
            backends=to,
            local_client_backends=cluster,
            action=action,
            **{**common, **more},
        )

    vip = parse_address(f"fd00:96::{number + 1}" if v6 else f"10.96.0.{number + 1}")
    rows = [made(Kind.CLUSTER_IP, vip, 80)]
    if draw(st.booleans()):
        rows.append(made(Kind.NODE_PORT, NODES[v6], 30000 + number))
    if not v6 and draw(st.booleans()):
        ranges = tuple(draw(st.sets(st.sampled_from(RANGES), max_size=2)))
        rows.append(made(Kind.LOAD_BALANCER, SHARED, 81 + number, source_ranges=ranges))
    return ServicePlan(service, rows=tuple(rows), policy_local=policy_local)


def deltas(*, steps: int) -> st.SearchStrategy[list[Plans]]:
    one = st.integers(0, 3).flatmap(lambda n: plans(n).map(lambda p: (ObjectKey("ns", f"s{n}"), p)))
    return st.lists(st.lists(one, min_size=1, max_size=3).map(dict), min_size=1, max_size=steps)


# -- what the kernel has ------------------------------------------------------------------------


def put_foreign(node: FakeNode) -> None:
    for id_ in FOREIGN:
        node.ipvs.put(
            VirtualServer(id_, FOREIGN_SCHEDULER, 0, 7),
            {RealServer(parse_address("10.9.9.9"), 9): RealConfig(3, ForwardMethod.ROUTE)},
        )


def foreign_state(node: FakeNode) -> str:
    found = (node.ipvs.state.get(id_) for id_ in sorted(FOREIGN, key=str))
    return repr([f for f in found if f is not None and f.server.scheduler == FOREIGN_SCHEDULER])


def state(node: FakeNode) -> dict[str, Any]:
    """The kernel as a value in which marks are told by who has them."""
    ledger = parse(node.path.read_bytes())
    owner = {id_.fwmark: repr(key) for id_, key in ledger.ours.items() if key is not None}
    servers = {
        (owner.get(id_.fwmark, id_.fwmark) if id_.fwmark else str(id_)): (
            found.server.scheduler,
            found.server.flags,
            found.server.persistence_s,
            {real: s.config for real, s in found.reals.items()},
        )
        for id_, found in node.ipvs.state.items()
    }
    members = {
        name: {m: owner.get(v, v) if v else v for m, v in found.members.items()}
        for name, found in node.sets.state.items()
    }
    return {
        "servers": servers,
        "vips": set(node.vips.state or ()),
        "members": members,
        "tables": repr(sorted(node.tables.state.items(), key=repr)),
    }


# -- what may pass ------------------------------------------------------------------------------

Pair = tuple[Prefix | None, RealServer]


def pairs_of(rows: Iterable[ServiceRow]) -> dict[RowKey, set[Pair]]:
    """Who may reach which backend: sources (None is everybody) and backends, by row."""
    return {
        row.key: {
            (source, RealServer(b.address, b.port))
            for source in (row.source_ranges or (None,))
            for b in row.backends
            if b.weight and row.action is not Action.DROP
        }
        for row in rows
    }


@dataclass
class Guard:
    """Looks at the kernel before each deed: what may pass was allowed before, or is allowed after."""

    node: FakeNode
    allowed: dict[RowKey, set[Pair]] = field(default_factory=dict)
    backends_too: bool = True
    looks: int = 0

    def begin(self, before: Plans, delta: Plans) -> None:
        """Between one state and the next, what either allows is allowed."""
        self.allowed = {}
        for plan in (*before.values(), *delta.values()):
            for key, pairs in pairs_of(() if plan is None else plan.rows).items():
                self.allowed.setdefault(key, set()).update(pairs)

    def look(self) -> None:
        self.looks += 1
        for vip in self.node.vips.state or ():
            family = family_of(vip)
            assert vip in self.node.sets.state[names.VIP[family].name].members
        for family in FAMILIES:
            ports = self.node.sets.state.get(names.PORT[family].name)
            for member in ports.members if ports else ():
                assert isinstance(member, AddressPort)
                if member.address not in (self.node.vips.state or ()):
                    continue
                id_ = ServerId(family, member.protocol, member.address, member.port)
                assert id_ in self.node.ipvs.state, f"{id_}: the node's own port is reached"
        for id_, found in self.node.ipvs.state.items() if self.backends_too else ():
            if id_.protocol is None or found.server.scheduler == FOREIGN_SCHEDULER:
                continue
            open_pairs = {
                (source, real)
                for source in self._sources(id_)
                for real, s in found.reals.items()
                if s.config.weight
            }
            key = RowKey(id_.address, id_.protocol, id_.port)
            allowed = self.allowed.get(key, set())
            for source, real in open_pairs:
                if (None, real) not in allowed and (source, real) not in allowed:
                    raise AssertionError(f"{id_}: {source} reaches {real}")

    def _sources(self, id_: ServerId) -> Iterable[Prefix | None]:
        assert id_.protocol is not None
        member = AddressPort(id_.address, id_.protocol, id_.port)

        def has(pair: Any) -> bool:
            found = self.node.sets.state.get(pair[id_.family].name)
            return found is not None and member in found.members

        if has(names.DROP):
            return ()
        if not has(names.LB):
            return (None,)
        sources: set[Prefix | None] = set()
        for m in self.node.sets.state[names.SRC[id_.family].name].members:
            assert isinstance(m, AddressPortNet)
            if m[:3] == member:
                sources.add(m.net if m.net.length > 1 else RANGES[2])
        return sources


def everything(history: Iterable[Plans]) -> Plans:
    merged: Plans = {}
    for delta in history:
        merged.update(delta)
    return merged


async def settle(node: FakeNode, room: ProxyRoom) -> None:
    """Let all that drains end."""
    await node.clock.advance(GRACE_S + 1)
    room._due.drain_at_s = node.clock.monotonic() if room._applier.drains.ids else float("inf")
    room._due.retry_at_s = float("inf")
    await serve(room)


async def fresh(history: Iterable[Plans], *, foreign: bool) -> dict[str, Any]:
    with fake_node() as node:
        if foreign:
            put_foreign(node)
        room = node.room()
        await run(room, {k: p for k, p in everything(history).items() if p is not None})
        assert not room.status.error
        return state(node)


@given(deltas(steps=5), st.booleans())
def test_changes_end_where_a_fresh_start_ends(history: list[Plans], foreign: bool):
    async def play() -> None:
        with fake_node() as node:
            guard = Guard(node)
            if foreign:
                put_foreign(node)
            before = foreign_state(node)
            room = node.room()
            node.fuse.watch = guard.look
            for at, delta in enumerate(history):
                guard.begin(everything(history[:at]), delta)
                await run(room, delta)
                assert not room.status.error
                assert foreign_state(node) == before
            await settle(node, room)
            assert state(node) == await fresh(history, foreign=foreign)
            assert guard.looks

    asyncio.run(play())


def assert_nothing_is_unknown(node: FakeNode) -> None:
    """What is ours is in the ledger, or stands on our link."""
    ledger = parse(node.path.read_bytes())
    for id_, found in node.ipvs.state.items():
        if found.server.scheduler != FOREIGN_SCHEDULER:
            assert id_ in ledger.ours or id_.address in (node.vips.state or ()), id_


async def run_until_killed(node: FakeNode, room: ProxyRoom, plans_: Plans, after: int) -> bool:
    """Whether it was killed, before so many deeds more."""
    node.fuse.at = node.fuse.burnt + after
    try:
        await run(room, plans_)
    except KilledError:
        return True
    finally:
        node.fuse.at = None
        if node.path.exists():
            assert_nothing_is_unknown(node)
    return False


@given(deltas(steps=3), st.lists(st.integers(0, 25), min_size=1, max_size=3), st.booleans())
def test_killed_anywhere_the_next_start_ends_there_too(
    history: list[Plans], kills: list[int], foreign: bool
):
    async def play() -> None:
        with fake_node() as node:
            guard = Guard(node)
            if foreign:
                put_foreign(node)
            before = foreign_state(node)
            node.fuse.watch = guard.look
            room = node.room()
            for at, delta in enumerate(history[:-1]):
                guard.begin(everything(history[:at]), delta)
                await run(room, delta)
            guard.begin(everything(history[:-1]), history[-1])
            told: Plans = history[-1]
            for after in kills:
                if not await run_until_killed(node, room, told, after):
                    break
                room = node.room()
                told = {k: p for k, p in everything(history).items() if p is not None}
            else:
                await run(room, told)
            assert not room.status.error
            assert foreign_state(node) == before
            await settle(node, room)
            assert state(node) == await fresh(history, foreign=foreign)

    asyncio.run(play())


@given(deltas(steps=3), st.lists(st.integers(0, 40), max_size=3), st.booleans())
def test_a_driver_that_fails_is_repaired_by_the_next_run(
    history: list[Plans], fails: list[int], foreign: bool
):
    async def play() -> None:
        with fake_node() as node:
            guard = Guard(node)
            if foreign:
                put_foreign(node)
            before = foreign_state(node)
            node.fuse.watch, node.fuse.error = guard.look, KernelError("no")
            room = node.room()
            for at, delta in enumerate(history):
                guard.begin(everything(history[:at]), delta)
                if at < len(fails):
                    node.fuse.at = node.fuse.burnt + fails[at]
                await run(room, delta)
                if room.status.error:
                    assert not room.in_sync
                    await run(room)
                node.fuse.at = None
                assert room.in_sync
                assert_nothing_is_unknown(node)
            assert foreign_state(node) == before
            await settle(node, room)
            assert state(node) == await fresh(history, foreign=foreign)

    asyncio.run(play())


@given(deltas(steps=3), st.sets(st.integers(0, 30), max_size=8), st.booleans())
def test_operations_that_are_refused_are_made_good_later(
    history: list[Plans], refused: set[int], foreign: bool
):
    async def play() -> None:
        with fake_node() as node:
            guard = Guard(node, backends_too=False)
            if foreign:
                put_foreign(node)
            before = foreign_state(node)
            counter = itertools.count()
            node.ipvs.veto = lambda _: errno.ENOMEM if next(counter) in refused else 0
            node.fuse.watch = guard.look
            room = node.room()
            for at, delta in enumerate(history):
                guard.begin(everything(history[:at]), delta)
                await run(room, delta)
                assert not room.status.error
                assert foreign_state(node) == before
            node.ipvs.veto = lambda _: 0
            room._due.retry_at_s = node.clock.monotonic()
            await serve(room)
            await settle(node, room)
            assert state(node) == await fresh(history, foreign=foreign)

    asyncio.run(play())


@given(st.binary(max_size=20), st.integers(0, 200), st.integers(0, 60))
def test_a_damaged_ledger_is_read_or_refused_and_nothing_else(junk: bytes, at: int, cut: int):
    owner = MarkKey(ObjectKey("ns", "web"), "http", FAMILIES[1])
    ours: dict[ServerId, MarkKey | None] = {id_: None for id_ in FOREIGN if not id_.fwmark}
    ours[ServerId.by_mark(FAMILIES[1], 0x100)] = owner
    whole = text(Ledger(ours, {ServerId(FAMILIES[0], Protocol.UDP, SHARED, 53)}))
    damaged = whole[:at] + junk + whole[at + cut :]
    try:
        ledger = parse(damaged)
    except ValueError:
        return
    assert parse(text(ledger)) == ledger
