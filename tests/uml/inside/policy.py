"""Services by IPVS under policy, step by step.

The node runs the product's own path: the reading of IPVS, the choice of what INPUT lets through, the
dataplane over netlink sets and legacy tables. The policies of each step are in `STEPS`.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyroute2 import IPVS, IPVSDest, IPVSService

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.enforce.served import IpvsWatch
from netpol.kernel.drivers import Variant
from netpol.kernel.links import own_addresses
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.sysctl import BRIDGE_NF_KEYS, keep_sysctl, read_sysctl
from netpol.kernel.tables import RestoreTables
from netpol.model.net import parse_prefix
from netpol.render.node import graph_of
from netpol.render.options import RenderOptions
from tests import builders as make
from tests import engine
from tests.uml.inside import lan, traffic
from tests.uml.inside.steps import (
    CLOSED,
    FROM_CLIENT,
    LATE,
    LATE_QUESTIONS,
    NODE_OWN,
    NODE_WEB,
    NODEPORT,
    POD_DNS,
    POD_PORT,
    QUESTIONS,
    SERVICES,
    SHUT_CLIENT,
    STEPS,
    TO_BACKEND,
    TO_BACKEND_ANY,
    Ask,
    Service,
)

Json = dict[str, Any]


class Node:
    """The node: its rules and what it knows of IPVS."""

    def __init__(self) -> None:
        self.sets = NetlinkSets()
        self.tables = RestoreTables(Variant.LEGACY)
        self.watch = IpvsWatch()
        self.dataplane: Dataplane | None = None

    def options(self) -> RenderOptions:
        served = self.watch.served(own_addresses())
        return RenderOptions(
            pod_interfaces=(lan.BRIDGE,),
            hold_ranges=(parse_prefix("10.244.1.0/24"), parse_prefix("fd00:10:244:1::/64")),
            own_addresses=own_addresses(),
            ipvs_services=None if served is None else served.services,
        )

    def apply(self, policies: list[Json], options: RenderOptions | None = None) -> None:
        """Put a world in force, from whatever was there."""
        pods = [
            make.pod(f"a/{name}", ip=(lan.v4(host), lan.v6(host)), app=name)
            for name, host in lan.PODS.items()
            if name != "newcomer"
        ]
        node = make.node("n1", lan.NODE4, lan.NODE6, cidrs=("10.244.1.0/24",))
        world = engine.build(make.world(node, make.namespace("a"), *pods, *policies))
        self.dataplane = Dataplane(graph_of(world, "n1"), options or self.options())
        plan = self.dataplane.reconcile(dump_kernel(self.sets, self.tables))
        execute(plan, self.sets, self.tables)

    def serve(self) -> Json:
        """Look at IPVS again and tell the sets, as the agent does."""
        assert self.dataplane is not None
        changed = self.watch.look()
        plan = self.dataplane.serve(self.options().ipvs_services or ())
        execute(plan, self.sets, self.tables)
        drift = self.dataplane.drift(dump_kernel(self.sets, self.tables))
        return {"changed": changed, "tables": plan.touches_tables, "drift": drift}


def ipvs(verb: str, service: Service) -> None:
    """Add or delete a service; "move" gives it its backend in place of another."""
    more: Json = {}
    if ":" in service.address:
        # pyroute2 types the prefix length of IPv6 as an IPv4 address: 128 in host order.
        more["netmask"] = "128.0.0.0"
    protocol = traffic.PROTOCOLS[service.protocol]
    made = IPVSService(
        addr=service.address, port=service.port, protocol=protocol, sched_name="rr", **more
    )
    with IPVS() as kernel:
        if verb != "move":
            kernel.service(verb, service=made)
        else:
            old = [IPVSDest.from_message(d) for d in kernel.dest("dump", service=made)]
            for dest in old:
                kernel.dest("del", service=made, dest=dest)
        if verb != "del":
            dest = IPVSDest(addr=service.to, port=service.to_port, fwd_method=0)
            kernel.dest("add", service=made, dest=dest)


def modprobe(*names: str) -> None:
    subprocess.run(["/run/modprobe", "-a", *names], check=True)


def play(node: Node, say: Callable[[str, Any], None]) -> None:
    """All steps; `say` keeps what comes out."""
    say("without the module", {"looked": node.watch.look(), "rules": _rules(node)})
    modprobe("ip_vs", "ip_vs_rr")
    say("with the module", {"looked": node.watch.look(), "rules": _rules(node)})
    for service in SERVICES:
        ipvs("add", service)
    # The way back of a pod that reaches itself must lead through the node; every proxy does this.
    subprocess.run(
        "iptables-legacy -t nat -A POSTROUTING -m ipvs --ipvs "
        f"-s {lan.v4(20)} -d {lan.v4(20)} -j MASQUERADE".split(),
        check=True,
    )
    node.watch.look()
    served = node.watch.served(own_addresses())
    assert served is not None
    told = [
        [socket.inet_ntop(_family(s.address), s.address), s.protocol, s.port]
        for s in served.services
    ]
    say("served", {"services": told, "notes": served.notes, "faults": node.watch.faults()})
    for name, policies in STEPS.items():
        node.apply(policies)
        say(name, traffic.ask(QUESTIONS))
    node.apply([TO_BACKEND], replace(node.options(), ipvs_services=None))
    say("without the rule", traffic.ask(QUESTIONS))
    _churn(node, say)
    _moved(node, say)
    _forged(node, say)
    _passed_by(node, say)
    _conntrack(node, say)


def _churn(node: Node, say: Callable[[str, Any], None]) -> None:
    """A service appears and goes; only sets change."""
    node.apply([TO_BACKEND])
    ipvs("add", LATE)
    say("late, not looked", traffic.ask(LATE_QUESTIONS))
    say("late, look", node.serve())
    say("late, looked", traffic.ask(LATE_QUESTIONS))
    ipvs("del", LATE)
    say("gone, not looked", traffic.ask(LATE_QUESTIONS))
    say("gone, look", node.serve())
    say("gone, looked", traffic.ask(LATE_QUESTIONS))


def _moved(node: Node, say: Callable[[str, Any], None]) -> None:
    """One UDP flow whose backend changes under it: conntrack knows it, policy does not allow it."""
    Path("/proc/sys/net/ipv4/vs/expire_nodest_conn").write_text("1")
    node.apply([TO_BACKEND_ANY])
    say("served before the move", traffic.ask(QUESTIONS))
    dns = QUESTIONS["vip udp"]
    flow = traffic.UdpFlow(dns)
    say("flow before the move", flow.ask())
    (service,) = (s for s in SERVICES if (s.address, s.port) == (dns.address, dns.port))
    ipvs("move", service._replace(to=lan.v4(30)))
    say("flow after the move", [flow.ask(), flow.ask()])
    node.apply([])
    say("flow without policy", flow.ask())
    ipvs("move", service)


def _forged(node: Node, say: Callable[[str, Any], None]) -> None:
    """A flow that conntrack takes for established before IPVS has ever sent a packet of it on.

    The node itself answers a segment out of the blue, which IPVS takes for no connection.
    """
    for name, who, policies in (
        ("forged, egress", "client", [SHUT_CLIENT]),
        ("forged, ingress", "other", [FROM_CLIENT]),
        ("forged, ingress from outside", lan.OUTSIDER, [FROM_CLIENT]),
    ):
        node.apply(policies)
        own = "172.18.0.9" if who == lan.OUTSIDER else lan.v4(lan.PODS[who])
        port = NODEPORT if who == lan.OUTSIDER else 80
        target = Ask(who, lan.NODE4 if who == lan.OUTSIDER else lan.VIP4, port)
        segments = traffic.Segments(target, own, 41000)
        say(
            name,
            [
                segments.say(traffic.ACK, 1000, 5000),
                segments.say(traffic.RST, 1000),
                segments.say(traffic.SYN, 90000),
            ],
        )


def _passed_by(node: Node, say: Callable[[str, Any], None]) -> None:
    """Packets to a served port that IPVS leaves to the node, which listens on the very port."""
    web, dns = QUESTIONS["vip"], QUESTIONS["vip udp"]
    for name, policies, sport in (("open", [], 42000), ("shut", [SHUT_CLIENT], 42001)):
        node.apply(policies)
        answers = traffic.ask({"port 20": web}, sport=20)
        answers["broadcast"] = traffic.by_broadcast(dns, lan.v4(10), sport)
        say(f"passed by IPVS, {name}", answers)


def _conntrack(node: Node, say: Callable[[str, Any], None]) -> None:
    """Replies of IPVS are part of their connection only with vs.conntrack."""
    node.apply([CLOSED])
    say("conntrack on", traffic.ask(QUESTIONS))
    Path("/proc/sys/net/ipv4/vs/conntrack").write_text("0")
    say("conntrack off", traffic.ask(QUESTIONS))
    node.watch.look()
    say("conntrack kept", [read_sysctl("net/ipv4/vs/conntrack"), *node.watch.faults()])


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def _rules(node: Node) -> int:
    node.apply([])
    return node.tables.save_text("mangle", engine.Family.V4).count("KNP-IPVS4")


def run(say: Callable[[str, Any], None]) -> None:
    """The network, its servers, and all steps."""
    modprobe("br_netfilter", "sctp")
    lan.build()
    faults = [keep_sysctl(key, "1") for key in BRIDGE_NF_KEYS]
    say("bridge", faults)
    servers = traffic.Servers()
    for name in ("client", "backend", "other"):
        servers.listen(name, name, POD_PORT)
        servers.listen(name, name, POD_DNS, "udp")
        servers.listen(name, name, POD_PORT, "sctp")
    for port in (NODE_OWN, NODE_WEB, LATE.port):
        servers.listen("node", "", port)
    # At the Service's address, so that the answer has it as its source.
    dns = QUESTIONS["vip udp"]
    servers.listen("node", "", dns.port, "udp", address=f"::ffff:{dns.address}")
    servers.start()
    play(Node(), say)
