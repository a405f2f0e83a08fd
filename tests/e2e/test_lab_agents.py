"""A lab with agents: policies are in force when `lab probe` looks, whatever happened to an agent before."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netpol.lab import control, launch, processes, spaces
from netpol.lab.plan import STATE_ROOT, netns_prefix

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

KUBECTL = Path(sys.executable).parent / "kubectl"
NAME = f"ta{os.getpid()}"
STATE = STATE_ROOT / NAME

PODS = """
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}},
 spec: {nodeName: node1, containers: [{name: c, image: x, ports: [{containerPort: 80}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: b}},
 spec: {nodeName: node2, containers: [{name: c, image: x, ports: [{containerPort: 80}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: c, namespace: blog, labels: {app: c}},
 spec: {nodeName: node2, containers: [{name: c, image: x, ports: [{containerPort: 80}]}]}}
"""
DENY = """
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: deny, namespace: shop},
 spec: {podSelector: {}, policyTypes: [Ingress]}}
"""
FROM_SHOP = """
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: own, namespace: shop},
 spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}}
"""


def lab(verb: str, *args: str, name: str = NAME) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "netpol.lab.cli", "lab", verb, "--name", name, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def kubectl(*args: str, stdin: str = "") -> str:
    env = os.environ | {"KUBECONFIG": str(STATE / "kubeconfig")}
    command = [str(KUBECTL), *args]
    done = subprocess.run(
        command, input=stdin, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def denied(*args: str) -> set[tuple[str, str]]:
    done = lab("probe", "--port", "80/tcp", "-o", "json", *args)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["verdicts"]["80/TCP"]
    return {(src, dst) for src, row in rows.items() for dst, cell in row.items() if cell == "deny"}


def agent(index: int) -> dict[str, Any]:
    found: dict[str, Any] = control.ask(STATE / "lab.sock", "status")["agents"][index]
    return found


INTO_SHOP = {
    (src, dst)
    for src in ("shop/a", "shop/b", "blog/c")
    for dst in ("shop/a", "shop/b")
    if src != dst
}
FROM_BLOG = {("blog/c", "shop/a"), ("blog/c", "shop/b")}


@pytest.fixture(scope="class")
def up(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("manifests")
    (folder / "pods.yaml").write_text(PODS)
    done = lab("up", "-f", str(folder), "--iptables", request.cls.iptables)
    try:
        assert done.returncode == 0, done.stderr
        yield done
    finally:
        launch.down(NAME)
    assert not spaces.names(netns_prefix(NAME))


@pytest.fixture
def clean(up: subprocess.CompletedProcess[str]) -> Iterator[None]:
    yield
    kubectl("delete", "networkpolicies", "--all", "-n", "shop")


_GET = """
import sys, urllib.request, urllib.error
request = urllib.request.Request("http://172.30.0.1:6443" + sys.argv[1], method=sys.argv[2])
request.add_header("Authorization", "Bearer " + sys.argv[3])
try:
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


class Agents:
    """The claims; each variant of iptables makes them with a lab of its own."""

    iptables = ""

    def test_up_returns_when_every_agent_is_ready(
        self, up: subprocess.CompletedProcess[str]
    ) -> None:
        assert "2 of 2 agents are ready" in up.stderr
        for index in (0, 1):
            line = agent(index)
            assert (line["ready"], line["problem"]) == (True, "")

    @pytest.mark.usefixtures("clean")
    def test_a_policy_is_in_force_for_the_probe_right_behind_it(self) -> None:
        for _ in range(3):
            kubectl("apply", "-f", "-", stdin=DENY)
            assert denied() == INTO_SHOP
            kubectl("apply", "-f", "-", stdin=FROM_SHOP)
            assert denied() == FROM_BLOG
            kubectl("delete", "networkpolicies", "--all", "-n", "shop")
            assert denied() == set()

    @pytest.mark.usefixtures("clean")
    def test_both_families_are_judged(self) -> None:
        kubectl("apply", "-f", "-", stdin=DENY)
        assert denied("--ip-family", "4") == INTO_SHOP
        assert denied("--ip-family", "6") == INTO_SHOP

    @pytest.mark.usefixtures("clean")
    def test_a_pod_that_was_just_created_is_part_of_the_probe(self) -> None:
        kubectl("apply", "-f", "-", stdin=FROM_SHOP)
        text = (
            "{apiVersion: v1, kind: Pod, metadata: {name: d, namespace: shop}, spec: {containers:"
            " [{name: c, image: x, ports: [{containerPort: 80}]}]}}"
        )
        kubectl("apply", "-f", "-", stdin=text)
        assert denied() == FROM_BLOG | {("blog/c", "shop/d")}
        kubectl("delete", "pod", "-n", "shop", "d")
        assert denied() == FROM_BLOG

    @pytest.mark.usefixtures("clean")
    def test_a_killed_agent_comes_back_and_the_probe_waits_for_it(self) -> None:
        before = agent(1)
        control.ask(STATE / "lab.sock", "agent", node="node2", action="kill", signal="SIGKILL")
        kubectl("apply", "-f", "-", stdin=DENY)
        assert denied() == INTO_SHOP
        after = agent(1)
        assert after["restarts"] == before["restarts"] + 1
        assert after["pid"] != before["pid"]

    @pytest.mark.usefixtures("clean")
    def test_without_an_agent_the_probe_says_so_and_does_not_guess(self) -> None:
        control.ask(STATE / "lab.sock", "agent", node="node1", action="stop")
        try:
            done = lab("probe", "--port", "80/tcp")
            assert done.returncode == 3
            assert "agent on node1 does not run" in done.stderr
            assert done.stdout == ""
        finally:
            control.ask(STATE / "lab.sock", "agent", node="node1", action="start")
        assert denied() == set()

    @pytest.mark.usefixtures("up")
    def test_an_agent_reads_only_what_its_role_allows(self) -> None:
        token = (STATE / "node1/token").read_text()
        inside = ["ip", "netns", "exec", f"{netns_prefix(NAME)}node1"]

        def code(path: str, method: str, bearer: str) -> str:
            command = [*inside, sys.executable, "-c", _GET, path, method, bearer]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()

        assert code("/api/v1/pods", "GET", token) == "200"
        assert code("/api/v1/pods", "GET", "another") == "401"
        if (Path(launch.__file__).parents[2] / "manifests/rbac.yaml").exists():
            assert code("/api/v1/namespaces/shop/pods/a", "DELETE", token) == "403"


class TestNft(Agents):
    iptables = "nft"


class TestLegacy(Agents):
    iptables = "legacy"


def test_down_ends_the_agents_of_a_killed_supervisor() -> None:
    name = f"td{os.getpid()}"
    state = STATE_ROOT / name
    try:
        assert lab("up", name=name).returncode == 0
        found = [processes.recorded(state / f"node{i}/agent.process") for i in (1, 2)]
        supervisor = processes.recorded(state / launch.SUPERVISOR_RECORD)
        assert supervisor is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while supervisor.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(process is not None and process.alive for process in found)
        assert lab("down", name=name).returncode == 0
        assert not any(process is not None and process.alive for process in found)
        assert not spaces.names(netns_prefix(name))
        assert not state.exists()
    finally:
        launch.down(name)
