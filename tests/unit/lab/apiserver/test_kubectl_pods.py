"""Logs, exec and permissions by real kubectl, with commands that run on this machine."""

import pytest

POD = """
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  nodeName: node-1
  containers: [{name: main, image: i}]
"""
REVIEWER = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reviewer}
rules: [{apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reviewer}
roleRef: {kind: ClusterRole, name: reviewer, apiGroup: rbac.authorization.k8s.io}
subjects: [{kind: ServiceAccount, name: agent, namespace: kube-system}]
"""


@pytest.fixture(scope="module", autouse=True)
def _pod(kubectl):
    kubectl.run("apply -f -", POD)


def test_logs_come_from_the_hook(kubectl):
    assert kubectl.run("logs web") == "main 0\nmain 1\nmain 2\n"
    assert kubectl.run("logs web --tail=1") == "main 2\n"
    assert kubectl.run("logs -f web") == "main 0\nmain 1\nmain 2\n"
    assert "is not valid for pod" in kubectl.run("logs web -c other", code=1)


def test_exec_carries_output_errors_and_the_exit_code(kubectl):
    assert kubectl.run("exec web -- echo hello") == "hello\n"
    script = "echo out; echo err >&2; exit 3"
    found = kubectl.run("exec web --", args=("sh", "-c", script), code=3)
    assert found.startswith("out\nerr\n")
    assert "exit code 3" in found


def test_exec_carries_input_to_its_end(kubectl):
    text = "line of input\n" * 20_000
    assert kubectl.run("exec -i web -- cat", text) == text
    assert kubectl.run("exec -i web -- wc -l", "a\nb\n").strip() == "2"


def test_exec_of_what_does_not_exist_fails_with_its_name(kubectl):
    assert "/no/such/command" in kubectl.run("exec web -- /no/such/command", code=1)
    assert "not found" in kubectl.run("exec nobody -- true", code=1)


def test_can_i_answers_for_oneself_and_for_others(kubectl):
    kubectl.run("apply -f -", REVIEWER)
    agent = "--as=system:serviceaccount:kube-system:agent"
    assert kubectl.run("auth can-i create pods") == "yes\n"
    assert kubectl.run(f"auth can-i list netpol {agent}") == "yes\n"
    assert kubectl.run(f"auth can-i delete netpol {agent}", code=1) == "no\n"
    refused = kubectl.run(f"delete netpol x {agent}", code=1)
    assert 'cannot delete resource "networkpolicies" in API group "networking.k8s.io"' in refused


def test_a_service_account_token_has_the_rights_of_its_bindings(kubectl, tmp_path):
    kubectl.run("apply -f -", REVIEWER)
    kubectl.server.kubeconfig(tmp_path / "config", kubectl.server.token_for("kube-system", "agent"))
    env = {"KUBECONFIG": str(tmp_path / "config")}
    assert "No resources found" in kubectl.run("get netpol -A", env=env)
    assert "Forbidden" in kubectl.run("get pods", env=env, code=1)


def test_the_kubeconfig_is_its_owners_alone(kubectl):
    assert (kubectl.folder / "config").stat().st_mode & 0o777 == 0o600
