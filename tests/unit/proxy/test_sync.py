"""The proxy's room on a node of fakes: costs, conflicts, refusals, drift, drains, restarts."""

from __future__ import annotations

import asyncio
import errno
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from netpol.kernel.drivers import FlowMatch, SetError
from netpol.kernel.ipvs import Forward
from netpol.kernel.ipvs import RealServer as ServedReal
from netpol.kernel.testing_ipvs import FakeFlow
from netpol.lib.errors import KernelError
from netpol.model.ids import ObjectKey, Protocol, SetName
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    DeleteReal,
    ForwardMethod,
    IpvsOp,
    RealConfig,
    ServerId,
    SetReal,
    VirtualServer,
)
from netpol.model.net import Family, parse_address
from netpol.model.ruleset import AddressPort
from proxy import names
from proxy.apply import ServedChange
from proxy.ledger import parse
from proxy.look import Touched
from proxy.rows import Kind
from proxy.sync import ProxyRoom
from tests.proxynode import (
    GRACE_S,
    FakeNode,
    backends,
    fake_node,
    id_of,
    plan,
    real,
    row,
    run,
    serve,
)

WEB, DNS = ObjectKey("ns", "web"), ObjectKey("ns", "dns")
WEB_ID, DNS_ID = id_of("10.96.0.1"), id_of("10.96.0.2", 53, Protocol.UDP)
POD1, POD2 = "10.0.1.1", "10.0.1.2"
NODE_PORT = id_of("172.18.0.2", 30080)


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with fake_node() as made:
        yield made


def web(*to: str) -> dict:
    return plan(row("web", "10.96.0.1", 80, *to))


def dns(*to: str) -> dict:
    return plan(row("dns", "10.96.0.2", 53, *to, protocol=Protocol.UDP))


def web_node_port(*to: str) -> dict:
    return plan(row("web", "172.18.0.2", 30080, *to, kind=Kind.NODE_PORT))


def foreign(node: FakeNode, id_: ServerId) -> VirtualServer:
    server = VirtualServer(id_, "wlc")
    node.ipvs.put(server, {real("10.9.9.9"): RealConfig(5, ForwardMethod.ROUTE)})
    return server


async def ops_of(node: FakeNode, room: ProxyRoom, plans: dict) -> list[IpvsOp]:
    """What one change does in IPVS; nothing is dumped for it."""
    begin, dumps = len(node.ipvs.applied), (node.ipvs.calls["dump"], node.sets.calls["dump"])
    await run(room, plans)
    assert (node.ipvs.calls["dump"], node.sets.calls["dump"]) == dumps
    return node.ipvs.applied[begin:]


# -- costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("services", [1, 300])
async def test_an_endpoint_costs_one_operation_however_many_services(node: FakeNode, services: int):
    room = node.room()
    others = [row(f"s{n}", f"10.97.{n // 250}.{n % 250}", 80, POD1) for n in range(services)]
    await run(room, plan(*others) | web(POD1))
    reads, applies = node.ipvs.calls["read"], node.sets.calls["apply"]
    assert await ops_of(node, room, web(POD1, POD2)) == [AddReal(WEB_ID, real(POD2), RealConfig())]
    assert await ops_of(node, room, web(POD2)) == [SetReal(WEB_ID, real(POD1), RealConfig(0))]
    assert await ops_of(node, room, web(POD1, POD2)) == [SetReal(WEB_ID, real(POD1), RealConfig())]
    assert await ops_of(node, room, web(POD1, POD2)) == []
    assert (node.ipvs.calls["read"], node.sets.calls["apply"]) == (reads, applies)


async def test_a_new_service_reads_its_own_servers_alone(node: FakeNode):
    room = node.room()
    await run(room, web(POD1))
    ops = await ops_of(node, room, dns(POD1))
    assert ops == [AddServer(VirtualServer(DNS_ID)), AddReal(DNS_ID, real(POD1), RealConfig())]
    assert node.ipvs.calls["read"] == 1


async def test_nothing_is_touched_before_the_start(node: FakeNode):
    room = node.room()
    room._started = False
    await run(room, web(POD1))
    assert node.fuse.burnt == 0
    assert not node.path.exists()
    assert not room.ready
    room.start()
    await run(room)
    assert WEB_ID in node.ipvs.state
    assert room.ready
    assert room.in_sync
    assert node.told == 1


