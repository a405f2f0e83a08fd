"""The lab as people use it: its command line, real kubectl, and whatever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.lab import launch, processes, spaces
from netpol.lab.assets import from_environment
from netpol.lab.plan import STATE_ROOT, netns_prefix

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

KUBECTL = Path(sys.executable).parent / "kubectl"
NAME = f"te{os.getpid()}"

MANIFESTS = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: node1
  containers:
  - name: c
    image: web
    ports:
    - {name: http, containerPort: 80}
    - {containerPort: 53, protocol: UDP}
    - {containerPort: 3868, protocol: SCTP}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec:
  nodeName: node2
  containers: [{name: c, image: db, ports: [{containerPort: 5432}]}]
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: v1
kind: Pod
metadata: {name: scheduled}
spec: {containers: [{name: c, image: x}]}
"""


def lab(verb: str, *args: str, name: str = NAME) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "netpol.lab.cli", "lab", verb, "--name", name, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def kubectl(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"KUBECONFIG": str(STATE_ROOT / NAME / "kubeconfig")}
    command = [str(KUBECTL), *args]
    return subprocess.run(
        command, input=stdin, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def nothing_left(name: str) -> bool:
    return not spaces.names(netns_prefix(name)) and not (STATE_ROOT / name).exists()


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifests")
    (folder / "all.yaml").write_text(MANIFESTS)
    return folder


@pytest.fixture(scope="module")
def up(manifests: Path) -> Iterator[None]:
    done = lab("up", "--no-agent", "-f", str(manifests))
    assert done.returncode == 0, done.stderr
    yield
    good(lab("down"))
    assert nothing_left(NAME)


@pytest.fixture
def other() -> Iterator[str]:
    """The name of a second lab, which is gone after the test."""
    name = f"tx{os.getpid()}"
    yield name
    launch.down(name)
    assert nothing_left(name)


# What is up is usable


@pytest.mark.usefixtures("up")
class TestUp:
    def test_pods_run_with_addresses_of_their_node(self) -> None:
        found = json.loads(good(kubectl("get", "pods", "-A", "-o", "json")))["items"]
        assert {pod["metadata"]["name"] for pod in found} == {"web", "db", "scheduled"}
        for pod in found:
            status = pod["status"]
            index = pod["spec"]["nodeName"].removeprefix("node")
            assert status["phase"] == "Running"
            assert status["podIP"].startswith(f"10.244.{index}.")
            assert status["podIPs"][1]["ip"].startswith(f"fd00:10:244:{index}::")
            ready = {c["type"]: c["status"] for c in status["conditions"]}
            assert ready["Ready"] == "True"

    def test_nodes_have_addresses_and_podcidrs(self) -> None:
        found = json.loads(good(kubectl("get", "nodes", "-o", "json")))["items"]
        assert [node["spec"]["podCIDRs"][0] for node in found] == ["10.244.1.0/24", "10.244.2.0/24"]
        assert [node["status"]["addresses"][0]["address"] for node in found] == [
            "172.30.0.11",
            "172.30.0.12",
        ]

    def test_a_second_up_is_refused_and_says_what_to_do(self) -> None:
        done = lab("up", "--no-agent")
        assert done.returncode == 2
        assert f"lab down --name {NAME}" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_the_supervisor_keeps_no_terminal_and_no_file_of_its_caller(self, other: str) -> None:
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        command = [sys.executable, "-m", "netpol.lab.cli", "lab", "up", "--no-agent"]
        subprocess.run(
            [*command, "--name", other],
            capture_output=True,
            check=True,
            close_fds=False,
            timeout=60,
        )
        os.close(writer)
        assert os.read(reader, 1) == b""  # nobody else holds the other end
        os.close(reader)
        supervisor = processes.recorded(STATE_ROOT / other / launch.SUPERVISOR_RECORD)
        assert supervisor is not None
        fields = Path(f"/proc/{supervisor.pid}/stat").read_text().rpartition(")")[2].split()
        assert fields[4] == "0"  # tty_nr
        assert os.getsid(supervisor.pid) == supervisor.pid

    def test_exec_runs_in_the_pods_network_with_its_names(self) -> None:
        inside = good(kubectl("exec", "-n", "shop", "web", "--", "sh", "-c", "hostname; ip -br a"))
        assert inside.startswith("web\n")
        assert "10.244.1." in inside
        for target in ("db", "db.shop", "headless", "headless.shop.svc.cluster.local"):
            done = kubectl("exec", "-n", "shop", "web", "--", "nc", "-vz", target, "5432")
            assert done.returncode == 0, (target, done.stderr)

    def test_exec_hands_on_input_and_exit_code(self) -> None:
        done = kubectl("exec", "-i", "-n", "shop", "web", "--", "cat", stdin="hello\n")
        assert good(done) == "hello\n"
        done = kubectl("exec", "-n", "shop", "web", "--", "sh", "-c", "exit 7")
        assert done.returncode == 7

    def test_exec_has_a_terminal_when_asked(self) -> None:
        inner = f"{KUBECTL} exec -it scheduled -- sh -c 'test -t 0 && tty; read x; echo got $x'"
        done = subprocess.run(
            ["script", "-qec", inner, "/dev/null"],
            input="word\n",
            env=os.environ | {"KUBECONFIG": str(STATE_ROOT / NAME / "kubeconfig")},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert "/dev/pts/" in done.stdout
        assert "got word" in done.stdout

    def test_exec_leaves_the_machines_own_names_alone(self) -> None:
        before = Path("/etc/hosts").read_text() if Path("/etc/hosts").exists() else ""
        good(kubectl("exec", "-n", "shop", "web", "--", "getent", "hosts", "db"))
        after = Path("/etc/hosts").read_text() if Path("/etc/hosts").exists() else ""
        assert after == before
        assert "knp-" not in Path("/proc/self/mounts").read_text().replace("/netns/knp-", "")

    def test_logs_show_who_was_answered(self) -> None:
        good(kubectl("exec", "-n", "shop", "web", "--", "nc", "-z", "-4", "db", "5432"))
        source = json.loads(good(kubectl("get", "pod", "-n", "shop", "web", "-o", "json")))
        text = good(kubectl("logs", "-n", "shop", "db", "--tail", "1"))
        assert "TCP 5432" in text
        assert f"from {source['status']['podIP']}:" in text

    def test_slices_follow_pods(self) -> None:
        def addresses() -> set[str]:
            text = good(
                kubectl(
                    "get", "endpointslices", "-n", "shop", "-o", "json",
                    "-l", "kubernetes.io/service-name=headless",
                )
            )  # fmt: skip
            items = json.loads(text)["items"]
            return {e["addresses"][0] for item in items for e in item["endpoints"] or ()}

        before = addresses()
        assert len(before) == 1
        good(kubectl("label", "pod", "-n", "shop", "web", "app=db", "--overwrite"))
        deadline = time.monotonic() + 5
        while len(addresses()) != 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(addresses()) == 2
        good(kubectl("label", "pod", "-n", "shop", "web", "app=web", "--overwrite"))
        while addresses() != before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert addresses() == before

    def test_a_pod_comes_and_goes_by_kubectl(self) -> None:
        good(kubectl("run", "visitor", "--image=any", "--port=8080"))
        good(kubectl("wait", "--for=condition=Ready", "pod/visitor", "--timeout=10s"))
        before = len(spaces.names(netns_prefix(NAME)))
        good(kubectl("delete", "pod", "visitor", "--timeout=10s"))
        assert len(spaces.names(netns_prefix(NAME))) == before - 1

    def test_a_pod_replaced_by_force_is_served_as_the_new_one(self) -> None:
        good(kubectl("run", "again", "--image=any", "--port=8080"))
        good(kubectl("wait", "--for=condition=Ready", "pod/again", "--timeout=10s"))
        good(kubectl("delete", "pod", "again", "--force", "--grace-period=0"))
        good(kubectl("run", "again", "--image=any", "--port=8081"))
        good(kubectl("wait", "--for=condition=Ready", "pod/again", "--timeout=10s"))
        good(kubectl("exec", "-n", "shop", "web", "--", "nc", "-z", "again.default", "8081"))
        good(kubectl("delete", "pod", "again", "--timeout=10s"))

    def test_a_namespace_goes_with_its_pods(self) -> None:
        text = '{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"passing"}}'
        good(kubectl("apply", "-f", "-", stdin=text))
        good(kubectl("run", "-n", "passing", "a", "--image=any"))
        good(kubectl("wait", "-n", "passing", "--for=condition=Ready", "pod/a", "--timeout=10s"))
        good(kubectl("delete", "namespace", "passing", "--timeout=10s"))
        assert kubectl("get", "namespace", "passing").returncode == 1

    def test_a_pod_in_the_hosts_network_has_the_nodes_addresses(self) -> None:
        text = (
            '{"apiVersion":"v1","kind":"Pod","metadata":{"name":"host"},"spec":{"nodeName":"node2",'
            '"hostNetwork":true,"containers":[{"name":"c","image":"x",'
            '"ports":[{"containerPort":9000}]}]}}'
        )
        good(kubectl("apply", "-f", "-", stdin=text))
        good(kubectl("wait", "--for=condition=Ready", "pod/host", "--timeout=10s"))
        good(kubectl("exec", "-n", "shop", "web", "--", "nc", "-z", "172.30.0.12", "9000"))
        good(kubectl("delete", "pod", "host", "--timeout=10s"))

    def test_a_pod_that_fits_nowhere_waits_with_a_reason_and_is_scheduled_later(self) -> None:
        text = (
            '{"apiVersion":"v1","kind":"Pod","metadata":{"name":"picky"},"spec":{"nodeSelector":'
            '{"disk":"ssd"},"containers":[{"name":"c","image":"x"}]}}'
        )
        good(kubectl("apply", "-f", "-", stdin=text))
        good(kubectl("wait", "--for=condition=PodScheduled=false", "pod/picky", "--timeout=10s"))
        assert "FailedScheduling" in good(kubectl("get", "events"))
        good(kubectl("label", "node", "node2", "disk=ssd"))
        good(kubectl("wait", "--for=condition=Ready", "pod/picky", "--timeout=10s"))
        good(kubectl("delete", "pod", "picky", "--timeout=10s"))

    def test_probe_prints_the_matrix_as_json_and_as_text(self) -> None:
        args = ("--port", "80/tcp", "--port", "53/udp", "--port", "3868/SCTP", "--port", "http")
        done = lab("probe", *args, "-o", "json")
        document = json.loads(good(done))
        assert set(document["verdicts"]) == {"80/TCP", "53/UDP", "3868/SCTP"}
        assert document["pods"] == ["default/scheduled", "shop/db", "shop/web"]
        for rows in document["verdicts"].values():
            assert {cell for row in rows.values() for cell in row.values()} == {"allow"}
        text = good(lab("probe", "--port", "80/tcp", "--ip-family", "6"))
        assert text.startswith("6 of 6 flows pass")

    def test_exec_of_the_lab_runs_in_a_nodes_namespace(self) -> None:
        assert "kube-bridge" in good(lab("exec", "node1", "--", "ip", "-br", "link"))
        done = lab("exec", "node9", "--", "true")
        assert done.returncode == 3
        assert "node1, node2" in done.stderr

    def test_status_and_kubeconfig(self) -> None:
        status = json.loads(good(lab("status", "-o", "json")))
        assert [node["name"] for node in status["nodes"]] == ["node1", "node2"]
        assert status["waiting"] == []
        assert good(lab("status")).startswith(f"lab '{NAME}' is ready: 2 nodes, 3 pods, 0 agents")
        assert Path(good(lab("kubeconfig")).strip()).stat().st_mode & 0o777 == 0o600

    def test_without_the_token_nobody_gets_in(self) -> None:
        url = json.loads(good(lab("status", "-o", "json")))["api_server"]
        done = kubectl(
            "--kubeconfig=/dev/null", f"--server={url}", "--insecure-skip-tls-verify",
            "--token=wrong", "get", "pods",
        )  # fmt: skip
        assert done.returncode != 0
        assert "scheduled" not in done.stdout


# What does not come up leaves nothing


def test_down_of_nothing_is_no_error() -> None:
    done = lab("down", name="tnone")
    assert done.returncode == 0
    assert "was not up" in done.stdout


def test_a_pod_on_an_unknown_node_is_refused_before_anything_is_made(
    tmp_path: Path, other: str
) -> None:
    (tmp_path / "a.yaml").write_text(
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {nodeName: node7}}"
    )
    done = lab("up", "--no-agent", "-f", str(tmp_path), name=other)
    assert done.returncode == 2
    assert "a.yaml: document 1" in done.stderr
    assert nothing_left(other)


def test_what_the_api_server_refuses_is_told_with_its_document(tmp_path: Path, other: str) -> None:
    (tmp_path / "a.yaml").write_text(
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p},"
        " spec: {podSelector: {}, ingress: [{ports: [{port: 99999}]}]}}"
    )
    done = lab("up", "--no-agent", "-f", str(tmp_path), name=other)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "a.yaml: document 1" in last
    assert "port" in last
    assert nothing_left(other)


