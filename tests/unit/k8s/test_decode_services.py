"""Decoding of what the proxy reads of Services, EndpointSlices and Nodes, and of what is absent."""

import json

import pytest

from netpol.k8s.decode import ENDPOINT_SLICE, NODE, SERVICE, decode, decode_list
from netpol.k8s.manifests import load
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import Ingress, ServicePort

FULL = {
    "metadata": {
        "name": "web",
        "namespace": "shop",
        "uid": "u1",
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "deletionTimestamp": "2026-01-02T03:05:05Z",
        "labels": {"app": "web"},
        "annotations": {
            "netpol.io/service.scheduler": "lc",
            "kube-router.io/service.dsr": "tunnel",
            "kubectl.kubernetes.io/last-applied-configuration": "{...}",
        },
    },
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1", "fd00::1"],
        "ipFamilies": ["IPv4", "IPv6"],
        "externalIPs": ["203.0.113.1", "203.0.113.1"],
        "internalTrafficPolicy": "Local",
        "externalTrafficPolicy": "Local",
        "trafficDistribution": "PreferSameNode",
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "loadBalancerSourceRanges": ["10.0.0.0/8", " fd00::/8 "],
        "loadBalancerClass": "netpol.io/loadbalancer",
        "loadBalancerIP": "203.0.113.9",
        "healthCheckNodePort": 31000,
        "publishNotReadyAddresses": True,
        "ports": [
            {"name": "http", "port": 80, "targetPort": "web", "nodePort": 30080, "protocol": "TCP"}
        ],
    },
    "status": {
        "loadBalancer": {
            "ingress": [
                {"ip": "203.0.113.9", "ipMode": "VIP"},
                {"ip": "203.0.113.10", "ipMode": "Proxy", "ports": [{"port": 80}]},
                {"hostname": "lb.example.com"},
                {},
            ]
        }
    },
}


def both(kind, obj):
    """Decode through JSON and through plain dicts; the results must be the same."""
    by_json = decode(kind, json.dumps(obj).encode())
    assert decode(kind, obj) == by_json
    return by_json


def spec(**fields):
    return {"metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1", **fields}}


