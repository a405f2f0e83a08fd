"""`netpol-ctl cleanup` takes the service proxy's things as well; `--kube-proxy` another proxy's alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from netpol.ctl.cleanup_kube_proxy import read_whole_ledger, theirs
from netpol.ctl.cleanup_proxy import clean_proxy, delete_ours, read_ledger
from netpol.kernel.kubeproxy import IpvsTraces
from netpol.kernel.netns import in_netns
from netpol.kernel.testing_ipvs import FakeIpvs
from netpol.kernel.vips import LINK
from netpol.lib.errors import NoAnswerError
from netpol.model.ids import Protocol
from netpol.model.ipvs import ServerId, VirtualServer
from netpol.model.net import Family, parse_address
from proxy.ledger import HEADER, Word, line

pytestmark = pytest.mark.kernel

REPOSITORY = Path(__file__).parents[2]
OURS = ServerId(Family.V4, Protocol.TCP, parse_address("10.96.0.10"), 53)
THEIRS = ServerId(Family.V4, Protocol.TCP, parse_address("10.96.0.11"), 53)
RULES = """*nat
:KNP-SVC-POST - [0:0]
:KUBE-SERVICES - [0:0]
-A POSTROUTING -j KNP-SVC-POST
-A PREROUTING -j KUBE-SERVICES
COMMIT
*filter
:KNP-SVC-IN - [0:0]
-A INPUT -j KNP-SVC-IN
-A KNP-SVC-IN -m set --match-set KNP-SVC-VIP4 dst -j DROP
COMMIT
"""


def run(space: str, *words: str, text: str = "", code: int = 0) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", space, *words],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=dict(os.environ),
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def ctl(space: str, tmp_path: Path, *words: str, code: int = 0) -> str:
    return run(
        *(space, sys.executable, "-m", "netpol.ctl.main", "cleanup"),
        *("--socket", str(tmp_path / "none.sock"), "--run-dir", str(tmp_path / "run"), *words),
        code=code,
    )


def furnish(space: str, tmp_path: Path) -> Path:
    """What an agent with the proxy, and a kube-proxy before it, leave behind."""
    folder = tmp_path / "run"
    folder.mkdir()
    run(space, "ip", "link", "add", LINK, "type", "bridge")
    run(space, "ip", "address", "add", "10.96.0.10/32", "dev", LINK)
    run(space, "ipset", "create", "KNP-SVC-VIP4", "hash:ip")
    run(space, "iptables-nft-restore", "--noflush", text=RULES)
    run(space, "sysctl", "-w", "net.ipv4.conf.all.arp_ignore=1")
    (folder / "sysctls.json").write_text(json.dumps({"net/ipv4/conf/all/arp_ignore": "0"}))
    (folder / "ipvs.ledger").write_bytes(HEADER + line(Word.OURS, OURS))
    return folder


def test_all_of_the_proxy_goes_and_the_settings_come_back(space: str, tmp_path: Path) -> None:
    folder = furnish(space, tmp_path)

    said = ctl(space, tmp_path, "-o", "json")

    removed = json.loads(said)["removed"]
    assert removed | {"servers": 0} == {
        "servers": 0,
        "links": 1,
        "sysctls": 1,
        "chains": 2,
        "jumps": 2,
        "sets": 1,
        "files": 0,
        "birds": 0,
        "routes": 0,
        "tunnels": 0,
    }
    assert run(space, "sysctl", "-n", "net.ipv4.conf.all.arp_ignore") == "0\n"
    assert LINK not in run(space, "ip", "link")
    assert list(folder.iterdir()) == []
    assert "KUBE-SERVICES" in run(space, "iptables-nft-save")
    assert ctl(space, tmp_path) == "nothing of netpol here\n"


def test_only_kube_proxys_goes_when_that_is_asked_for(space: str, tmp_path: Path) -> None:
    folder = furnish(space, tmp_path)
    before = sorted(p.name for p in folder.iterdir())

    assert ctl(space, tmp_path, "--kube-proxy") == "removed of kube-proxy: 1 chain, 1 jump\n"

    saved = run(space, "iptables-nft-save")
    assert "KUBE-" not in saved
    assert saved.count("-j KNP-SVC-") == 2
    assert sorted(p.name for p in folder.iterdir()) == before
    assert ctl(space, tmp_path, "--kube-proxy") == "nothing of kube-proxy here\n"


VIP, NODE, OTHER = "10.96.0.10", "192.0.2.1", "10.96.9.9"
#: Its link has the first; it served a NodePort on the node.
TRACES = IpvsTraces(frozenset({parse_address(VIP)}), frozenset({(Family.V4, Protocol.TCP, 30080)}))


def test_of_servers_only_those_go_of_which_something_says_that_they_are_kube_proxys() -> None:
    def server(address: str, port: int, protocol: Protocol = Protocol.TCP) -> ServerId:
        return ServerId(Family.V4, protocol, parse_address(address), port)

    its = [server(VIP, 80), server(VIP, 53, Protocol.UDP), server(NODE, 30080)]
    unclear = [server(NODE, 30080, Protocol.UDP), server(NODE, 3306)]
    elsewhere = [server(OTHER, 80), ServerId.by_mark(Family.V4, 7)]

    found = theirs([*its, *unclear, *elsewhere], TRACES, own=[parse_address(NODE)])

    assert found == (its, unclear)


def test_without_a_ledger_that_can_be_read_no_server_is_taken_for_kube_proxys(
    tmp_path: Path,
) -> None:
    file = tmp_path / "ipvs.ledger"
    assert len(read_whole_ledger(file, there_is_link=False)) == 0
    with pytest.raises(
        NoAnswerError, match=r"needed --run-dir as the agent has it; got no .*ledger"
    ):
        read_whole_ledger(file, there_is_link=True)
    file.write_text("nonsense\n")
    with pytest.raises(
        NoAnswerError, match="nothing was removed; needed a ledger that can be read"
    ):
        read_whole_ledger(file, there_is_link=False)


def test_servers_are_ours_by_the_ledger(tmp_path: Path) -> None:
    file = tmp_path / "ipvs.ledger"
    file.write_bytes(HEADER + line(Word.OURS, OURS) + line(Word.FOREIGN, THEIRS))
    left: list[str] = []
    ledger = read_ledger(file, left)
    unnamed = ServerId(Family.V4, Protocol.TCP, OURS.address, 80)
    elsewhere = ServerId(Family.V4, Protocol.TCP, parse_address("192.0.2.1"), 53)
    ipvs = FakeIpvs()
    for id_ in (OURS, THEIRS, unnamed, elsewhere, ServerId.by_mark(Family.V4, 256)):
        ipvs.put(VirtualServer(id_), {})
    # Somebody's server may stand on an address of our link: it was there first.
    on_link = frozenset((OURS.address, THEIRS.address))
    assert delete_ours(ipvs, ledger, on_link, left) == 2
    assert ipvs.state.keys() == {THEIRS, elsewhere, ServerId.by_mark(Family.V4, 256)}
    assert delete_ours(ipvs, ledger, on_link, left) == 0
    assert left == []


def test_a_ledger_that_cannot_be_read_is_told_and_stays(space: str, tmp_path: Path) -> None:
    file = tmp_path / "ipvs.ledger"
    file.write_text("nonsense\n")
    left: list[str] = []
    assert len(read_ledger(file, left)) == 0
    assert "only servers on our own link" in left[0]
    in_netns(space, lambda: clean_proxy(tmp_path, left))
    assert file.exists()
