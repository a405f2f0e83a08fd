"""Overlays between real BIRDs where the kernel has IPIP: two subnets, and a router without pod routes.

Each step goes as the room does it: links that are needed, BIRD's configuration, links that are not any more.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from netpol.kernel.modules import load_module
from netpol.kernel.netns import in_netns
from netpol.kernel.overlay import apply_overlay
from netpol.lib.errors import KernelError
from netpol.model.net import Family, format_address, parse_address, parse_prefix
from netpol.model.objects import Node
from routes.bird import reply
from routes.bird.render import render, tunnel6_link
from routes.options import Encapsulation, OverlayMode, RouteOptions
from routes.overlay import LINK_PREFIXES, overlay_of
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, Host, bird_net

Say = Callable[[str, Any], None]

VXLAN, IPIP = Encapsulation.VXLAN, Encapsulation.IPIP
CROSS, ALWAYS = OverlayMode.CROSS_SUBNET, OverlayMode.ALWAYS
SUBNETS = tuple(
    parse_prefix(p) for p in ("10.0.1.0/24", "10.0.2.0/24", "fd00:1::/64", "fd00:2::/64")
)
MTU = 1500
_SETTLE_S = 0.4
_ETH_P_ALL = 3
_IN_IP, _IN_IPV6 = 4, 41  # RFC 2003, RFC 2473: protocols of what is inside
_POD_BYTES = {Family.V4: b"\x0a\x01", Family.V6: b"\xfd\x01"}


def run(say: Say) -> None:
    """Everything, on one network that goes from overlay to overlay."""
    for module in ("veth", "bridge", "ipip", "ip6_tunnel"):
        load_module(module)
    with bird_net([(1, 1), (1, 2), (2, 3)]) as net:
        cluster = _Cluster(net)
        one, two, three = net.hosts.values()
        fallback = _fallback(one)
        cluster.turn(VXLAN, CROSS)
        say("vxlan", [cluster.routed(), one.pings(three)])
        since = cluster.sessions()

        with _pinging(one, three) as counts:
            say("to ipip", cluster.turn(IPIP, CROSS))
            cluster.routed()
        say("pings to ipip", counts)
        with _heard(net, three.name) as heard:
            say(
                "cross-subnet",
                [cluster.routed(), one.pings(two), one.pings(three), three.pings(two)],
            )
        say("on the wire", sorted(heard))
        say("hops", [_hop(one, other) for other in (two, three)])
        say("mtu", _mtu(one, three))
        say("again", cluster.turn(IPIP, CROSS))

        say("drift", _drift(cluster))
        say("foreign", _foreign(cluster))

        say("to always", cluster.turn(IPIP, ALWAYS))
        say("always", [cluster.routed(), one.pings(two), three.pings(one)])
        say("always hops", [_hop(one, other) for other in (two, three)])
        say("without tunnels", _without_tunnels(cluster))
        say("an end changes hands", _changed_hands(cluster))
        with _pinging(one, three) as counts:
            say("to vxlan", cluster.turn(VXLAN, ALWAYS))
            cluster.routed()
        say("pings to vxlan", counts)
        say("vxlan always", [cluster.routed(), one.pings(two), three.pings(one)])
        say("vxlan hops", [_hop(one, other) for other in (two, three)])
        say("one by one", cluster.one_by_one())
        say("sessions", [since, cluster.sessions()])
        say("fallback", [fallback, _fallback(one)])


class _Cluster:
    """The nodes, and what they are told."""

    def __init__(self, net: BirdNet) -> None:
        self.net = net
        self._encapsulation, self._mode = VXLAN, CROSS
        self._accept: tuple[Encapsulation, ...] = ()
        self._changed: dict[str, Encapsulation] = {}

    def turn(self, encapsulation: Encapsulation, mode: OverlayMode) -> list[str]:
        """Go to an overlay, all nodes at once; what the first one changed."""
        self._encapsulation, self._mode = encapsulation, mode
        hosts = self.net.hosts.values()
        steps = [
            [self.links(host, prune=False) for host in hosts],
            [self._bird(host) for host in hosts],
            [self.links(host, prune=True) for host in hosts],
        ]
        return [word for step in steps for word in step[0]]

    def one_by_one(self) -> list[Any]:
        """One node after the other goes from VXLAN to IPIP, while all take both; who is reached meanwhile."""
        one, two, three = self.net.hosts.values()
        found: list[Any] = []
        self._accept = (VXLAN, IPIP)
        self.turn(VXLAN, ALWAYS)
        for host in (one, two):
            self._changed[host.name] = IPIP
            self.turn(VXLAN, ALWAYS)
            found.append([self.routed(), _hop(one, three), _hop(three, one)])
            found.append([one.pings(two), one.pings(three), two.pings(three), three.pings(one)])
        self._changed = {}
        self.turn(IPIP, ALWAYS)
        self._accept = ()
        self.turn(IPIP, ALWAYS)
        found.append([self.routed(), one.pings(three), three.pings(two)])
        found.append("knp-t6-in" in one.run("ip", "link"))
        self.turn(VXLAN, ALWAYS)
        self.routed()
        return found

    def _bird(self, host: Host) -> list[str]:
        text = render(plan(self._nodes(), host.name, self._options(host)))
        path = host.folder / "bird.conf"
        if not path.exists():
            self.net.start(host.name, text)
        elif path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            assert not host.ask("configure").failed
        else:
            return []
        return ["configured"]

    def links(self, host: Host, *, prune: bool, nodes: list[Node] | None = None) -> list[str]:
        """Have one node's links."""
        made = plan(nodes or self._nodes(), host.name, self._options(host))
        want = overlay_of(made, underlay_mtu=MTU)
        return in_netns(
            host.netns, lambda: apply_overlay(want, prefixes=LINK_PREFIXES, prune=prune)
        )

    def _nodes(self) -> list[Node]:
        return [h.node() for h in self.net.hosts.values()]

    def _options(self, host: Host) -> RouteOptions:
        return RouteOptions(
            run_dir=str(host.folder),
            subnets=SUBNETS,
            overlay=self._mode,
            encapsulation=self._changed.get(host.name, self._encapsulation),
            accept=self._accept,
        )

    def routed(self) -> bool:
        """Whether all get all routes."""
        hosts = self.net.hosts.values()
        want = {h.name: {p for o in hosts if o is not h for p in o.pods} for h in hosts}
        return self.net.wait(lambda: all(h.routes() == want[h.name] for h in hosts))

    def sessions(self) -> dict[str, dict[str, str]]:
        """Since when each node's sessions are up, by name."""
        return {
            host.name: {
                name: state.since
                for name, state in reply.protocols(host.ask("show protocols all")).items()
                if state.established
            }
            for host in self.net.hosts.values()
        }


