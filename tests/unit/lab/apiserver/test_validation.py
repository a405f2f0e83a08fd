"""What the API server fills in and refuses, kind by kind."""

import pytest

from netpol.lab.apiserver import ApiError, Store
from tests.unit.lab.apiserver.helpers import pod, policy, service


def refusal(store, obj):
    """Return (reason, field) of every cause of the refusal, and none when it is taken."""
    try:
        store.create(obj)
    except ApiError as refused:
        causes = (refused.details or {}).get("causes") if refused.code == 422 else None
        if causes is None:
            raise
        return [(one["reason"], one["field"]) for one in causes]
    return []


PORT = "spec.ingress[0].ports[0]"
PEER = "spec.ingress[0].from[0]"


def from_peer(peer):
    return {"ingress": [{"from": [peer]}]}


def on_port(**port):
    return {"ingress": [{"ports": [port]}]}


def expression(**term):
    return {"podSelector": {"matchExpressions": [{"key": "a", **term}]}}


def block(cidr, *excepted):
    return from_peer({"ipBlock": {"cidr": cidr, "except": list(excepted)}})


@pytest.mark.parametrize(
    ("row", "spec", "expected"),
    [
        (23, from_peer({}), [("FieldValueRequired", PEER)]),
        (
            29,
            from_peer({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}),
            [("FieldValueForbidden", PEER)],
        ),
        (
            32,
            expression(operator="Exists", values=["x"]),
            [("FieldValueForbidden", "spec.podSelector.matchExpressions[0].values")],
        ),
        (
            33,
            expression(operator="In"),
            [("FieldValueRequired", "spec.podSelector.matchExpressions[0].values")],
        ),
        (
            33,
            expression(operator="Near"),
            [("FieldValueInvalid", "spec.podSelector.matchExpressions[0].operator")],
        ),
        (
            45,
            block("10.0.0.0/8", "11.0.0.0/16"),
            [("FieldValueInvalid", f"{PEER}.ipBlock.except[0]")],
        ),
        (
            45,
            block("10.0.0.0/8", "10.0.0.0/8"),
            [("FieldValueInvalid", f"{PEER}.ipBlock.except[0]")],
        ),
        (45, block("10.0.0.0/8", "::/0"), [("FieldValueInvalid", f"{PEER}.ipBlock.except[0]")]),
        (45, block("10.0.0.0/8", "10.1.0.0/16"), []),
        (50, block("10.1.2.3/8"), [("FieldValueInvalid", f"{PEER}.ipBlock.cidr")]),
        (50, block("010.0.0.0/8"), [("FieldValueInvalid", f"{PEER}.ipBlock.cidr")]),
        (50, block("10.0.0.0"), [("FieldValueInvalid", f"{PEER}.ipBlock.cidr")]),
        (50, block("10.0.0.0/255.0.0.0"), [("FieldValueInvalid", f"{PEER}.ipBlock.cidr")]),
        (50, block(""), [("FieldValueRequired", f"{PEER}.ipBlock.cidr")]),
        (61, on_port(protocol="ICMP"), [("FieldValueNotSupported", f"{PORT}.protocol")]),
        (62, on_port(port=80, endPort=80), []),
        (62, on_port(port=80, endPort=90, protocol="SCTP"), []),
        (63, on_port(endPort=90), [("FieldValueInvalid", f"{PORT}.endPort")]),
        (63, on_port(port="http", endPort=90), [("FieldValueInvalid", f"{PORT}.endPort")]),
        (63, on_port(port=80, endPort=79), [("FieldValueInvalid", f"{PORT}.endPort")]),
        (63, on_port(port=80, endPort=70000), [("FieldValueInvalid", f"{PORT}.endPort")]),
        (74, on_port(port=0), [("FieldValueInvalid", f"{PORT}.port")]),
        (74, on_port(port=65536), [("FieldValueInvalid", f"{PORT}.port")]),
        (74, on_port(port="Bad_Name"), [("FieldValueInvalid", f"{PORT}.port")]),
        (74, on_port(port="a-name-that-is-too-long"), [("FieldValueInvalid", f"{PORT}.port")]),
        (97, {"policyTypes": ["Ingress", "Ingress"]}, []),
        (98, {"policyTypes": ["Ingress"] * 3}, [("FieldValueInvalid", "spec.policyTypes")]),
        (98, {"policyTypes": ["Both"]}, [("FieldValueNotSupported", "spec.policyTypes[0]")]),
    ],
)
def test_policies_by_row(store, row, spec, expected):
    assert refusal(store, policy(**spec)) == expected, row


