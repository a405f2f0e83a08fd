"""When packets go in tunnels, where these may lead, and what that needs in this node's pods."""

from __future__ import annotations

import msgspec
import pytest

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import parse_address
from netpol.model.objects import EndpointSlice, Node, Service, ServicePort, SliceEndpoint
from netpol.model.ruleset import AddressPort
from proxy.changes import Tracker
from proxy.dsr import Ends
from proxy.lower import lower
from proxy.marks import Marks
from proxy.plan import ProxyOptions, plan_service
from proxy.rows import Kind, ServicePlan, ServiceRow

KEY = ObjectKey("shop", "web")
VIP, CLUSTER_IP = parse_address("203.0.113.7"), parse_address("10.96.0.1")
HERE, THERE = parse_address("10.244.1.5"), parse_address("10.244.2.5")
NODE = Node(name="n1", addresses=(parse_address("192.0.2.1"),))
SERVICE = Service(
    key=KEY,
    cluster_ips=(CLUSTER_IP,),
    external_ips=(VIP,),
    ports=(ServicePort("http", Protocol.TCP, 80, 80, 0),),
    annotations=(("netpol.io/service.dsr", "tunnel"),),
)
OPTIONS = ProxyOptions()


def pieces(port: int = 80, nodes: tuple[str, str] = ("n1", "n2"), **more: bool) -> EndpointSlice:
    state = {"pod": None, "ready": True, "serving": True, "terminating": False} | more
    ends = tuple(
        SliceEndpoint(addresses=(a,), node=n, **state)
        for a, n in zip((HERE, THERE), nodes, strict=True)
    )
    return EndpointSlice(
        key=ObjectKey("shop", "web-1"),
        service=KEY,
        address_type="IPv4",
        ports=(("http", Protocol.TCP, port),),
        endpoints=ends,
    )


def outside(plan: ServicePlan | None) -> ServiceRow:
    assert plan is not None
    return next(r for r in plan.rows if r.kind is Kind.EXTERNAL_IP)


def refusals(plan: ServicePlan | None) -> list[str]:
    assert plan is not None
    return [r.message for r in plan.refused if r.reason == "DirectReturnRefused"]


def test_a_row_names_the_endpoints_of_this_node():
    plan = plan_service(SERVICE, [pieces()], NODE, OPTIONS)
    assert (outside(plan).tunnel, outside(plan).ends) == (True, (HERE,))
    assert not refusals(plan)


def test_ends_are_there_before_an_endpoint_is_ready():
    plan = plan_service(SERVICE, [pieces(ready=False, serving=False)], NODE, OPTIONS)
    assert outside(plan).ends == (HERE,)


@pytest.mark.parametrize("isolated", [HERE, THERE])
def test_an_isolated_endpoint_of_any_node_is_served_without_tunnels(isolated):
    plan = plan_service(
        SERVICE,
        [pieces()],
        NODE,
        OPTIONS,
        hidden=lambda a: "policy shop/deny isolates it" if a == isolated else None,
    )
    assert (outside(plan).tunnel, outside(plan).ends) == (False, ())
    (text,) = refusals(plan)
    assert text.startswith(
        "direct server return of 203.0.113.7:80/TCP: policy shop/deny isolates it;"
    )


def test_an_endpoint_that_is_not_known_yet_has_no_end_here_and_is_no_reason_for_an_event():
    plan = plan_service(SERVICE, [pieces()], NODE, OPTIONS, hidden=lambda _: "")
    assert (outside(plan).tunnel, outside(plan).ends) == (True, ())
    assert not refusals(plan)


@pytest.mark.parametrize(
    ("piece", "options", "why"),
    [
        (pieces(8080), OPTIONS, "listens on 8080, and a tunnel cannot change the port"),
        (pieces(nodes=("n1", "")), OPTIONS, "endpoint 10.244.2.5 is no pod"),
        (pieces(), ProxyOptions(no_direct_return="no tunnels here"), "no tunnels here"),
    ],
)
def test_what_a_tunnel_cannot_do_is_told(piece, options, why):
    plan = plan_service(SERVICE, [piece], NODE, options)
    assert not outside(plan).tunnel
    assert len(refusals(plan)) == 1
    assert why in refusals(plan)[0]


def test_an_endpoint_that_is_a_node_is_no_end():
    tracker = Tracker("n1")
    tracker.node(None, NODE)
    tracker.node(None, Node(name="n2", addresses=(THERE,)))
    tracker.service(None, SERVICE)
    tracker.slice(None, pieces())
    (plan,) = tracker.flush().values()
    assert not outside(plan).tunnel
    assert "endpoint 10.244.2.5 is node n2 itself" in refusals(plan)[0]


def test_a_change_of_isolation_plans_these_services_alone():
    isolated: set[bytes] = set()
    tracker = Tracker("n1", hidden=lambda a: "isolated" if a in isolated else None)
    other = msgspec.structs.replace(SERVICE, key=ObjectKey("shop", "x"), annotations=())
    tracker.service(None, SERVICE)
    tracker.service(None, msgspec.structs.replace(other, cluster_ips=(b"\x0a\x60\0\2",)))
    tracker.slice(None, pieces())
    tracker.flush()
    assert tracker.wants_direct
    planned = tracker.planned
    isolated.add(THERE)
    tracker.recheck_direct()
    (plan,) = tracker.flush().values()
    assert not outside(plan).tunnel
    assert tracker.planned == planned + 1
    isolated.clear()
    tracker.recheck_direct()
    assert outside(tracker.flush()[KEY]).tunnel
    tracker.service(SERVICE, None)
    assert not tracker.wants_direct


def test_clients_of_this_node_have_a_server_without_a_tunnel():
    part = lower(plan_service(SERVICE, [pieces()], NODE, OPTIONS), Marks(0xFFF00).assign)
    tunnels = {(s.virtual.id.fwmark > 0, s.virtual.id.address): s.tunnel for s in part.servers}
    assert {by_mark for (by_mark, _), tunnel in tunnels.items() if tunnel} == {False}
    assert sum(by_mark for by_mark, _ in tunnels) == 1


class TestEnds:
    def test_a_pod_has_the_addresses_of_all_its_services(self):
        ends = Ends()
        plan = plan_service(SERVICE, [pieces()], NODE, OPTIONS)
        assert ends.change({KEY: plan})
        assert ends.wanted() == {HERE: frozenset({VIP})}
        assert ends.sources() == {AddressPort(VIP, Protocol.TCP, 80)}
        assert ends.services(HERE) == [KEY]
        assert ends.services(THERE) == []

    def test_what_changes_nothing_here_is_told(self):
        ends = Ends()
        plan = plan_service(SERVICE, [pieces()], NODE, OPTIONS)
        ends.change({KEY: plan})
        weighted = msgspec.structs.replace(
            SERVICE, annotations=(*SERVICE.annotations, ("netpol.io/service.weights", "node/n2=7"))
        )
        assert not ends.change({KEY: plan_service(weighted, [pieces()], NODE, OPTIONS)})
        assert ends.change({KEY: None})
        assert (ends.wanted(), ends.sources()) == ({}, frozenset())