@contextlib.contextmanager
def _pinging(host: Host, other: Host) -> Iterator[list[list[int]]]:
    """Ping a pod meanwhile, IPv4 and IPv6; how many were sent and answered, at the end."""
    counts: list[list[int]] = []
    running = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", host.netns),
                *("ping", "-i", "0.02", "-I", mine, theirs),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for mine, theirs in zip(host.pod_addresses, other.pod_addresses, strict=True)
    ]
    time.sleep(_SETTLE_S)
    yield counts
    time.sleep(_SETTLE_S)
    for process in running:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=10)[0]
        counts.append([int(n) for n in re.findall(r"(\d+) (?:packets transmitted|received)", said)])


def _hop(host: Host, other: Host) -> list[str]:
    """The links that a node's packets to another's pods take, by family."""
    found = []
    for address in other.pod_addresses:
        words = host.run("ip", "route", "get", address).split()
        found.append(words[words.index("dev") + 1])
    return found


def _mtu(host: Host, other: Host) -> list[str]:
    """What of a packet that fills a tunnel exactly, and of one byte more; IPv4, then IPv6."""
    found = []
    headers = {Family.V4: 28, Family.V6: 48}
    room = {Family.V4: MTU - 20, Family.V6: MTU - 40}
    for family, mine, theirs in zip(headers, host.pod_addresses, other.pod_addresses, strict=True):
        for more in (0, 1):
            size = room[family] - headers[family] + more
            said = host.run(
                *("ping", "-c", "1", "-W", "0.5", "-M", "do", "-s", str(size), "-I", mine, theirs)
            )
            found.append("fits" if " 0% packet loss" in said else said.partition("too long")[1])
    return found


