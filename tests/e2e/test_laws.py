"""The laws of the dataplane with real packets: each claim here fails where its law is not kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.kernel.netns import in_netns
from netpol.lab import control, spaces
from netpol.lab.plan import STATE_ROOT
from tests.e2e import wire
from tests.e2e.labs import Json, Lab, namespace, pod, policy
from tests.e2e.wire import connects, link_local, listening, reaches, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NS = "law"
WEB = {"containerPort": 80}
BRIDGE = "kube-bridge"
OUTSIDE4, OUTSIDE6 = "203.0.113.77", "2001:db8::77"


class LawLab(Lab):
    def up_with(self, variant: str, tmp: Path) -> None:
        self.up(
            "--iptables",
            variant,
            manifests=[
                namespace(NS),
                pod(f"{NS}/a", {"app": "a"}, WEB, node="node1"),
                pod(f"{NS}/b", {"app": "b"}, WEB, node="node1"),
                pod(f"{NS}/far", {"app": "far"}, WEB, node="node2"),
            ],
            tmp=tmp,
        )
        self.state = STATE_ROOT / self.name
        found = control.ask(self.state / "lab.sock", "pods")["pods"]
        self.space = {p["name"]: str(p["netns"]) for p in found}
        self.at4 = {p["name"]: str(p["addresses"][0]) for p in found}
        self.at6 = {p["name"]: str(p["addresses"][1]) for p in found}
        status = control.ask(self.state / "lab.sock", "status")
        for node in status["nodes"]:
            name = node["name"]
            self.space[name] = node["netns"]
            self.at4[name], self.at6[name] = node["addresses"]
            number = name.removeprefix("node")
            self.at4[f"gateway{number}"] = f"10.244.{number}.1"
            self.at6[f"gateway{number}"] = f"fd00:10:244:{number}::1"

    def settle(self) -> None:
        control.ask(self.state / "lab.sock", "settle")

    @contextlib.contextmanager
    def policies(self, *made: Json) -> Iterator[None]:
        """These policies and no others are in force."""
        self.apply(list(made))
        try:
            self.settle()
            yield
        finally:
            self.kubectl("delete", "networkpolicies", "--all", "-n", NS)
            self.settle()

    def agent_pid(self, node: str) -> int:
        agents = control.ask(self.state / "lab.sock", "status")["agents"]
        return int(next(a["pid"] for a in agents if a["node"] == node))

    def save(self, node: str, tool: str) -> str:
        text = run(self.space[node], f"{tool}-save")
        return re.sub(r"\[\d+:\d+\]|^#.*$", "", text, flags=re.MULTILINE)


def spec(app: str, *types: str, **rules: list[Json]) -> Json:
    return {"podSelector": {"matchLabels": {"app": app}}, "policyTypes": list(types), **rules}


def block(address: str) -> Json:
    return {"ipBlock": {"cidr": f"{address}/{128 if ':' in address else 32}"}}


DENY_ALL = policy(f"{NS}/deny-all", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LawLab]:
    lab = LawLab("law")
    try:
        lab.up_with("nft", tmp_path_factory.mktemp("laws"))
        yield lab
    finally:
        lab.down()


# -- law 15: who may say who it is ----------------------------------------------------------------


@pytest.mark.parametrize("to", ["b", "far"])
def test_a_forged_source_is_dropped(lab: LawLab, to: str) -> None:
    """Of a pod elsewhere, of the node, of its gateway, and of somebody outside; no policy is needed."""
    assert reaches(lab.space["a"], lab.space[to], lab.at4[to], source=lab.at4["a"])
    assert reaches(lab.space["a"], lab.space[to], lab.at6[to], source=lab.at6["a"])
    elsewhere = "far" if to == "b" else "node2"
    for forged in (lab.at4[elsewhere], lab.at4["node1"], lab.at4["gateway1"], OUTSIDE4):
        assert not reaches(lab.space["a"], lab.space[to], lab.at4[to], source=forged), forged
    for forged in (lab.at6[elsewhere], lab.at6["node1"], lab.at6["gateway1"], OUTSIDE6):
        assert not reaches(lab.space["a"], lab.space[to], lab.at6[to], source=forged), forged


def test_a_forged_source_does_not_reach_the_node(lab: LawLab) -> None:
    node = lab.space["node1"]
    assert reaches(lab.space["a"], node, lab.at4["gateway1"], source=lab.at4["a"])
    for forged in (lab.at4["far"], lab.at4["node2"], OUTSIDE4):
        assert not reaches(lab.space["a"], node, lab.at4["gateway1"], source=forged), forged
    assert reaches(lab.space["a"], node, lab.at6["gateway1"], source=lab.at6["a"])
    assert not reaches(lab.space["a"], node, lab.at6["gateway1"], source=OUTSIDE6)


def test_link_local_addresses_carry_nothing_between_pods(lab: LawLab) -> None:
    """Every pod has one, also without a policy, and no policy could name it."""
    a, b = lab.space["a"], lab.space["b"]
    own, other = link_local(a), link_local(b)
    assert not reaches(a, b, other, device="eth0")
    assert not reaches(a, b, lab.at6["b"], source=own, device="eth0")
    assert not reaches(a, lab.space["node1"], link_local(lab.space["node1"], BRIDGE), device="eth0")
    with listening(b, "::", 8123):
        assert connects(a, lab.at6["b"], 8123)
        assert not connects(a, other, 8123, device="eth0")


# -- neighbour discovery --------------------------------------------------------------------------


def test_neighbours_are_found_under_a_policy_that_denies_everything(lab: LawLab) -> None:
    with lab.policies(DENY_ALL):
        run(lab.space["a"], "ip", "neigh", "flush", "all")
        run(lab.space["b"], "ip", "neigh", "flush", "all")
        for target, space in ((lab.at6["b"], "b"), (lab.at6["gateway1"], "node1")):
            assert not reaches(lab.space["a"], lab.space[space], target)
            known = run(lab.space["a"], "ip", "-6", "neigh", "show", target)
            assert "lladdr" in known, f"{target}: {known}"
        found = run(lab.space["node1"], "ip", "-6", "neigh", "show", lab.at6["a"])
        assert "FAILED" not in found


# -- law 2: unknown pods, and the gateway in their range ------------------------------------------


@pytest.fixture
def stranger(lab: LawLab) -> Iterator[tuple[str, str, str]]:
    """A pod that the API server has not heard of: on the bridge, in the podCIDR."""
    name = f"knp-{lab.name}-stranger"
    spaces.create([name])
    try:
        spaces.ip_batch(
            [
                f"link add strange0 type veth peer name eth0 netns {name}",
                f"link set strange0 master {BRIDGE} up",
            ],
            netns=lab.space["node1"],
        )
        spaces.ip_batch(
            [
                "link set lo up",
                "link set eth0 up",
                "addr add 10.244.1.200/24 dev eth0",
                "addr add fd00:10:244:1::200/64 dev eth0 nodad",
                "route add default via 10.244.1.1",
                "route add default via fd00:10:244:1::1",
            ],
            netns=name,
        )
        yield name, "10.244.1.200", "fd00:10:244:1::200"
    finally:
        spaces.remove([name])


def test_an_unknown_pod_is_held_both_ways(lab: LawLab, stranger: tuple[str, str, str]) -> None:
    space, v4, v6 = stranger
    for known in ("b", "far"):
        assert not reaches(space, lab.space[known], lab.at4[known])
        assert not reaches(space, lab.space[known], lab.at6[known])
        assert not reaches(lab.space[known], space, v4)
        assert not reaches(lab.space[known], space, v6)
    assert not reaches(space, lab.space["node1"], lab.at4["node1"])
    assert not reaches(lab.space["node2"], space, v4)
    assert reaches(lab.space["node1"], space, v4), "its own node may speak to it"


def test_the_gateway_lies_in_the_held_range_and_works(lab: LawLab) -> None:
    with listening(lab.space["node1"], "::", 8200):
        assert connects(lab.space["a"], lab.at6["gateway1"], 8200)
        assert connects(lab.space["far"], lab.at6["gateway1"], 8200)
    with listening(lab.space["node1"], "0.0.0.0", 8200):
        assert connects(lab.space["a"], lab.at4["gateway1"], 8200)
        assert connects(lab.space["far"], lab.at4["gateway1"], 8200)


def test_a_new_pod_is_let_go_and_a_gone_pod_is_held(lab: LawLab) -> None:
    lab.apply([pod(f"{NS}/new", {"app": "new"}, WEB, node="node1")])
    lab.kubectl("wait", "--for=condition=Ready", f"-n={NS}", "pod/new")
    lab.settle()
    found = control.ask(lab.state / "lab.sock", "pods")["pods"]
    (new,) = (p for p in found if p["name"] == "new")
    address = str(new["addresses"][0])
    assert connects(lab.space["a"], address, 80)
    members = run(lab.space["node1"], "ipset", "list", "KNP-EMAP4")
    assert f"{address} " in members
    lab.kubectl("delete", "pod", "new", f"-n={NS}")
    lab.settle()
    assert f"{address} " not in run(lab.space["node1"], "ipset", "list", "KNP-EMAP4")


# -- law 9: the node ------------------------------------------------------------------------------


def test_a_node_reaches_its_own_isolated_pods_and_nobody_elses(lab: LawLab) -> None:
    with lab.policies(DENY_ALL):
        for address in (lab.at4["b"], lab.at6["b"]):
            assert connects(lab.space["node1"], address, 80)
            assert not connects(lab.space["node2"], address, 80)
    only = policy(
        f"{NS}/node2",
        spec(
            "b",
            "Ingress",
            ingress=[{"from": [block(lab.at4["node2"]), block(lab.at6["node2"])]}],
        ),
    )
    with lab.policies(DENY_ALL, only):
        for address in (lab.at4["b"], lab.at6["b"]):
            assert connects(lab.space["node2"], address, 80)
            assert connects(lab.space["node1"], address, 80)
            assert not connects(lab.space["a"], address, 80)


def test_a_pods_way_to_its_own_node_is_judged(lab: LawLab) -> None:
    targets = [lab.at4["node1"], lab.at4["gateway1"], lab.at6["node1"], lab.at6["gateway1"]]
    with contextlib.ExitStack() as stack:
        for address in targets:
            stack.enter_context(listening(lab.space["node1"], address, 8300))
        assert all(connects(lab.space["a"], t, 8300) for t in targets)
        with lab.policies(policy(f"{NS}/none", spec("a", "Egress"))):
            assert not any(connects(lab.space["a"], t, 8300) for t in targets)
            assert connects(lab.space["b"], targets[0], 8300)
        rule = {"to": [block(lab.at4["node1"])], "ports": [{"port": 8300}]}
        with lab.policies(policy(f"{NS}/one", spec("a", "Egress", egress=[rule]))):
            assert [connects(lab.space["a"], t, 8300) for t in targets] == [
                True,
                False,
                False,
                False,
            ]


# -- law 10: the bridge ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"])
def test_bridged_packets_are_shown_to_the_rules_again(lab: LawLab, key: str) -> None:
    path = Path("/proc/sys/net/bridge", key)
    space = lab.space["node1"]
    in_netns(space, lambda: path.write_text("0"))
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        if in_netns(space, path.read_text).strip() == "1":
            break
        time.sleep(0.2)
    assert in_netns(space, path.read_text).strip() == "1"


# -- law 1: class numbers -------------------------------------------------------------------------


def test_a_number_that_is_used_again_judges_by_the_new_class(lab: LawLab) -> None:
    def number(name: str) -> str:
        members = run(lab.space["node1"], "ipset", "save", "KNP-IMAP4")
        found = re.search(rf"{re.escape(lab.at4[name])} skbmark (\S+)/", members)
        return found.group(1) if found else ""

    def no_class_left() -> bool:
        deadline = time.monotonic() + 10
        while "KNP-CI-" in lab.save("node1", "iptables-nft") and time.monotonic() < deadline:
            time.sleep(0.2)
        return "KNP-CI-" not in lab.save("node1", "iptables-nft")

    assert no_class_left(), "what the tests before used is not free"
    to_a = policy(f"{NS}/to-a", spec("a", "Ingress", ingress=[{"from": [block(lab.at4["far"])]}]))
    to_b = policy(f"{NS}/to-b", spec("b", "Ingress", ingress=[{"from": [block(lab.at4["a"])]}]))
    with lab.policies(to_a):
        first = number("a")
        assert connects(lab.space["far"], lab.at4["a"], 80)
        assert not connects(lab.space["b"], lab.at4["a"], 80)
    assert no_class_left(), "the number is never free"
    with lab.policies(to_b):
        assert number("b") == first
        assert connects(lab.space["a"], lab.at4["b"], 80)
        assert not connects(lab.space["far"], lab.at4["b"], 80)
        assert connects(lab.space["b"], lab.at4["a"], 80)


# -- law 8 and the audit log ----------------------------------------------------------------------


def _audit(lab: LawLab, node: str) -> list[Json]:
    path = lab.state / node / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(("src", "node"), [("a", "node1"), ("far", "node1")])
def test_a_drop_is_one_line_with_both_pods(lab: LawLab, src: str, node: str) -> None:
    time.sleep(1.2)  # until the lines of others' drops are written
    with lab.policies(policy(f"{NS}/closed", spec("b", "Ingress"))):
        before = len(_audit(lab, node))
        assert not reaches(lab.space[src], lab.space["b"], lab.at4["b"])
        deadline = time.monotonic() + 5
        while len(_audit(lab, node)) == before and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.2)  # a second line would come with the next window
        lines = _audit(lab, node)[before:]
    assert len(lines) == 1, "\n".join(map(json.dumps, lines))
    line = lines[0]
    assert (line["src"]["pod"], line["src"]["namespace"]) == (src, NS)
    assert (line["dst"]["pod"], line["dst"]["namespace"]) == ("b", NS)
    assert (line["verdict"], line["direction"], line["proto"]) == ("deny", "ingress", "UDP")
    assert line["policies"] == [f"{NS}/closed"]
    assert line["note"] == ""


# -- one agent a node; what stays and what goes ---------------------------------------------------


def _second_agent(lab: LawLab, node: str) -> subprocess.CompletedProcess[str]:
    state = lab.state / node
    words = [sys.executable, "-m", "netpol", "--node", node, "--api-server", "http://127.0.0.1:1"]
    words += ["--admin-socket", str(state / "agent.sock"), "--health-addr", ""]
    words += ["--state-dir", str(state / "agent"), "--cni-conf-dir", str(state / "etc/cni/net.d")]
    return subprocess.run(
        ["ip", "netns", "exec", lab.space[node], *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={**os.environ, "XTABLES_LOCKFILE": str(state / "xtables.lock")},
    )


def test_a_second_agent_refuses(lab: LawLab) -> None:
    pid = lab.agent_pid("node1")
    done = _second_agent(lab, "node1")
    assert done.returncode == 3, done.stderr
    assert "agent" in done.stderr.splitlines()[-1]
    assert lab.agent_pid("node1") == pid


def test_a_stopped_agent_keeps_the_rules_and_cleanup_removes_exactly_ours(lab: LawLab) -> None:
    node = lab.space["node1"]
    run(
        node,
        "sh",
        "-ec",
        "iptables-nft -t mangle -N KNOT; iptables-nft -t mangle -A FORWARD -j KNOT",
    )
    run(node, "sh", "-ec", "ipset create knot hash:ip; ipset add knot 192.0.2.1")
    sock = lab.state / "lab.sock"
    try:
        with lab.policies(policy(f"{NS}/closed", spec("b", "Ingress"))):
            refused = lab.ctl(
                "lab", "exec", "--name", lab.name, "node1", "--",
                str(Path(sys.executable).parent / "netpol-ctl"), "cleanup",
                "--socket", str(lab.state / "node1/agent.sock"),
            )  # fmt: skip
            assert refused.returncode == 3
            assert "agent" in refused.stderr
            rules = lab.save("node1", "iptables-nft"), lab.save("node1", "ip6tables-nft")
            sets = sorted(run(node, "ipset", "save").splitlines())
            control.ask(sock, "agent", node="node1", action="stop")
            assert (lab.save("node1", "iptables-nft"), lab.save("node1", "ip6tables-nft")) == rules
            assert sorted(run(node, "ipset", "save").splitlines()) == sets
            assert not connects(lab.space["a"], lab.at4["b"], 80)
            done = lab.node(
                "node1",
                str(Path(sys.executable).parent / "netpol-ctl"),
                "cleanup",
                "--socket",
                str(lab.state / "node1/agent.sock"),
            )
            assert "removed" in done
            left = [lab.save("node1", t) for t in ("iptables-nft", "ip6tables-nft")]
            for had, has in zip(rules, left, strict=True):
                foreign = [r for r in had.splitlines() if "KNP-" not in r]
                assert [r for r in has.splitlines() if r] == [r for r in foreign if r]
            saved = run(node, "ipset", "save").splitlines()
            assert saved
            assert sorted(saved) == [s for s in sets if "KNP-" not in s]
            assert connects(lab.space["a"], lab.at4["b"], 80)
            control.ask(sock, "agent", node="node1", action="start")
            lab.settle()
            assert not connects(lab.space["a"], lab.at4["b"], 80)
    finally:
        control.ask(sock, "agent", node="node1", action="start")
        lab.settle()
        run(
            node,
            "sh",
            "-ec",
            "iptables-nft -t mangle -D FORWARD -j KNOT; iptables-nft -t mangle -X KNOT",
        )
        run(node, "ipset", "destroy", "knot")


def test_the_walkers_of_this_suite_see_a_difference() -> None:
    """A probe that is always silent would prove every denial here: it is tried without rules."""
    name = f"knpt-wire-{os.getpid()}"
    spaces.create([name])
    try:
        spaces.ip_batch(["link set lo up", "addr add 192.0.2.1/32 dev lo"], netns=name)
        assert reaches(name, name, "127.0.0.1")
        assert reaches(name, name, "127.0.0.1", source="192.0.2.1")
        assert reaches(name, name, "::1")
        with listening(name, "127.0.0.1", 80):
            assert connects(name, "127.0.0.1", 80)
        assert not connects(name, "127.0.0.1", 80)
        assert wire.SILENCE_S < 1
    finally:
        spaces.remove([name])
