"""Decoding: what is read of each kind, leniency, and the one error."""

import datetime as dt
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netpol.k8s.decode import (
    ENDPOINT_SLICE,
    KINDS,
    NAMESPACE,
    NETWORK_POLICY,
    NODE,
    POD,
    SERVICE,
    decode,
    decode_list,
    decode_object,
    identify,
)
from netpol.k8s.errors import DecodeError
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import ContainerPort, Endpoint

POD_OBJECT = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "web-0",
        "namespace": "shop",
        "uid": "u1",
        "resourceVersion": "17",
        "labels": {"tier": "front", "app": "web"},
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
    },
    "spec": {
        "nodeName": "n1",
        "containers": [
            {
                "name": "c",
                "image": "i",
                "ports": [
                    {"name": "http", "containerPort": 8080},
                    {"name": "dns", "containerPort": 53, "protocol": "UDP"},
                ],
            }
        ],
        "initContainers": [
            {"name": "once", "ports": [{"name": "never", "containerPort": 1}]},
            {
                "name": "mesh",
                "restartPolicy": "Always",
                "ports": [{"name": "admin", "containerPort": 15000}],
            },
        ],
    },
    "status": {
        "phase": "Running",
        "podIP": "10.0.0.9",
        "podIPs": [{"ip": "10.0.0.9"}, {"ip": "fd00::9"}],
        "conditions": [{"type": "Ready"}],
    },
}


def both(kind, obj):
    """Decode through JSON and through plain dicts; the results must be the same."""
    by_json = decode(kind, json.dumps(obj).encode())
    assert decode(kind, obj) == by_json
    return by_json


def pod_with(**changes):
    obj = json.loads(json.dumps(POD_OBJECT))
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = obj
        for part in parents:
            at = at[part]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return obj


def test_a_pod_keeps_what_policy_reads():
    got = both(POD, POD_OBJECT)
    assert got.key == ObjectKey("shop", "web-0")
    assert got.resource_version == "17"
    assert got.problems == ()
    assert got.value == Endpoint(
        key=ObjectKey("shop", "web-0"),
        uid="u1",
        labels=(("app", "web"), ("tier", "front")),
        node="n1",
        phase="Running",
        addresses=(parse_address("10.0.0.9"), parse_address("fd00::9")),
        ports=(
            ContainerPort("http", Protocol.TCP, 8080),
            ContainerPort("dns", Protocol.UDP, 53),
            ContainerPort("admin", Protocol.TCP, 15000),
        ),
        host_network=False,
        terminating=False,
        created="2026-01-02T03:04:05Z",
    )


def test_status_noise_does_not_make_a_pod_different():
    noisy = pod_with(metadata__resourceVersion="18", status__conditions=[])
    assert both(POD, noisy).value == both(POD, POD_OBJECT).value


@pytest.mark.parametrize(
    ("changes", "field", "want"),
    [
        ({"status": ...}, "phase", ""),
        ({"status": ...}, "addresses", ()),
        ({"status": None}, "addresses", ()),
        ({"status__podIPs": ...}, "addresses", (parse_address("10.0.0.9"),)),
        ({"status__podIPs": []}, "addresses", (parse_address("10.0.0.9"),)),
        ({"status__podIPs": None, "status__podIP": ""}, "addresses", ()),
        ({"status__podIPs": [{"ip": "::ffff:10.0.0.1"}]}, "addresses", (bytes([10, 0, 0, 1]),)),
        ({"metadata__deletionTimestamp": "2026-01-02T03:04:05Z"}, "terminating", True),
        ({"metadata__deletionTimestamp": None}, "terminating", False),
        ({"metadata__labels": None}, "labels", ()),
        ({"metadata__creationTimestamp": None}, "created", ""),
        ({"spec__hostNetwork": True}, "host_network", True),
        ({"spec": ...}, "node", ""),
        ({"spec__containers": None, "spec__initContainers": None}, "ports", ()),
        ({"spec__unknownField": {"a": [1, {"b": None}]}}, "node", "n1"),
        ({"metadata__namespace": ...}, "key", ObjectKey("default", "web-0")),
    ],
)
def test_absent_and_odd_fields_of_a_pod(changes, field, want):
    assert getattr(both(POD, pod_with(**changes)).value, field) == want


