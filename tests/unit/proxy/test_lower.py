"""Rows to what the kernel must have."""

from __future__ import annotations

from typing import Any

import pytest

from netpol.model.ids import Protocol
from netpol.model.ipvs import SCHED_FLAG_1, SCHED_FLAG_2, ForwardMethod, RealConfig, ServerId
from netpol.model.net import Family, parse_address, parse_prefix
from netpol.model.ruleset import AddressPort, AddressPortNet
from proxy import names
from proxy.lower import Entry, KernelPart, lower
from proxy.marks import MarkKey, Marks
from proxy.rows import Action, Backend, Kind, ServicePlan, ServiceRow
from tests.proxynode import MASK, backends, id_of, real, row


def lowered(*rows: ServiceRow, mask: int = MASK) -> KernelPart:
    return lower(ServicePlan(rows[0].service, rows=rows), Marks(mask).assign)


def entries(part: KernelPart, pair: Any, family: Family = Family.V4) -> set[Any]:
    return {e.member for e in part.entries if e.name == pair[family].name}


def test_a_cluster_address_is_a_server_an_address_and_a_port():
    part = lowered(row("web", "10.96.0.1", 80, "10.0.1.2", "10.0.2.2", affinity_s=60))
    (server,) = part.servers
    assert server.virtual.id == id_of("10.96.0.1")
    assert server.virtual.persistence_s == 60
    assert server.reals == {real("10.0.1.2"): RealConfig(), real("10.0.2.2"): RealConfig()}
    vip = parse_address("10.96.0.1")
    assert part.vips == (vip,)
    assert set(part.entries) == {
        Entry(names.VIP[Family.V4].name, vip),
        Entry(names.PORT[Family.V4].name, AddressPort(vip, Protocol.TCP, 80)),
    }
    assert part.marks == ()


def test_a_node_port_is_no_address_of_ours():
    part = lowered(row("web", "172.18.0.2", 30080, "10.0.1.2", kind=Kind.NODE_PORT))
    assert part.vips == ()
    assert entries(part, names.VIP) == set()
    assert len(entries(part, names.PORT)) == 1


def test_the_other_family_has_sets_of_its_own():
    part = lowered(row("web", "fd00:96::1", 80, "fd00:0:1::2"))
    assert part.servers[0].virtual.id.family is Family.V6
    assert entries(part, names.VIP, Family.V6) == {parse_address("fd00:96::1")}
    assert entries(part, names.VIP) == set()


@pytest.mark.parametrize("action", [Action.REJECT, Action.DROP])
def test_without_a_backend_the_server_stands_empty_and_drop_is_in_a_set(action: Action):
    part = lowered(row("web", "192.0.2.1", 80, kind=Kind.EXTERNAL_IP, action=action))
    assert part.servers[0].reals == {}
    assert bool(entries(part, names.DROP)) is (action is Action.DROP)


def test_a_local_policy_has_a_server_by_mark_for_clients_of_the_node():
    everywhere, here = backends("10.0.1.2", "10.0.2.2"), backends("10.0.1.2")
    common: dict[str, Any] = {"backends": here, "local_client_backends": everywhere}
    part = lowered(
        row("web", "10.96.0.1", 80, "10.0.1.2", "10.0.2.2"),
        row("web", "192.0.2.1", 80, kind=Kind.LOAD_BALANCER, **common),
        row("web", "172.18.0.2", 30080, kind=Kind.NODE_PORT, **common),
    )
    *_, by_mark = part.servers
    assert len(part.servers) == 4  # one by mark for both rows
    assert by_mark.virtual.id == ServerId.by_mark(Family.V4, 0x100)
    assert set(by_mark.reals) == {real("10.0.1.2"), real("10.0.2.2")}
    assert by_mark.protocol is Protocol.TCP
    (key,) = part.marks
    assert key == by_mark.mark == MarkKey(part.marks[0].service, "", Family.V4)
    marked = {(e.member, e.mark) for e in part.entries if e.name == names.MARK[Family.V4].name}
    assert marked == {
        (AddressPort(parse_address("192.0.2.1"), Protocol.TCP, 80), 0x100),
        (AddressPort(parse_address("172.18.0.2"), Protocol.TCP, 30080), 0x100),
    }


