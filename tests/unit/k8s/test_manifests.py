"""Manifests as people and programs write them, good and bad."""

import gzip
import io
import json
import os
import time
from pathlib import Path

import pytest

from netpol.k8s.manifest_text import DEPTH_MAX, resolve
from netpol.k8s.manifests import load
from netpol.lib.errors import InputError
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import format_address

EXAMPLES = Path(__file__).parents[3] / "manifests" / "examples"
POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\n"
POLICY = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: "


@pytest.fixture
def read(tmp_path):
    def run(text, name="m.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load([str(path)])

    return run


def refused(read, text):
    with pytest.raises(InputError) as caught:
        read(text)
    message = str(caught.value)
    assert len(message) <= 1500
    assert "\n" not in message
    return message


def addresses(found):
    return {k.name: [format_address(a) for a in p.addresses] for k, p in found.pods.items()}


# -- what is loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_accepted(file):
    found = load([str(file)])
    assert found.policies or found.pods
    assert not found.problems
    assert not found.skipped


def test_the_examples_can_be_loaded_together():
    found = load([str(EXAMPLES)])
    assert {k.namespace for k in found.policies} == {"default", "shop"}
    assert not found.notices


def test_documents_lists_and_typed_lists_are_one(read):
    found = read(
        POD % "a" + "---\n\n---\napiVersion: v1\nkind: List\nitems:\n"
        "- {apiVersion: v1, kind: Pod, metadata: {name: b}}\n"
        "- apiVersion: v1\n  kind: List\n  items: [{apiVersion: v1, kind: Pod, metadata: {name: c}}]\n"
        "---\napiVersion: v1\nkind: PodList\nitems: [{metadata: {name: d}}]\n"
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems: [{metadata: {name: e}}]\n"
    )
    assert sorted(k.name for k in found.pods) == ["a", "b", "c", "d"]
    assert list(found.policies) == [ObjectKey("default", "e")]


def test_json_is_read_also_several_objects_in_a_row(read):
    one = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
    two = {**one, "metadata": {"name": "b"}}
    assert len(read(json.dumps(one), "m.json").pods) == 1
    assert len(read(json.dumps(one) + "\n" + json.dumps(two), "m.json").pods) == 2
    assert len(read(json.dumps(one) + "\n---\n" + json.dumps(two)).pods) == 2


def test_folders_are_read_in_order_and_recursively(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.yml").write_text(POD % "third")
    (tmp_path / "a.yaml").write_text(POD % "first")
    (tmp_path / "a2.json").write_text(
        '{"apiVersion":"v1","kind":"Pod","metadata":{"name":"second"}}'
    )
    (tmp_path / "README.md").write_text("not a manifest: [")
    os.mkfifo(tmp_path / "pipe.yaml")
    found = load([str(tmp_path)])
    assert addresses(found) == {
        "first": ["10.244.0.1"],
        "second": ["10.244.0.2"],
        "third": ["10.244.0.3"],
    }


def test_standard_input_is_a_dash():
    assert list(load(["-"], stdin=io.BytesIO((POD % "a").encode())).pods)


def test_pods_without_status_get_the_addresses_that_nobody_has(read):
    found = read(
        POD % "a"
        + "---\n"
        + POD % "b"
        + "status: {podIPs: [{ip: 10.244.0.1}, {ip: 'fd00::1'}]}\n---\n"
        + POD % "c"
        + "status: {}\n---\n"
        + POD % "pending"
        + "status: {phase: Pending}\n---\n"
        + POD % "old"
        + "status: {podIP: 10.9.9.9}\n"
    )
    assert addresses(found) == {
        "a": ["10.244.0.2"],
        "b": ["10.244.0.1", "fd00::1"],
        "c": ["10.244.0.3"],
        "pending": [],
        "old": ["10.9.9.9"],
    }
    assert {p.phase for p in found.pods.values()} == {"Running"}
    assert found.assigned == [ObjectKey("default", "a"), ObjectKey("default", "c")]


def test_ended_pods_stay_ended(read):
    found = read(POD % "a" + "status: {phase: Failed, podIPs: [{ip: 10.0.0.1}]}\n")
    assert not next(iter(found.pods.values())).live


def test_a_pod_in_the_host_network_has_its_nodes_address(read):
    found = read(
        "apiVersion: v1\nkind: Node\nmetadata: {name: node}\n"
        "status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n---\n"
        + POD % "a"
        + "spec: {hostNetwork: true, nodeName: node}\n"
    )
    assert addresses(found) == {"a": ["192.0.2.1"]}
    assert found.node_names == ("node",)


def test_namespaces_that_are_only_named_exist_with_their_name_label(read):
    found = read("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop}\n")
    assert found.namespaces["shop"].labels == (("kubernetes.io/metadata.name", "shop"),)


def test_nodes_are_also_those_that_pods_name(read):
    assert read(POD % "a" + "spec: {nodeName: n7}\n").node_names == ("n7",)


def test_slices_are_made_for_services_with_a_selector(read):
    text = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\n"
        "spec: {selector: {app: a}, ports: [{port: 80, targetPort: web}]}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: one, labels: {app: a}}\n"
        "spec: {containers: [{ports: [{name: web, containerPort: 8080}]}]}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: two, labels: {app: a}}\n"
        "spec: {containers: [{ports: [{name: web, containerPort: 9090}]}]}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: other, labels: {app: b}}\n"
    )
    found = read(text)
    assert {(s.endpoints[0].pod.name, s.ports) for s in found.slices.values()} == {
        ("one", (("", Protocol.TCP, 8080),)),
        ("two", (("", Protocol.TCP, 9090),)),
    }
    given = read(
        text + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        "metadata: {name: s-1, labels: {kubernetes.io/service-name: s}}\nendpoints: []\n"
    )
    assert [k.name for k in given.slices] == ["s-1"]


def test_headless_and_external_addresses_of_services_are_kept(read):
    found = read(
        "apiVersion: v1\nkind: Service\nmetadata: {name: h}\nspec: {clusterIP: None}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: e}\n"
        "spec: {externalIPs: [198.51.100.1, nonsense]}\n"
        "status: {loadBalancer: {ingress: [{ip: 198.51.100.2}, {hostname: x}]}}\n"
    )
    assert found.headless == {ObjectKey("default", "h")}
    assert {format_address(a) for a in found.external_ips} == {"198.51.100.1", "198.51.100.2"}


def test_other_kinds_are_counted_and_other_groups_are_other_kinds(read):
    found = read(
        "apiVersion: apps/v1\nkind: Deployment\n---\napiVersion: apps/v1\nkind: Deployment\n---\n"
        "apiVersion: crd.projectcalico.org/v1\nkind: NetworkPolicy\nmetadata: {name: x}\n"
    )
    assert dict(found.skipped) == {"Deployment": 2, "NetworkPolicy (crd.projectcalico.org/v1)": 1}
    assert not found.policies


def test_of_two_equal_names_the_later_counts_and_it_is_said(read):
    found = read(POD % "a" + "---\n" + POD % "a" + "spec: {nodeName: later}\n")
    assert next(iter(found.pods.values())).node == "later"
    assert found.notices[0].endswith(
        "m.yaml: document 2: Pod default/a is given again and replaces that of "
        + str(found.notices[0].split(": document")[0])
        + ": document 1"
    )


def test_null_is_what_it_is_to_the_api(read):
    found = read(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: }, namespace: null}\nspec: null\n---\n"
        + POLICY
        + "{podSelector: null, ingress: [null], egress: null}\n"
    )
    assert next(iter(found.pods.values())).labels == (("app", ""),)
    spec = next(iter(found.policies.values())).spec
    assert spec.ingress[0].peers is None
    assert spec.egress is None


