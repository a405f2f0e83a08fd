"""What `lab up -f` decides before anything is created."""

from pathlib import Path

import pytest

from netpol.lab import objects
from netpol.lib.errors import InputError

SERVED = {
    ("v1", "Pod"): True,
    ("v1", "Namespace"): False,
    ("v1", "Node"): False,
    ("apps/v1", "Deployment"): True,
}
NODES = ("node1", "node2")


def read(tmp_path: Path, text: str) -> list[objects.Manifest]:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    return objects.read([str(tmp_path)])


def select(tmp_path: Path, text: str) -> objects.Selection:
    return objects.select(read(tmp_path, text), nodes=NODES, served=SERVED)


def identities(selection: objects.Selection) -> list[tuple[str, str, str]]:
    return [manifest.identity for manifest in selection.manifests]


def test_a_missing_namespace_is_created_before_what_is_in_it(tmp_path: Path) -> None:
    found = select(tmp_path, "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop}}")
    assert identities(found) == [("Namespace", "", "shop"), ("Pod", "shop", "a")]


def test_a_namespace_that_is_defined_later_is_created_first_and_once(tmp_path: Path) -> None:
    text = (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop}}\n---\n"
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: x}}}"
    )
    found = select(tmp_path, text)
    assert identities(found) == [("Namespace", "", "shop"), ("Pod", "shop", "a")]
    assert found.manifests[0].obj["metadata"]["labels"] == {"team": "x"}


def test_lists_are_taken_apart_and_empty_documents_skipped(tmp_path: Path) -> None:
    text = (
        "---\n---\napiVersion: v1\nkind: PodList\nitems:\n"
        "- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n"
        "- {apiVersion: v1, kind: Pod, metadata: {name: b}}\n"
    )
    found = select(tmp_path, text)
    assert identities(found) == [("Pod", "default", "a"), ("Pod", "default", "b")]


def test_a_pod_on_an_unknown_node_is_refused_with_file_document_and_field(tmp_path: Path) -> None:
    text = "---\n{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {nodeName: node9}}"
    with pytest.raises(InputError) as refused:
        select(tmp_path, text)
    message = str(refused.value)
    assert "a.yaml: document 1" in message
    assert "spec.nodeName" in message
    assert "node9" in message
    assert "node1, node2" in message


def test_kinds_without_a_controller_and_unknown_kinds_are_named_once(tmp_path: Path) -> None:
    text = (
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}}\n---\n"
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: b}}\n---\n"
        "{apiVersion: example.org/v1, kind: Gizmo, metadata: {name: c}}"
    )
    found = select(tmp_path, text)
    assert found.manifests == ()
    said = "skipped: Deployment (the lab has no controller for it, write Pods), Gizmo"
    assert found.notes == (said,)


def test_labels_of_a_lab_node_are_kept_and_other_nodes_skipped(tmp_path: Path) -> None:
    text = (
        "{apiVersion: v1, kind: Node, metadata: {name: node1, labels: {disk: ssd}}}\n---\n"
        "{apiVersion: v1, kind: Node, metadata: {name: other}}"
    )
    found = select(tmp_path, text)
    assert found.node_labels == {"node1": {"disk": "ssd"}}
    assert "Node other" in found.notes[0]


def test_what_an_api_server_wrote_into_an_export_is_left_out(tmp_path: Path) -> None:
    text = (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, uid: x, resourceVersion: '7',"
        " managedFields: []}, status: {phase: Failed}}"
    )
    (found,) = select(tmp_path, text).manifests
    assert found.obj["metadata"] == {"name": "a", "namespace": "default"}
    assert "status" not in found.obj


def test_of_two_documents_with_one_name_the_later_counts(tmp_path: Path) -> None:
    text = (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {v: '1'}}}\n---\n"
        "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {v: '2'}}}"
    )
    (found,) = select(tmp_path, text).manifests
    assert found.obj["metadata"]["labels"] == {"v": "2"}


def test_kinds_of_a_custom_resource_definition_are_served(tmp_path: Path) -> None:
    text = (
        "{apiVersion: example.org/v1, kind: Gizmo, metadata: {name: c}}\n---\n"
        "{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition,"
        " metadata: {name: gizmos.example.org}, spec: {group: example.org, scope: Cluster,"
        " names: {kind: Gizmo, plural: gizmos}, versions: [{name: v1}]}}"
    )
    served = SERVED | {("apiextensions.k8s.io/v1", "CustomResourceDefinition"): False}
    found = objects.select(read(tmp_path, text), nodes=NODES, served=served)
    assert [manifest.obj["kind"] for manifest in found.manifests] == [
        "CustomResourceDefinition",
        "Gizmo",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "a Kubernetes object"),
        ("{kind: Pod, metadata: {name: a}}", "apiVersion"),
        ("{apiVersion: v1, metadata: {name: a}}", "kind"),
        ("{apiVersion: v1, kind: Pod, metadata: {}}", "metadata.name"),
        ("a: [", "not YAML"),
    ],
)
def test_a_document_that_is_no_object_is_refused_in_one_line(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(InputError) as refused:
        select(tmp_path, text)
    assert says in str(refused.value)
    assert "a.yaml: document 1" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_path_that_is_missing_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing of that name"):
        objects.read([str(tmp_path / "none")])
    with pytest.raises(InputError, match="manifests"):
        objects.read([str(tmp_path)])
