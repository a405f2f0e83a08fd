"""A kube-proxy beside us: found while it runs, and its remains removed, kubelet's chains left alone."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from netpol.kernel.drivers import Variant
from netpol.kernel.kubeproxy import (
    ipvs_traces,
    leftover_chains,
    removal_text,
    remove_leftovers,
    running_kube_proxy,
)
from netpol.kernel.netns import in_netns
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES, Family, parse_address

pytestmark = pytest.mark.kernel

TOOLS = {Family.V4: "iptables", Family.V6: "ip6tables"}
SVC, SEP = "KUBE-SVC-NPX46M4PTMTKRN6Y", "KUBE-SEP-ABCDEFGHIJKLMNOP"
NAT = f"""*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:{SVC} - [0:0]
:{SEP} - [0:0]
:MINE - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "it's \\"quoted\\"" -j KUBE-POSTROUTING
-A POSTROUTING -m comment --comment "it's \\"quoted\\"" -j KUBE-POSTROUTING
-A PREROUTING -p tcp --dport 1 -j MINE
-A KUBE-SERVICES -p tcp -m tcp --dport 443 -j {SVC}
-A {SVC} -m statistic --mode random --probability 0.5 -j {SEP}
-A {SVC} -j {SEP}
-A {SEP} -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A MINE -j RETURN
COMMIT
"""
FILTER = """*filter
:KUBE-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
-A FORWARD -j KUBE-FORWARD
-A INPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
COMMIT
"""
MANGLE = """*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"""


def run(space: str, *words: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", space, *words],
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def load(space: str, variant: Variant) -> None:
    for family in FAMILIES:
        tool = f"{TOOLS[family]}-{variant}-restore"
        run(space, tool, "--noflush", stdin=NAT + FILTER + MANGLE)


def chains(space: str, variant: Variant, family: Family) -> set[str]:
    driver = RestoreTables(variant, netns=space)
    text = "".join(driver.save_text(t, family) for t in ("nat", "filter", "mangle"))
    return {line.split()[0][1:] for line in text.splitlines() if line.startswith(":")}


@pytest.mark.parametrize("variant", list(Variant))
def test_only_kube_proxys_part_is_removed(space: str, variant: Variant) -> None:
    load(space, variant)
    run(space, "ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port")
    run(space, "ipset", "create", "OTHER", "hash:ip")
    run(space, "ip", "link", "add", "kube-ipvs0", "type", "bridge")
    run(space, "ip", "address", "add", "10.96.0.1/32", "dev", "kube-ipvs0")
    assert in_netns(space, leftover_chains) == 2 * 7

    done = in_netns(space, remove_leftovers)

    assert done.left == []
    assert (done.chains, done.jumps) == (2 * 7, 2 * 5)
    assert (done.sets, done.links) == (1, 1)
    for family in FAMILIES:
        kept = {c for c in chains(space, variant, family) if c.startswith(("KUBE-", "MINE"))}
        assert kept == {"KUBE-KUBELET-CANARY", "KUBE-FIREWALL", "KUBE-IPTABLES-HINT", "MINE"}
        driver = RestoreTables(variant, netns=space)
        assert "-A INPUT -j KUBE-FIREWALL" in driver.save_text("filter", family)
        assert driver.save_text("nat", family).count("-j MINE") == 1
    assert run(space, "ipset", "list", "-n").split() == ["OTHER"]
    assert in_netns(space, leftover_chains) == 0
    again = in_netns(space, remove_leftovers)
    assert (again.chains, again.jumps, again.sets, again.links, again.tables) == (0, 0, 0, 0, 0)


def test_its_link_and_its_sets_tell_which_servers_are_its(space: str) -> None:
    assert in_netns(space, ipvs_traces) == (frozenset(), frozenset())
    sets = """create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