# -- what is told of it -------------------------------------------------------------------------


async def test_whoever_judges_is_told_what_is_served_otherwise_and_no_more(node: FakeNode):
    room = node.room()
    said: list[ServedChange | None] = []
    room._tell_served = said.append
    await run(room, web(POD1) | dns(POD1))
    assert said.pop() is None  # at the start it looks for itself

    def backends_told(*addresses: str) -> frozenset[ServedReal]:
        return frozenset(ServedReal(parse_address(a), Forward.NAT) for a in addresses)

    service = AddressPort(WEB_ID.address, Protocol.TCP, 80)
    await run(room, web(POD1, POD2))
    assert said.pop() == {service: backends_told(POD1, POD2)}
    await run(room, web(POD2))
    assert said.pop() == {service: backends_told(POD1, POD2)}  # one drains
    await node.clock.advance(2)
    await serve(room)
    assert said.pop() == {service: backends_told(POD2)}
    await run(room, {WEB: None})
    assert said.pop() == {service: None}
    node.ipvs.refuse[AddReal(WEB_ID, real(POD1), RealConfig())] = errno.ENOMEM
    await run(room, web(POD1))
    assert said == [None]


# -- drains -------------------------------------------------------------------------------------


async def test_tcp_drains_until_it_is_idle(node: FakeNode):
    room = node.room()
    await run(room, web(POD1, POD2))
    node.ipvs.connect(WEB_ID, real(POD1), active=1)
    await run(room, web(POD2))
    assert node.reals(WEB_ID) == {real(POD1): 0, real(POD2): 1}
    assert room.status.draining == 1
    live = await room.live(WEB)
    assert live is not None
    assert live.wanted == (WEB_ID,)
    assert live.states[WEB_ID].reals[real(POD1)].active == 1
    assert live.draining == {WEB_ID: {real(POD1): 0.0}}
    await node.clock.advance(2)
    await serve(room)
    assert real(POD1) in node.reals(WEB_ID)
    node.ipvs.connect(WEB_ID, real(POD1))
    await node.clock.advance(2)
    await serve(room)
    assert node.reals(WEB_ID) == {real(POD2): 1}
    assert room.status.draining == 0


async def test_a_grace_period_ends(node: FakeNode):
    room = node.room()
    await run(room, web(POD1))
    node.ipvs.connect(WEB_ID, real(POD1), active=1)
    await run(room, web())
    await node.clock.advance(GRACE_S + 1)
    await serve(room)
    assert node.reals(WEB_ID) == {}


async def test_one_that_came_back_in_a_run_that_failed_does_not_drain(node: FakeNode):
    room = node.room()
    await run(room, web(POD1, POD2))
    await run(room, web(POD2))
    # The weight is set, and then the run fails.
    node.fuse.at, node.fuse.error = node.fuse.burnt + 1, KernelError("no")
    await run(room, web(POD1))
    assert node.reals(WEB_ID) == {real(POD1): 1, real(POD2): 1}
    await run(room)
    await node.clock.advance(GRACE_S + 1)
    await serve(room)
    assert node.reals(WEB_ID) == {real(POD1): 1}


async def test_udp_goes_at_once_with_its_flows(node: FakeNode):
    room = node.room()
    await run(room, dns(POD1, POD2) | web(POD1))
    vip = parse_address("10.96.0.2")
    stale = FakeFlow(Protocol.UDP, vip, 53, parse_address(POD1), 8080)
    node.flows.state = [stale, stale._replace(backend=parse_address(POD2))]
    assert await ops_of(node, room, dns(POD2)) == [DeleteReal(DNS_ID, real(POD1))]
    assert node.flows.ended == [FlowMatch(Protocol.UDP, parse_address(POD1), 8080, vip, 53)]
    assert [flow.backend for flow in node.flows.state] == [parse_address(POD2)]
    await run(room, {WEB: None})
    assert len(node.flows.ended) == 1
    await run(room, {DNS: None})
    assert node.flows.state == []


async def test_a_deleted_service_takes_all_of_it_at_once(node: FakeNode):
    room = node.room()
    await run(room, web(POD1, POD2))
    node.ipvs.connect(WEB_ID, real(POD1), active=5)
    await run(room, web(POD2))
    await run(room, {WEB: None})
    assert node.ipvs.state == {}
    assert not node.vips.state
    assert not any(s.members for n, s in node.sets.state.items() if "POD" not in n)
    assert room.status.draining == 0
    assert await room.live(WEB) is None


