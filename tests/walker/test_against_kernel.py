"""The walker against the kernel: the same text, the same packets, the same verdicts.

A namespace stands for node n1 of the case table: its pods are behind `cni0`, the rest of the world behind
`eth0`. Packets are made by hand, so that every source address is at hand; who comes out is sniffed.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest

from netpol.kernel import netns
from netpol.model.flow import Flow
from netpol.model.ids import Protocol
from tests import engine
from tests.spec.policy.case import Case
from tests.spec.policy.cases import CASES
from tests.walker.cluster import BRIDGE, UPLINK, Cluster

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

NODE = "n1"
ROWS = (
    "5",
    "16",
    "17",
    "23",
    "26",
    "42",
    "43",
    "47",
    "58",
    "59",
    "62",
    "64",
    "69",
    "72",
    "79",
    "91",
)
CHOSEN = [c for c in CASES if c.row in ROWS and len(c.steps) == 1]
FIRST_SPORT = 20000
ETH_P_IP = 0x0800
NUMBERS = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}
SETTLE_S = 0.3


def run(space: str, *words: str, text: str | None = None) -> None:
    done = subprocess.run(
        ["ip", "netns", "exec", space, *words],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (words, done.stderr)


class Lab:
    """Three namespaces in a row: pods, the node, everybody else."""

    def __init__(self) -> None:
        tag = f"knpt-walk-{os.getpid()}"
        self.pods, self.node, self.rest = f"{tag}-p", f"{tag}-n", f"{tag}-o"
        self.spaces = (self.pods, self.node, self.rest)

    def up(self) -> None:
        for space in self.spaces:
            netns.create(space)
        for far, link in ((self.pods, BRIDGE), (self.rest, UPLINK)):
            run(self.node, "ip", "link", "add", link, "type", "veth", "peer", "v0", "netns", far)
            run(self.node, "ip", "link", "set", link, "up")
            run(far, "ip", "link", "set", "v0", "up")
        run(self.node, "ip", "addr", "add", "10.244.1.1/24", "dev", BRIDGE)
        run(self.node, "ip", "addr", "add", "172.18.0.2/24", "dev", UPLINK)
        run(self.pods, "ip", "addr", "add", "10.244.1.254/24", "dev", "v0")
        run(self.rest, "ip", "addr", "add", "172.18.0.254/24", "dev", "v0")
        run(self.pods, "ip", "route", "add", "default", "via", "10.244.1.1")
        run(self.rest, "ip", "route", "add", "default", "via", "172.18.0.2")
        run(self.node, "ip", "route", "add", "default", "via", "172.18.0.254")
        # Every pod address is one hop behind the pods' namespace, none of its own: nothing answers.
        run(self.node, "ip", "route", "add", "10.244.1.0/25", "via", "10.244.1.254")
        run(self.node, "ip", "route", "add", "172.18.0.3", "via", "172.18.0.254")
        for name in ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"):
            run(self.node, "sysctl", "-qw", name)
        for link in (BRIDGE, UPLINK):
            run(self.node, "sysctl", "-qw", f"net.ipv4.conf.{link}.rp_filter=0")

    def down(self) -> None:
        for space in self.spaces:
            netns.delete(space)

    def load(self, cluster: Cluster, variant: str) -> None:
        """Put a node's text in force, in place of what was there."""
        tool = f"iptables-{variant}"
        run(self.node, tool, "-t", "mangle", "-F")
        run(self.node, tool, "-t", "mangle", "-X")
        run(self.node, "ipset", "destroy")
        text = cluster.texts[NODE]
        run(self.node, "ipset", "-exist", "restore", text=text.sets)
        for family, words in ((4, "iptables"), (6, "ip6tables")):
            lines = text.tables[family]
            run(self.node, f"{words}-{variant}-restore", "--noflush", "--wait", "5", text=lines)
            if family == 6:  # accepted; its packets are not sent here, and it holds the sets
                run(self.node, f"{words}-{variant}", "-t", "mangle", "-F")
                run(self.node, f"{words}-{variant}", "-t", "mangle", "-X")

    def send(self, flows: list[Flow], inside: list[bool]) -> list[bool]:
        """Send each flow's first packet from its side; which came out at the other."""
        ears = [self._ear(self.rest), self._ear(self.pods)]
        mouths = [
            netns.open_socket(space, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
            for space in (self.pods, self.rest)
        ]
        try:
            for number, (flow, from_pods) in enumerate(zip(flows, inside, strict=True)):
                packet = datagram(flow, FIRST_SPORT + number)
                to = socket.inet_ntoa(flow.dst.address)
                mouths[0 if from_pods else 1].sendto(packet, (to, 0))
            time.sleep(SETTLE_S)
            heard = [sports(ear) for ear in ears]
        finally:
            for sock in (*ears, *mouths):
                sock.close()
        return [
            FIRST_SPORT + number in heard[0 if from_pods else 1]
            for number, from_pods in enumerate(inside)
        ]

    def _ear(self, space: str) -> socket.socket:
        def listen() -> socket.socket:
            ear = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
            ear.bind(("v0", ETH_P_IP))
            ear.setblocking(False)
            return ear

        return netns.in_netns(space, listen)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram(flow: Flow, sport: int) -> bytes:
    """A SYN or an empty datagram; the kernel fills in the IP checksum."""
    number, port = NUMBERS[flow.protocol], flow.port or 0
    if flow.protocol is Protocol.TCP:
        body = struct.pack("!HHIIBBHHH", sport, port, 1, 0, 5 << 4, 2, 1024, 0, 0)
        at = 16
    else:
        body = struct.pack("!HHHH", sport, port, 8, 0)
        at = 6
    pseudo = flow.src.address + flow.dst.address + struct.pack("!BBH", 0, number, len(body))
    body = body[:at] + struct.pack("!H", checksum(pseudo + body)) + body[at + 2 :]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), sport, 0, 64, number, 0)
    return head + flow.src.address + flow.dst.address + body