def test_all_of_a_service():
    found = both(SERVICE, FULL)
    value = found.value
    assert found.problems == ()
    assert value.key == ObjectKey("shop", "web")
    assert value.cluster_ips == (parse_address("10.96.0.1"), parse_address("fd00::1"))
    assert value.ports == (ServicePort("http", Protocol.TCP, 80, "web", 30080),)
    assert value.external_ips == (parse_address("203.0.113.1"),)
    assert value.ingress == (
        Ingress(parse_address("203.0.113.9")),
        Ingress(parse_address("203.0.113.10"), "", True),
        Ingress(b"", "lb.example.com"),
    )
    assert value.outside_addresses == tuple(
        map(parse_address, ("203.0.113.1", "203.0.113.9", "203.0.113.10"))
    )
    assert (value.internal_local, value.external_local) == (True, True)
    assert value.traffic_distribution == "PreferSameNode"
    assert value.affinity_s == 60
    assert value.source_ranges == (parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/8"))
    assert not value.source_ranges_unread
    assert value.load_balancer_class == "netpol.io/loadbalancer"
    assert value.requested_ip == "203.0.113.9"
    assert value.health_port == 31000
    assert value.publish_not_ready
    assert value.terminating
    assert value.created == "2026-01-02T03:04:05Z"
    assert dict(value.annotations) == {
        "netpol.io/service.scheduler": "lc",
        "kube-router.io/service.dsr": "tunnel",
    }


def test_a_bare_service_has_the_defaults_of_the_api():
    value = both(SERVICE, spec(ports=[{"port": 80}])).value
    assert value.type == "ClusterIP"
    assert value.cluster_ips == (parse_address("10.96.0.1"),)
    assert value.ports == (ServicePort("", Protocol.TCP, 80, 80, 0),)
    flags = (value.internal_local, value.external_local, value.headless, value.foreign)
    assert not any(flags)
    assert (value.affinity_s, value.health_port, value.created) == (0, 0, "")


def test_null_is_absent():
    empty = dict.fromkeys(FULL["spec"])
    value = both(SERVICE, {"metadata": {"name": "web"}, "spec": empty, "status": None}).value
    assert value == both(SERVICE, {"metadata": {"name": "web"}}).value


@pytest.mark.parametrize(
    ("fields", "headless", "ips"),
    [
        ({"clusterIP": "None"}, True, 0),
        ({"clusterIP": None, "clusterIPs": ["None"]}, True, 0),
        ({"clusterIP": ""}, False, 0),
        ({"clusterIPs": ["10.96.0.7"]}, False, 1),
    ],
)
def test_headless_is_not_the_same_as_without_an_address(fields, headless, ips):
    value = both(SERVICE, spec(**fields)).value
    assert (value.headless, len(value.cluster_ips)) == (headless, ips)


@pytest.mark.parametrize(
    "label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]
)
def test_labels_that_make_an_object_another_ones(label):
    meta = {"name": "web", "labels": {label: "", "kubernetes.io/service-name": "web"}}
    assert both(SERVICE, {"metadata": meta}).value.foreign
    assert both(ENDPOINT_SLICE, {"metadata": meta, "addressType": "IPv4"}).value.foreign


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sessionAffinity": "Sometimes"}, "spec.sessionAffinity"),
        ({"externalTrafficPolicy": "Nearby"}, "spec.externalTrafficPolicy"),
        ({"internalTrafficPolicy": "local"}, "spec.internalTrafficPolicy"),
        ({"loadBalancerSourceRanges": ["10.0.0.0"]}, "spec.loadBalancerSourceRanges[0]"),
        ({"externalIPs": ["nowhere"]}, "spec.externalIPs"),
        ({"ports": [{"port": 80, "nodePort": 70000}]}, "spec.ports[0].nodePort"),
        ({"healthCheckNodePort": 70000}, "spec.healthCheckNodePort"),
        (
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}},
            },
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        ),
    ],
)
def test_what_the_api_would_refuse_is_named_and_has_no_effect(fields, field):
    found = both(SERVICE, spec(**fields))
    assert [p.field for p in found.problems] == [field]
    value = found.value
    assert not any((value.external_local, value.internal_local, value.external_ips))


def test_affinity_without_a_usable_timeout_has_the_default():
    config = {"clientIP": {"timeoutSeconds": 90000}}
    for fields in ({}, {"sessionAffinityConfig": {}}, {"sessionAffinityConfig": config}):
        found = both(SERVICE, spec(sessionAffinity="ClientIP", **fields))
        assert found.value.affinity_s == 10800


def test_unread_source_ranges_are_known_to_be_so():
    value = both(SERVICE, spec(loadBalancerSourceRanges=["10.0.0.0/8", "x"])).value
    assert value.source_ranges == (parse_prefix("10.0.0.0/8"),)
    assert value.source_ranges_unread


def test_an_endpoint_with_everything_and_one_with_nothing():
    obj = {
        "metadata": {
            "name": "web-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"netpol.io/weight": "3", "other.io/x": "y"},
        },
        "addressType": "IPv4",
        "ports": [{"name": None, "port": None}, {"name": "http", "port": 80, "protocol": "TCP"}],
        "endpoints": [
            {
                "addresses": ["10.0.0.1"],
                "conditions": {"ready": False, "serving": True, "terminating": True},
                "nodeName": "n1",
                "zone": "z1",
                "hints": {
                    "forZones": [{"name": "z1"}, {"name": "z2"}],
                    "forNodes": [{"name": "n1"}],
                },
                "targetRef": {"kind": "Pod", "name": "web-0"},
            },
            {"addresses": ["10.0.0.2"], "conditions": None, "hints": None, "nodeName": None},
        ],
    }
    value = both(ENDPOINT_SLICE, obj).value
    assert value.address_type == "IPv4"
    assert value.annotations == (("netpol.io/weight", "3"),)
    assert value.ports == (("", Protocol.TCP, 0), ("http", Protocol.TCP, 80))
    first, second = value.endpoints
    assert (first.ready, first.serving, first.terminating) == (False, True, True)
    assert (first.node, first.zone) == ("n1", "z1")
    assert (first.for_zones, first.for_nodes) == (("z1", "z2"), ("n1",))
    assert first.pod == ObjectKey("shop", "web-0")
    assert (second.ready, second.serving, second.terminating) == (True, True, False)
    assert (second.node, second.zone, second.for_zones, second.for_nodes) == ("", "", (), ())


