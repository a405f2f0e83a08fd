"""The manifests of the product: they hold together, and grant no more than the agent needs."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from netpol.config import Settings, load, parser
from proxy.lbcontroller import LEASE_NAME, LEASE_NAMESPACE

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
        ("", "events", "create")
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


def test_the_proxy_may_do_what_the_allocator_does_and_no_more():
    roles = {o["kind"]: o for o in yaml.safe_load_all((MANIFESTS / "proxy/rbac.yaml").read_text())}
    assert roles["ClusterRole"]["rules"] == [
        {"apiGroups": [""], "resources": ["services/status"], "verbs": ["patch"]}
    ]
    create, rest = roles["Role"]["rules"]
    assert create["verbs"] == ["create"]
    assert rest["verbs"] == ["get", "update"]
    assert rest["resourceNames"] == [LEASE_NAME]
    assert roles["Role"]["metadata"]["namespace"] == LEASE_NAMESPACE


def with_component(tmp_path, name):
    """The manifests with a component taken in."""
    folder = tmp_path / "manifests"
    shutil.copytree(MANIFESTS, folder)
    file = folder / "kustomization.yaml"
    file.write_text(
        file.read_text()
        .replace("# components:", "components:")
        .replace(f"#   - {name}", f"  - {name}")
    )
    return folder


@pytest.mark.skipif(not Path(KUBECTL).exists(), reason="no kubectl")
def test_the_proxy_is_a_component_whose_settings_are_good(tmp_path):
    done = subprocess.run(
        [KUBECTL, "kustomize", str(with_component(tmp_path, "proxy"))],
        capture_output=True,
        text=True,
        check=True,
    )
    found = list(yaml.safe_load_all(done.stdout))
    assert sorted(o["kind"] for o in found).count("Role") == 1
    (daemon,) = [o for o in found if o["kind"] == "DaemonSet"]
    pod = daemon["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    given = {e["name"]: e["value"] for e in agent["env"] if "value" in e}
    files = {k: v for k, v in given.items() if k.endswith("_FILE")}
    assert set(files) == {"NETPOL_TOKEN_FILE", "NETPOL_CA_FILE"}
    settings = load(parser().parse_args([]), {k: v for k, v in given.items() if k not in files})
    assert settings.proxy
    mounts = {m["name"]: m["mountPath"] for m in agent["volumeMounts"]}
    assert {v["name"] for v in pod["volumes"]} == set(mounts)
    assert settings.run_dir == mounts["run"]
    assert settings.netns_dir == mounts["netns"]
    ports = {p["containerPort"] for p in agent["ports"]}
    assert int(settings.proxy_health_addr.rpartition(":")[2]) in ports


@pytest.mark.skipif(not Path(KUBECTL).exists(), reason="no kubectl")
def test_routes_are_a_component_with_bird_in_a_container_of_its_own(tmp_path):
    done = subprocess.run(
        [KUBECTL, "kustomize", str(with_component(tmp_path, "routes"))],
        capture_output=True,
        text=True,
        check=True,
    )
    (daemon,) = [o for o in yaml.safe_load_all(done.stdout) if o["kind"] == "DaemonSet"]
    containers = {c["name"]: c for c in daemon["spec"]["template"]["spec"]["containers"]}
    agent, bird = containers["agent"], containers["bird"]
    given = {e["name"]: e["value"] for e in agent["env"] if "value" in e}
    settings = load(parser().parse_args([]), given)
    assert settings.routes
    assert settings.bird_external
    (conf,) = [m for m in agent["volumeMounts"] if m["name"] == "cni-conf"]
    assert conf["mountPath"] == settings.cni_conf_dir
    assert not conf.get("readOnly")
    assert bird["command"] == ["netpol-bird"]
    assert {"name": "run", "mountPath": settings.run_dir} in bird["volumeMounts"]
    assert not bird["securityContext"].get("privileged")


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