def test_what_does_not_get_ready_in_time_is_named_and_taken_down(
    tmp_path: Path, other: str
) -> None:
    (tmp_path / "a.yaml").write_text(
        "{apiVersion: v1, kind: Pod, metadata: {name: picky},"
        " spec: {nodeSelector: {disk: ssd}, containers: [{name: c, image: x}]}}"
    )
    # A real API server needs some seconds of this for its own start.
    timeout_s = "1" if from_environment(os.environ) is None else "15"
    done = lab("up", "--no-agent", "-f", str(tmp_path), "--timeout-s", timeout_s, name=other)
    assert done.returncode == 3
    assert "pod default/picky" in done.stderr.strip().splitlines()[-1]
    assert nothing_left(other)


def test_missing_plugins_are_named(tmp_path: Path, other: str) -> None:
    done = lab("up", "--no-agent", "--cni-dir", str(tmp_path), name=other)
    assert done.returncode == 3
    assert "host-local" in done.stderr
    assert nothing_left(other)


def test_a_killed_supervisor_is_noticed_and_down_still_removes_all(other: str) -> None:
    good(lab("up", "--no-agent", name=other))
    supervisor = processes.recorded(STATE_ROOT / other / launch.SUPERVISOR_RECORD)
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while supervisor.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    done = lab("status", name=other)
    assert done.returncode == 3
    assert "lab down" in done.stderr
    good(lab("down", name=other))
    assert nothing_left(other)


