"""The engine's matrix and real packets agree: random worlds, both variants of iptables, across segments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from netpol.lab import routing
from tests.e2e.labs import PROBED, Dice, Lab, nine_pods

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: Random worlds for each variant; NETPOL_WORLDS=100 for a long night.
WORLDS = int(os.environ.get("NETPOL_WORLDS", "5"))


#: Flags of each lab; in two segments all packets between its nodes go through the overlay.
LABS = {
    "nft": ("--iptables", "nft"),
    "legacy": ("--iptables", "legacy"),
    "segments": ("--subnets", "2"),
}


@pytest.fixture(scope="module", params=LABS)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if request.param == "segments" and routing.missing() is not None:
        pytest.skip(f"{routing.missing()}")
    lab = Lab(f"ag{request.param[0]}")
    try:
        lab.up(
            *LABS[request.param],
            manifests=nine_pods(),
            tmp=tmp_path_factory.mktemp("agreement"),
        )
        yield lab
    finally:
        lab.down()


def _addresses(lab: Lab) -> list[str]:
    pods = json.loads(lab.kubectl("get", "pods", "-A", "-o", "json"))["items"]
    nodes = json.loads(lab.kubectl("get", "nodes", "-o", "json"))["items"]
    own = [a["address"] for n in nodes for a in n["status"]["addresses"]]
    return [i["ip"] for p in pods for i in p["status"]["podIPs"]] + [
        a for a in own if a[0].isdigit()
    ]


def test_without_policies_everything_passes(lab: Lab) -> None:
    found = lab.probe(*PROBED)

    verdicts = {v for p in found["verdicts"].values() for row in p.values() for v in row.values()}
    assert len(found["pods"]) == 9
    assert verdicts == {"allow"}


@pytest.mark.parametrize("seed", range(WORLDS))
def test_packets_agree_with_the_engine(lab: Lab, seed: int) -> None:
    policies = Dice(seed, _addresses(lab)).policies(3 + seed % 6)
    lab.apply(policies)
    try:
        for family in (4, 6):
            want, have = lab.matrix(*PROBED, family=family), lab.probe(*PROBED, family=family)
            wrong = [
                f"{port} {src} -> {dst}: engine {verdict}, packets {have['verdicts'][port][src][dst]}"
                for port, rows in want["verdicts"].items()
                for src, row in rows.items()
                for dst, verdict in row.items()
                if have["verdicts"][port][src][dst] != verdict
            ]
            assert not wrong, json.dumps(policies) + "\n" + "\n".join(wrong)
    finally:
        lab.kubectl("delete", "networkpolicies", "--all", "-A", "--wait=false")