def test_what_does_not_parse_is_left_out_and_named():
    got = both(
        POD,
        pod_with(
            status__podIPs=[{"ip": "10.0.0.9"}, {"ip": "10.0.0.999"}],
            spec__containers=[
                {
                    "ports": [
                        {"containerPort": 80, "protocol": "QUIC"},
                        {"containerPort": 0},
                        {"containerPort": 70000},
                        {"containerPort": 443},
                    ]
                }
            ],
        ),
    )
    assert got.value.addresses == (bytes([10, 0, 0, 9]),)
    assert [p.number for p in got.value.ports] == [443, 15000]
    assert [p.field for p in got.problems] == [
        "status.podIPs",
        "spec.containers[0].ports[0].protocol",
        "spec.containers[0].ports[1].containerPort",
        "spec.containers[0].ports[2].containerPort",
    ]


def test_equal_labels_and_ports_are_one_object_in_memory():
    one, two = both(POD, POD_OBJECT).value, both(POD, pod_with(metadata__name="web-1")).value
    assert one.labels is two.labels
    assert one.ports is two.ports


def test_a_namespace_always_has_its_name_label():
    plain = both(NAMESPACE, {"metadata": {"name": "shop"}}).value
    assert plain.labels == (("kubernetes.io/metadata.name", "shop"),)
    lying = {
        "metadata": {
            "name": "shop",
            "labels": {"kubernetes.io/metadata.name": "other", "a": "b"},
            "namespace": "ignored",
        }
    }
    got = both(NAMESPACE, lying)
    assert got.key == ObjectKey("", "shop")
    assert got.value.labels == (("a", "b"), ("kubernetes.io/metadata.name", "shop"))


def test_a_node_has_internal_addresses_before_external_ones():
    got = both(
        NODE,
        {
            "metadata": {"name": "n1", "uid": "u"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]},
            "status": {
                "addresses": [
                    {"type": "Hostname", "address": "n1"},
                    {"type": "ExternalIP", "address": "203.0.113.1"},
                    {"type": "InternalIP", "address": "192.0.2.1"},
                    {"type": "InternalIP", "address": "fd00::1"},
                ]
            },
        },
    ).value
    assert got.addresses == tuple(map(parse_address, ("192.0.2.1", "fd00::1", "203.0.113.1")))
    assert got.pod_cidrs == (parse_prefix("10.244.1.0/24"), parse_prefix("fd00:1::/64"))


def test_a_node_falls_back_to_its_single_pod_cidr():
    obj = {"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.1.0/24"}}
    assert both(NODE, obj).value.pod_cidrs == (parse_prefix("10.244.1.0/24"),)
    bad = {"metadata": {"name": "n1"}, "spec": {"podCIDRs": ["10.244.1.0/240"]}}
    got = both(NODE, bad)
    assert got.value.pod_cidrs == ()
    assert [p.field for p in got.problems] == ["spec.podCIDRs"]


def test_a_service_with_its_ports():
    got = both(
        SERVICE,
        {
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "clusterIP": "10.96.0.1",
                "selector": {"app": "web"},
                "ports": [
                    {"port": 80},
                    {"name": "m", "port": 81, "targetPort": "metrics", "protocol": "UDP"},
                    {"port": 82, "targetPort": 8082, "nodePort": 30082},
                    {"port": 83, "targetPort": 99999},
                ],
            },
        },
    )
    assert got.value.type == "ClusterIP"
    assert got.value.cluster_ips == (parse_address("10.96.0.1"),)
    assert got.value.selector == (("app", "web"),)
    assert [tuple(p) for p in got.value.ports] == [
        ("", Protocol.TCP, 80, 80, 0),
        ("m", Protocol.UDP, 81, "metrics", 0),
        ("", Protocol.TCP, 82, 8082, 30082),
    ]
    assert [p.field for p in got.problems] == ["spec.ports[3].targetPort"]


@pytest.mark.parametrize("spec", [{"clusterIP": "None"}, {"clusterIPs": ["None"]}, {}, None])
def test_a_headless_service_has_no_cluster_ip(spec):
    got = both(SERVICE, {"metadata": {"name": "web"}, "spec": spec})
    assert got.value.cluster_ips == ()
    assert got.problems == ()