def sports(ear: socket.socket) -> set[int]:
    """Source ports of what arrived."""
    found = set()
    while True:
        try:
            data, origin = ear.recvfrom(2048)
        except BlockingIOError:
            return found
        if origin[2] != socket.PACKET_OUTGOING and data[9] in NUMBERS.values():
            offset = (data[0] & 15) * 4
            found.add(int.from_bytes(data[offset : offset + 2], "big"))


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Lab, str]]:
    before = os.environ.get("XTABLES_LOCKFILE")
    os.environ["XTABLES_LOCKFILE"] = str(tmp_path_factory.mktemp("lock") / "xtables.lock")
    made = Lab()
    try:
        made.up()
        yield made, request.param
    finally:
        made.down()
        if before is None:
            del os.environ["XTABLES_LOCKFILE"]
        else:
            os.environ["XTABLES_LOCKFILE"] = before


@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: c.id)
def test_kernel_and_walker_agree(lab: tuple[Lab, str], case: Case):
    space, variant = lab
    world = engine.build(case.steps[0].world)
    cluster = Cluster.rendered(world)
    space.load(cluster, variant)
    flows, inside = [], []
    ports = {f.port for f in case.steps[0].flows if f.port.endswith(("/TCP", "/UDP"))}
    ends = [*world.pods, *sorted({e for f in case.steps[0].flows for e in f[:2] if "/" not in e})]
    for src in map(str, ends):
        for dst in map(str, ends):
            for port in sorted(ports | {"81/TCP"}):
                try:
                    flow = engine.flow(world, src, dst, port, 4)
                except engine.NoPartyError:
                    continue
                here = [cluster.place(p) == ("pod", NODE) for p in (flow.src, flow.dst)]
                if sum(here) == 1 and ("host", NODE) not in map(
                    cluster.place, (flow.src, flow.dst)
                ):
                    flows.append(flow)
                    inside.append(here[0])
    assert flows
    verdicts = space.send(flows, inside)
    for flow, passed in zip(flows, verdicts, strict=True):
        walk = cluster.walk_at(NODE, flow)
        assert passed == walk.passed, (
            f"{flow.src} to {flow.dst} {flow.port}/{flow.protocol}\n{walk}"
        )
