"""Planning one Service: order of rows, flags, words, and what does not happen."""

from __future__ import annotations

import msgspec

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.ipvs import SCHED_FLAG_2
from netpol.model.net import format_address, host_prefix, parse_address, parse_prefix
from netpol.model.objects import EndpointSlice, Node, Service, ServicePort, SliceEndpoint
from proxy.addresses import Forbidden
from proxy.plan import ProxyOptions, plan_service, skipped

KEY = ObjectKey("ns", "web")
NODE = Node(name="n1", addresses=tuple(map(parse_address, ("2001:db8::1", "192.0.2.1"))))
SERVICE = Service(
    key=KEY,
    uid="u",
    type="NodePort",
    cluster_ips=tuple(map(parse_address, ("2001:db8:96::1", "10.96.0.1"))),
    ports=(
        ServicePort("b", Protocol.TCP, 81, 8080, 30081),
        ServicePort("a", Protocol.TCP, 80, 8080, 30080),
    ),
)


def slice_of(*ends: SliceEndpoint, name: str = "web-1", port: int = 8080) -> EndpointSlice:
    return EndpointSlice(
        key=ObjectKey("ns", name),
        service=KEY,
        ports=(("a", Protocol.TCP, port), ("b", Protocol.TCP, port)),
        endpoints=ends,
    )


def end(number: int, node: str = "n1", *, ready: bool = True) -> SliceEndpoint:
    return SliceEndpoint((bytes((10, 1, 0, number)),), node, None, ready, True, False)


def test_rows_come_by_kind_family_address_and_port():
    plan = plan_service(SERVICE, [], NODE, ProxyOptions())
    assert [(r.kind.value, format_address(r.address), r.port) for r in plan.rows] == [
        ("ClusterIP", "10.96.0.1", 80),
        ("ClusterIP", "10.96.0.1", 81),
        ("ClusterIP", "2001:db8:96::1", 80),
        ("ClusterIP", "2001:db8:96::1", 81),
        ("NodePort", "192.0.2.1", 30080),
        ("NodePort", "192.0.2.1", 30081),
        ("NodePort", "2001:db8::1", 30080),
        ("NodePort", "2001:db8::1", 30081),
    ]
    assert (plan.service, plan.uid, plan.skipped) == (KEY, "u", "")


def test_the_same_world_in_another_order_is_the_same_plan():
    pieces = [slice_of(end(1), end(2)), slice_of(end(3), end(2), name="web-2")]
    turned = [msgspec.structs.replace(s, endpoints=s.endpoints[::-1]) for s in reversed(pieces)]
    plans = [plan_service(SERVICE, p, NODE, ProxyOptions()) for p in (pieces, turned)]
    assert plans[0] == plans[1]


def test_flags_and_scheduler_are_in_every_row():
    asked = msgspec.structs.replace(
        SERVICE,
        annotations=(
            ("netpol.io/service.schedflags", "mh-port"),
            ("netpol.io/service.scheduler", "mh"),
        ),
    )
    plan = plan_service(asked, [], NODE, ProxyOptions())
    assert {(r.scheduler, r.scheduler_flags) for r in plan.rows} == {("mh", SCHED_FLAG_2)}


def test_direct_return_is_for_addresses_outside_alone():
    outside = parse_address("203.0.113.7")
    asked = msgspec.structs.replace(
        SERVICE,
        external_ips=(outside,),
        ports=(ServicePort("a", Protocol.TCP, 8080, 8080, 30080),),
        annotations=(("kube-router.io/service.dsr", "tunnel"),),
    )
    plan = plan_service(asked, [slice_of(end(1))], NODE, ProxyOptions())
    assert {r.kind.value: r.tunnel for r in plan.rows} == {
        "ClusterIP": False,
        "NodePort": False,
        "ExternalIP": True,
    }


def test_an_endpoint_without_a_node_is_on_no_node_whatever_that_is_called():
    local = msgspec.structs.replace(SERVICE, internal_local=True)
    plan = plan_service(local, [slice_of(end(1, ""))], Node(name=""), ProxyOptions())
    assert {r.action.value for r in plan.rows if len(r.address) == 4} == {"drop"}


def test_without_being_asked_nothing_is_explained():
    pieces = [slice_of(end(1), end(2, ready=False))]
    assert plan_service(SERVICE, pieces, NODE, ProxyOptions()).unused
    assert not plan_service(SERVICE, pieces, NODE, ProxyOptions(), explain=False).unused


def test_slices_without_the_port_are_named():
    plan = plan_service(
        msgspec.structs.replace(SERVICE, ports=(ServicePort("", Protocol.TCP, 80, 1),)),
        [slice_of(end(1))],
        NODE,
        ProxyOptions(),
    )
    assert [(u.address[-1], u.why) for u in plan.unused] == [
        (1, "its slice web-1 has no port unnamed TCP")
    ]


def test_why_a_service_is_skipped():
    changes = (
        ({"type": "ExternalName"}, "it is a name in DNS (ExternalName)"),
        ({"headless": True}, "it is headless"),
        ({"foreign": True}, "it is labelled for another proxy"),
        ({"cluster_ips": ()}, "it has no ClusterIP"),
    )
    for fields, why in changes:
        changed = msgspec.structs.replace(SERVICE, **fields)
        assert skipped(changed) == why
        plan = plan_service(changed, [slice_of(end(1))], NODE, ProxyOptions())
        assert (plan.rows, plan.skipped) == ((), why)


# -- whose an address is ------------------------------------------------------------------------


def test_the_longest_block_that_holds_an_address_says_whose_it_is():
    forbidden = Forbidden()
    forbidden.add(parse_prefix("203.0.113.0/24"), "a pod range")
    forbidden.add(parse_prefix("203.0.0.0/16"), "a Service range")
    address = parse_address("203.0.113.7")
    assert forbidden.why(address) == "it lies in a pod range"
    forbidden.add_host(address, "an address of node n2")
    assert forbidden.why(address) == "it is an address of node n2"
    forbidden.remove(host_prefix(address), "an address of node n2")
    assert forbidden.why(address) == "it lies in a pod range"
    assert forbidden.why(parse_address("203.0.112.1")) == "it lies in a Service range"
    assert forbidden.why(parse_address("203.1.0.1")) is None
    assert forbidden.why(parse_address("2001:db8::1")) is None


def test_what_two_say_is_forbidden_until_both_take_it_back():
    forbidden = Forbidden()
    block = parse_prefix("203.0.113.0/24")
    forbidden.add(block, "a")
    forbidden.add(block, "b")
    forbidden.remove(block, "a")
    assert forbidden.why(parse_address("203.0.113.1")) == "it lies in b"
    forbidden.remove(block, "b")
    assert forbidden.why(parse_address("203.0.113.1")) is None
    assert forbidden.entries() == []