def test_an_endpoint_slice_with_its_endpoints():
    got = both(
        ENDPOINT_SLICE,
        {
            "metadata": {
                "name": "web-x",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "ports": [{"name": "http", "port": 8080}, {"port": None}],
            "endpoints": [
                {
                    "addresses": ["10.0.0.9"],
                    "nodeName": "n1",
                    "targetRef": {"kind": "Pod", "name": "web-0"},
                },
                {
                    "addresses": ["10.0.0.10"],
                    "conditions": {"ready": False, "serving": True, "terminating": True},
                    "targetRef": {"kind": "Node", "name": "n2"},
                },
            ],
        },
    ).value
    assert got.service == ObjectKey("shop", "web")
    assert got.ports == (("http", Protocol.TCP, 8080), ("", Protocol.TCP, 0))
    first, second = got.endpoints
    assert first.pod == ObjectKey("shop", "web-0")
    assert (first.ready, first.serving, first.terminating) == (True, True, False)
    assert second.pod is None
    assert (second.ready, second.serving, second.terminating) == (False, True, True)


def test_a_network_policy_keeps_its_raw_spec():
    got = both(
        NETWORK_POLICY,
        {
            "metadata": {"name": "p", "namespace": "shop", "uid": "u"},
            "spec": {
                "podSelector": {"matchExpressions": [{"key": "a", "operator": "Weird"}]},
                "policyTypes": ["Ingress", "Sideways"],
                "ingress": [
                    {
                        "from": [{"ipBlock": {"cidr": "nonsense", "except": ["x"]}}, {}],
                        "ports": [
                            {"port": "http", "protocol": "QUIC"},
                            {"port": 80, "endPort": 90},
                        ],
                    }
                ],
                "egress": None,
            },
        },
    ).value
    rule = got.spec.ingress[0]
    assert rule.peers[0].ip_block.cidr == "nonsense"
    assert rule.peers[0].ip_block.excepts == ("x",)
    assert (rule.ports[0].port, rule.ports[0].protocol) == ("http", "QUIC")
    assert (rule.ports[1].port, rule.ports[1].end_port) == (80, 90)
    assert got.spec.policy_types == ("Ingress", "Sideways")
    assert got.spec.egress is None
    assert got.spec.pod_selector.match_expressions[0].operator == "Weird"


def test_null_reads_as_not_set_even_where_the_model_wants_a_value():
    got = both(
        NETWORK_POLICY,
        {
            "metadata": {"name": "p"},
            "spec": {"ingress": [None], "podSelector": {"matchExpressions": [{"key": None}]}},
        },
    ).value
    assert len(got.spec.ingress) == 1
    assert got.spec.ingress[0].peers is None
    assert got.spec.pod_selector.match_expressions[0].key == ""


def test_a_date_that_yaml_parsed_is_text_again():
    when = dt.datetime(2026, 1, 2, 5, 4, 5, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    plain = pod_with(metadata__creationTimestamp=None, metadata__labels={"since": None})
    plain["metadata"]["creationTimestamp"] = when
    plain["metadata"]["labels"] = {"since": dt.date(2026, 1, 2)}
    got = decode(POD, plain).value
    assert got.created == "2026-01-02T03:04:05Z"
    assert got.labels == (("since", "2026-01-02"),)


@pytest.mark.parametrize(
    ("changes", "path", "needed", "got"),
    [
        ({"metadata__labels": ["a"]}, "metadata.labels", "object | null", "array"),
        ({"metadata__labels": {"a": 1}}, "metadata.labels[...]", "str", "int"),
        ({"spec__containers": {"a": 1}}, "spec.containers", "array | null", "object"),
        (
            {"spec__containers": [{"ports": [{"containerPort": "80"}]}]},
            "spec.containers[0].ports[0].containerPort",
            "int | null",
            "str",
        ),
        ({"kind": "Service"}, "kind", "Pod", "'Service'"),
        ({"metadata__name": "a/b"}, "metadata.name", "a name", "'a/b'"),
        ({"metadata__name": ...}, "metadata.name", "a name", "''"),
        ({"metadata__namespace": "a b"}, "metadata.namespace", "a name", "'a b'"),
    ],
)
def test_a_wrong_structure_is_one_error_with_the_field_path(changes, path, needed, got):
    obj = pod_with(**changes)
    errors = []
    for raw in (obj, json.dumps(obj).encode()):
        with pytest.raises(DecodeError) as caught:
            decode(POD, raw)
        errors.append(caught.value)
    for e in errors:
        assert (e.kind, e.path, e.needed, e.got) == ("Pod", path, needed, got)
    assert str(errors[0]) == str(errors[1])


def test_the_error_names_the_object():
    with pytest.raises(DecodeError, match=r"^Pod shop/web-0: metadata\.labels cannot be read") as e:
        decode_object("Pod", pod_with(metadata__labels=["a"]))
    assert e.value.key == ObjectKey("shop", "web-0")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"[" * 5000,
        b'{"spec":' * 5000,
        b'{"metadata":{"name":"\xff"}}',
        b'{"metadata":{"name":"\\ud800"}}',
        b'{"metadata":{"name":1e999}}',
        b'{"metadata":{"name":"a"}} trailing',
        b"\x00\x01",
        b'{"metadata":{"name":"a","labels":{"\xff":"x"}}}',
    ],
)
def test_garbage_is_a_decode_error(body):
    for kind in KINDS:
        with pytest.raises(DecodeError) as caught:
            decode_object(kind, body)
        assert len(str(caught.value)) < 400