async def test_an_address_that_two_services_have_goes_with_the_second(node: FakeNode):
    room = node.room()
    shared = {"kind": Kind.EXTERNAL_IP}
    both = plan(
        row("web", "192.0.2.1", 80, POD1, **shared), row("mail", "192.0.2.1", 25, POD1, **shared)
    )
    await run(room, both)
    vip = parse_address("192.0.2.1")
    await run(room, {WEB: None})
    assert set(node.vips.state or ()) == {vip}
    assert set(node.sets.state[names.VIP[Family.V4].name].members) == {vip}
    await run(room, {ObjectKey("ns", "mail"): None})
    assert not node.vips.state
    assert not node.sets.state[names.VIP[Family.V4].name].members


# -- restarts -----------------------------------------------------------------------------------


async def test_a_restart_changes_nothing_that_is_right_and_goes_on_draining(node: FakeNode):
    await run(node.room(), web(POD1, POD2) | dns(POD1))
    node.ipvs.connect(WEB_ID, real(POD1), active=1)
    await run(node.rooms[-1], web(POD2))
    begin = len(node.ipvs.applied)
    room = node.room()
    await run(room, web(POD2) | dns(POD1))
    assert node.ipvs.applied[begin:] == []
    assert room.status.repaired == ""
    assert room.status.draining == 1
    node.ipvs.connect(WEB_ID, real(POD1))
    await node.clock.advance(2)
    await serve(room)
    assert node.reals(WEB_ID) == {real(POD2): 1}


async def test_what_nobody_wants_after_a_restart_goes(node: FakeNode):
    await run(node.room(), web(POD1) | dns(POD1) | plan(row("old", "172.18.0.2", 30081, POD1)))
    room = node.room()
    await run(room, dns(POD1, POD2))
    assert set(node.ipvs.state) == {DNS_ID}
    assert set(node.vips.state or ()) == {parse_address("10.96.0.2")}
    assert set(parse(node.path.read_bytes()).ours) == {DNS_ID}


async def test_marks_stay_with_their_services_over_a_restart(node: FakeNode):
    local = [
        row(n, f"192.0.2.{at}", 80, local_client_backends=backends(POD1))
        for at, n in enumerate(("b", "c", "a"), 1)
    ]
    await run(node.room(), plan(*local))
    begin = len(node.ipvs.applied)
    await run(node.room(), plan(*reversed(local)))
    assert node.ipvs.applied[begin:] == []
    await run(node.rooms[-1], {ObjectKey("ns", "c"): None})
    await run(node.rooms[-1], plan(row("d", "192.0.2.9", 80, local_client_backends=backends(POD1))))
    marks = {i.fwmark for i in node.ipvs.state if i.fwmark}
    assert marks == {0x100, 0x200, 0x300}


async def test_a_ledger_that_cannot_be_read_leaves_what_is_not_on_our_link(node: FakeNode):
    await run(node.room(), plan(*(web(POD1)[WEB].rows + web_node_port(POD1)[WEB].rows)))
    node.path.write_bytes(b"nonsense\n")
    room = node.room()
    await run(room, {})
    assert set(node.ipvs.state) == {NODE_PORT}
    assert room.status.foreign == (NODE_PORT,)
    assert "only servers on our own link count as ours" in room.status.faults[0]
    await run(room, web_node_port(POD1))
    assert "somebody else" in room.errors[WEB][0]


# -- whose it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["seen at start", "came later"])
async def test_a_conflict_is_an_error_of_that_service_alone(node: FakeNode, first: str):
    room = node.room()
    if first == "came later":
        await run(room)
    server = foreign(node, NODE_PORT)
    await run(room, web_node_port(POD1) | dns(POD1))
    assert node.ipvs.state[NODE_PORT].server is server
    assert node.reals(NODE_PORT) == {real("10.9.9.9"): 5}
    assert node.reals(DNS_ID) == {real(POD1): 1}
    assert list(room.errors) == [WEB]
    assert not room.ready
    assert room.in_sync
    # Changes of the Service and its end do not touch it either.
    await run(room, web_node_port(POD2))
    await node.clock.advance(60)
    await serve(room)
    assert node.ipvs.state[NODE_PORT].server is server
    # It goes, and the Service has its server at the next try.
    del node.ipvs.state[NODE_PORT]
    await node.clock.advance(60)
    await serve(room)
    assert node.reals(NODE_PORT) == {real(POD2): 1}
    assert room.ready
    assert node.sets.state[names.PORT[Family.V4].name].members.keys() == {
        AddressPort(parse_address("10.96.0.2"), Protocol.UDP, 53),
        AddressPort(parse_address("172.18.0.2"), Protocol.TCP, 30080),
    }