def test_an_old_cidr_is_tolerated_where_it_stands_already(store):
    stored = store.create(policy(**block("10.1.2.3/8")), unchecked=True)
    stored["metadata"]["labels"] = {"a": "b"}
    stored = store.update(stored)
    stored["spec"]["egress"] = [{"to": [{"ipBlock": {"cidr": "10.1.2.4/8"}}]}]
    with pytest.raises(ApiError, match=r"spec\.egress\[0\]\.to\[0\]\.ipBlock\.cidr"):
        store.update(stored)


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ({}, ["Ingress"]),
        ({"egress": []}, ["Ingress"]),
        ({"egress": [{}]}, ["Ingress", "Egress"]),
        ({"policyTypes": ["Egress"]}, ["Egress"]),
    ],
)
def test_policy_types_are_filled_in(store, spec, types):
    assert store.create(policy(**spec))["spec"]["policyTypes"] == types


def test_empty_selectors_of_peers_survive_and_empty_lists_vanish(store):
    spec = {"ingress": [{"from": [{"namespaceSelector": {}}], "ports": []}], "egress": []}
    stored = store.create(policy(**spec))["spec"]
    assert stored["ingress"] == [{"from": [{"namespaceSelector": {}}]}]
    assert "egress" not in stored
    assert store.create(policy(**on_port(port=1)) | {"metadata": {"name": "q"}})["spec"][
        "ingress"
    ] == [{"ports": [{"port": 1, "protocol": "TCP"}]}]


def ports(*found):
    return {"containers": [{"name": "c", "image": "i", "ports": list(found)}]}


POD_PORT = "spec.containers[0].ports[0]"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"containers": []}, [("FieldValueRequired", "spec.containers")]),
        ({"restartPolicy": "Maybe"}, [("FieldValueNotSupported", "spec.restartPolicy")]),
        (ports({"containerPort": 70000}), [("FieldValueInvalid", f"{POD_PORT}.containerPort")]),
        (ports({"name": "a"}), [("FieldValueRequired", f"{POD_PORT}.containerPort")]),
        (
            ports({"containerPort": 1, "protocol": "X"}),
            [("FieldValueNotSupported", f"{POD_PORT}.protocol")],
        ),
        (
            {"containers": [{"name": "c", "image": "i"}] * 2},
            [("FieldValueDuplicate", "spec.containers[1].name")],
        ),
        ({"containers": [{"name": "c"}]}, [("FieldValueRequired", "spec.containers[0].image")]),
    ],
)
def test_pods_are_checked(store, spec, expected):
    assert refusal(store, pod("a", **spec)) == expected


def test_pods_are_completed(store):
    spec = store.create(
        pod("a", **ports({"containerPort": 53, "protocol": "UDP"}, {"containerPort": 80}))
    )
    assert spec["status"] == {"phase": "Pending", "qosClass": "BestEffort"}
    spec = spec["spec"]
    assert (spec["restartPolicy"], spec["dnsPolicy"]) == ("Always", "ClusterFirst")
    assert spec["serviceAccountName"] == "default"
    assert [one["protocol"] for one in spec["containers"][0]["ports"]] == ["UDP", "TCP"]


