"""Agents that start, die and come back: the hold at boot, the rules in between, the right end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.admin import client
from netpol.lab import control
from netpol.lab.plan import STATE_ROOT
from tests.e2e.labs import Dice, Lab, nine_pods
from tests.e2e.wire import reaches, run
from tests.kernel.probespaces import Bridge

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROBED = ("80/TCP", "81/TCP", "80/UDP")
#: NETPOL_KILLS=200 for a long night.
ROUNDS = int(os.environ.get("NETPOL_KILLS", "6"))
RANGES = ("10.9.0.0/16", "fd09::/64")


class Boot:
    """A node that boots: no rule, no pod yet, and an API server that nobody can reach.

    Its pods come while the agent runs: they leave the bridge before it starts and join it once it holds.
    """

    def __init__(self, bridge: Bridge, tmp_path: Path) -> None:
        self.bridge, self.tmp = bridge, tmp_path
        self.conf = tmp_path / "net.d"
        self.conf.mkdir()

    def conflist(self) -> None:
        """What the node's CNI plugin is told."""
        ipam = {"type": "host-local", "ranges": [[{"subnet": r}] for r in RANGES]}
        plugin = {"type": "bridge", "bridge": "br0", "ipam": ipam}
        text = json.dumps({"cniVersion": "1.0.0", "name": "x", "plugins": [plugin]})
        (self.conf / "10-x.conflist").write_text(text)

    @contextlib.contextmanager
    def agent(self, *more: str, path: str = "") -> Iterator[subprocess.Popen[str]]:
        """Start an agent, with the programs of a path if given; it is killed at the end."""
        words = [sys.executable, "-m", "netpol", "--node", "n1", "--health-addr", ""]
        words += ["--api-server", "http://127.0.0.1:1", "--state-dir", str(self.tmp / "state")]
        words += ["--admin-socket", str(self.tmp / "agent.sock"), "--cni-conf-dir", str(self.conf)]
        words += ["--audit-log", "", "--xtables-lockfile", str(self.tmp / "lock"), *more]
        self.attach("nomaster")
        with subprocess.Popen(
            ["ip", "netns", "exec", self.bridge.node, *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **({"PATH": path} if path else {})},
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def attach(self, *where: str) -> None:
        """Take the pods off the bridge, or put them on it."""
        for i in range(len(self.bridge.pods)):
            run(self.bridge.node, "ip", "link", "set", f"v{i}", *where)

    def passes(self, family: int) -> bool:
        """Whether one pod's packet reaches another."""
        at = self.bridge.texts(1)[0 if family == 4 else 1]
        return reaches(self.bridge.pods[0], self.bridge.pods[1], at)

    def held(self, *families: int, timeout_s: float = 10.0) -> bool:
        """Wait until the rules of families (by default both) are there."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if all("/" in self.entries(family) for family in families or (4, 6)):
                self.attach("master", "br0")
                return True
            time.sleep(0.1)
        return False

    def entries(self, family: int) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.bridge.node, "ipset", "save", f"KNP-EMAP{family}"],
            capture_output=True,
            text=True,
            check=False,
        )
        return "".join(line for line in done.stdout.splitlines() if line.startswith("add"))


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    with Bridge("boot", 2, tmp_path=tmp_path) as bridge:
        yield Boot(bridge, tmp_path)


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_a_fresh_node_holds_its_pods_before_it_reaches_the_api_server(
    boot: Boot, variant: str
) -> None:
    boot.conflist()
    assert boot.passes(4)
    assert boot.passes(6)
    with boot.agent("--iptables", variant):
        assert boot.held()
        assert not boot.passes(4)
        assert not boot.passes(6)
    assert not boot.passes(4), "a killed agent leaves its rules"
    assert not boot.passes(6)


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_a_node_without_ip6tables_holds_its_ipv4(boot: Boot, variant: str) -> None:
    boot.conflist()
    programs = boot.tmp / "programs"
    programs.mkdir()
    tools = [f"iptables-{v}-{what}" for v in ("nft", "legacy") for what in ("save", "restore")]
    for name in ("ip", "ipset", "iptables", *tools):
        (programs / name).symlink_to(shutil.which(name) or "")
    with boot.agent("--iptables", variant, path=str(programs)):
        assert boot.held(4)
        assert not boot.passes(4)
        assert boot.passes(6), "without rules nothing is held"
        assert not boot.entries(6)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            status = client.call(str(boot.tmp / "agent.sock"), "status")
            if any(f"ip6tables-{variant}" in e for e in status["errors"]):
                break
            time.sleep(0.1)
        assert any(f"IPv6: running ip6tables-{variant}" in e for e in status["errors"]), status
        assert not status["ready"]


def test_the_ranges_come_from_the_last_state_file_where_there_is_no_conflist(boot: Boot) -> None:
    state = boot.tmp / "state"
    state.mkdir()
    (state / "node.json").write_text(json.dumps({"hold_ranges": list(RANGES)}))
    with boot.agent():
        assert boot.held()
        assert not boot.passes(4)
        assert not boot.passes(6)


def test_an_agent_remembers_the_ranges_for_the_next_boot(boot: Boot) -> None:
    boot.conflist()
    with boot.agent():
        assert boot.held()
        deadline = time.monotonic() + 10
        file = boot.tmp / "state/node.json"
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert json.loads(file.read_text())["hold_ranges"] == list(RANGES)


def test_without_the_hold_unknown_pods_are_open(boot: Boot) -> None:
    """The counter-proof: it is the setting that holds."""
    boot.conflist()
    with boot.agent("--hold-unknown-pods", "off"):
        deadline = time.monotonic() + 10
        node = ["ip", "netns", "exec", boot.bridge.node]
        while time.monotonic() < deadline:
            saved = subprocess.run(
                [*node, "ipset", "list", "-n"], capture_output=True, text=True, check=True
            ).stdout
            if "KNP-EMAP6" in saved:
                break
            time.sleep(0.1)
        assert "KNP-EMAP6" in saved
        # Their sources are still checked: a local pod's address is needed on a pod interface.
        assert run(boot.bridge.pods[0], "ip", "addr")


def test_a_node_whose_pods_run_already_is_not_held(boot: Boot) -> None:
    """Their traffic went on before the agent came, and nobody knows them yet."""
    boot.conflist()
    with boot.agent():
        boot.attach("master", "br0")  # before the agent has looked: its interpreter only starts
        time.sleep(4)
        assert not boot.entries(4)
        assert boot.passes(4)


def test_killed_while_it_writes_the_hold_the_next_one_finishes_it(boot: Boot) -> None:
    """Rules of one family, or of both without the entries that hold: neither is a node with pods."""
    boot.conflist()
    with boot.agent():
        assert boot.held()
    node = boot.bridge.node
    run(node, "ipset", "flush", "KNP-EMAP4")
    run(node, "ipset", "flush", "KNP-IMAP4")
    run(node, "ip6tables", "-t", "mangle", "-F")
    run(node, "ip6tables", "-t", "mangle", "-X")
    with boot.agent():
        assert boot.held()
        assert not boot.passes(4)
        assert not boot.passes(6)


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(f"re{request.param[0]}")
    try:
        tmp = tmp_path_factory.mktemp("restart")
        lab.up("--iptables", request.param, manifests=nine_pods(), tmp=tmp)
        yield lab
    finally:
        lab.down()


def _kill(lab: Lab, node: str) -> None:
    sock = STATE_ROOT / lab.name / "lab.sock"
    for found in control.ask(sock, "status")["agents"]:
        if found["node"] == node and found["pid"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found["pid"], signal.SIGKILL)
    control.ask(sock, "agent", node=node, action="start")


def test_killed_again_and_again_it_ends_where_it_must(lab: Lab) -> None:
    """Policies change; agents die while they apply, while they start and while they read."""
    dice = random.Random(4)
    pods = json.loads(lab.kubectl("get", "pods", "-A", "-o", "json"))["items"]
    addresses = [i["ip"] for p in pods for i in p["status"]["podIPs"]]
    for number in range(ROUNDS):
        lab.apply(Dice(100 + number, addresses).policies(3 + number % 4))
        for _ in range(dice.randrange(1, 4)):
            _kill(lab, dice.choice(("node1", "node2")))
            time.sleep(dice.random() * 0.8)
        family = 4 if number % 2 else 6
        have, want = lab.probe(*PROBED, family=family), lab.matrix(*PROBED, family=family)
        assert have["verdicts"] == want["verdicts"]
        if number % 2:
            lab.kubectl("delete", "networkpolicies", "--all", "-A", "--wait=false")