async def test_a_server_that_comes_between_look_and_deed_is_not_taken_over(node: FakeNode):
    room = node.room()
    await run(room)
    read = node.ipvs.read

    def race(ids):
        found = read(ids)
        if NODE_PORT not in node.ipvs.state:
            foreign(node, NODE_PORT)
        return found

    node.ipvs.read = race  # type: ignore[method-assign]
    await run(room, web_node_port(POD1))
    assert node.reals(NODE_PORT) == {real("10.9.9.9"): 5}
    assert list(room.errors) == [WEB]
    ledger = parse(node.path.read_bytes())
    assert (set(ledger.ours), ledger.foreign) == (set(), {NODE_PORT})


async def test_somebody_elses_server_at_an_address_that_we_take_on_stays_his(node: FakeNode):
    theirs = id_of("192.0.2.1", 443)
    server = foreign(node, theirs)
    room = node.room()
    await run(room, plan(row("web", "192.0.2.1", 80, POD1, kind=Kind.EXTERNAL_IP)))
    room.resync()
    await run(room)
    await run(node.room(), {})
    assert node.ipvs.state[theirs].server is server
    assert set(node.ipvs.state) == {theirs}


async def test_a_mark_that_somebody_has_is_not_given(node: FakeNode):
    foreign(node, ServerId.by_mark(Family.V4, 0x100))
    room = node.room()
    await run(room, plan(row("web", "192.0.2.1", 80, local_client_backends=backends(POD1))))
    assert not room.errors
    assert {i.fwmark for i in node.ipvs.state if i.fwmark} == {0x100, 0x200}


# -- refusals -----------------------------------------------------------------------------------


async def test_what_the_kernel_refuses_of_a_service_stops_no_other_one(node: FakeNode):
    node.ipvs.schedulers.discard("mh")
    room = node.room()
    await run(room, plan(row("web", "10.96.0.1", 80, POD1, scheduler="mh")) | dns(POD1))
    assert "the kernel has no scheduler mh (module ip_vs_mh)" in room.errors[WEB][0]
    assert list(room.errors) == [WEB]
    assert node.reals(DNS_ID) == {real(POD1): 1}
    # Its address may be there, its port not: it would be the node's own.
    port = AddressPort(parse_address("10.96.0.1"), Protocol.TCP, 80)
    assert port not in node.sets.state[names.PORT[Family.V4].name].members
    await run(room, plan(row("web", "10.96.0.1", 80, POD2, scheduler="mh")))
    assert port not in node.sets.state[names.PORT[Family.V4].name].members
    node.ipvs.schedulers.add("mh")
    await node.clock.advance(60)
    await serve(room)
    assert node.reals(WEB_ID) == {real(POD2): 1}
    assert port in node.sets.state[names.PORT[Family.V4].name].members
    assert room.ready


async def test_a_refused_backend_is_read_back_and_tried_again(node: FakeNode):
    op = AddReal(WEB_ID, real(POD2), RealConfig())
    node.ipvs.refuse[op] = errno.ENOMEM
    room = node.room()
    await run(room, web(POD1, POD2))
    assert node.reals(WEB_ID) == {real(POD1): 1}
    assert "adding backend 10.0.1.2 port 8080" in room.errors[WEB][0]
    node.ipvs.refuse.clear()
    await node.clock.advance(60)
    await serve(room)
    assert node.reals(WEB_ID) == {real(POD1): 1, real(POD2): 1}
    assert room.ready


async def test_a_refused_address_is_tried_again(node: FakeNode):
    vip = parse_address("10.96.0.1")
    node.vips.refuse[vip] = errno.ENOMEM
    room = node.room()
    await run(room, web(POD1) | dns(POD1))
    assert "10.96.0.1: adding it" in room.errors[WEB][0]
    assert parse_address("10.96.0.2") in (node.vips.state or ())
    node.vips.refuse.clear()
    await node.clock.advance(60)
    await serve(room)
    assert vip in (node.vips.state or ())
    assert room.ready


