"""The manifests of the product: they hold together, and grant no more than the agent needs."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from netpol.config import Settings, load, parser

MANIFESTS = Path(__file__).parents[3] / "manifests"
KUBECTL = shutil.which("kubectl") or str(Path(__file__).parents[3] / ".venv" / "bin" / "kubectl")


def objects(name):
    return {o["kind"]: o for o in yaml.safe_load_all((MANIFESTS / name).read_text())}


def test_the_role_reads_six_kinds_and_writes_events():
    rules = objects("rbac.yaml")["ClusterRole"]["rules"]
    allowed = {
        (group, resource, verb)
        for r in rules
        for group in r["apiGroups"]
        for resource in r["resources"]
        for verb in r["verbs"]
    }
    read = {("", k) for k in ("namespaces", "pods", "nodes", "services")}
    read |= {("networking.k8s.io", "networkpolicies"), ("discovery.k8s.io", "endpointslices")}
    assert allowed == {(g, k, v) for g, k in read for v in ("get", "list", "watch")} | {
        (g, "events", v) for g in ("", "events.k8s.io") for v in ("create", "patch")
    }


def test_the_documented_settings_are_the_defaults(tmp_path):
    text = objects("config.yaml")["ConfigMap"]["data"]["config.yaml"]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    flags = parser().parse_args(["--config", str(file)])
    found = load(flags, {}, host_name="n1")
    assert dataclasses.asdict(found) == dataclasses.asdict(Settings(node="n1"))


def test_the_daemonset_uses_what_the_others_define():
    pod = objects("daemonset.yaml")["DaemonSet"]["spec"]["template"]["spec"]
    agent = pod["containers"][0]
    mounts = {m["name"]: m["mountPath"] for m in agent["volumeMounts"]}
    assert {v["name"] for v in pod["volumes"]} == set(mounts)
    assert pod["serviceAccountName"] == objects("rbac.yaml")["ServiceAccount"]["metadata"]["name"]
    assert pod["hostNetwork"] is True
    settings = Settings()
    assert settings.admin_socket.startswith(mounts["run"] + "/")
    assert agent["ports"][0]["containerPort"] == int(settings.health_addr.rpartition(":")[2])
    assert agent["env"][0]["name"] == "NETPOL_NODE"


@pytest.mark.skipif(not Path(KUBECTL).exists(), reason="no kubectl")
def test_kustomize_builds_all_of_it():
    done = subprocess.run(
        [KUBECTL, "kustomize", str(MANIFESTS)], capture_output=True, text=True, check=True
    )
    kinds = sorted(o["kind"] for o in yaml.safe_load_all(done.stdout))
    assert kinds == [
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "DaemonSet",
        "ServiceAccount",
    ]