def test_anchors_and_merge_keys_work(read):
    found = read(
        "apiVersion: v1\nkind: List\nitems:\n"
        "- &one {apiVersion: v1, kind: Pod, metadata: {name: a, labels: &l {app: x}}}\n"
        "- {<<: *one, metadata: {name: b, labels: {<<: *l, tier: z}}}\n"
    )
    assert [p.labels for p in found.pods.values()] == [
        (("app", "x"),),
        (("app", "x"), ("tier", "z")),
    ]


# -- YAML 1.1's traps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("yes", True), ("On", True), ("NO", False), ("y", "y"), ("n", "n"), ("oN", "oN")),
        *(("0x1F", 31), ("010", 8), ("08", "08"), ("1_000", 1000), ("-5", -5), ("0b11", 3)),
        *(("1.5", 1.5), (".5", 0.5), ("5e7", "5e7"), ("1.0e3", 1000.0), ("-", "-"), (".", ".")),
        *(("2024-01-01", "2024-01-01"), ("12:30:00", "12:30:00"), ("~", None), ("", None)),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_scalars_mean_what_they_mean_to_kubernetes(text, value):
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_keys_that_are_no_text_do_not_crash_and_get_their_json_name(read):
    found = read(
        "apiVersion: v1\nkind: Pod\n"
        "metadata: {name: a, labels: {on: x, 1: y, 1.5: z, 2024-01-01: d, 'n': e}}\n"
    )
    assert dict(next(iter(found.pods.values())).labels) == {
        "true": "x",
        "1": "y",
        "1.5": "z",
        "2024-01-01": "d",
        "n": "e",
    }


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("a: [1, 2", ["document 1: line 2", "not YAML"]),
        (POD % "a" + "---\na: b: c\n", ["document 2: line 5", "not YAML"]),
        ("just text", ["document 1: not an object", "'just text'"]),
        ("- a\n- b", ["document 1: not an object", "a list"]),
        ("metadata: {name: a}", ["document 1: kind", "got nothing"]),
        ("kind: 7", ["kind", "7 (a number)"]),
        ("kind: Pod\nmetadata: {name: a}", ["Pod: apiVersion", "needed v1"]),
        ("apiVersion: 1\nkind: Pod", ["apiVersion", "1 (a number)"]),
        (
            "apiVersion: extensions/v1beta1\nkind: NetworkPolicy",
            ["needed networking.k8s.io/v1", "got extensions/v1beta1"],
        ),
        ("apiVersion: v1\nkind: Pod", ["metadata.name", "needed a name", "got nothing"]),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a/b}", ["metadata.name"]),
        ("apiVersion: v1\nkind: Pod\nmetadata: [a]", ["Pod: metadata", "a mapping", "a list"]),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {version: 1}}",
            ["Pod default/a: metadata.labels[version]", "a string", "1 (a number)"],
        ),
        (
            "apiVersion: v1\nkind: List\nitems: [{}, {apiVersion: v1, kind: Pod, metadata: 5}]",
            ["document 1: items[0]: kind"],
        ),
        ("apiVersion: v1\nkind: List\nitems: {}", ["items", "a list", "a mapping"]),
        (POD % "a" + "spec: {hostNetwork: 'yes'}", ["spec.hostNetwork", "true or false", "'yes'"]),
        (
            POD % "a" + "spec: {containers: [{}, {ports: [{containerPort: '80'}]}]}",
            ["spec.containers[1].ports[0].containerPort", "an integer", "'80'"],
        ),
        (POLICY + "{podSelector: [a]}", ["spec.podSelector", "a mapping", "a list"]),
        (
            POLICY + "{ingress: {from: []}}",
            ["NetworkPolicy default/p: spec.ingress", "a list", "a mapping"],
        ),
        (
            POLICY + "{ingress: [{ports: [{port: true}]}]}",
            ["spec.ingress[0].ports[0].port", "an integer or a string", "true"],
        ),
        (
            POLICY + "{ingress: [{ports: [{port: 99999999999}]}]}",
            ["spec.ingress[0].ports[0].port", "32 bits"],
        ),
        (
            POLICY + "{podSelector: {matchLabels: {on: off}}}",
            ["spec.podSelector.matchLabels[true]", "a string", "false"],
        ),
        (
            POLICY + "{egress: [{to: [{ipBlock: {cidr: 10.0}}]}]}",
            ["spec.egress[0].to[0].ipBlock.cidr", "a string", "10.0 (a number)"],
        ),
        ("a: !!python/object/apply:os.system [ls]", ["tag", "not allowed"]),
        ("a: !secret x", ["tag '!secret' is not allowed"]),
        ("? [a]\n: b", ["a list or mapping as a key"]),
        ("a: *nowhere", ["alias *nowhere names no anchor"]),
        ("a: &a [*a]", ["alias *a stands inside what it names"]),
        ("<<: 5", ["merge key"]),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(read, text, needles):
    message = refused(read, text)
    assert "m.yaml: " in message
    for needle in needles:
        assert needle in message