def _drift(cluster: _Cluster) -> list[list[str]]:
    """Somebody changes the links; what is put right, and what a second time."""
    one, _, three = cluster.net.hosts.values()
    six = tunnel6_link(parse_address(three.addresses[1]))
    one.run("ip", "link", "set", "knp-ipip0", "mtu", "1300")
    one.run("ip", "link", "set", six, "down")
    mended = [cluster.links(one, prune=True)]
    one.run("ip", "-6", "tunnel", "change", six, "encaplimit", "4")
    mended += [cluster.links(one, prune=True) for _ in range(2)]
    return mended


def _foreign(cluster: _Cluster) -> str:
    """What is said where somebody else has the tunnel already."""
    one, *_ = cluster.net.hosts.values()
    one.run("ip", "link", "delete", "knp-ipip0")
    one.run("ip", "link", "add", "theirs", "type", "ipip", "local", one.addresses[0])
    try:
        cluster.links(one, prune=False)
    except KernelError as e:
        return str(e)
    finally:
        one.run("ip", "link", "delete", "theirs")
    return "nothing"


def _reaches(host: Host, address: str) -> bool:
    return " 0% packet loss" in host.run("ping", "-c", "1", "-W", "0.5", address)


def _without_tunnels(cluster: _Cluster) -> dict[str, Any]:
    """Links go away under a node: what is left, and whether all is back when they are made again."""
    one, two, three = cluster.net.hosts.values()
    one.run("ip", "link", "delete", "knp-ipip0")
    one.run("ip", "link", "delete", tunnel6_link(parse_address(two.addresses[1])))
    gone = {*(f"unreachable {h.pods[0]}" for h in (two, three)), f"unreachable {two.pods[1]}"}
    closed = cluster.net.wait(lambda: one.routes() == {*gone, three.pods[1]})
    plain = [_reaches(one, address) for address in two.pod_addresses]
    made = cluster.links(one, prune=True)
    return {"closed": closed, "reached": plain, "made": made, "back": cluster.routed()}


def _changed_hands(cluster: _Cluster) -> list[list[str]]:
    """A machine comes back as a Node of another name, and for a while there are both."""
    one, *_ = cluster.net.hosts.values()
    nodes = [h.node() for h in cluster.net.hosts.values()]
    renamed = msgspec.structs.replace(nodes[2], name="n9")
    return [
        cluster.links(one, prune=prune, nodes=known)
        for known in ([*nodes, renamed], [*nodes[:2], renamed])
        for prune in (False, True)
    ]


def _fallback(host: Host) -> dict[str, str]:
    """The devices that come with the kernel's modules: ours to leave alone."""
    out = {}
    for name in ("tunl0", "ip6tnl0"):
        out[name] = " ".join(host.run("ip", "-d", "link", "show", name).split()[1:])
    return out


@contextlib.contextmanager
def _heard(net: BirdNet, link: str) -> Iterator[set[str]]:
    """Which of the pods' packets the router's link carries meanwhile, and whether they are in tunnels."""
    heard: set[str] = set()

    def listen() -> socket.socket:
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        listener.bind((link, _ETH_P_ALL))
        return listener

    with in_netns(net.router, listen) as listener:
        listener.setblocking(False)
        yield heard
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.update(_kind(listener.recv(128)))


def _kind(packet: bytes) -> Iterator[str]:
    if packet[0] >> 4 == 4:
        family, protocol, src, inside = Family.V4, packet[9], packet[12:16], packet[20 + 12 :]
    elif packet[0] >> 4 == 6:
        family, protocol, src, inside = Family.V6, packet[6], packet[8:24], packet[40 + 8 :]
    else:
        return
    pods = _POD_BYTES[family]
    if src.startswith(pods):
        yield f"{format_address(src)} plain"
    elif protocol in (_IN_IP, _IN_IPV6) and inside.startswith(pods):
        yield f"{format_address(src)} carries {format_address(inside[: len(src)])}"
