"""What people type works with real kubectl: reading, applying, changing, deleting."""

import json
import re
import subprocess
import time

import pytest

WORLD = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: node-1
  containers: [{name: main, image: "web:1", ports: [{containerPort: 80, name: http}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {team: a}}}], ports: [{port: http}]}]
---
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {"node-role.kubernetes.io/worker": ""}}
spec: {podCIDR: 10.244.0.0/24}
"""
OTHER = """
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: default}
data: {colour: red}
"""


@pytest.fixture(scope="module", autouse=True)
def _world(kubectl):
    kubectl.run("apply -f -", WORLD)


def test_version_and_api_resources_list_what_is_served(kubectl):
    assert "Server Version: v1." in kubectl.run("version")
    found = kubectl.run("api-resources")
    assert re.search(r"networkpolicies +netpol +networking.k8s.io/v1 +true +NetworkPolicy", found)
    assert re.search(r"pods +po +v1 +true +Pod", found)


def test_get_prints_the_columns_that_users_know(kubectl):
    assert kubectl.run("get ns shop").splitlines()[0].split() == ["NAME", "STATUS", "AGE"]
    wide = kubectl.run("get po -A -o wide").splitlines()
    assert wide[0].split()[:7] == ["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP"]
    assert wide[1].split()[:4] == ["shop", "web", "0/1", "Pending"]
    assert "node-1" in wide[1]
    service = kubectl.run("get svc -n shop web").splitlines()[1].split()
    assert service[1] == "ClusterIP"
    assert service[4] == "80/TCP"
    policy = kubectl.run("get netpol -n shop").splitlines()
    assert policy[0].split() == ["NAME", "POD-SELECTOR", "AGE"]
    assert policy[1].split()[:2] == ["only-web", "app=web"]
    assert "worker" in kubectl.run("get no")


def test_get_all_goes_through_the_category(kubectl):
    found = kubectl.run("get all -n shop")
    assert "pod/web" in found
    assert "service/web" in found


def test_output_forms_and_selectors(kubectl):
    assert json.loads(kubectl.run("get pods -n shop -o json"))["items"][0]["kind"] == "Pod"
    assert "kind: Pod" in kubectl.run("get pod web -n shop -o yaml")
    assert kubectl.run("get pod web -n shop -o jsonpath={.spec.restartPolicy}") == "Always"
    assert kubectl.run("get po -A -l app=web -o name") == "pod/web\n"
    assert kubectl.run("get po -A -l app!=web -o name") == ""
    assert kubectl.run("get po -A --field-selector=spec.nodeName=node-1 -o name") == "pod/web\n"
    assert kubectl.run("get po -A --field-selector=status.phase!=Pending -o name") == ""
    refused = kubectl.run("get po -A --field-selector=spec.colour=red", code=1)
    assert "field label not supported: spec.colour" in refused


def test_describe_reads_the_objects_it_needs(kubectl):
    assert "Port:         80/TCP" in kubectl.run("describe pod web -n shop")
    assert "Allowing ingress traffic" in kubectl.run("describe netpol only-web -n shop")
    assert re.search(r"TargetPort: +http/TCP", kubectl.run("describe svc web -n shop"))
    node = kubectl.run("describe node node-1")
    assert "10.244.0.0/24" in node
    assert re.search(r"shop +web", node)


def test_apply_says_created_unchanged_and_configured(kubectl):
    assert "created" in kubectl.run("apply -f -", OTHER)
    assert "unchanged" in kubectl.run("apply -f -", OTHER)
    blue = OTHER.replace("red", "blue")
    assert kubectl.run("diff -f -", blue, code=1).count("colour: blue") == 1
    assert "configured" in kubectl.run("apply -f -", blue)
    assert "deleted" in kubectl.run("delete -f -", OTHER)


def test_apply_removes_what_the_manifest_no_longer_says(kubectl):
    kubectl.run("apply -f -", OTHER.replace("red", "red, size: big"))
    kubectl.run("apply -f -", OTHER)
    assert kubectl.run("get cm settings -o jsonpath={.data}") == '{"colour":"red"}'
    kubectl.run("delete cm settings")


def test_server_side_apply_creates_changes_and_removes(kubectl):
    kubectl.run("apply --server-side -f -", OTHER.replace("red", "red, size: big"))
    assert "serverside-applied" in kubectl.run("apply --server-side -f -", OTHER)
    assert kubectl.run("get cm settings -o jsonpath={.data}") == '{"colour":"red"}'
    managers = kubectl.run("get cm settings -o jsonpath={.metadata.managedFields[*].manager}")
    assert managers == "kubectl"
    kubectl.run("delete cm settings")


def test_label_annotate_and_edit_change_the_object(kubectl):
    kubectl.run("label pod web -n shop tier=front")
    assert kubectl.run("get po -A -l tier=front -o name") == "pod/web\n"
    kubectl.run("label pod web -n shop tier-")
    assert kubectl.run("get po -A -l tier -o name") == ""
    kubectl.run("annotate svc web -n shop note=1")
    assert kubectl.run("get svc web -n shop -o jsonpath={.metadata.annotations.note}") == "1"
    editor = {"KUBE_EDITOR": "sed -i s/web:1/web:2/"}
    assert "edited" in kubectl.run("edit pod web -n shop", env=editor)
    image = kubectl.run("get pod web -n shop -o jsonpath={.spec.containers[0].image}")
    assert image == "web:2"


def test_the_three_patch_types(kubectl):
    target = ("patch", "netpol", "only-web", "-n", "shop")
    merge = '{"metadata":{"labels":{"by":"merge"}}}'
    kubectl.run("", args=(*target, "--type=merge", "-p", merge))
    json_patch = '[{"op":"add","path":"/spec/ingress/0/ports/-","value":{"port":443}}]'
    kubectl.run("", args=(*target, "--type=json", "-p", json_patch))
    strategic = '{"spec":{"policyTypes":["Ingress","Egress"]}}'
    kubectl.run("", args=(*target, "-p", strategic))
    found = json.loads(kubectl.run("get netpol only-web -n shop -o json"))
    assert found["metadata"]["labels"] == {"by": "merge"}
    added = {"port": 443, "protocol": "TCP"}
    assert found["spec"]["ingress"][0]["ports"] == [{"port": "http", "protocol": "TCP"}, added]
    assert found["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert found["metadata"]["generation"] == 3


def test_create_sends_protobuf_and_is_understood(kubectl):
    kubectl.run("create namespace proto")
    kubectl.run("create configmap -n proto one --from-literal=a=b")
    kubectl.run("create service clusterip -n proto web --tcp=80:8080")
    kubectl.run("create secret generic -n proto two --from-literal=a=b")
    assert kubectl.run("get cm -n proto one -o jsonpath={.data.a}") == "b"
    assert kubectl.run("get secret -n proto two -o jsonpath={.data.a}") == "Yg=="
    ports = kubectl.run("get svc -n proto web -o jsonpath={.spec.ports[0].targetPort}")
    assert ports == "8080"
    refused = kubectl.run("create deployment -n proto d --image=i", code=1)
    assert "kubectl apply -f -" in refused
    assert "deleted" in kubectl.run("delete ns proto --timeout=20s")
    assert "not found" in kubectl.run("get ns proto", code=1)


def test_run_wait_and_delete_with_wait(kubectl):
    kubectl.run("run one --image=nginx --restart=Never")
    with kubectl.popen("wait", "--for=condition=Ready", "pod/one", "--timeout=20s") as waiting:
        time.sleep(0.3)
        ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
        kubectl.stored("patch", "pods", "one", "default", body=ready, subresource="status")
        out, err = waiting.communicate(timeout=20)
    assert "condition met" in out, err
    with kubectl.popen("wait", "--for=delete", "pod/one", "--timeout=20s") as waiting:
        time.sleep(0.3)
        assert 'pod "one" deleted' in kubectl.run("delete pod one")
        waiting.communicate(timeout=20)
    assert waiting.returncode == 0


def test_delete_waits_for_the_kubelet_and_all_namespaces_can_be_emptied(kubectl):
    kubectl.run("apply -f -", WORLD.replace("name: web,", "name: web-2,"))
    with kubectl.popen("delete", "pod", "web-2", "-n", "shop", "--timeout=20s") as deleting:
        with pytest.raises(subprocess.TimeoutExpired):
            deleting.wait(timeout=1)
        assert "Terminating" in kubectl.run("get pod web-2 -n shop")
        kubectl.stored("delete", "pods", "web-2", "shop", grace_period_s=0)
        out, err = deleting.communicate(timeout=20)
    assert "deleted" in out, err
    kubectl.run("run a --image=i -n default")
    kubectl.run("run b --image=i -n kube-public")
    assert kubectl.run("delete pods --all -A --grace-period=0 --force").count("deleted") >= 3
    assert "No resources found" in kubectl.run("get pods -A")
    kubectl.run("apply -f -", WORLD)


def test_watching_prints_the_events_of_a_selector(kubectl):
    args = ("get", "cm", "-l", "a=1", "-w", "--output-watch-events", "--request-timeout=3s")
    with kubectl.popen(*args) as watching:
        time.sleep(0.7)
        kubectl.run("create configmap seen")
        kubectl.run("label cm seen a=1")
        kubectl.run("annotate cm seen b=2")
        kubectl.run("label cm seen a=2 --overwrite")
        out, _ = watching.communicate(timeout=20)
    lines = [line.split()[:2] for line in out.splitlines()]
    assert lines == [
        ["EVENT", "NAME"],
        ["ADDED", "seen"],
        ["MODIFIED", "seen"],
        ["DELETED", "seen"],
    ]
    kubectl.run("delete cm seen")


def test_invalid_and_misspelt_policies_are_refused_with_the_field(kubectl):
    bad = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bad}
spec: {podSelector: {}, ingress: [{from: [{}]}]}
"""
    refused = kubectl.run("apply -f -", bad, code=1)
    assert '"bad" is invalid: spec.ingress[0].from[0]: Required value' in refused
    refused = kubectl.run("apply -f -", bad.replace("podSelector", "podSelektor"), code=1)
    assert 'strict decoding error: unknown field "spec.podSelektor"' in refused