@pytest.mark.parametrize("tool", ["-", "[", "{a: "], ids=["block", "flow", "mapping"])
def test_deep_nesting_is_refused(read, tool):
    assert f"at most {DEPTH_MAX} levels" in refused(read, (tool + " ") * 5000)


def test_deep_json_is_refused(read):
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    assert "at most" in refused(read, deep)


def test_alias_bombs_are_refused_at_once(read):
    lines = ["a0: &a0 [" + "x," * 9 + "]"]
    lines += [f"a{i}: &a{i} [" + f"*a{i - 1}," * 9 + "]" for i in range(1, 20)]
    started = time.monotonic()
    assert "aliases expand to too many values" in refused(read, "\n".join(lines))
    assert time.monotonic() - started < 1


def test_merge_bombs_are_refused_at_once(read):
    lines = ["a0: &a0 {" + "".join(f"k{j}: v, " for j in range(50)) + "}"]
    lines += [f"b{i}: {{<<: *a0}}" for i in range(5000)]
    assert "aliases expand to too many values" in refused(read, "\n".join(lines))


@pytest.mark.parametrize(
    "raw",
    [
        b"\x7fELF\x02\x01\x01\x00\x00",
        gzip.compress(b"kind: Pod", mtime=0),
        "kind: Pod".encode("utf-16"),
        b"\xff\xfe",
    ],
)
def test_binary_files_are_refused(read, raw):
    assert "binary file" in refused(read, raw)


