"""Which addresses of Services a node announces."""

from __future__ import annotations

import pytest

from netpol.model.ids import ObjectKey
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import EndpointSlice, Ingress, Node, Service, SliceEndpoint
from routes.options import RouteOptions
from routes.vips import announced

KEY = ObjectKey("shop", "web")
NODES = (
    Node(
        name="n1", addresses=(parse_address("10.0.1.1"),), pod_cidrs=(parse_prefix("10.1.1.0/24"),)
    ),
)
ALL = RouteOptions(
    advertise_cluster_ip=True, advertise_external_ip=True, advertise_load_balancer_ip=True
)


def service(**more: object) -> Service:
    given = {
        "cluster_ips": (parse_address("10.96.0.10"), parse_address("fd96::10")),
        "external_ips": (parse_address("203.0.113.7"),),
        "ingress": (Ingress(parse_address("203.0.113.8")),),
        **more,
    }
    return Service(key=KEY, type="LoadBalancer", **given)  # type: ignore[arg-type]


def endpoints(node: str, *, ready: bool = True) -> EndpointSlice:
    one = SliceEndpoint((parse_address("10.1.1.9"),), node, None, ready, ready, not ready)
    return EndpointSlice(key=ObjectKey("shop", "web-1"), service=KEY, endpoints=(one,))


def of(service: Service, *slices: EndpointSlice, options: RouteOptions = ALL) -> list[str]:
    found = announced([service], slices, NODES, node="n1", options=options)
    return [str(p).rpartition("/")[0] for p in found]


CLUSTER = ["10.96.0.10", "fd96::10"]


def test_nothing_by_default() -> None:
    assert of(service(), options=RouteOptions()) == []


def test_every_kind_of_address() -> None:
    assert sorted(of(service())) == sorted([*CLUSTER, "203.0.113.7", "203.0.113.8"])


@pytest.mark.parametrize(
    ("what", "address"),
    [("clusterip", "10.96.0.10"), ("externalip", "203.0.113.7"), ("loadbalancerip", "203.0.113.8")],
)
@pytest.mark.parametrize("prefix", ["netpol.io", "kube-router.io"])
def test_an_annotation_says_otherwise_for_its_service(what: str, address: str, prefix: str) -> None:
    name = f"{prefix}/service.advertise.{what}"
    on = service(annotations=((name, "true"),))
    assert address in of(on, options=RouteOptions())
    off = service(annotations=((name, "false"),))
    assert address not in of(off)
    nonsense = service(annotations=((name, "perhaps"),))
    assert address in of(nonsense)


def test_a_local_policy_needs_a_ready_endpoint_on_the_node() -> None:
    local = service(external_local=True)
    assert of(local) == CLUSTER
    assert of(local, endpoints("n2")) == CLUSTER
    assert of(local, endpoints("n1", ready=False)) == CLUSTER
    assert "203.0.113.8" in of(local, endpoints("n2"), endpoints("n1"))


def test_an_internal_local_policy_concerns_the_cluster_ip_alone() -> None:
    local = service(internal_local=True)
    assert sorted(of(local)) == ["203.0.113.7", "203.0.113.8"]
    assert "10.96.0.10" in of(local, endpoints("n1"))


@pytest.mark.parametrize(
    "address",
    ["10.0.1.1", "10.1.1.77", "127.0.0.1", "169.254.1.1", "224.0.0.5", "fe80::1", "0.0.0.0"],
)
def test_what_is_no_services_to_have_is_not_announced(address: str) -> None:
    assert address not in of(service(external_ips=(parse_address(address),)))


def test_services_that_are_not_ours() -> None:
    assert of(service(foreign=True)) == []
    named = Service(key=KEY, type="ExternalName", external_ips=(parse_address("203.0.113.7"),))
    assert of(named) == []


def test_an_address_that_stays_the_load_balancers_is_not_announced() -> None:
    """IpMode Proxy: packets to it must get there."""
    proxied = service(ingress=(Ingress(parse_address("203.0.113.8"), proxied=True),))
    assert "203.0.113.8" not in of(proxied)