def test_equal_hints_and_ports_are_one_value():
    """10,000 Services must not hold 10,000 equal tuples."""
    end = {"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "z1"}]}}
    items = [
        {
            "metadata": {"name": f"w{n}", "labels": {"kubernetes.io/service-name": "w"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 80}],
            "endpoints": [end],
        }
        for n in range(2)
    ]
    page = decode_list(ENDPOINT_SLICE, json.dumps({"items": items}).encode())
    one, other = (item.value for item in page.items)
    assert one.ports is other.ports
    assert one.endpoints[0].for_zones is other.endpoints[0].for_zones


def test_host_names_are_no_endpoints_and_no_problem():
    obj = {"metadata": {"name": "n"}, "addressType": "FQDN", "endpoints": [{"addresses": ["a.b"]}]}
    found = both(ENDPOINT_SLICE, obj)
    assert (found.value.endpoints, found.problems) == ((), ())


def test_the_zone_of_a_node():
    meta = {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}}
    assert both(NODE, {"metadata": meta}).value.zone == "z1"
    assert both(NODE, {"metadata": {"name": "n1"}}).value.zone == ""


# -- manifests ----------------------------------------------------------------------------------


def loaded(tmp_path, *objects):
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"kind": "List", "items": list(objects)}))
    return load([str(file)])


def test_manifests_read_the_same_fields(tmp_path):
    found = loaded(tmp_path, {"apiVersion": "v1", "kind": "Service", **FULL})
    assert found.services[ObjectKey("shop", "web")] == both(SERVICE, FULL).value
    assert found.headless == set()
    assert set(found.external_ips) == set(both(SERVICE, FULL).value.outside_addresses)


@pytest.mark.parametrize(
    ("distribution", "zones", "nodes"),
    [
        (None, (), ()),
        ("PreferClose", ("z1",), ()),
        ("PreferSameZone", ("z1",), ()),
        ("PreferSameNode", ("z1",), ("n1",)),
    ],
)
def test_slices_that_are_made_have_the_hints_of_the_distribution(
    tmp_path, distribution, zones, nodes
):
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {
            "clusterIP": "10.96.0.1",
            "selector": {"app": "web"},
            "trafficDistribution": distribution,
            "ports": [{"port": 80}],
        },
    }
    found = loaded(tmp_path, node, pod, service)
    (piece,) = found.slices.values()
    (end,) = piece.endpoints
    assert (piece.address_type, end.zone) == ("IPv4", "z1")
    assert (end.for_zones, end.for_nodes) == (zones, nodes)


def test_a_terminating_pod_of_a_service_that_publishes_it_is_ready(tmp_path):
    def world(publish):
        meta = {"name": "p", "labels": {"app": "web"}, "deletionTimestamp": "2026-01-01T00:00:00Z"}
        return loaded(
            tmp_path,
            {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": []}},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web"},
                "spec": {
                    "clusterIP": "10.96.0.1",
                    "selector": {"app": "web"},
                    "publishNotReadyAddresses": publish,
                    "ports": [{"port": 80}],
                },
            },
        )

    for publish in (True, False):
        (piece,) = world(publish).slices.values()
        (end,) = piece.endpoints
        assert (end.ready, end.serving, end.terminating) == (publish, True, True)