def test_dry_run_stores_nothing(kubectl):
    assert "(server dry run)" in kubectl.run("apply --dry-run=server -f -", OTHER)
    assert "not found" in kubectl.run("get cm settings", code=1)


def test_explain_knows_the_fields(kubectl):
    found = kubectl.run("explain netpol.spec.ingress.from.ipBlock")
    assert re.search(r"cidr\t<string>", found)
    assert re.search(r"except\t<\[\]string>", found)


def test_custom_resources_are_served_once_defined(kubectl):
    crd = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: tins.food.example}
spec:
  group: food.example
  scope: Namespaced
  names: {kind: Tin, plural: tins, shortNames: [tn]}
  versions:
  - name: v1
    served: true
    storage: true
    additionalPrinterColumns: [{name: Size, type: integer, jsonPath: .spec.size}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [size]
            properties: {size: {type: integer, minimum: 1}}
"""
    tin = "{apiVersion: food.example/v1, kind: Tin, metadata: {name: t}, spec: {size: 3}}"
    kubectl.run("apply -f -", crd)
    kubectl.run("wait --for=condition=Established crd/tins.food.example --timeout=10s")
    kubectl.run("apply -f -", tin)
    assert kubectl.run("get tn").splitlines()[1].split()[:2] == ["t", "3"]
    assert "Invalid" in kubectl.run("apply -f -", tin.replace("size: 3", "size: 0"), code=1)
    kubectl.run("delete crd tins.food.example")
    assert "could not find the requested resource" in kubectl.run("get tins", code=1)