add KUBE-NODE-PORT-TCP 30080
add KUBE-NODE-PORT-TCP 30081
create KUBE-NODE-PORT-LOCAL-TCP bitmap:port range 0-65535
add KUBE-NODE-PORT-LOCAL-TCP 30081
create KUBE-6-NODE-PORT-UDP bitmap:port range 0-65535
add KUBE-6-NODE-PORT-UDP 30053
create KUBE-NODE-PORT-SCTP-HASH hash:ip,port
add KUBE-NODE-PORT-SCTP-HASH 192.0.2.1,sctp:30099
create KUBE-NODE-PORT-LOCAL-UDP bitmap:port range 0-65535
create KUBE-LOAD-BALANCER hash:ip,port
add KUBE-LOAD-BALANCER 192.0.2.1,tcp:443
"""
    run(space, "ipset", "restore", stdin=sets)
    run(space, "ip", "link", "add", "kube-ipvs0", "type", "bridge")
    run(space, "ip", "address", "add", "10.96.0.1/32", "dev", "kube-ipvs0")
    run(space, "ip", "address", "add", "fd00::1/128", "dev", "kube-ipvs0", "nodad")

    traces = in_netns(space, ipvs_traces)

    assert traces.addresses == {parse_address("10.96.0.1"), parse_address("fd00::1")}
    assert traces.node_ports == {
        (Family.V4, Protocol.TCP, 30080),
        (Family.V4, Protocol.TCP, 30081),
        (Family.V6, Protocol.UDP, 30053),
        (Family.V4, Protocol.SCTP, 30099),
    }


def test_looking_makes_no_table(space: str) -> None:
    in_netns(space, remove_leftovers)

    for path in ("ip_tables_names", "ip6_tables_names"):
        assert run(space, "cat", f"/proc/net/{path}") == ""
    assert "*" not in run(space, "iptables-nft-save")


def test_a_table_of_nftables_goes_without_the_nft_program(space: str) -> None:
    for family in (2, 10):
        in_netns(space, partial(make_nft_table, family))

    assert in_netns(space, remove_leftovers).tables == 2
    assert in_netns(space, remove_leftovers).tables == 0


def make_nft_table(family: int) -> None:
    """NFT_MSG_NEWTABLE (0) of the name kube-proxy."""
    import socket

    from netpol.kernel import netlink

    frame = [netlink.message(k, 1, s, b"")[:-2] + b"\0\x0a" for k, s in ((16, 1), (17, 3))]
    name = netlink.nla(1, b"kube-proxy\0")
    new = netlink.message(10 << 8, 0x401 | 4, 2, name, family=family)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:
        sock.send(frame[0] + new + frame[1])
        (answer,) = [m for m in netlink.messages(sock.recv(4096)) if m.type == 2]
        assert netlink.error_code(answer.payload) == 0


def test_a_saved_table_without_its_chains_is_left_alone() -> None:
    assert removal_text("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n", "nat") == ("", 0, 0)


# -- one that runs ------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    bodies: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        body = self.bodies.get(self.path)
        self.send_response(503 if body else 404)
        self.end_headers()
        self.wfile.write((body or "not found").encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def serve(space: str) -> Iterator[Callable[[dict[str, str]], int]]:
    """Starts an HTTP server in the namespace; returns its port."""
    servers: list[HTTPServer] = []

    def start(bodies: dict[str, str]) -> int:
        handler = type("H", (Handler,), {"bodies": bodies})
        server = in_netns(space, lambda: HTTPServer(("127.0.0.1", 0), handler))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server.server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_nothing_runs(space: str, tmp_path: Path) -> None:
    assert in_netns(space, lambda: running_kube_proxy(proc=tmp_path)) is None


def test_its_ports_tell_even_when_it_is_unhealthy(
    space: str, tmp_path: Path, serve: Callable[[dict[str, str]], int]
) -> None:
    health = serve({"/healthz": json.dumps({"lastUpdated": "x"})})
    metrics = serve({"/proxyMode": "ipvs"})
    other = serve({"/": "hello"})
    talkative = serve(
        {"/healthz": "ok", "/proxyMode": "<html>what you asked for is not here</html>"}
    )

    def found(ports: tuple[int, int]) -> str | None:
        return in_netns(space, lambda: running_kube_proxy(proc=tmp_path, ports=ports))

    assert "answers on port" in (found((health, 1)) or "")
    assert "in mode ipvs" in (found((1, metrics)) or "")
    assert found((other, other)) is None
    assert found((talkative, talkative)) is None


def fake_process(proc: Path, pid: str, *, comm: str, cmdline: bytes, space: str | None) -> None:
    (proc / pid / "ns").mkdir(parents=True)
    (proc / pid / "comm").write_text(f"{comm}\n")
    (proc / pid / "cmdline").write_bytes(cmdline)
    if space is not None:
        (proc / pid / "ns/net").symlink_to(space)


@pytest.mark.parametrize(
    ("comm", "cmdline", "same", "found"),
    [
        ("kube-proxy", b"/usr/local/bin/kube-proxy\0--config=x\0", True, True),
        ("kube-proxy", b"/usr/local/bin/kube-proxy\0", False, False),
        ("hyperkube", b"/hyperkube\0kube-proxy\0", True, True),
        ("kubelet", b"/usr/bin/kubelet\0", True, False),
        ("sh", b"sh\0-c\0echo kube-proxy\0", True, False),
    ],
)
def test_a_process_counts_in_the_same_network_only(
    space: str, tmp_path: Path, *, comm: str, cmdline: bytes, same: bool, found: bool
) -> None:
    here = f"/run/netns/{space}"
    fake_process(tmp_path, "thread-self", comm="x", cmdline=b"", space=here)
    fake_process(tmp_path, "7", comm="kube-proxy", cmdline=b"", space=None)  # ended
    fake_process(
        tmp_path, "8", comm=comm, cmdline=cmdline, space=here if same else "/proc/self/ns/net"
    )

    said = in_netns(space, lambda: running_kube_proxy(proc=tmp_path, ports=(1, 1)))

    assert said == ("process 8 is a kube-proxy" if found else None)


def test_a_live_process_is_found(space: str, tmp_path: Path) -> None:
    program = tmp_path / "kube-proxy"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen(["ip", "netns", "exec", space, str(program), "60"])
    try:
        wanted = f"process {child.pid} is a kube-proxy"
        deadline = 200
        while deadline and in_netns(space, own_proc) != wanted:
            deadline -= 1
        assert in_netns(space, own_proc) == wanted
        assert running_kube_proxy(ports=(1, 1)) != wanted  # not in the tests' own namespace
    finally:
        child.terminate()
        child.wait()
    assert in_netns(space, own_proc) is None


def own_proc() -> str | None:
    return running_kube_proxy(ports=(1, 1))
