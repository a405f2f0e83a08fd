"""Ending flows on the real kernel: the right ones go, of both families, and no others.

A NAT rule plays IPVS: what conntrack keeps of a flow is the same.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from netpol.kernel import conntrack
from netpol.kernel.conntrack import NetlinkFlows
from netpol.kernel.drivers import FlowMatch
from netpol.kernel.netns import in_netns
from netpol.model.ids import Protocol
from netpol.model.net import parse_address

pytestmark = pytest.mark.kernel

UDP, TCP, SCTP = Protocol.UDP, Protocol.TCP, Protocol.SCTP
BACKEND_PORT = 5353


class World(NamedTuple):
    """What is dialled, and where it goes, in one family."""

    vip: str
    backends: tuple[str, str]


WORLDS = (
    World("10.96.0.10", ("10.244.1.20", "10.244.1.30")),
    World("fd00:96::10", ("fd00:244::20", "fd00:244::30")),
)


@pytest.fixture(params=WORLDS, ids=["v4", "v6"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.param
    return found


@pytest.fixture
def node(space: str) -> str:
    """Port 53 of a VIP goes to the first backend, port 54 to the second; nobody need be there."""
    commands = []
    for found in WORLDS:
        six = ":" in found.vip
        ip = "ip -6" if six else "ip -4"
        commands += [f"{ip} addr add {a}/{128 if six else 32} dev lo" for a in found.backends]
        commands.append(f"{ip} route add local {found.vip} dev lo")
        for protocol in ("udp", "tcp", "sctp"):
            for port, backend in zip((53, 54), found.backends, strict=True):
                host = f"[{backend}]" if six else backend
                commands.append(
                    f"{'ip6tables' if six else 'iptables'} -w -t nat -A OUTPUT -d {found.vip} -p {protocol} "
                    f"--dport {port} -j DNAT --to-destination {host}:{BACKEND_PORT}"
                )
    script = "set -e\n" + "\n".join(commands)
    subprocess.run(["ip", "netns", "exec", space, "sh", "-c", script], check=True)
    return space


@pytest.fixture
def flows(node: str) -> Iterator[NetlinkFlows]:
    driver = in_netns(node, NetlinkFlows)
    try:
        yield driver
    finally:
        driver.close()


def dial(space: str, address: str, *ports: int, times: int = 1, tcp: bool = False) -> None:
    """Send one packet to each port, so many times from other ports."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def send() -> None:
        kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
        with contextlib.ExitStack() as held:  # all open until the end, or ports come twice
            for _ in range(times):
                for port in ports:
                    sock = held.enter_context(socket.socket(family, kind))
                    if tcp:
                        sock.connect_ex((address, port))
                    else:
                        sock.sendto(b"?", (address, port))

    in_netns(space, send)


def known(space: str, world: World, *, backend: int | None = None) -> int:
    """How many flows conntrack knows to the VIP, or of those that one backend has."""
    command = ["conntrack", "-L", "-f", "ipv6" if ":" in world.vip else "ipv4", "-d", world.vip]
    if backend is not None:
        command += ["-r", world.backends[backend]]
    done = subprocess.run(
        ["ip", "netns", "exec", space, *command], capture_output=True, text=True, check=True
    )
    return len(done.stdout.splitlines())


@pytest.mark.parametrize("filters", [True, False], ids=["the kernel picks", "whole listings"])
def test_flows_of_a_backend_end(
    node: str, flows: NetlinkFlows, world: World, monkeypatch: pytest.MonkeyPatch, *, filters: bool
) -> None:
    if not filters:
        monkeypatch.setattr(conntrack, "FILTERED_BACKENDS", 0)
    dial(node, world.vip, 53, 54, times=300)
    assert (known(node, world, backend=0), known(node, world, backend=1)) == (300, 300)
    match = FlowMatch(UDP, parse_address(world.backends[0]), BACKEND_PORT)
    assert flows.end([match]) == 300
    assert (known(node, world, backend=0), known(node, world, backend=1)) == (0, 300)
    assert flows.end([match]) == 0


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 1),
        ({"backend_port": 0}, 1),
        ({"port": 53}, 1),
        ({"address": "vip", "port": 53}, 1),
        ({"address": "vip"}, 1),
        ({"protocol": TCP}, 0),
        ({"protocol": SCTP}, 0),
        ({"backend_port": 5354}, 0),
        ({"port": 54}, 0),
        ({"address": "other"}, 0),
        ({"backend": "unknown"}, 0),
    ],
    ids=str,
)
def test_what_a_match_means(
    node: str, flows: NetlinkFlows, world: World, change: dict[str, object], count: int
) -> None:
    names = {"vip": world.vip, "other": world.backends[1], "unknown": world.vip}
    plain = FlowMatch(UDP, parse_address(world.backends[0]), BACKEND_PORT)
    match = plain._replace(
        **{
            k: parse_address(names[v]) if isinstance(v, str) and v in names else v
            for k, v in change.items()
        }
    )
    dial(node, world.vip, 53, 54)
    assert flows.end([match]) == count
    assert known(node, world) == 2 - count


def test_many_backends_of_both_families_at_once(node: str, flows: NetlinkFlows) -> None:
    for found in WORLDS:
        dial(node, found.vip, 53, 54, times=5)
    nobody = [FlowMatch(UDP, bytes([10, 244, 9, n]), 1) for n in range(1, 100)]
    wanted = [FlowMatch(UDP, parse_address(w.backends[0])) for w in WORLDS]
    assert flows.end([*nobody, *wanted]) == 10
    for found in WORLDS:
        assert (known(node, found, backend=0), known(node, found, backend=1)) == (0, 5)


def test_other_protocols_stay(node: str, flows: NetlinkFlows, world: World) -> None:
    def listen() -> socket.socket:
        six = ":" in world.vip
        sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET)
        sock.bind((world.backends[0], BACKEND_PORT))
        sock.listen()
        return sock

    with in_netns(node, listen):
        dial(node, world.vip, 53, tcp=True)
        dial(node, world.vip, 53)
        assert known(node, world) == 2
        assert flows.end([FlowMatch(UDP, parse_address(world.backends[0]))]) == 1
        assert known(node, world) == 1


def test_nothing_to_end(flows: NetlinkFlows) -> None:
    assert flows.end([]) == 0
