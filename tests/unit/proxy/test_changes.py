"""The Tracker: what is planned anew for which change, and who has what two Services want."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import (
    ZONE_LABEL,
    EndpointSlice,
    Ingress,
    Node,
    Service,
    ServicePort,
    SliceEndpoint,
)
from proxy.changes import API_SERVICE, Tracker
from proxy.plan import ProxyOptions
from proxy.rows import Kind, Reason

OUTSIDE = parse_address("203.0.113.7")
NODE = Node(name="n1", addresses=(parse_address("192.0.2.1"),), labels=((ZONE_LABEL, "z1"),))


def key(name: str) -> ObjectKey:
    return ObjectKey("ns", name)


def service(name: str, number: int = 1, *, node_port: int = 0, **more) -> Service:
    port = ServicePort("", Protocol.TCP, 80, 8080, node_port)
    return Service(key=key(name), cluster_ips=(bytes((10, 96, 0, number)),), ports=(port,), **more)


def piece(name: str, *ends: SliceEndpoint, of: ObjectKey | None = None) -> EndpointSlice:
    return EndpointSlice(
        key=key(f"{name}-1"),
        service=of or key(name),
        ports=(("", Protocol.TCP, 8080),),
        endpoints=ends,
    )


def end(number: int, node: str = "n1", *, zones: tuple[str, ...] = ()) -> SliceEndpoint:
    address = (bytes((10, 1, 0, number)),)
    return SliceEndpoint(address, node, None, True, True, False, for_zones=zones)


def tracker(*services: Service) -> Tracker:
    made = Tracker("n1")
    made.node(None, NODE)
    for one in services:
        made.service(None, one)
    made.flush()
    return made


def kinds(made: Tracker, name: str) -> list[str]:
    plan = made.plans.get(key(name))
    return [row.kind.value for row in plan.rows] if plan else []


# -- what a change costs ------------------------------------------------------------------------


def test_an_endpoint_change_plans_one_service():
    made = tracker(*(service(f"s{n}", n) for n in range(200)))
    before = made.planned
    old, new = piece("s7", end(1)), piece("s7", end(1), end(2))
    made.slice(None, old)
    assert list(made.flush()) == [key("s7")]
    made.slice(old, new)
    changed = made.flush()
    assert made.planned == before + 2
    plan = changed[key("s7")]
    assert plan is not None
    assert [b.address[3] for b in plan.rows[0].backends] == [1, 2]


def test_nothing_is_said_that_did_not_change():
    made = tracker(service("a"))
    made.service(service("a"), service("a"))
    assert not made.pending
    made.slice(None, piece("a"))  # no endpoint: nothing to dial as before
    assert made.pending
    assert made.flush() == {}


def test_a_change_and_its_undoing_before_a_flush_is_nothing():
    made = tracker(service("a"))
    made.slice(None, piece("a", end(1)))
    made.slice(piece("a", end(1)), None)
    assert made.flush() == {}


def test_another_nodes_heartbeat_or_address_plans_nothing():
    made = tracker(*(service(f"s{n}", n, external_ips=(OUTSIDE,)) for n in range(3)))
    other = Node(name="n2", addresses=(parse_address("192.0.2.2"),))
    made.node(None, other)
    made.node(other, msgspec.structs.replace(other, pod_cidrs=(parse_prefix("10.9.0.0/24"),)))
    assert not made.pending


def test_a_slice_that_moves_to_another_service_changes_both():
    made = tracker(service("a", 1), service("b", 2))
    old = piece("a", end(1))
    made.slice(None, old)
    made.flush()
    made.slice(old, msgspec.structs.replace(old, service=key("b")))
    assert set(made.flush()) == {key("a"), key("b")}


def test_slices_that_come_before_their_service_are_not_forgotten():
    made = tracker()
    made.slice(None, piece("a", end(1)))
    assert made.flush() == {}
    made.service(None, service("a"))
    plan = made.flush()[key("a")]
    assert plan is not None
    assert len(plan.rows[0].backends) == 1


def test_a_service_that_goes_is_said_once():
    made = tracker(service("a"))
    made.service(service("a"), None)
    assert made.flush() == {key("a"): None}
    assert made.flush() == {}
    assert made.explained(key("a")) is None


def test_a_service_that_becomes_headless_is_gone():
    made = tracker(service("a"))
    made.service(service("a"), Service(key=key("a"), headless=True))
    assert made.flush() == {key("a"): None}


# -- this node ----------------------------------------------------------------------------------


def test_a_new_address_of_this_node_plans_node_ports_alone():
    made = tracker(service("a", 1), service("b", 2, node_port=30080))
    before = made.planned
    more = msgspec.structs.replace(NODE, addresses=(*NODE.addresses, parse_address("192.0.2.9")))
    made.node(NODE, more)
    assert list(made.flush()) == [key("b")]
    assert made.planned == before + 1
    assert kinds(made, "b") == ["ClusterIP", "NodePort", "NodePort"]


def test_a_new_zone_plans_services_with_hints_alone():
    made = tracker(service("a", 1), service("b", 2))
    made.slice(None, piece("a", end(1), end(2)))
    made.slice(None, piece("b", end(1, zones=("z1",)), end(2, zones=("z2",))))
    made.flush()
    before = made.planned
    made.node(NODE, msgspec.structs.replace(NODE, labels=((ZONE_LABEL, "z2"),)))
    plan = made.flush()[key("b")]
    assert made.planned == before + 1
    assert plan is not None
    assert [b.address[3] for b in plan.rows[0].backends] == [2]


def test_the_object_of_this_node_may_go_and_its_node_ports_stay():
    """Somebody deletes it, and the kubelet makes it anew: connections must not notice."""
    made = tracker(service("a", node_port=30080))
    made.node(NODE, None)
    assert not made.pending
    moved = msgspec.structs.replace(NODE, uid="2", addresses=(parse_address("192.0.2.9"),))
    made.node(None, moved)
    made.flush()
    assert [row.address for row in made.plans[key("a")].rows][1:] == list(moved.addresses)


def test_a_node_that_is_not_known_yet_has_no_node_ports():
    made = Tracker("n1")
    made.service(None, service("a", node_port=30080))
    made.flush()
    assert kinds(made, "a") == ["ClusterIP"]
    made.node(None, NODE)
    made.flush()
    assert kinds(made, "a") == ["ClusterIP", "NodePort"]


# -- one address, two Services ------------------------------------------------------------------

OLD = service("z", 1, external_ips=(OUTSIDE,), created="2026-01-01T00:00:00Z")
YOUNG = service("a", 2, external_ips=(OUTSIDE,), created="2026-01-02T00:00:00Z")


def test_the_older_has_it_and_the_other_is_told():
    made = tracker(YOUNG, OLD)
    assert kinds(made, "z") == ["ClusterIP", "ExternalIP"]
    assert kinds(made, "a") == ["ClusterIP"]
    (refused,) = made.plans[key("a")].refused
    assert refused.reason == Reason.ADDRESS_IN_USE
    wanted = "address 203.0.113.7:80/TCP is not served: it is Service ns/z's, the older one"
    assert refused.message == wanted


def test_the_other_gets_it_when_the_older_goes():
    made = tracker(OLD, YOUNG)
    made.service(OLD, None)
    changed = made.flush()
    assert changed[key("z")] is None
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]
    assert made.plans[key("a")].refused == ()


def test_an_older_one_that_comes_later_takes_it():
    made = tracker(YOUNG)
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]
    made.service(None, OLD)
    assert set(made.flush()) == {key("a"), key("z")}
    assert kinds(made, "a") == ["ClusterIP"]


def test_one_that_is_made_anew_is_young():
    made = tracker(OLD, YOUNG)
    anew = msgspec.structs.replace(OLD, uid="2", created="2026-03-01T00:00:00Z")
    made.service(OLD, None)
    made.service(None, anew)
    made.flush()
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]
    assert kinds(made, "z") == ["ClusterIP"]


def test_of_three_the_second_follows():
    third = service("m", 3, external_ips=(OUTSIDE,), created="2026-01-03T00:00:00Z")
    made = tracker(third, YOUNG, OLD)
    made.service(OLD, None)
    made.flush()
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]
    assert kinds(made, "m") == ["ClusterIP"]
    assert "ns/a's" in made.plans[key("m")].refused[0].message


def test_of_equal_age_the_name_decides():
    same = msgspec.structs.replace(YOUNG, created=OLD.created)
    made = tracker(OLD, same)
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]


def test_one_without_a_time_is_the_youngest():
    made = tracker(msgspec.structs.replace(OLD, created=""), YOUNG)
    assert kinds(made, "z") == ["ClusterIP"]


def test_another_port_or_protocol_is_no_conflict():
    other = msgspec.structs.replace(YOUNG, ports=(ServicePort("", Protocol.UDP, 80, 80),))
    third = msgspec.structs.replace(
        YOUNG, key=key("c"), ports=(ServicePort("", Protocol.TCP, 81, 80),)
    )
    made = tracker(OLD, other, third)
    assert kinds(made, "a") == kinds(made, "c") == ["ClusterIP", "ExternalIP"]


def test_an_external_and_a_load_balancers_address_conflict_too():
    other = msgspec.structs.replace(YOUNG, external_ips=(), ingress=(Ingress(OUTSIDE),))
    made = tracker(OLD, other)
    assert kinds(made, "a") == ["ClusterIP"]


def test_explained_leaves_out_what_another_has():
    made = tracker(OLD, YOUNG)
    plan = made.explained(key("a"))
    assert plan is not None
    assert replace(plan, unused=()) == made.plans[key("a")]


# -- whose an address is ------------------------------------------------------------------------


def test_the_clusterip_of_another_service_is_refused_and_given_back():
    owner = service("owner", 9)
    taker = service("taker", 2, external_ips=owner.cluster_ips)
    made = tracker(taker, owner)
    assert kinds(made, "taker") == ["ClusterIP"]
    assert "the ClusterIP of ns/owner" in made.plans[key("taker")].refused[0].message
    made.service(owner, None)
    made.flush()
    assert kinds(made, "taker") == ["ClusterIP", "ExternalIP"]


def test_an_address_that_becomes_a_nodes_is_refused_from_then_on():
    made = tracker(service("a", external_ips=(OUTSIDE,)))
    other = Node(name="n2", addresses=(OUTSIDE,))
    made.node(None, other)
    made.flush()
    assert kinds(made, "a") == ["ClusterIP"]
    made.node(other, None)
    made.flush()
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]


def test_a_pod_range_that_comes_to_hold_an_address_takes_it():
    made = tracker(service("a", external_ips=(OUTSIDE,)))
    made.node(None, Node(name="n2", pod_cidrs=(parse_prefix("203.0.113.0/24"),)))
    made.flush()
    assert kinds(made, "a") == ["ClusterIP"]


def test_the_api_servers_endpoints_are_refused():
    made = tracker(service("a", external_ips=(OUTSIDE,)))
    own = SliceEndpoint((OUTSIDE,), "", None, True, True, False)
    servers = piece("api", own, of=API_SERVICE)
    made.slice(None, servers)
    made.flush()
    assert "the API server's address" in made.plans[key("a")].refused[0].message
    made.slice(servers, None)
    made.flush()
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]


def test_other_options_plan_everything():
    made = tracker(service("a", external_ips=(OUTSIDE,)), service("b", 2))
    made.set_options(ProxyOptions(external_cidrs=(parse_prefix("192.0.2.0/24"),)))
    assert set(made.flush()) == {key("a")}
    assert kinds(made, "a") == ["ClusterIP"]
    made.set_options(ProxyOptions(scheduler="lc"))
    assert set(made.flush()) == {key("a"), key("b")}
    assert all(r.scheduler == "lc" for p in made.plans.values() for r in p.rows)


def test_another_address_of_this_machine_plans_only_who_wants_it():
    """Interfaces come and go with pods."""
    made = tracker(service("a", external_ips=(OUTSIDE,)), service("b", 2, node_port=30080))
    before = made.planned
    made.set_options(ProxyOptions(node_addresses=(parse_address("fe80::7"),)))
    assert not made.pending
    made.set_options(ProxyOptions(node_addresses=(OUTSIDE, OUTSIDE)))
    made.flush()
    assert (made.planned, kinds(made, "a")) == (before + 1, ["ClusterIP"])
    made.set_options(ProxyOptions(node_addresses=(parse_address("fe80::7"),)))
    made.flush()
    assert kinds(made, "a") == ["ClusterIP", "ExternalIP"]


def test_other_addresses_for_node_ports_plan_services_with_some():
    made = tracker(service("a", external_ips=(OUTSIDE,)), service("b", 2, node_port=30080))
    made.set_options(ProxyOptions(nodeport_cidrs=(parse_prefix("198.51.100.0/24"),)))
    assert set(made.flush()) == {key("b")}
    assert kinds(made, "b") == ["ClusterIP"]


def test_two_ports_of_one_service_at_one_number():
    ports = (
        ServicePort("a", Protocol.TCP, 80, 1, 30080),
        ServicePort("b", Protocol.TCP, 81, 1, 30080),
    )
    made = tracker(Service(key=key("a"), cluster_ips=(b"\x0a\x60\x00\x01",), ports=ports))
    plan = made.plans[key("a")]
    assert [(r.kind, r.port_name) for r in plan.rows] == [
        (Kind.CLUSTER_IP, "a"),
        (Kind.CLUSTER_IP, "b"),
        (Kind.NODE_PORT, "a"),
    ]
    assert "port b at 192.0.2.1:30080/TCP is not served: port a" in plan.refused[0].message


def test_planning_in_parts_ends_where_planning_at_once_does() -> None:
    """Changes come in between, also of what was planned already."""
    shared = parse_address("203.0.113.77")
    whole, parts = Tracker("n1"), Tracker("n1")
    for tracker in (whole, parts):
        for n in range(5):
            tracker.service(None, service(f"s{n}", external_ips=(shared,)))
    assert parts.plan_some(2)
    assert parts.plan_some(2)
    for tracker in (whole, parts):
        tracker.service(service("s0", external_ips=(shared,)), None)
        tracker.service(None, service("s9"))
    while parts.plan_some(1):
        assert parts.pending
    assert parts.pending
    assert not parts.plans
    assert parts.flush() == whole.flush()
    assert not parts.pending
    assert parts.plans == whole.plans
