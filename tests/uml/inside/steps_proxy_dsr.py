"""Direct server return between two nodes, with policy's tables in place on both.

A client's packets reach node a; the backends are a pod there and one on node b. Servers, links in pods and
rules are made by the product's own code, from rows as the plan has them.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from netpol.config import DEFAULT_SERVICE_MARK_MASK
from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.kernel import netns
from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    SetTransaction,
    TableTransaction,
    Variant,
)
from netpol.kernel.dsr import LINKS, PodTunnels
from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.modules import load_module
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.sysctl import keep_bridge_nf, keep_sysctl, read_sysctl
from netpol.kernel.tables import RestoreTables
from netpol.kernel.vips import DummyVips
from netpol.model.ids import SERVICES, ObjectKey, Protocol
from netpol.model.ipvs import AddReal, AddServer, DeleteServer
from netpol.model.net import FAMILIES, Family, parse_address, parse_prefix
from netpol.render.node import graph_of
from netpol.render.options import AnswerLink, RenderOptions
from proxy import names
from proxy.dsr import Ends
from proxy.lower import lower
from proxy.marks import Marks
from proxy.rows import Backend, Kind, ServicePlan, ServiceRow
from proxy.rules import RuleOptions, rulesets
from tests import builders as make
from tests import engine

Json = dict[str, Any]
Say = Callable[[str, Any], None]

PORT, MASK, BRIDGE, CLIENT = 8080, DEFAULT_SERVICE_MARK_MASK, "kube-bridge", "client"
VIP = {Family.V4: "203.0.113.7", Family.V6: "2001:db8:7::7"}
CLIENT_ADDRESS = {Family.V4: "172.18.0.9", Family.V6: "fd00:172:18::9"}
NODES = {"a": 2, "b": 3}
PODS = {"pod-a": "a", "pod-b": "b", "other-b": "b"}
LARGE = 400_000
SERVICE = ObjectKey("shop", "web")
_ETH_P_ALL = 3


def node_address(node: str, family: Family) -> str:
    """A node on the link to the client."""
    number = NODES[node]
    return f"172.18.0.{number}" if family is Family.V4 else f"fd00:172:18::{number}"


def pod_address(pod: str, family: Family) -> str:
    """A pod's address."""
    net, host = NODES[PODS[pod]], 20 if pod.startswith("pod") else 30
    return f"10.244.{net}.{host}" if family is Family.V4 else f"fd00:10:244:{net}::{host}"