def test_the_spec_of_a_pod_hardly_changes(store):
    stored = store.create(pod("a"))
    stored["spec"]["containers"][0]["image"] = "i:2"
    stored = store.update(stored)
    stored["spec"]["nodeName"] = "n1"
    with pytest.raises(ApiError, match="pod updates may not change fields other than"):
        store.update(stored)


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"a b": "c"}, "metadata.labels"),
        ({"a": "c d"}, "metadata.labels"),
        ({"/a": "c"}, "metadata.labels"),
    ],
)
def test_labels_are_checked(store, labels, field):
    found = refusal(store, pod("a") | {"metadata": {"name": "a", "labels": labels}})
    assert {one[1] for one in found} == {field}


def test_namespaces_carry_their_name_as_a_label(store):
    made = store.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}})
    assert made["metadata"]["labels"] == {"kubernetes.io/metadata.name": "x"}
    assert made["status"] == {"phase": "Active"}
    assert store.get("serviceaccounts", "default", "x")
    changed = store.patch("namespaces", "x", body={"metadata": {"labels": None}})
    assert changed["metadata"]["labels"] == {"kubernetes.io/metadata.name": "x"}


class TestServices:
    def test_a_cluster_ip_is_allocated_and_freed(self):
        store = Store(service_cidrs=("10.96.0.0/28",))
        given = [
            store.create(service(f"s{number}", ports=[{"port": 80}]))["spec"]["clusterIP"]
            for number in range(14)
        ]
        assert len(set(given)) == 14
        assert "10.96.0.0" not in given
        assert "10.96.0.15" not in given
        assert refusal(store, service("more", ports=[{"port": 80}]))
        store.delete("services", "s3", "default")
        again = store.create(service("more", ports=[{"port": 80}]))
        assert again["spec"]["clusterIP"] == given[3]

    def test_defaults(self, store):
        spec = store.create(service(ports=[{"port": 80}]))["spec"]
        assert spec["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
        assert spec["clusterIPs"] == [spec["clusterIP"]]
        assert (spec["type"], spec["sessionAffinity"]) == ("ClusterIP", "None")
        assert (spec["ipFamilies"], spec["ipFamilyPolicy"]) == (["IPv4"], "SingleStack")
        assert spec["internalTrafficPolicy"] == "Cluster"

    def test_the_affinity_has_a_timeout(self, store):
        spec = store.create(service(ports=[{"port": 80}], sessionAffinity="ClientIP"))["spec"]
        assert spec["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 10800}}

    def test_dual_stack_has_both_families(self):
        store = Store(service_cidrs=("10.96.0.0/16", "fd00:96::/112"))
        made = store.create(service(ports=[{"port": 80}], ipFamilyPolicy="PreferDualStack"))
        assert made["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
        assert made["spec"]["clusterIPs"] == ["10.96.0.10", "fd00:96::a"]

    def test_headless_has_none(self, store):
        made = store.create(service(clusterIP="None", selector={"a": "b"}))
        assert made["spec"]["clusterIPs"] == ["None"]

    def test_node_ports_are_allocated_kept_and_unique(self, store):
        made = store.create(service(type="NodePort", ports=[{"port": 80}]))
        number = made["spec"]["ports"][0]["nodePort"]
        assert 30000 <= number <= 32767
        made["metadata"]["labels"] = {"a": "b"}
        del made["spec"]["ports"][0]["nodePort"]
        assert store.update(made)["spec"]["ports"][0]["nodePort"] == number
        taken = service("b", type="NodePort", ports=[{"port": 80, "nodePort": number}])
        assert refusal(store, taken) == [("FieldValueInvalid", "spec.ports[0].nodePort")]

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ({}, [("FieldValueRequired", "spec.ports")]),
            ({"ports": [{"port": 0}]}, None),
            (
                {"ports": [{"port": 1, "name": "a"}, {"port": 2}]},
                [("FieldValueRequired", "spec.ports[1].name")],
            ),
            ({"type": "X", "ports": [{"port": 1}]}, [("FieldValueNotSupported", "spec.type")]),
            ({"type": "ExternalName"}, [("FieldValueRequired", "spec.externalName")]),
            (
                {"clusterIP": "192.0.2.1", "ports": [{"port": 1}]},
                [("FieldValueInvalid", "spec.clusterIPs")],
            ),
        ],
    )
    def test_refusals(self, store, spec, expected):
        found = refusal(store, service(**spec))
        assert found == expected if expected is not None else found

    def test_the_cluster_ip_stays(self, store):
        made = store.create(service(ports=[{"port": 80}]))
        kept = store.update(service(ports=[{"port": 81}]))
        assert kept["spec"]["clusterIP"] == made["spec"]["clusterIP"]
        made = kept | {
            "spec": kept["spec"] | {"clusterIP": "10.96.9.9", "clusterIPs": ["10.96.9.9"]}
        }
        with pytest.raises(ApiError, match="may not change once set"):
            store.update(made)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"addressType": None}, [("FieldValueRequired", "addressType")]),
        ({"addressType": "IPv6"}, [("FieldValueInvalid", "endpoints[0].addresses")]),
        ({"endpoints": [{"addresses": []}]}, [("FieldValueRequired", "endpoints[0].addresses")]),
        (
            {"endpoints": [{"addresses": ["127.0.0.1"]}]},
            [("FieldValueInvalid", "endpoints[0].addresses[0]")],
        ),
    ],
)
def test_endpoint_slices_are_checked(store, change, expected):
    obj = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "s", "namespace": "default"},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1"]}],
        "ports": [{"port": 80}],
    }
    assert refusal(store, obj | change) == expected


