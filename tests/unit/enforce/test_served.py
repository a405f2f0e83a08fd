"""Which services INPUT leaves to OUTPUT, and how the sets that say so follow IPVS."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.enforce.served import LOOK_EVERY_S, Choice, IpvsWatch, served_by
from netpol.enforce.worker import PolicyRoom
from netpol.kernel.drivers import AddMembers, SetTransaction
from netpol.kernel.ipvs import Forward, IpvsTable, RealServer
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.lib.errors import KernelError
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES
from netpol.model.ruleset import AddressPort
from netpol.policy.graph import Graph
from netpol.render import names, static
from netpol.render.options import RenderOptions


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def key(address: str, port: int = 80, protocol: Protocol = Protocol.TCP) -> AddressPort:
    return AddressPort(packed(address), protocol, port)


def table(services: dict[AddressPort, Iterable[str]], **more: object) -> IpvsTable:
    found = {
        s: frozenset(RealServer(packed(a), Forward.NAT) for a in reals)
        for s, reals in services.items()
    }
    return IpvsTable(found, **more)  # type: ignore[arg-type]


VIP, VIP6, LATE = key("10.96.0.10"), key("fd00:10:96::10"), key("10.96.0.11", 53, Protocol.UDP)
OWN = (packed("10.96.0.10"), packed("172.18.0.2"))


# -- the choice ---------------------------------------------------------------------------------


def test_marks_of_our_own_proxy_are_nothing_to_note() -> None:
    marked = IpvsTable({VIP: frozenset()}, fwmarks=3)
    assert served_by(marked, OWN, marks_are_ours=True).notes == ()
    assert "3, judged" in served_by(marked, OWN).notes[0]


def test_backends_elsewhere_are_let_through_also_none_at_all():
    found = served_by(
        table({VIP6: ["fd00:10:244::2"], VIP: ["10.244.1.20", "10.0.0.9"], LATE: []}), OWN
    )
    assert found.services == (VIP, LATE, VIP6)
    assert found.notes == ()


@pytest.mark.parametrize(
    "backend",
    ["172.18.0.2", "10.96.0.10", "10.96.0.11", "127.0.0.1", "169.254.20.10", "::1", "fe80::1"],
)
def test_one_backend_on_the_node_keeps_a_service_out(backend: str):
    found = served_by(table({VIP: ["10.244.1.20", backend], LATE: []}), OWN)
    assert found.services == (LATE,)
    assert len(found.notes) == 1
    assert "on this node itself: 1" in found.notes[0]


@pytest.mark.parametrize("forward", [Forward.TUNNEL, Forward.ROUTE, Forward.BYPASS])
def test_other_ways_than_nat_keep_a_service_out(forward: Forward):
    both = {RealServer(packed("10.244.1.20"), f) for f in (Forward.NAT, forward)}
    found = served_by(IpvsTable({VIP: frozenset(both)}), OWN)
    assert found.services == ()
    assert "without NAT: 1" in found.notes[0]


def test_what_no_address_and_port_tells_is_counted():
    found = served_by(table({key("10.96.0.12", 0): []}, fwmarks=2, strange=("x", "y", "z")), ())
    assert found.services == ()
    assert [n.split(",")[0] for n in found.notes] == [
        "IPVS services by packet mark: 2",
        "IPVS services for all ports of an address: 1",
        "IPVS services that cannot be read: 3",
    ]


# -- looking ------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """Answers in the order given; the last one again and again."""

    answers: list[IpvsTable | KernelError | None] = field(default_factory=lambda: [None])
    reads: int = 0

    def read(self) -> IpvsTable | None:
        self.reads += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, KernelError):
            raise answer
        return answer


def test_no_ipvs_is_told_from_one_that_serves_nothing():
    kernel = Kernel([None, IpvsTable()])
    watch = IpvsWatch(kernel.read)
    assert not watch.look()
    assert watch.served(OWN) is None
    assert watch.look()
    served = watch.served(OWN)
    assert served is not None
    assert served.services == ()


def test_counters_and_order_are_no_change():
    watch = IpvsWatch(Kernel([table({VIP: [], LATE: []}), table({LATE: [], VIP: []})]).read)
    assert watch.look()
    assert not watch.look()


def test_a_service_that_one_reading_misses_stays():
    full = table({VIP: [], LATE: []})
    kernel = Kernel([full, table({VIP: []}), full])
    watch = IpvsWatch(kernel.read)
    watch.look()
    assert not watch.look()
    assert kernel.reads == 3


def test_a_service_that_two_readings_miss_is_gone():
    kernel = Kernel([table({VIP: [], LATE: []}), table({VIP: []})])
    watch = IpvsWatch(kernel.read)
    watch.look()
    assert watch.look()
    served = watch.served(OWN)
    assert served is not None
    assert served.services == (VIP,)


def test_a_second_reading_adds_what_came_meanwhile():
    kernel = Kernel([table({VIP: []}), IpvsTable(), table({LATE: []})])
    watch = IpvsWatch(kernel.read)
    watch.look()
    watch.look()
    served = watch.served(OWN)
    assert served is not None
    assert served.services == (LATE,)


def test_what_cannot_be_read_stays_and_is_a_fault_until_it_can():
    kernel = Kernel([table({VIP: []}), KernelError("reading", got="smoke"), table({VIP: []})])
    watch = IpvsWatch(kernel.read)
    watch.look()
    assert not watch.look()
    assert any("smoke" in f for f in watch.faults())
    served = watch.served(OWN)
    assert served is not None
    assert served.services == (VIP,)
    watch.look()
    assert not any("smoke" in f for f in watch.faults())


def test_an_address_that_becomes_the_nodes_own_counts_at_once():
    watch = IpvsWatch(Kernel([table({VIP: ["10.0.0.9"]})]).read)
    watch.look()
    before, after = watch.served(OWN), watch.served((*OWN, packed("10.0.0.9")))
    assert before is not None
    assert after is not None
    assert (before.services, after.services) == ((VIP,), ())


# -- what this process changed ------------------------------------------------------------------


def told(*backends: str, forward: Forward = Forward.NAT) -> frozenset[RealServer]:
    return frozenset(RealServer(packed(a), forward) for a in backends)


def passing(watch: IpvsWatch, own: tuple[bytes, ...] = OWN) -> tuple[AddressPort, ...]:
    served = watch.served(own)
    assert served is not None
    return served.services


def test_what_is_told_is_known_without_a_look():
    kernel = Kernel([table({VIP: ["10.244.1.20"]})])
    watch = IpvsWatch(kernel.read)
    watch.look()
    assert passing(watch) == (VIP,)
    assert not watch.tell(
        {VIP: told("10.244.1.20", "10.244.1.21")}
    )  # an endpoint: nothing for INPUT
    assert watch.tell({LATE: told()})
    assert passing(watch) == (VIP, LATE)
    assert watch.tell({VIP: told("10.244.1.20", "172.18.0.2")})  # a backend on the node
    assert passing(watch) == (LATE,)
    assert watch.tell({VIP: told("10.244.1.20")})
    assert watch.tell({LATE: None})
    assert passing(watch) == (VIP,)
    assert kernel.reads == 1


def test_what_is_told_during_a_look_beats_what_the_look_saw():
    watch = IpvsWatch(Kernel([table({VIP: [], VIP6: []}), table({VIP: [], LATE: []})]).read)
    watch.look()
    watch._told = {}
    news = watch._news(watch._snapshot())
    watch.tell({VIP: None, LATE: None, VIP6: told("fd00::2")})
    watch._take(news)
    assert passing(watch) == (VIP6,)


def test_a_table_that_differs_much_is_taken_over_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("netpol.enforce.served.TAKEN_AT_ONCE", 1)
    many = {key(f"10.96.1.{n}"): ["10.244.1.20"] for n in range(9)}
    watch = IpvsWatch(Kernel([table({VIP: ["172.18.0.2"]}), table(many)]).read)
    watch.look()
    assert passing(watch) == ()
    news = watch._news(watch._snapshot())
    watch.tell({VIP6: told(), key("10.96.1.3"): told("172.18.0.2")})
    assert watch._take(news)
    assert set(passing(watch)) == {VIP6, *many} - {key("10.96.1.3")}


SERVICES = [VIP, VIP6, LATE, key("10.96.0.12", 0), key("10.96.0.11", 80)]
BACKENDS = st.frozensets(
    st.builds(
        RealServer,
        st.sampled_from(["10.244.1.20", "10.96.0.11", "172.18.0.2", "127.0.0.1"]).map(packed),
        st.sampled_from([Forward.NAT, Forward.TUNNEL]),
    ),
    max_size=2,
)
DEEDS = st.one_of(
    st.tuples(st.sampled_from(SERVICES), st.none() | BACKENDS),
    st.sampled_from([OWN, (), (packed("10.244.1.20"),)]),
)


@given(st.lists(DEEDS, max_size=12))
def test_change_by_change_it_is_what_a_full_look_says(deeds: list[tuple[object, ...]]):
    choice, now, own = Choice(IpvsTable()), IpvsTable(), ()
    for deed in deeds:
        before, version = choice.served(marks_are_ours=False).services, choice.version
        match deed:
            case (AddressPort() as service, None):
                choice.put(service, None)
                now.services.pop(service, None)
            case (AddressPort() as service, frozenset() as backends):
                choice.put(service, backends)
                now.services[service] = backends
            case _:
                own = deed
                choice.own = frozenset(own)
        found = choice.served(marks_are_ours=False)
        assert found == served_by(now, own)
        assert choice.version != version or found.services == before


# -- the sets -----------------------------------------------------------------------------------


class Node:
    """A dataplane over fakes."""

    def __init__(self, services: tuple[AddressPort, ...] | None) -> None:
        self.sets = FakeSets()
        self.tables = FakeTables(sets=self.sets)
        self.dataplane = Dataplane(Graph("n1"), RenderOptions(ipvs_services=services))
        self.reconcile()

    def reconcile(self, services: tuple[AddressPort, ...] | None = ()) -> None:
        if services != ():
            self.dataplane.options = replace(self.dataplane.options, ipvs_services=services)
        plan = self.dataplane.reconcile(dump_kernel(self.sets, self.tables))
        execute(plan, self.sets, self.tables)

    def members(self) -> set[object]:
        dumps = self.sets.dump()
        return {m for f in FAMILIES for m in dumps[names.ipvs_set(f)].members}

    def drift(self) -> str:
        return self.dataplane.drift(dump_kernel(self.sets, self.tables))

    def input_rules(self) -> list[object]:
        rule = names.hook_chain(static.HOOKS[1])
        return [self.tables.dump("mangle", f).chains[rule] for f in FAMILIES]


def test_serving_something_else_touches_members_alone():
    node = Node((VIP, VIP6))
    plan = node.dataplane.serve((VIP, LATE))
    assert not plan.touches_tables
    execute(plan, node.sets, node.tables)
    assert node.members() == {VIP, LATE}
    assert node.drift() == ""
    assert node.dataplane.serve((LATE, VIP)).steps == ()


def test_a_foreign_member_is_drift_and_goes():
    node = Node((VIP,))
    foreign = AddMembers(static.ipvs_spec(FAMILIES[0]), {LATE: None})
    node.sets.apply(SetTransaction((foreign,)))
    assert "KNP-IPVS4" in node.drift()
    node.reconcile((VIP,))
    assert node.members() == {VIP}


def test_garbage_collection_leaves_the_sets():
    node = Node((VIP,))
    node.dataplane._extra_chains = True
    execute(node.dataplane.collect(), node.sets, node.tables)
    assert node.members() == {VIP}


def test_ipvs_comes_and_goes_with_rule_and_sets():
    node = Node(None)
    without = node.input_rules()
    assert not {names.ipvs_set(f) for f in FAMILIES} & set(node.sets.dump())
    node.reconcile((VIP,))
    assert [len(r) for r in node.input_rules()] == [len(r) + 1 for r in without]  # type: ignore[arg-type]
    assert node.members() == {VIP}
    node.reconcile(None)
    assert node.input_rules() == without
    execute(node.dataplane.collect(), node.sets, node.tables)
    assert not {names.ipvs_set(f) for f in FAMILIES} & set(node.sets.dump())
    assert node.drift() == ""


# -- the room -----------------------------------------------------------------------------------


async def test_the_room_follows_ipvs_without_looking_at_everything():
    sets = FakeSets()
    tables = FakeTables(sets=sets)
    told: list[tuple[AddressPort, ...] | None] = [None]
    room = PolicyRoom(
        Graph("n1"),
        sets=sets,
        tables=tables,
        options=RenderOptions(),
        before_reconcile=lambda: RenderOptions(ipvs_services=told[0]),
    )

    async def serve(services: tuple[AddressPort, ...] | None) -> None:
        told[0] = services
        room.serve()
        await room.runner.wait_idle()

    task = asyncio.create_task(room.run_forever())
    try:
        await serve((VIP,))  # too early: nothing is written before the start
        assert sets.dump() == {}
        room.start()
        await room.runner.wait_idle()
        assert sets.dump()[names.ipvs_set(FAMILIES[0])].members == {VIP: None}
        done = (room.status.reconciles, room.status.table_transactions)
        await serve((VIP, LATE))
        assert sets.dump()[names.ipvs_set(FAMILIES[0])].members == {VIP: None, LATE: None}
        assert (room.status.reconciles, room.status.table_transactions) == done
        sets.failures.plan(KernelError("adding", got="smoke"))
        await serve((LATE,))  # refused once, then everything is compared
        assert sets.dump()[names.ipvs_set(FAMILIES[0])].members == {LATE: None}
        assert room.status.failures == 1
        await serve(None)
        assert room.status.table_transactions > done[1]
        assert not room.status.error
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        room.close()


async def test_whoever_changed_ipvs_has_it_looked_at_at_once():
    kernel = Kernel([table({VIP: []}), table({LATE: []})])
    watch = IpvsWatch(kernel.read)
    changed = asyncio.Event()
    task = asyncio.create_task(watch.watch(changed.set))
    began_s = time.monotonic()
    watch.hasten()
    await asyncio.wait_for(changed.wait(), 5)
    changed.clear()
    watch.hasten()
    await asyncio.wait_for(changed.wait(), 5)
    assert time.monotonic() - began_s < LOOK_EVERY_S
    task.cancel()