def test_control_characters_are_refused(read):
    assert "not YAML" in refused(read, "a: \x01")


def test_an_endless_device_is_refused():
    with pytest.raises(InputError, match=r"too large|binary"):
        load(["/dev/zero"])


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.yaml"
    with path.open("wb") as f:
        f.truncate(10 << 30)
    with pytest.raises(InputError, match="too large"):
        load([str(path)])


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(InputError, match=r"no such file: .*nope"):
        load([str(tmp_path / "nope")])
    with pytest.raises(InputError, match="no manifests in this folder"):
        load([str(tmp_path)])


def test_an_empty_file_is_an_empty_cluster(read):
    assert not read("").pods
    assert not read("# nothing\n---\n").pods


# -- what the API would refuse but can be read ------------------------------------------------------


def test_misspelt_fields_of_a_policy_are_problems(read):
    found = read(POLICY + "{podSelector: {}, Ingress: [], ingress: [{form: []}]}\n")
    assert [str(p).split("m.yaml: ")[1] for p in found.problems] == [
        "document 1: NetworkPolicy default/p: spec.Ingress: unknown field, it has no effect",
        "document 1: NetworkPolicy default/p: spec.ingress[0].form: unknown field, it has no effect",
    ]


def test_bad_names_labels_ports_and_addresses_are_problems(read):
    found = read(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: Bad_Name, labels: {a: 'b c'}}\n"
        "spec: {containers: [{ports: [{containerPort: 0}, {containerPort: 80, protocol: ICMP}]}]}\n"
        "status: {podIPs: [{ip: 10.0.0.256}]}\n"
    )
    assert [p.field for p in found.problems] == [
        "status.podIPs",
        "spec.containers[0].ports[0].containerPort",
        "spec.containers[0].ports[1].protocol",
        "metadata.name",
        "metadata.labels[a]",
    ]