def test_yaml_that_no_json_can_say_is_a_decode_error():
    loop = {}
    loop["metadata"] = {"name": "a", "labels": loop}
    for raw in (
        loop,
        {"metadata": {"name": b"x"}},
        {"metadata": {"name": "a", "labels": {1: "x"}}},
        {"metadata": {"name": "a", "labels": {"k": "\ud800"}}},
        {1: 2},
    ):
        with pytest.raises(DecodeError):
            decode(POD, raw)


FIELDS = (
    "metadata spec status name namespace labels ports port containers podIPs ip ingress from "
    "podSelector ipBlock endpoints addresses address type conditions"
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(FIELDS.split()),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.sampled_from(sorted(KINDS)), json_values)
def test_no_json_makes_anything_but_a_value_or_a_decode_error(kind, value):
    body = json.dumps(value, allow_nan=False).encode() if _finite(value) else b"NaN"
    try:
        got = decode(KINDS[kind], body)
    except DecodeError:
        return
    assert got.key.name
    assert decode(KINDS[kind], value) == got


@settings(deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=80))
def test_no_bytes_make_a_list_raise_anything_but_a_decode_error(kind, body):
    try:
        page = decode_list(kind, body)
    except DecodeError:
        return
    assert page.items == ()


def _finite(value):
    try:
        json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def test_a_page_keeps_its_good_items_beside_a_bad_one():
    bad = pod_with(metadata__name="bad", metadata__labels=["a"])
    nameless = pod_with(metadata__name=...)
    body = json.dumps(
        {
            "kind": "PodList",
            "metadata": {"resourceVersion": "40", "continue": "tok"},
            "items": [POD_OBJECT, bad, nameless, pod_with(metadata__name="web-1")],
        }
    ).encode()
    page = decode_list(POD, body)
    assert [d.key.name for d in page.items] == ["web-0", "web-1"]
    assert [(e.key.name, e.path) for e in page.errors] == [
        ("bad", "metadata.labels"),
        ("", "metadata.name"),
    ]
    assert (page.resource_version, page.continue_token) == ("40", "tok")


def test_a_page_of_another_kind_is_an_error():
    with pytest.raises(DecodeError, match="needed PodList"):
        decode_list("Pod", b'{"kind":"Table","items":[]}')
    with pytest.raises(DecodeError):
        decode_list("Pod", b'{"kind":"Status","status":"Failure","items":5}')


def test_an_empty_page():
    page = decode_list("Pod", b'{"kind":"PodList","metadata":{"resourceVersion":"7"},"items":null}')
    assert (page.items, page.errors, page.resource_version) == ((), (), "7")


def test_identity_can_be_read_out_of_a_broken_object():
    assert identify(POD, {"metadata": {"name": "a", "namespace": 5}}) == ObjectKey("default", "a")
    assert identify(NODE, {"metadata": {"name": "a"}}) == ObjectKey("", "a")
    assert identify(POD, b"{") == ObjectKey("", "")


def test_api_paths():
    assert POD.path() == "/api/v1/pods"
    assert POD.path(ObjectKey("a", "b")) == "/api/v1/namespaces/a/pods/b"
    assert NODE.path(ObjectKey("", "n")) == "/api/v1/nodes/n"
    assert (
        NETWORK_POLICY.path(namespace="a")
        == "/apis/networking.k8s.io/v1/namespaces/a/networkpolicies"
    )