async def test_a_full_mark_field_is_an_error_until_there_is_room(node: FakeNode):
    room = node.room()
    room._marks.ban(range(0x200, 0x100000, 0x100))
    local = {
        n: plan(row(n, f"192.0.2.{at}", 80, local_client_backends=backends(POD1)))
        for at, n in enumerate("ab", 1)
    }
    await run(room, local["a"] | local["b"])
    assert list(room.errors) == [ObjectKey("ns", "b")]
    await run(room, {ObjectKey("ns", "a"): None})
    await run(room, web(POD1))
    assert not room.errors
    assert {i.fwmark for i in node.ipvs.state} == {0, 0x100}


async def test_a_failure_of_the_run_is_repaired_by_a_look_at_everything(node: FakeNode):
    room = node.room()
    await run(room, web(POD1))
    name = names.VIP[Family.V4].name
    node.sets.failures.plan(SetError("no", name=SetName(name), code=errno.ENOMEM))
    await run(room, dns(POD1))
    assert room.status.error
    assert not room.ready
    assert not room.in_sync
    assert DNS_ID not in node.ipvs.state
    await run(room)
    assert room.ready
    assert room.in_sync
    assert node.reals(DNS_ID) == {real(POD1): 1}
    assert room.status.failures == 1


# -- drift --------------------------------------------------------------------------------------


def delete_server(node: FakeNode) -> None:
    del node.ipvs.state[WEB_ID]


def add_server(node: FakeNode) -> None:
    node.ipvs.put(VirtualServer(id_of("10.96.0.1", 81)), {})


def change_weight(node: FakeNode) -> None:
    node.ipvs.put(VirtualServer(WEB_ID), {real(POD1): RealConfig(0)})


def delete_address(node: FakeNode) -> None:
    node.vips.state = None


def lose_route(node: FakeNode) -> None:
    assert node.vips.state is not None
    node.vips.state[parse_address("10.96.0.1")] = None


def delete_member(node: FakeNode) -> None:
    node.sets.state[names.PORT[Family.V4].name].members.clear()


def delete_set(node: FakeNode) -> None:
    del node.sets.state[names.VIP[Family.V6].name]


def flush_tables(node: FakeNode) -> None:
    node.tables.state.clear()


@pytest.mark.parametrize(
    "harm",
    [
        delete_server,
        add_server,
        change_weight,
        delete_address,
        lose_route,
        delete_member,
        delete_set,
        flush_tables,
    ],
)
async def test_drift_is_found_and_repaired(node: FakeNode, harm: Callable[[FakeNode], None]):
    room = node.room()
    await run(room, web(POD1))
    await room._look()
    assert room.status.drifts == 0
    before = (repr(node.ipvs.state), repr(node.vips.state), repr(node.sets.state))
    harm(node)
    await room._look()
    assert room.status.drifts == 1
    await run(room)
    assert room.status.repaired
    assert (repr(node.ipvs.state), repr(node.vips.state)) == before[:2]
    assert {n: s.members for n, s in node.sets.state.items()}.keys() == names.SPECS.keys()
    await room._look()
    assert room.status.drifts == 1


async def test_what_others_have_is_no_drift(node: FakeNode):
    room = node.room()
    foreign(node, id_of("192.0.2.99"))
    await run(room, web(POD1))
    foreign(node, id_of("192.0.2.98"))
    await room._look()
    assert room.status.drifts == 0


async def test_a_look_that_is_overtaken_has_no_answer(node: FakeNode):
    room = node.room()
    await run(room, web(POD1))
    delete_server(node)
    assert await room._eyes.drift(room._static(), touched=Touched(), still=lambda: False) is None