def test_an_up_that_is_ended_takes_down_what_it_began(tmp_path: Path, other: str) -> None:
    (tmp_path / "a.yaml").write_text(
        "{apiVersion: v1, kind: Pod, metadata: {name: picky},"
        " spec: {nodeSelector: {disk: ssd}, containers: [{name: c, image: x}]}}"
    )
    command = [sys.executable, "-m", "netpol.lab.cli", "lab", "up", "--name", other, "--no-agent"]
    with subprocess.Popen([*command, "-f", str(tmp_path)], stderr=subprocess.PIPE) as starting:
        assert starting.stderr is not None
        while b"picky" not in (line := starting.stderr.readline()):
            assert line, "it ended by itself"
        starting.terminate()
        starting.stderr.read()
        assert starting.wait(timeout=10) == 130
    assert nothing_left(other)


def test_up_after_a_killed_supervisor_starts_anew(other: str) -> None:
    good(lab("up", "--no-agent", name=other))
    supervisor = processes.recorded(STATE_ROOT / other / launch.SUPERVISOR_RECORD)
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    done = lab("up", "--no-agent", name=other)
    assert done.returncode == 0, done.stderr
    assert "removing what an ended lab left behind" in done.stderr


def test_down_ends_recorded_processes_and_never_a_pid_that_was_used_again(other: str) -> None:
    good(lab("up", "--no-agent", name=other))
    node = STATE_ROOT / other / "node1"
    with subprocess.Popen(["sleep", "60"]) as mine, subprocess.Popen(["sleep", "60"]) as agent:
        processes.record(node / "agent.process", agent.pid)
        stale = processes.identify(mine.pid)
        assert stale is not None
        old = stale._replace(start_ticks=stale.start_ticks - 1)._asdict()
        (STATE_ROOT / other / "node2/agent.process").write_text(json.dumps(old))
        good(lab("down", name=other))
        assert agent.wait(timeout=5) < 0
        assert mine.poll() is None
        mine.kill()


def test_two_labs_run_beside_each_other(other: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MANIFESTS)
    third = f"ty{os.getpid()}"
    try:
        good(lab("up", "--no-agent", "-f", str(tmp_path), name=other))
        done = lab("up", "--no-agent", "-f", str(tmp_path), "--ip-family", "4", name=third)
        assert done.returncode == 0, done.stderr
        good(lab("down", name=other))
        assert good(lab("probe", "--port", "80", name=third)).startswith("6 of 6 flows pass")
    finally:
        launch.down(third)
