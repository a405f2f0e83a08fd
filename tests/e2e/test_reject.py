"""Agents that reject, are killed, and come back with the other setting: what a client sees meanwhile."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.admin import client
from netpol.audit.record import as_dict, decode_line
from netpol.kernel.netns import open_socket
from netpol.lab import control
from netpol.lab.plan import STATE_ROOT
from tests.e2e.labs import Lab, namespace, pod, policy
from tests.e2e.wire import run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NS, PORT = "rej", 80
SILENCE_S = 0.5


class RejectLab(Lab):
    """A lab whose agents are the test's own."""

    def up_with(self, variant: str, tmp: Path) -> None:
        web = {"containerPort": PORT}
        self.up(
            "--iptables",
            variant,
            manifests=[
                namespace(NS),
                pod(f"{NS}/client", {"app": "client"}, web, node="node1"),
                pod(f"{NS}/near", {"app": "server"}, web, node="node1"),
                pod(f"{NS}/far", {"app": "server"}, web, node="node2"),
                policy(f"{NS}/shut", {"podSelector": {"matchLabels": {"app": "server"}}}),
            ],
            tmp=tmp,
        )
        self.variant, self.tmp = variant, tmp
        self.state = STATE_ROOT / self.name
        found = control.ask(self.state / "lab.sock", "pods")["pods"]
        self.space = {p["name"]: str(p["netns"]) for p in found}
        self.at = {p["name"]: [str(a) for a in p["addresses"]] for p in found}
        for node in control.ask(self.state / "lab.sock", "status")["nodes"]:
            self.space[node["name"]] = node["netns"]

        self.words, self.sockets, self.logs = {}, {}, {}
        for found in control.ask(self.state / "lab.sock", "status")["agents"]:
            proc, node = Path("/proc", str(found["pid"])), found["node"]
            self.words[node] = proc.joinpath("cmdline").read_text().split("\0")[:-1]
            self.sockets[node], self.logs[node] = Path(found["socket"]), Path(found["audit_log"])
            control.ask(self.state / "lab.sock", "agent", node=node, action="stop")

    def clean(self, node: str) -> str:
        """Run `netpol-ctl cleanup`; what it said."""
        lock = self.words[node][self.words[node].index("--xtables-lockfile") + 1]
        words = ["env", f"XTABLES_LOCKFILE={lock}", sys.executable, "-m", "netpol.ctl.main"]
        return run(self.space[node], *words, "cleanup", "--socket", str(self.sockets[node]))

    @contextlib.contextmanager
    def agent(self, node: str, deny_with: str) -> Iterator[None]:
        """The lab's agent with this setting, in sync; killed at the end."""
        words = ["ip", "netns", "exec", self.space[node], *self.words[node]]
        log = self.tmp / f"{node}.log"
        with (
            log.open("a") as out,
            subprocess.Popen([*words, "--deny-with", deny_with], stderr=out) as process,
        ):
            try:
                self._wait(self.sockets[node])
                yield
            finally:
                process.send_signal(signal.SIGKILL)

    @staticmethod
    def _wait(admin: Path) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if client.call(str(admin), "status", timeout_s=1.0)["in_sync"]:
                    return
            time.sleep(0.05)
        raise AssertionError("the agent is not in sync")


@pytest.fixture(scope="module", params=["nft", "legacy"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RejectLab]:
    lab = RejectLab(f"rej{request.param[0]}")
    try:
        lab.up_with(request.param, tmp_path_factory.mktemp("reject"))
        yield lab
    finally:
        lab.down()


@pytest.fixture
def lab(made: RejectLab) -> RejectLab:
    """Nodes without rules."""
    for node in made.words:
        made.clean(node)
    return made


def connect(lab: RejectLab, to: str, family: int) -> str:
    """How a client's connection ends: "", "silence", or the error's name."""
    address = lab.at[to][0 if family == 4 else 1]
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with open_socket(lab.space["client"], kind) as sock:
        sock.settimeout(SILENCE_S)
        try:
            sock.connect((address, PORT))
        except TimeoutError:
            return "silence"
        except OSError as e:
            return errno.errorcode[e.errno or 0]
    return ""


def everybody(lab: RejectLab) -> set[str]:
    return {connect(lab, to, family) for to in ("near", "far") for family in (4, 6)}


class Storm:
    """Connects all the time, and counts how it ends."""

    def __init__(self, lab: RejectLab) -> None:
        self.ends: Counter[str] = Counter()
        self._lab, self._stop = lab, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(to, family))
            for to in ("near", "far")
            for family in (4, 6)
        ]

    def _run(self, to: str, family: int) -> None:
        while not self._stop.is_set():
            self.ends[connect(self._lab, to, family)] += 1
            time.sleep(0.002)

    def __enter__(self) -> Counter[str]:
        for thread in self._threads:
            thread.start()
        return self.ends

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_killed_agents_that_change_the_setting_let_nothing_through(lab: RejectLab) -> None:
    assert everybody(lab) == {""}, "without rules everybody is answered"
    with lab.agent("node1", "drop"), lab.agent("node2", "drop"):
        assert everybody(lab) == {"silence"}
    assert everybody(lab) == {"silence"}, "a killed agent leaves its rules"
    with Storm(lab) as ends:
        for deny_with in ("reject", "drop", "reject"):
            with lab.agent("node1", deny_with), lab.agent("node2", deny_with):
                time.sleep(0.3)
    assert ends[""] == 0, ends
    assert set(ends) == {"silence", "ECONNREFUSED"}
    assert everybody(lab) == {"ECONNREFUSED"}, "answers stay, too"
    assert "-j KNP-REJECT" in run(lab.space["node1"], f"iptables-{lab.variant}-save")


def test_cleanup_takes_the_answers_away(lab: RejectLab) -> None:
    with lab.agent("node1", "reject"):
        assert connect(lab, "near", 4) == "ECONNREFUSED"
    assert "removed" in lab.clean("node1")
    for tool in ("iptables", "ip6tables"):
        assert "KNP-" not in run(lab.space["node1"], f"{tool}-{lab.variant}-save")
    assert connect(lab, "near", 4) == ""


def test_the_log_says_the_same(lab: RejectLab) -> None:
    """Line for line, but for the time and the source's port."""
    told = {}
    for deny_with in ("drop", "reject"):
        before = len(lab.logs["node1"].read_text().splitlines())
        with lab.agent("node1", deny_with):
            assert connect(lab, "near", 4) == ("silence" if deny_with == "drop" else "ECONNREFUSED")
            lines: list[str] = []
            deadline = time.monotonic() + 10
            while not lines and time.monotonic() < deadline:
                time.sleep(0.1)
                lines = lab.logs["node1"].read_text().splitlines()[before:]
        records = [as_dict(decode_line(line)) for line in lines]
        for record in records:
            record["src"].pop("port")
            del record["ts"], record["generation"]
        told[deny_with] = records
    assert told["drop"] == told["reject"]
    (record,) = told["drop"]
    assert (record["reason"], record["dst"]["name"]) == ("denied", f"{NS}/near")