def test_with_a_local_policy_the_server_by_mark_stays_when_all_backends_are_here():
    rows = (
        row("web", "10.96.0.1", 80, "10.0.1.2"),
        row("web", "192.0.2.1", 80, "10.0.1.2", kind=Kind.LOAD_BALANCER),
    )
    part = lower(ServicePlan(rows[0].service, rows=rows, policy_local=True), Marks(MASK).assign)
    assert [s.virtual.id.fwmark for s in part.servers] == [0, 0, 0x100]
    assert entries(part, names.MARK) == {AddressPort(parse_address("192.0.2.1"), Protocol.TCP, 80)}


def test_rows_of_a_port_that_differ_have_marks_of_their_own():
    part = lowered(
        row("web", "192.0.2.1", 80, backends=(), local_client_backends=backends("10.0.1.2")),
        row("web", "192.0.2.2", 80, backends=(), local_client_backends=backends("10.0.1.3")),
    )
    assert [key.variant for key in part.marks] == [0, 1]
    assert [s.virtual.id.fwmark for s in part.servers if s.mark] == [0x100, 0x200]


def test_affinity_of_a_server_by_mark_is_a_hash_since_persistence_keeps_the_port_dialled():
    part = lowered(
        row("web", "192.0.2.1", 80, affinity_s=60, local_client_backends=backends("10.0.1.2"))
    )
    by_address, by_mark = part.servers
    assert by_address.virtual.persistence_s == 60
    assert by_mark.virtual.persistence_s == 0
    assert (by_mark.virtual.scheduler, by_mark.virtual.flags) == ("mh", SCHED_FLAG_1)


@pytest.mark.parametrize(
    ("scheduler", "flags", "expected"),
    [
        ("rr", 0, 0),
        ("sh", 0, SCHED_FLAG_1),
        ("mh", SCHED_FLAG_2, SCHED_FLAG_1 | SCHED_FLAG_2),
        ("dh", 0, 0),
    ],
)
def test_hash_schedulers_fall_back_from_servers_without_weight(
    scheduler: str, flags: int, expected: int
):
    part = lowered(row("web", "10.96.0.1", 80, scheduler=scheduler, scheduler_flags=flags))
    assert part.servers[0].virtual.flags == expected


def test_backends_without_weight_are_not_wanted_and_make_no_difference():
    one, two = Backend(parse_address("10.0.1.2"), 8080), Backend(parse_address("10.0.1.3"), 8080, 0)
    part = lowered(row("web", "10.96.0.1", 80, backends=(one,), local_client_backends=(one, two)))
    assert part.marks == ()
    part = lowered(row("web", "10.96.0.1", 80, backends=(two,), local_client_backends=(two,)))
    assert part.servers[0].reals == {}


def test_a_tunnel_keeps_the_port_that_is_dialled():
    part = lowered(row("web", "192.0.2.1", 80, "10.0.1.2", kind=Kind.EXTERNAL_IP, tunnel=True))
    config = RealConfig(1, ForwardMethod.TUNNEL)
    assert part.servers[0].reals == {real("10.0.1.2", 80): config}


def test_sources_are_members_and_everybody_is_two_halves():
    ranges = (parse_prefix("203.0.113.0/24"), parse_prefix("0.0.0.0/0"))
    part = lowered(
        row("web", "192.0.2.1", 80, "10.0.1.2", kind=Kind.LOAD_BALANCER, source_ranges=ranges)
    )
    here = (parse_address("192.0.2.1"), Protocol.TCP, 80)
    assert entries(part, names.LB) == {AddressPort(*here)}
    assert entries(part, names.SRC) == {
        AddressPortNet(*here, parse_prefix(text))
        for text in ("203.0.113.0/24", "0.0.0.0/1", "128.0.0.0/1")
    }


def test_a_full_field_is_a_fault_and_nothing_else_is_missing():
    part = lowered(
        row("web", "192.0.2.1", 80, local_client_backends=backends("10.0.1.2")),
        row("web", "192.0.2.2", 80, local_client_backends=backends("10.0.1.3")),
        mask=0x100,
    )
    assert len(part.servers) == 3
    (fault,) = part.faults
    assert "no packet mark is left" in fault