def _ip(space: str, *lines: str) -> None:
    done = subprocess.run(
        ["ip", "-n", space, "-batch", "-"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (space, done.stderr)


def build() -> None:
    """Two nodes and a client on one link, pods behind a bridge of each node."""
    for space in (CLIENT, *NODES, *PODS):
        netns.create(space)
    _ip(CLIENT, "link add lan0 type bridge", "link set lan0 up")
    _ip(CLIENT, "addr add 172.18.0.9/24 dev lan0", "addr add fd00:172:18::9/64 dev lan0 nodad")
    for node, number in NODES.items():
        _ip(
            node,
            f"link add eth0 type veth peer name lan-{node} netns {CLIENT}",
            f"link add {BRIDGE} type bridge",
            *(f"link set {link} up" for link in ("eth0", BRIDGE)),
            f"addr add 10.244.{number}.1/24 dev {BRIDGE}",
            f"addr add fd00:10:244:{number}::1/64 dev {BRIDGE} nodad",
            *(f"addr add {node_address(node, Family.V4)}/24 dev eth0",),
            *(f"addr add {node_address(node, Family.V6)}/64 dev eth0 nodad",),
        )
        _ip(CLIENT, f"link set lan-{node} master lan0 up")
    for node, other in (("a", "b"), ("b", "a")):
        number = NODES[other]
        _ip(
            node,
            f"route add 10.244.{number}.0/24 via {node_address(other, Family.V4)}",
            f"route add fd00:10:244:{number}::/64 via {node_address(other, Family.V6)}",
        )
    for pod, node in PODS.items():
        number = NODES[node]
        _ip(
            node,
            f"link add v{pod} type veth peer name eth0 netns {pod}",
            f"link set v{pod} master {BRIDGE} up",
        )
        _ip(
            pod,
            "link set eth0 up",
            f"addr add {pod_address(pod, Family.V4)}/24 dev eth0",
            f"addr add {pod_address(pod, Family.V6)}/64 dev eth0 nodad",
            f"route add default via 10.244.{number}.1",
            f"route add default via fd00:10:244:{number}::1",
        )
        folder = Path(f"/run/ns-{node}")
        folder.mkdir(exist_ok=True)
        (folder / pod).symlink_to(f"/run/netns/{pod}")


class Node:
    """One node: policy's and the proxy's parts of its kernel."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tunnels = PodTunnels(Path(f"/run/ns-{name}"), Path(f"/run/before-{name}.json"))
        in_netns(name, self._open)

    def _open(self) -> None:
        self.ipvs, self.vips = NetlinkIpvs(), DummyVips()  # IPVS has settings only once it is there
        keep_bridge_nf()
        for key, value in {
            "net/ipv4/ip_forward": "1",
            "net/ipv6/conf/all/forwarding": "1",
            "net/ipv4/vs/conntrack": "1",
            "net/ipv4/conf/all/arp_ignore": "1",
            "net/ipv4/conf/all/arp_announce": "2",
            # As strict as hosts are.
            "net/ipv4/conf/all/rp_filter": "1",
        }.items():
            keep_sysctl(key, value)
        self.sets = NetlinkSets()
        self.svc_sets = NetlinkSets(mark_mask=MASK, owner=SERVICES)
        self.tables = RestoreTables(Variant.LEGACY)
        self.svc_tables = RestoreTables(Variant.LEGACY, owner=SERVICES)
        self.svc_sets.apply(SetTransaction(tuple(CreateSet(s) for s in names.SPECS.values())))
        for (table, family), ruleset in rulesets(RuleOptions(MASK)).items():
            self.svc_tables.apply(
                TableTransaction(table, family, replace=ruleset.chains, hooks=ruleset.hooks)
            )

    def serve(self, rows: list[ServiceRow]) -> None:
        """Have IPVS serve these rows alone, on addresses of this node."""
        in_netns(self.name, lambda: self._serve(rows))

    def _serve(self, rows: list[ServiceRow]) -> None:
        self.ipvs.apply([DeleteServer(i) for i in self.ipvs.dump()])
        part = lower(ServicePlan(SERVICE, rows=tuple(rows)), Marks(MASK).assign)
        refused = self.ipvs.apply(
            [
                *(AddServer(s.virtual) for s in part.servers),
                *(
                    AddReal(s.virtual.id, real, config)
                    for s in part.servers
                    for real, config in s.reals.items()
                ),
            ]
        )
        assert not refused, refused
        number = NODES[self.name]
        for family in FAMILIES:
            text = f"10.244.{number}.0/24" if family is Family.V4 else f"fd00:10:244:{number}::/64"
            add = AddMembers(names.POD[family], {parse_prefix(text): None})
            self.svc_sets.apply(SetTransaction((add,)))
        for entry in part.entries:
            add = AddMembers(names.SPECS[entry.name], {entry.member: entry.mark})
            self.svc_sets.apply(SetTransaction((add,)))
        sources = {f: parse_address(node_address(self.name, f)) for f in FAMILIES}
        bad = self.vips.apply(add=part.vips, remove=(), sources=sources)
        assert not bad, bad

    def ends(self, rows: list[ServiceRow], policies: list[Json]) -> Json:
        """Make the links in pods, and tell policy; what failed, and what a second time changes."""
        return in_netns(self.name, lambda: self._ends(rows, policies))

    def _ends(self, rows: list[ServiceRow], policies: list[Json]) -> Json:
        ends = Ends()
        here = [replace(r, ends=tuple(e for e in r.ends if self._has(e))) for r in rows]
        ends.change({SERVICE: ServicePlan(SERVICE, rows=tuple(here))})
        wanted = ends.wanted()
        made = self.tunnels.apply(wanted)
        again = self.tunnels.apply(wanted)
        links = tuple(
            AnswerLink(vip, made.links[pod].name, made.links[pod].port)
            for pod, vips in wanted.items()
            if pod in made.links
            for vip in sorted(vips)
        )
        pods = [
            make.pod(f"shop/{p}", node=n, ip=(pod_address(p, Family.V4), pod_address(p, Family.V6)))
            for p, n in PODS.items()
        ]
        nodes = [make.node(n, node_address(n, Family.V4)) for n in NODES]
        world = engine.build(make.world(*nodes, make.namespace("shop"), *pods, *policies))
        options = RenderOptions(
            pod_interfaces=(BRIDGE,),
            direct_ports=tuple(sorted(ends.sources())) if links else (),
            direct_links=links,
        )
        dataplane = Dataplane(graph_of(world, self.name), options)
        execute(dataplane.reconcile(dump_kernel(self.sets, self.tables)), self.sets, self.tables)
        execute(dataplane.collect(), self.sets, self.tables)
        return {
            "faults": {str(k): v for k, v in made.faults.items()},
            "same": again == made,
            "drift": dataplane.drift(dump_kernel(self.sets, self.tables)),
            "ports": sorted(link.port for link in made.links.values()),
        }

    def _has(self, address: bytes) -> bool:
        return any(
            parse_address(pod_address(p, f)) == address
            for p, n in PODS.items()
            if n == self.name
            for f in FAMILIES
        )


def rows(*pods: str, tunnel: bool = True) -> list[ServiceRow]:
    """The Service's external addresses, with these pods behind."""
    out = []
    for family in FAMILIES:
        ends = tuple(parse_address(pod_address(p, family)) for p in pods)
        backends = tuple(Backend(e, PORT) for e in ends)
        out += [
            ServiceRow(
                SERVICE,
                str(protocol),
                Kind.EXTERNAL_IP,
                parse_address(VIP[family]),
                PORT,
                protocol,
                backends=backends,
                local_client_backends=backends,
                tunnel=tunnel,
                ends=ends if tunnel else (),
            )
            for protocol in (Protocol.TCP, Protocol.UDP)
        ]
    return out


# -- traffic ------------------------------------------------------------------------------------


def serve_pods() -> None:
    """Every pod says who asks, takes as many bytes as it is told, and sends as many back."""
    for pod in PODS:
        listener = in_netns(
            pod,
            lambda: socket.create_server(
                ("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
            ),
        )
        threading.Thread(target=_accept, args=(pod, listener), daemon=True).start()
        datagrams = in_netns(pod, lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        datagrams.bind(("::", PORT))
        threading.Thread(target=_echo, args=(pod, datagrams), daemon=True).start()


def _echo(pod: str, sock: socket.socket) -> None:
    """Answer from the address that was asked, as name servers do."""
    while True:
        _, ancillary, _, peer = sock.recvmsg(64, 256)
        asked = ancillary[0][2][:16] + bytes(4)  # in6_pktinfo, by any link
        words = f"{pod} saw {peer[0].removeprefix('::ffff:')}".encode()
        with contextlib.suppress(OSError):
            sock.sendmsg([words], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, asked)], 0, peer)


def _accept(pod: str, listener: socket.socket) -> None:
    while True:
        peer, origin = listener.accept()
        threading.Thread(target=_talk, args=(pod, peer, origin[0]), daemon=True).start()


def _talk(pod: str, peer: socket.socket, origin: str) -> None:
    with peer, contextlib.suppress(OSError):
        peer.settimeout(8)
        stream = peer.makefile("rwb")
        size = int(stream.readline())
        got = len(stream.read(size))
        words = f"{pod} saw {origin.removeprefix('::ffff:')}, got {got}\n"
        stream.write(words.encode() + b"x" * size)
        stream.flush()


def ask(space: str, address: str, size: int = 0) -> str:
    """What a pod says, and how many bytes came back; "" where nothing comes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = in_netns(space, lambda: socket.socket(family, socket.SOCK_STREAM))
    with sock:
        sock.settimeout(6 if size else 1.5)
        try:
            sock.connect((address, PORT))
            stream = sock.makefile("rwb")
            stream.write(f"{size}\n".encode() + b"y" * size)
            stream.flush()
            words = stream.readline().decode().strip()
            return f"{words}, back {len(stream.read(size))}" if size else words
        except ConnectionRefusedError:
            return "refused"
        except OSError:
            return ""


def ask_by_udp(space: str, address: str) -> str:
    """What a pod says to a datagram; "" where nothing comes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = in_netns(space, lambda: socket.socket(family, socket.SOCK_DGRAM))
    with sock, contextlib.suppress(OSError):
        sock.settimeout(1.5)
        sock.connect((address, PORT))
        sock.send(b"who?")
        return sock.recv(64).decode()
    return ""


def ask_until(space: str, address: str, pods: set[str], size: int = 0) -> list[str]:
    """Answers until all pods were met: the scheduler goes round."""
    found: dict[str, None] = {}
    for _ in range(2 * len(pods)):
        found[ask(space, address, size)] = None
        if {a.partition(" ")[0] for a in found} >= pods:
            break
    return sorted(found)


@contextlib.contextmanager
def heard() -> Iterator[set[tuple[str, str, int]]]:
    """What comes to the client from a Service's address: by which link, from where, from which port."""
    found: set[tuple[str, str, int]] = set()
    listener = in_netns(
        CLIENT, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    )
    vips = {parse_address(v): v for v in VIP.values()}
    with listener:
        listener.setblocking(False)
        yield found
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, where = listener.recvfrom(128)
                six = packet[0] >> 4 == 6
                src, head = (packet[8:24], 40) if six else (packet[12:16], 20)
                if src in vips and where[0].startswith("lan-") and where[2] != 4:
                    port = struct.unpack_from("!H", packet, head)[0]
                    found.add((where[0], vips[src], port))


def forge(pod: str, sport: int) -> None:
    """A pod sends a segment from the Service's address to the client."""
    src, dst = (socket.inet_aton(x) for x in (VIP[Family.V4], CLIENT_ADDRESS[Family.V4]))
    segment = struct.pack("!HHIIBBHHH", sport, 4567, 1, 1, 0x50, 0x10, 1024, 0, 0)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 9, 0, 64, 6, 0) + src + dst
    mouth = in_netns(pod, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 255))
    with mouth:
        mouth.sendto(head + segment, (CLIENT_ADDRESS[Family.V4], 0))


