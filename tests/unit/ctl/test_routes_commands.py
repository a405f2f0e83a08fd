"""`netpol-ctl routes` and `peers` against an agent's socket, and what explain says of the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netpol.ctl.ends import resolve
from netpol.ctl.explain import spans
from netpol.ctl.explain_routes import route_notes
from netpol.ctl.judge import findings
from netpol.ctl.main import main
from netpol.ctl.ports import parse_port
from netpol.ctl.refs import parse_ref
from netpol.ctl.source import offline
from netpol.model.net import Family
from tests.unit.ctl.agents import agent_socket

ROUTE = {
    "prefix": "10.1.2.0/24",
    "peer": "n2",
    "via": ["10.0.1.2"],
    "interface": "eth0",
    "reachable": True,
    "kernel": "agrees",
}
ROUTES: dict[str, Any] = {"node": "n1", "routes": [ROUTE], "extra": [], "missing": []}
PEER = {
    "peer": "n2",
    "kind": "node",
    "address": "10.0.1.2",
    "asn": 64512,
    "state": "Established",
    "since": "2026-11-24 10:00:00.000",
    "lastError": None,
    "imported": 2,
    "exported": 2,
    "filtered": 0,
    "limits": [],
}
WORLD = """
apiVersion: v1
kind: Pod
metadata: {name: a}
spec: {nodeName: n1, containers: [{name: c, image: i}]}
status: {phase: Running, podIPs: [{ip: 10.1.1.5}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b}
spec: {nodeName: n2, containers: [{name: c, image: i, ports: [{containerPort: 80}]}]}
status: {phase: Running, podIPs: [{ip: 10.1.2.5}]}
"""


def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Any, *words: str
) -> tuple[int, str]:
    with agent_socket(tmp_path, {words[0]: lambda _: answer}) as path:
        code = main([*words, "--socket", path])
    return code, capsys.readouterr().out


def test_routes_that_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(tmp_path, capsys, ROUTES, "routes")
    assert code == 0
    assert out.splitlines() == [
        "n1: 1 route, BIRD and the kernel agree",
        "  10.1.2.0/24  10.0.1.2 on eth0  of n2",
    ]
    code, out = run(tmp_path, capsys, ROUTES, "routes", "-o", "json")
    assert json.loads(out) == ROUTES


def test_routes_that_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {
        "node": "n1",
        "routes": [{**ROUTE, "kernel": "missing"}, {**ROUTE, "reachable": False, "via": []}],
        "extra": ["10.1.9.0/24"],
        "missing": ["10.1.3.0/24"],
    }
    _, out = run(tmp_path, capsys, odd, "routes")
    assert out.startswith("n1: 2 routes, 2 disagreements with the kernel\n")
    assert "kernel: missing" in out
    assert "unreachable" in out
    assert "10.1.9.0/24: in the kernel, but not of BIRD's any more" in out
    assert "10.1.3.0/24: a node's range that nobody announces" in out


def test_where_an_address_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {
        "node": "n1",
        "address": "10.1.2.7",
        "where": "via 10.0.1.2 on eth0",
        "prefix": "10.1.2.0/24",
        "peer": "n2",
        "by": "bird",
        "learnt": "10.1.2.0/24",
    }
    _, out = run(tmp_path, capsys, answer, "routes", "10.1.2.7")
    assert out == "10.1.2.7: via 10.0.1.2 on eth0 (10.1.2.0/24 of n2)\n"
    other = {**answer, "prefix": "10.1.2.0/28", "peer": None, "by": "static"}
    _, out = run(tmp_path, capsys, other, "routes", "10.1.2.7")
    assert out.endswith("(10.1.2.0/28); not by 10.1.2.0/24, which BGP has told\n")


def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routes", "10.1.2"]) == 2
    assert "needed an IP address" in capsys.readouterr().err


def test_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down = {
        **PEER,
        "peer": "n3",
        "state": "Active",
        "lastError": "Socket: refused",
        "limits": ["x"],
    }
    _, out = run(tmp_path, capsys, {"node": "n1", "peers": [PEER, down]}, "peers")
    lines = out.splitlines()
    assert lines[0] == "n1: 1 of 2 sessions established"
    assert "n2  node  AS 64512  Established" in lines[1]
    assert lines[2].endswith("last error: Socket: refused")
    assert lines[3] == "  n3: limit reached: x"


@pytest.mark.parametrize("words", [["routes"], ["peers"], ["routes", "10.0.0.1"]])
def test_without_an_agent(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--socket", "/nonexistent/agent.sock"]) == 3
    assert "no agent answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"node": "n1", "where": "via x", "by": "bird", "learnt": "10.1.2.0/24"}, ""),
        (
            {"node": "n1", "where": "via x", "by": "static", "learnt": "10.1.2.0/24"},
            "another way than BGP says",
        ),
        (
            {"node": "n1", "where": "via x", "by": "boot", "learnt": None},
            "has learnt no route to 10.1.2.5",
        ),
        (
            {"node": "n1", "where": "nowhere: refused", "by": "bird", "learnt": "10.1.2.0/24"},
            "leads nowhere: refused",
        ),
        ({"node": "n9", "where": "no route", "prefix": None}, ""),
    ],
)
def test_explain_mentions_a_missing_route(tmp_path: Path, answer: Any, said: str) -> None:
    (tmp_path / "w.yaml").write_text(WORLD)
    where = offline([str(tmp_path / "w.yaml")])
    ports = [parse_port("80")]
    src = resolve(where, parse_ref("pod/a", namespace="default"), family=Family.V4, ports=None)
    dst = resolve(where, parse_ref("pod/b", namespace="default"), family=Family.V4, ports=ports)
    found = findings(where.world, src, dst, spans(dst, ports))
    with agent_socket(tmp_path, {"routes": lambda _: answer}) as path:
        notes = route_notes(path, found)
    assert len(notes) == bool(said)
    assert said in "".join(notes)
    assert route_notes("/nonexistent/agent.sock", found) == ()


# -- routes render -----------------------------------------------------------------------------------

NODES = """
apiVersion: v1
kind: Node
metadata:
  name: n1
  annotations:
    kube-router.io/peers: "[{remoteip: 10.0.1.254, remoteasn: 64600, password: c2VjcmV0LXB3}]"
spec: {podCIDRs: [10.1.1.0/24]}
status: {addresses: [{type: InternalIP, address: 10.0.1.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2, annotations: {netpol.io/node.asn: "23456"}}
spec: {podCIDRs: [10.1.2.0/24]}
status: {addresses: [{type: InternalIP, address: 10.0.1.2}]}
"""


def rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[object, str, str]:
    path = tmp_path / "nodes.yaml"
    path.write_text(NODES)
    code: object
    try:
        code = main(["routes", "render", "-f", str(path), "--node", "n1", *words])
    except SystemExit as e:  # how arguments are refused
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_what_is_not_followed_is_told_with_file_and_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = rendered(tmp_path, capsys)
    assert code == 0
    assert out.count("secret-pw") == 1
    where = f"{tmp_path}/nodes.yaml: document 2"
    assert err.splitlines() == [
        f"{where}: node n2: netpol.io/node.asn: needed an AS, and 23456 is none",
        "1 password in the configuration: keep it as a secret",
    ]
    code, out, err = rendered(tmp_path, capsys, "--strict")
    assert (code, out) == (2, "")
    assert "secret-pw" not in err


def test_the_settings_of_sessions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = rendered(
        tmp_path,
        capsys,
        *("--hold-time", "9", "--keepalive-time", "3", "--bgp-port", "1179"),
        *("--no-graceful-restart", "--vip-cidr", "203.0.113.0/24"),
    )
    assert code == 0
    assert "hold time 9; keepalive time 3;" in out
    assert "neighbor 10.0.1.2 port 1179 as 64512;" in out
    assert "203.0.113.0/24+" in out
    assert "graceful restart aware;" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hold-time", "2"), "needed a number of 3..65535"),
        (("--hold-time", "9", "--keepalive-time", "10"), "needed at most --hold-time"),
        (("--bgp-port", "0"), "needed a number of 1..65535"),
        (("--asn", "65535"), "needed an AS"),
        (("--vip-cidr", "x"), "needed a CIDR"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    code, out, err = rendered(tmp_path, capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