def test_a_node_keeps_its_pod_cidr(store):
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "n"},
        "spec": {"podCIDR": "10.1.0.0/24"},
    }
    assert store.create(node)["spec"]["podCIDRs"] == ["10.1.0.0/24"]
    with pytest.raises(ApiError, match="node updates may not change podCIDR"):
        store.patch("nodes", "n", body={"spec": {"podCIDR": None, "podCIDRs": ["10.2.0.0/24"]}})


CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "tins.food.example"},
    "spec": {
        "group": "food.example",
        "scope": "Cluster",
        "names": {"kind": "Tin", "plural": "tins"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "required": ["spec"],
                        "properties": {
                            "spec": {
                                "type": "object",
                                "required": ["size"],
                                "properties": {
                                    "size": {"type": "integer", "minimum": 1, "maximum": 9},
                                    "kind": {"type": "string", "enum": ["a", "b"], "default": "a"},
                                    "parts": {
                                        "type": "array",
                                        "maxItems": 1,
                                        "items": {"type": "string", "pattern": "^x"},
                                    },
                                },
                            }
                        },
                    }
                },
            }
        ],
    },
}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"size": 1}, []),
        ({}, [("FieldValueRequired", "spec.size")]),
        ({"size": "1"}, [("FieldValueTypeInvalid", "spec.size")]),
        ({"size": 10}, [("FieldValueInvalid", "spec.size")]),
        ({"size": 1, "kind": "c"}, [("FieldValueNotSupported", "spec.kind")]),
        ({"size": 1, "parts": ["x", "x"]}, [("FieldValueTooMany", "spec.parts")]),
        ({"size": 1, "parts": ["y"]}, [("FieldValueInvalid", "spec.parts[0]")]),
    ],
)
def test_custom_objects_obey_their_schema(store, spec, expected):
    store.create(CRD)
    tin = {"apiVersion": "food.example/v1", "kind": "Tin", "metadata": {"name": "t"}, "spec": spec}
    assert refusal(store, tin) == expected


def test_custom_objects_are_pruned_and_completed(store):
    store.create(CRD)
    tin = {"apiVersion": "food.example/v1", "kind": "Tin", "metadata": {"name": "t"}}
    made = store.create(tin | {"spec": {"size": 1, "colour": "red"}})
    assert made["spec"] == {"size": 1, "kind": "a"}
    assert "namespace" not in made["metadata"]