def links_in(pod: str) -> list[str]:
    """Our links in a pod."""

    def look() -> list[str]:
        return [name for _, name in socket.if_nameindex() if name in LINKS.values()]

    return in_netns(pod, look)


# -- steps --------------------------------------------------------------------------------------


def run(say: Say) -> None:
    """All steps."""
    for module in ("veth", "bridge", "br_netfilter", "ipip", "ip6_tunnel"):
        load_module(module)
    build()
    serve_pods()
    for family in FAMILIES:
        _ip(CLIENT, f"route add {VIP[family]} via {node_address('a', family)}")
    nodes = [Node(name) for name in NODES]
    both = rows("pod-a", "pod-b")
    say("ends", {n.name: n.ends(both, []) for n in nodes})
    for node in nodes:
        node.serve(both)
    for family in FAMILIES:
        with heard() as found:
            answers = ask_until(CLIENT, VIP[family], {"pod-a", "pod-b"})
        say(f"answers, IPv{family}", [answers, sorted(found)])
        with heard() as found:
            answers = sorted({ask_by_udp(CLIENT, VIP[family]) for _ in range(4)})
        say(f"by UDP, IPv{family}", [answers, sorted(found)])
        say(f"large, IPv{family}", ask_until(CLIENT, VIP[family], {"pod-a", "pod-b"}, LARGE))
        say(
            f"clients of nodes, IPv{family}",
            {
                where: ask_until(where, VIP[family], {"pod-a", "pod-b"})
                for where in ("a", "b", "other-b")
            },
        )
    say("links", {pod: links_in(pod) for pod in PODS})
    say(
        "host",
        {
            node.name: in_netns(
                node.name,
                lambda: [
                    read_sysctl(f"net/ipv4/conf/{BRIDGE}/{k}")
                    for k in ("accept_local", "rp_filter")
                ],
            )
            for node in nodes
        },
    )
    say("forged", _forged())

    # Another Service's pod leaves: the rows have pod-b alone.
    alone = rows("pod-b")
    say("pod-a left", [nodes[0].ends(alone, [])["faults"], links_in("pod-a"), links_in("pod-b")])

    # Isolated on ingress: NAT, no ends.
    blocks = (make.block("172.18.0.0/24"), make.block("fd00:172:18::/64"))
    policy = make.policy("shop/web", ingress=[make.ingress(*blocks, ports=[f"{PORT}/TCP"])])
    back = rows("pod-a", "pod-b", tunnel=False)
    say("isolated without ends", _isolated(nodes, policy))
    say("ends, isolated", {n.name: n.ends(back, [policy]) for n in nodes})
    for node in nodes:
        node.serve(back)
    for family in FAMILIES:
        with heard() as found:
            answers = ask_until(CLIENT, VIP[family], {"pod-a", "pod-b"})
        say(f"fallback, IPv{family}", [answers, sorted(found)])
    say("links, isolated", {pod: links_in(pod) for pod in PODS})
    say(
        "host, isolated", in_netns("b", lambda: read_sysctl(f"net/ipv4/conf/{BRIDGE}/accept_local"))
    )


def _forged() -> Json:
    """Who gets a segment from the Service's address to the client."""
    out = {}
    for pod, sport in (("pod-b", PORT), ("pod-b", PORT + 1), ("other-b", PORT)):
        with heard() as found:
            forge(pod, sport)
            time.sleep(0.1)
        out[f"{pod} {sport}"] = any(port == sport for _, _, port in found)
    return out


def _isolated(nodes: list[Node], policy: Json) -> list[str]:
    """What a node does that still sends by tunnels to a pod without an end."""
    nodes[1].ends([], [policy])
    return [ask(CLIENT, VIP[family]) for family in FAMILIES for _ in range(2)]