async def test_a_look_goes_on_while_services_change(node: FakeNode):
    """What changed since it began is left out; what else differs is found."""
    room = node.room()
    await run(room, web(POD1) | dns(POD1))
    dump = node.ipvs.dump

    def meanwhile() -> dict:
        found = dump()
        loop.call_soon_threadsafe(changing.set)
        changed.wait(5)
        return found

    loop, changing, changed = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    for harm in (False, True):
        changing.clear()
        changed.clear()
        node.ipvs.dump = meanwhile  # type: ignore[method-assign]
        looking = asyncio.create_task(room._look())
        await changing.wait()
        node.ipvs.dump = dump  # type: ignore[method-assign]
        await run(room, plan(row("new", "10.96.0.9", 80, POD1)) | dns(POD2))
        await run(room, {ObjectKey("ns", "new"): None})
        await run(room, dns(POD1))
        if harm:
            delete_address(node)
        changed.set()
        await looking
        assert room.status.drift == ("2 addresses differ" if harm else "")


async def test_what_is_in_trouble_is_no_drift(node: FakeNode):
    node.ipvs.schedulers.discard("mh")
    node.vips.refuse[parse_address("10.96.0.2")] = errno.ENOMEM
    room = node.room()
    await run(room, plan(row("web", "10.96.0.1", 80, POD1, scheduler="mh")) | dns(POD1))
    await room._look()
    assert room.status.drift == ""


async def test_what_is_asked_during_a_run_is_done_after_it(node: FakeNode):
    room = node.room()
    await run(room, web(POD1))
    room.resync()
    dump = node.ipvs.dump

    def asking():
        node.ipvs.dump = dump  # type: ignore[method-assign]
        room._asked = True
        return dump()

    node.ipvs.dump = asking  # type: ignore[method-assign]
    await run(room)
    assert room._dirty
    await run(room)
    assert not room._dirty


# -- by itself ----------------------------------------------------------------------------------


@pytest.fixture
async def running(node: FakeNode) -> AsyncIterator[ProxyRoom]:
    room = node.room()
    task = asyncio.create_task(room.run_forever())
    yield room
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(node: FakeNode, holds: Callable[[], bool], *, step_s: float = 0.0) -> None:
    """Let the room's threads work, and time pass, until something holds."""
    for _ in range(2000):
        if holds():
            return
        await node.clock.advance(step_s)
        await asyncio.sleep(0.0005)
    raise AssertionError("it never held")


async def test_it_drains_repairs_and_tries_again_by_itself(node: FakeNode, running: ProxyRoom):
    running.changed(web(POD1, POD2))
    await until(node, lambda: running.in_sync)
    node.ipvs.connect(WEB_ID, real(POD1), active=1)
    running.changed(web(POD2))
    await until(node, lambda: running.in_sync)
    node.ipvs.connect(WEB_ID, real(POD1))
    await until(node, lambda: node.reals(WEB_ID) == {real(POD2): 1}, step_s=0.1)
    delete_server(node)
    await until(node, lambda: WEB_ID in node.ipvs.state, step_s=0.1)
    assert running.status.drifts == 1
    node.ipvs.schedulers.discard("lc")
    running.changed(plan(row("dns", "10.96.0.2", 53, POD1, scheduler="lc")))
    await until(node, lambda: DNS in running.errors)
    tries = node.ipvs.calls["AddServer"]
    await node.clock.advance(0.6)
    await until(node, lambda: node.ipvs.calls["AddServer"] > tries)
    node.ipvs.schedulers.add("lc")
    await until(node, lambda: running.ready, step_s=0.5)


async def test_looks_come_at_growing_intervals(node: FakeNode, running: ProxyRoom):
    running.changed(web(POD1))
    await until(node, lambda: running.in_sync)
    at: list[float] = []
    for _ in range(13):
        await until(node, lambda: running._due.look_at_s > node.clock.monotonic())
        at.append(running._due.look_at_s)
        await node.clock.advance(running._due.look_at_s - node.clock.monotonic())
    gaps = [round(later - earlier, 3) for earlier, later in itertools.pairwise(at)]
    assert gaps[:4] == [0.1, 0.2, 0.4, 0.8]
    assert gaps[-2:] == [30.0, 30.0]


async def test_looks_leave_most_of_the_time_to_others_however_often_something_changes(
    node: FakeNode,
):
    room = node.room()
    await run(room, web(POD1))
    dump = node.ipvs.dump

    def slowly():
        node.clock._now += 0.4  # what a large table takes
        return dump()

    node.ipvs.dump = slowly  # type: ignore[method-assign]
    await room._look()
    end_s = node.clock.monotonic()
    await run(room, web(POD2))
    assert room._due.look_at_s >= end_s + 19
