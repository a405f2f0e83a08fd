"""A lab whose agents route: three nodes in two segments, a router outside, policies across all of it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.lab import frr, launch, processes, routing, spaces
from netpol.lab.plan import STATE_ROOT, LabPlan, netns_prefix
from tests.e2e.labs import Json, Lab, namespace, pod, policy

WEB = {"containerPort": 80, "name": "web"}
NS = "shop"
#: The node of every pod; node2 is in a segment of its own.
PLACES = {"web": "node1", "api": "node2", "db": "node3"}
DENY = policy(f"{NS}/deny", {"podSelector": {}, "policyTypes": ["Ingress"]})
API_FROM_WEB = policy(
    f"{NS}/api",
    {
        "podSelector": {"matchLabels": {"app": "api"}},
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": {"app": "web"}}}],
                "ports": [{"port": "web"}],
            }
        ],
    },
)
SERVICE: Json = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "api", "namespace": NS},
    "spec": {"clusterIP": "10.96.0.77", "selector": {"app": "api"}, "ports": [{"port": 80}]},
}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(routing.missing() is not None, reason=f"{routing.missing()}"),
    pytest.mark.skipif(frr.missing() is not None, reason=f"FRR: {frr.missing()}"),
]


def world() -> list[Json]:
    pods = [pod(f"{NS}/{name}", {"app": name}, WEB, node=node) for name, node in PLACES.items()]
    return [namespace(NS), *pods, SERVICE]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab("rt")
    try:
        lab.up(
            *("--nodes", "3", "--subnets", "2", "--router", "frr"),
            manifests=world(),
            tmp=tmp_path_factory.mktemp("routes"),
        )
        yield lab
    finally:
        lab.down()


def addresses(lab: Lab, name: str) -> list[str]:
    status = json.loads(lab.kubectl("get", "pod", "-n", NS, name, "-o", "json"))["status"]
    return [entry["ip"] for entry in status["podIPs"]]


def passes(found: Json) -> set[tuple[str, str]]:
    return {
        (src.partition("/")[2], dst.partition("/")[2])
        for src, row in found["verdicts"]["80/TCP"].items()
        for dst, verdict in row.items()
        if verdict == "allow" and src != dst
    }


def eventually(ask: object, *, within_s: float = 10.0) -> bool:
    assert callable(ask)
    deadline = time.monotonic() + within_s
    while not ask():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


EVERYBODY = {(a, b) for a in PLACES for b in PLACES if a != b}


def test_pods_reach_pods_by_routes_that_bird_made(lab: Lab) -> None:
    for family in (4, 6):
        assert passes(lab.probe("80/TCP", family=family)) == EVERYBODY
    near, far = (
        lab.node("node1", "ip", "route", "show", cidr)
        for cidr in ("10.244.3.0/24", "10.244.2.0/24")
    )
    assert "via 172.30.0.13 dev eth0 proto bird" in near
    assert "via 172.30.1.12 dev knp-vxlan0 proto bird" in far


def test_unknown_pods_are_held_in_ranges_that_the_agent_itself_wrote(lab: Lab) -> None:
    done = lab.ctl(
        "status", "--socket", str(STATE_ROOT / lab.name / "node2/agent.sock"), "-o", "json"
    )
    assert json.loads(done.stdout)["node_facts"]["hold_ranges"] == [
        "10.244.2.0/24",
        "fd00:10:244:2::/64",
    ]


def test_what_joins_the_segments_knows_no_pod_route(lab: Lab) -> None:
    switch = LabPlan(name=lab.name).switch_netns
    for family, pods in (("-4", "10.244."), ("-6", "fd00:10:244:")):
        done = subprocess.run(
            ["ip", "-n", switch, family, "route"], capture_output=True, text=True, check=True
        )
        assert "172.30" in done.stdout or "fd00:172" in done.stdout
        assert pods not in done.stdout
        assert "default" not in done.stdout


def test_policies_hold_across_segments(lab: Lab) -> None:
    lab.apply([DENY, API_FROM_WEB])
    try:
        for family in (4, 6):
            assert passes(lab.probe("80/TCP", family=family)) == {("web", "api")}
            wanted, found = (
                ask("80/TCP", family=family)["verdicts"] for ask in (lab.matrix, lab.probe)
            )
            assert found == wanted
    finally:
        lab.kubectl("delete", "networkpolicies", "--all", "-n", NS)
    assert passes(lab.probe("80/TCP")) == EVERYBODY


def test_the_router_outside_pings_pods_and_they_it(lab: Lab) -> None:
    router = LabPlan(name=lab.name, node_count=3, routes="bgp", subnets=2, router="frr")
    for name, node in PLACES.items():
        segment = 1 if node == "node2" else 0
        for address, back in zip(
            addresses(lab, name), router.router_addresses(segment), strict=True
        ):
            lab.node("router", "ping", "-c", "1", "-W", "2", address)
            lab.kubectl("exec", "-n", NS, name, "--", "ping", "-c", "1", "-W", "2", back)


def test_the_router_learns_addresses_of_services_from_all_nodes(lab: Lab) -> None:
    assert "10.96.0.77" in frr.learnt(LabPlan(name=lab.name))
    table = json.loads(frr.vtysh(LabPlan(name=lab.name), "show bgp ipv4 unicast 10.96.0.77 json"))
    assert len(table["paths"]) == 3


def test_status_shows_the_sessions_of_nodes_and_router(lab: Lab) -> None:
    text = lab.ctl("lab", "status", "--name", lab.name).stdout
    assert "BGP: 3 of 3 sessions up (node2, node3, 172.30.0.2)" in text
    assert "router  AS 64600  172.30.0.2" in text
    assert "BGP: 3 sessions" in text


def test_mtu_leaves_room_for_the_overlay(lab: Lab) -> None:
    assert "mtu 1450" in lab.kubectl("exec", "-n", NS, "web", "--", "ip", "link", "show", "eth0")
    big = ["ping", "-M", "do", "-s", str(1450 - 28), "-c", "1", "-W", "2"]
    lab.kubectl("exec", "-n", NS, "web", "--", *big, addresses(lab, "api")[0])


def test_a_bird_that_is_killed_comes_back_and_the_lab_knows(lab: Lab) -> None:
    file = STATE_ROOT / lab.name / "node2/run/bird/bird.pid"
    before = int(file.read_text())
    os.kill(before, 9)
    assert eventually(lambda: file.read_text().strip() not in ("", str(before)))
    assert passes(lab.probe("80/TCP")) == EVERYBODY


# What is left


def daemons(state: Path) -> list[processes.Process]:
    files = [*state.glob("*/run/bird/*.pid"), *state.glob("*/*.pid")]
    found = [processes.identify(int(file.read_text())) for file in files]
    return [process for process in found if process is not None]


def test_down_ends_bird_and_frr_whoever_was_killed_and_whatever_lost_its_name() -> None:
    lab = Lab("rd")
    try:
        lab.up("--router", "frr")
        state = STATE_ROOT / lab.name
        alive = daemons(state)
        assert len(alive) == 4  # two BIRDs, zebra, bgpd
        supervisor = processes.recorded(state / launch.SUPERVISOR_RECORD)
        assert supervisor is not None
        os.kill(supervisor.pid, 9)
        for name in ("node1", "router"):
            subprocess.run(["ip", "netns", "del", f"{netns_prefix(lab.name)}{name}"], check=True)
    finally:
        lab.down()
    assert not [process for process in alive if process.alive]
    assert not spaces.names(netns_prefix(lab.name))
    assert not (STATE_ROOT / lab.name).exists()


def test_a_lab_routes_by_itself_where_it_is_asked_to(tmp_path: Path) -> None:
    lab = Lab("rs")
    try:
        lab.up("--routes", "static", manifests=[*world()[:3]], tmp=tmp_path)
        assert passes(lab.probe("80/TCP")) == {("web", "api"), ("api", "web")}
        assert "proto bird" not in lab.node("node1", "ip", "route")
        assert not list((STATE_ROOT / lab.name).glob("*/run/bird"))
    finally:
        lab.down()
