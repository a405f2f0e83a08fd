"""The lab on the API server that the environment asks for, and what is said when that one does not start.

All tests of this folder run on a real API server where envtest's two variables name one. Those here ask
what must be so on both kinds, and, with programs that only pretend, what a lab says of a server that it
cannot use.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netpol.lab import launch, processes, spaces
from netpol.lab.assets import API_SERVER_VARIABLE, ETCD_VARIABLE, from_environment
from netpol.lab.plan import STATE_ROOT, LabPlan, netns_prefix
from tests.e2e.labs import BIN, Json, Lab, pod, policy

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

DEFINITION: Json = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "things.example.com"},
    "spec": {
        "group": "example.com",
        "scope": "Namespaced",
        "names": {"plural": "things", "singular": "thing", "kind": "Thing"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}
SERVICE: Json = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"selector": {"app": "a"}, "ports": [{"port": 80}]},
}


# On whichever server is asked for


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab("api")
    thing = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "mine"}}
    manifests = [DEFINITION, pod("shop/a", {"app": "a"}, {"containerPort": 80}), SERVICE]
    try:
        lab.up("--no-agent", manifests=manifests, tmp=tmp_path_factory.mktemp("api"))
        lab.apply([thing])
        yield lab
    finally:
        lab.down()


def test_the_server_is_the_one_that_was_asked_for(lab: Lab) -> None:
    version = json.loads(lab.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    status = json.loads(lab.ctl("lab", "status", "--name", lab.name, "-o", "json").stdout)
    assets = from_environment(os.environ)
    if assets is None:
        assert version.endswith("netpol-lab")
        assert status["api_server_program"] == "embedded"
    else:
        assert "netpol" not in version
        assert status["api_server_program"] == assets.kube_apiserver


def test_what_a_manifest_defines_is_served(lab: Lab) -> None:
    assert lab.kubectl("get", "things", "-o", "name").strip() == "thing.example.com/mine"


def test_every_namespace_has_a_default_account(lab: Lab) -> None:
    for namespace in ("default", "shop"):
        _eventually(lambda name=namespace: "default" in lab.kubectl("get", "sa", "-n", name))


def test_a_service_has_an_address_of_each_family_and_its_pods_as_endpoints(lab: Lab) -> None:
    service = {**SERVICE, "spec": {**SERVICE["spec"], "ipFamilyPolicy": "PreferDualStack"}}
    lab.apply([service])
    spec = json.loads(lab.kubectl("get", "service", "-n", "shop", "web", "-o", "json"))["spec"]
    assert [address[:6] for address in spec["clusterIPs"]] == ["10.96.", "fd00:1"]
    status = json.loads(lab.kubectl("get", "pod", "-n", "shop", "a", "-o", "json"))["status"]
    addresses = {entry["ip"] for entry in status["podIPs"]}

    def endpoints() -> set[str]:
        text = lab.kubectl("get", "endpointslices", "-n", "shop", "-o", "json")
        return {
            address
            for item in json.loads(text)["items"]
            for endpoint in item["endpoints"] or ()
            for address in endpoint["addresses"]
        }

    _eventually(lambda: endpoints() == addresses)


def test_a_namespace_ends_with_whatever_kind_is_in_it(lab: Lab) -> None:
    thing = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "t"}}
    lab.kubectl("create", "namespace", "passing")
    thing["metadata"]["namespace"] = "passing"
    lab.apply([thing, pod("passing/a", {}), {**SERVICE, "metadata": {"name": "s"}}])
    lab.kubectl("wait", "-n", "passing", "--for=condition=Ready", "pod/a", "--timeout=10s")
    lab.kubectl("delete", "namespace", "passing", "--timeout=20s")
    assert "passing" not in lab.kubectl("get", "namespaces")


def test_logs_are_followed_while_they_come(lab: Lab) -> None:
    words = [str(BIN / "kubectl"), "logs", "-f", "-n", "shop", "a"]
    env = {**os.environ, "KUBECONFIG": lab.kubeconfig}
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as following:
        try:
            lab.kubectl("exec", "-n", "shop", "a", "--", "nc", "-z", "-4", "a", "80")
            assert following.stdout is not None
            assert "TCP 80" in following.stdout.readline()
        finally:
            following.kill()


def test_what_a_kubelet_answers_is_for_the_api_server_alone(lab: Lab) -> None:
    """A pod reaches the node's addresses; without a certificate it gets no command run there."""
    at = "https://172.30.0.11:10250/containerLogs/shop/a/c0"
    script = (
        "import ssl,urllib.request as r;c=ssl.create_default_context();c.check_hostname=False;"
        f"c.verify_mode=ssl.CERT_NONE;print(r.urlopen('{at}',context=c,timeout=5).status)"
    )
    words = ["exec", "-n", "shop", "a", "--", sys.executable, "-c", script]
    done = subprocess.run(
        [str(BIN / "kubectl"), *words],
        env={**os.environ, "KUBECONFIG": lab.kubeconfig},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert "200" not in done.stdout


def test_down_after_a_killed_supervisor_leaves_no_process_of_the_wire() -> None:
    lab = Lab("apk")
    switch = LabPlan(name=lab.name).switch_netns
    try:
        lab.up("--no-agent")
        before = spaces.pids([switch])
        assert bool(before) is (from_environment(os.environ) is not None)
        supervisor = processes.recorded(STATE_ROOT / lab.name / launch.SUPERVISOR_RECORD)
        assert supervisor is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        assert spaces.pids([switch]) == before
        servers = [processes.identify(pid) for pid in before]
    finally:
        lab.down()
    assert not any(server is not None and server.alive for server in servers)
    assert not spaces.names(netns_prefix(lab.name))
    assert not (STATE_ROOT / lab.name).exists()


# Programs that only pretend

ETCD = "exec sleep 600"
ROOT = Path(__file__).resolve().parents[2]
STAND_IN = f'PYTHONPATH={ROOT} exec {sys.executable} -m tests.e2e.standin_apiserver "$@"'
OLD_SERVER = f"""exec {sys.executable} - "$@" <<'PYTHON'
import http.server, json, ssl, sys
flags = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])

class Old(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = {{"/readyz": {{}}, "/version": {{"gitVersion": "v1.20.2"}}}}.get(self.path)
        self.send_response(404 if known is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(known or {{}}).encode())

server = http.server.HTTPServer((flags["bind-address"], int(flags["secure-port"])), Old)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(flags["tls-cert-file"], flags["tls-private-key-file"])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
PYTHON
"""


@pytest.fixture
def unused() -> Iterator[str]:
    """The name of a lab of which nothing may be left."""
    name = f"apx{os.getpid() % 10000}"
    yield name
    left = spaces.names(netns_prefix(name)), (STATE_ROOT / name).exists()
    launch.down(name)
    assert left == ([], False)


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def refused(name: str, *args: str, api_server: str, etcd: str) -> tuple[int, str]:
    """Try to start a lab on these programs; return the exit code and the last line."""
    done = subprocess.run(
        [sys.executable, "-m", "netpol.lab.cli", "lab", "up", "--no-agent", "--name", name, *args],
        env={**os.environ, API_SERVER_VARIABLE: api_server, ETCD_VARIABLE: etcd},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Lab]:
    """A lab with agents whose API server is another process on the lab's wire."""
    lab = Lab("ape")
    lab.env = {
        API_SERVER_VARIABLE: program(tmp_path / "kube-apiserver", STAND_IN),
        ETCD_VARIABLE: program(tmp_path / "etcd", ETCD),
    }
    manifests = [
        pod(f"shop/{name}", {"app": name}, {"containerPort": 80}, node=node)
        for name, node in (("a", "node1"), ("b", "node2"))
    ]
    try:
        lab.up(manifests=manifests, tmp=tmp_path)
        yield lab
    finally:
        lab.down()
    assert not spaces.names(netns_prefix(lab.name))


def test_a_lab_whose_server_is_another_process_is_a_lab(elsewhere: Lab) -> None:
    """Every probe comes right behind a change: the agents have applied it, quiet watches or not."""
    status = json.loads(
        elsewhere.ctl("lab", "status", "--name", elsewhere.name, "-o", "json").stdout
    )
    assert status["api_server_program"] == elsewhere.env[API_SERVER_VARIABLE]
    deny = policy("shop/deny", {"podSelector": {"matchLabels": {"app": "b"}}})
    for _ in range(2):
        elsewhere.apply([deny])
        assert elsewhere.probe("80/TCP")["verdicts"]["80/TCP"]["shop/a"]["shop/b"] == "deny"
        assert elsewhere.probe("80/TCP", family=6)["verdicts"]["80/TCP"]["shop/b"]["shop/a"] == (
            "allow"
        )
        elsewhere.kubectl("label", "pod", "-n", "shop", "b", "app=c", "--overwrite")
        assert elsewhere.probe("80/TCP")["verdicts"]["80/TCP"]["shop/a"]["shop/b"] == "allow"
        elsewhere.kubectl("label", "pod", "-n", "shop", "b", "app=b", "--overwrite")
        assert elsewhere.probe("80/TCP")["verdicts"]["80/TCP"]["shop/a"]["shop/b"] == "deny"
        elsewhere.kubectl("delete", "networkpolicy", "-n", "shop", "deny")
        assert elsewhere.probe("80/TCP")["verdicts"]["80/TCP"]["shop/a"]["shop/b"] == "allow"


def test_a_server_that_ends_later_takes_the_lab_with_it(elsewhere: Lab) -> None:
    state = STATE_ROOT / elsewhere.name
    server = processes.recorded(state / "api/kube-apiserver.process")
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    _eventually(lambda: not launch.is_up(elsewhere.name))
    assert "kube-apiserver" in (state / launch.SUPERVISOR_LOG).read_text()
    done = elsewhere.ctl("lab", "status", "--name", elsewhere.name)
    assert done.returncode == 3
    assert "lab down" in done.stderr


def test_one_variable_alone_is_refused_before_anything_is_made(unused: str) -> None:
    code, text = refused(unused, api_server="/bin/true", etcd="")
    assert code == 2
    assert f"{API_SERVER_VARIABLE} is set and {ETCD_VARIABLE} is not" in text


def test_a_missing_program_is_named_before_anything_is_made(unused: str) -> None:
    code, text = refused(unused, api_server="/no/such/kube-apiserver", etcd="/bin/true")
    assert code == 3
    assert API_SERVER_VARIABLE in text
    assert "/no/such/kube-apiserver" in text


def test_a_server_that_ends_at_once_is_quoted(unused: str, tmp_path: Path) -> None:
    api_server = program(tmp_path / "kube-apiserver", "echo first; echo unknown flag: --x; exit 1")
    etcd = program(tmp_path / "etcd", ETCD)

    code, text = refused(unused, api_server=api_server, etcd=etcd)

    assert code == 3
    expected = f"kube-apiserver ({API_SERVER_VARIABLE}={api_server}) ended by exit code 1"
    assert expected in text
    assert text.endswith("got unknown flag: --x")


def test_an_etcd_that_ends_at_once_is_quoted(unused: str, tmp_path: Path) -> None:
    api_server = program(tmp_path / "kube-apiserver", "exec sleep 60")
    etcd = program(tmp_path / "etcd", "echo address in use; kill -9 $$")

    code, text = refused(unused, api_server=api_server, etcd=etcd)

    assert code == 3
    assert f"etcd ({ETCD_VARIABLE}={etcd}) ended by signal SIGKILL" in text
    assert text.endswith("got address in use")


def test_a_server_that_never_answers_is_told_with_its_last_words(
    unused: str, tmp_path: Path
) -> None:
    api_server = program(tmp_path / "kube-apiserver", "echo waiting for storage; exec sleep 60")
    etcd = program(tmp_path / "etcd", ETCD)

    code, text = refused(unused, "--timeout-s", "2", api_server=api_server, etcd=etcd)

    assert code == 3
    assert "ready within 2 s" in text
    assert "kube-apiserver: waiting for storage" in text


def test_a_server_that_is_too_old_is_refused_by_its_version(unused: str, tmp_path: Path) -> None:
    api_server = program(tmp_path / "kube-apiserver", OLD_SERVER)
    etcd = program(tmp_path / "etcd", ETCD)

    code, text = refused(unused, api_server=api_server, etcd=etcd)

    assert code == 3
    assert f"{API_SERVER_VARIABLE}={api_server} is too old" in text
    assert "discovery.k8s.io/v1" in text
    assert text.endswith("got v1.20.2")


def test_a_program_that_the_kernel_cannot_run_is_named(unused: str, tmp_path: Path) -> None:
    broken = tmp_path / "etcd"
    broken.write_text("this is no program")
    broken.chmod(0o755)

    code, text = refused(unused, api_server="/bin/true", etcd=str(broken))

    assert code == 3
    assert f"etcd ({ETCD_VARIABLE}={broken}) ended" in text


def _eventually(claim: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.05)
