"""The proxy's drivers on a kernel that has IPVS and dummy links: their contracts, and packets.

The guest is the node; the drivers alone make Services, without rules.
"""

from __future__ import annotations

import socket
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyroute2 import IPVS, IPVSDest, IPVSService

from netpol.kernel.conntrack import NetlinkFlows
from netpol.kernel.drivers import FlowMatch, VipDriver
from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.modules import load_module
from netpol.kernel.netns import in_netns
from netpol.kernel.sysctl import BRIDGE_NF_KEYS, keep_sysctl
from netpol.kernel.vips import DummyVips
from netpol.model.ids import Protocol
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    DeleteReal,
    DeleteServer,
    RealConfig,
    RealServer,
    ServerId,
    SetReal,
    VirtualServer,
)
from netpol.model.net import Family, parse_address
from tests.uml.inside import checks_vips, contract_ipvs, contract_vips, lan, traffic
from tests.uml.inside.steps import POD_DNS, POD_PORT, Ask

Say = Callable[[str, Any], None]

#: A Service of three ports in both families; each has its first pod as its only backend.
VIPS = {Family.V4: "10.96.1.10", Family.V6: "fd00:10:96:1::10"}
PORTS = {
    "tcp": (Protocol.TCP, 80, POD_PORT),
    "udp": (Protocol.UDP, 53, POD_DNS),
    "sctp": (Protocol.SCTP, 90, POD_PORT),
}
SOURCES = {Family.V4: parse_address(lan.NODE4), Family.V6: parse_address(lan.NODE6)}
FIRST, SECOND = 20, 30
#: TCP over IPv6 hears a refusal at its first repetition only, where it comes back before connect() lets go
#: of the socket, as it does on one machine (LockDroppedIcmps); all others do at once.
REFUSED_S = 1.8
#: Services of another program.
FOREIGN = "10.97.0.1"


def run(say: Say) -> None:
    """All steps."""
    for module in ("br_netfilter", "sctp"):
        load_module(module)
    ipvs = NetlinkIpvs()

    def in_an_empty_table(check: contract_ipvs.Check) -> None:
        ipvs.apply([DeleteServer(id_) for id_ in ipvs.dump()])
        check(ipvs)

    def without_the_space(check: contract_vips.Check) -> None:
        def run(_space: str, vips: VipDriver) -> None:
            check(vips)

        checks_vips.in_a_node(run)

    say(
        "checks",
        {
            **_checked("ipvs", contract_ipvs.CHECKS, in_an_empty_table),
            **_checked("vips", contract_vips.CHECKS, without_the_space),
            **_checked("vips beyond", checks_vips.CHECKS, checks_vips.in_a_node),
        },
    )
    ipvs.apply([DeleteServer(id_) for id_ in ipvs.dump()])
    say("module anew", _module_anew(ipvs))
    _packets(say, ipvs)


def _module_anew(ipvs: NetlinkIpvs) -> dict[str, Any]:
    """Another one of the module has another number: what the driver then refuses, reads and changes."""
    id_ = ServerId(Family.V4, Protocol.TCP, parse_address("10.96.1.99"), 80)
    unloaded = False
    for _ in range(50):  # namespaces of groups before this one end in their own time
        used = [line.split()[0] for line in Path("/proc/modules").read_text().splitlines()]
        subprocess.run(
            ["rmmod", *(m for m in used if m.startswith(("xt_ipvs", "ip_vs_"))), "ip_vs"],
            check=False,
            capture_output=True,
        )
        unloaded = not Path("/proc/net/ip_vs").exists()
        if unloaded:
            break
        time.sleep(0.1)
    load_module("ip_vs")
    before = [failure.code for failure in ipvs.apply([AddServer(VirtualServer(id_))])]
    empty = not ipvs.dump()
    refused = ipvs.apply([AddServer(VirtualServer(id_))])
    there = list(ipvs.dump()) == [id_]
    ipvs.apply([DeleteServer(id_)])
    return {
        "unloaded": unloaded,
        "before": before,
        "empty": empty,
        "refused": len(refused),
        "there": there,
    }


def server(family: Family, name: str) -> ServerId:
    """The virtual server of a port of the Service."""
    protocol, port, _ = PORTS[name]
    return ServerId(family, protocol, parse_address(VIPS[family]), port)


def real(family: Family, name: str, host: int = FIRST) -> RealServer:
    """A backend of a port of the Service."""
    address = lan.v4(host) if family is Family.V4 else lan.v6(host)
    return RealServer(parse_address(address), PORTS[name][2])


def questions(who: str) -> dict[str, Ask]:
    """All ports of the Service, from one place."""
    return {
        f"{name}{family}": Ask(who, VIPS[family], PORTS[name][1], name)
        for family in VIPS
        for name in PORTS
    }


def _packets(say: Say, ipvs: NetlinkIpvs) -> None:
    lan.build()
    for key in BRIDGE_NF_KEYS:
        keep_sysctl(key, "1")
    # Conntrack works in a namespace only where some rule needs it.
    for command in ("iptables-legacy", "ip6tables-legacy"):
        rule = [command, "-t", "mangle", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW"]
        subprocess.run(rule, check=True)
    for key in ("conntrack", "expire_nodest_conn"):
        keep_sysctl(f"net/ipv4/vs/{key}", "1")
    servers = traffic.Servers()
    for name in ("backend", "other"):
        servers.listen(name, name, POD_PORT)
        servers.listen(name, name, POD_DNS, "udp")
        servers.listen(name, name, POD_PORT, "sctp")
    servers.start()
    way_back = ["ip", "-n", lan.OUTSIDER, "route", "add", "default", "via", lan.NODE6]
    subprocess.run(way_back, check=True)
    vips, flows = DummyVips(), NetlinkFlows()
    _foreign("add")
    foreign = ipvs.dump()
    say("foreign", {str(id_): repr(state) for id_, state in foreign.items()})

    ours = [server(family, name) for family in VIPS for name in PORTS]
    say(
        "without backends",
        [str(f) for f in ipvs.apply([AddServer(VirtualServer(s)) for s in ours])],
    )
    say(
        "addresses",
        vips.apply(add=list(map(parse_address, VIPS.values())), remove=[], sources=SOURCES),
    )
    # Neighbours are known then; on a busy machine a question may come before the first answer.
    for _ in range(10):
        if traffic.ask({"": Ask("client", lan.v6(FIRST), POD_PORT)})[""]:
            break
    # SCTP is refused as well, which its sockets do not hear of.
    asked = {n: ask for n, ask in questions("client").items() if ask.protocol != "sctp"}
    say("refused", {name: _refused(ask) for name, ask in asked.items()})
    adds = [
        AddReal(server(family, name), real(family, name), RealConfig(1))
        for family in VIPS
        for name in PORTS
    ]
    say("with backends", [str(f) for f in ipvs.apply(adds)])
    for who in ("client", "", lan.OUTSIDER):
        say(f"asked by {who or 'node'}", _patiently(questions(who)))

    # Another process of the agent finds what this one made.
    again, vips_again = NetlinkIpvs(), DummyVips()
    found = again.dump()
    say(
        "adopted",
        {str(id_): [*found[id_].reals] == [a.real] for id_, a in zip(ours, adds, strict=True)},
    )
    say("adopted addresses", vips_again.dump() == set(map(parse_address, VIPS.values())))
    _drained(say, again)
    _ended(say, again, flows)
    again.apply([DeleteServer(id_) for id_ in ours])
    vips_again.remove_link()
    say("foreign stays", again.dump() == foreign)
    say("gone", traffic.ask(questions("client")))
    _foreign("del")


def _drained(say: Say, ipvs: NetlinkIpvs) -> None:
    """Weight 0: what is known goes on, what is new goes elsewhere."""
    for family in VIPS:
        ask = questions("client")[f"udp{family}"]
        held = traffic.UdpFlow(ask)
        said = [held.ask()]
        id_ = server(family, "udp")
        ipvs.apply(
            [
                AddReal(id_, real(family, "udp", SECOND), RealConfig(1)),
                SetReal(id_, real(family, "udp"), RealConfig(0)),
            ]
        )
        said += [held.ask(), traffic.UdpFlow(ask).ask()]
        state = ipvs.read([id_])[id_].reals[real(family, "udp")]
        say(
            f"drained, IPv{family}", [*said, state.config.weight, state.active + state.inactive > 0]
        )


def _ended(say: Say, ipvs: NetlinkIpvs, flows: NetlinkFlows) -> None:
    """A backend that goes: its flows end at once, and go on with another one."""
    for family in VIPS:
        id_, gone = server(family, "udp"), real(family, "udp", SECOND)
        ask = questions("client")[f"udp{family}"]
        held = traffic.UdpFlow(ask)
        said = [held.ask()]
        # Before the backend goes: after that, this kernel ends them soon by itself.
        match = FlowMatch(Protocol.UDP, gone.address, gone.port, id_.address, id_.port)
        ended = [flows.end([match._replace(port=54)]), flows.end([match]) > 0, flows.end([match])]
        said.append(held.ask())
        # Ended right behind the backend, its packets are new to both, and none is lost.
        ipvs.apply([SetReal(id_, real(family, "udp"), RealConfig(1)), DeleteReal(id_, gone)])
        flows.end([match])
        said += [held.ask(), held.ask()]
        say(f"ended, IPv{family}", {"said": said, "ended": ended})


def _refused(ask: Ask) -> bool:
    """Whether a Service without backends says so."""
    family = socket.AF_INET6 if ":" in ask.address else socket.AF_INET
    kind = socket.SOCK_DGRAM if ask.protocol == "udp" else socket.SOCK_STREAM

    def open_socket() -> socket.socket:
        return socket.socket(family, kind)

    with in_netns(ask.src, open_socket) as sock:
        sock.settimeout(REFUSED_S)
        try:
            sock.connect((ask.address, ask.port))
            if ask.protocol == "udp":
                sock.send(b"who?")
                sock.recv(16)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    return False


def _patiently(asked: dict[str, Ask]) -> dict[str, str]:
    """Ask again what got no answer: with two guests at once, a first packet may wait for its neighbour."""
    answers = traffic.ask(asked)
    for _ in range(4):
        silent = {name: ask for name, ask in asked.items() if not answers[name]}
        if not silent:
            break
        answers |= traffic.ask(silent)
    return answers


def _foreign(verb: str) -> None:
    """Another program's servers, by another program's messages."""
    with IPVS() as kernel:
        for port, more in (
            (80, {}),
            (81, {"timeout": 600, "flags": {"flags": 1, "mask": 0xFFFFFFFF}}),
        ):
            made = IPVSService(addr=FOREIGN, port=port, protocol=6, sched_name="wlc", **more)
            kernel.service(verb, service=made)
            if verb == "add":
                for n in (1, 2):
                    dest = IPVSDest(addr=f"192.0.2.{n}", port=8080, fwd_method=3, weight=n)
                    kernel.dest("add", service=made, dest=dest)


def _checked(
    title: str, checks: dict[str, Any], run_check: Callable[[Any], None]
) -> dict[str, str]:
    """What went wrong with each check, as text; "" where nothing did."""
    said = {}
    for name, check in checks.items():
        said[f"{title}: {name}"] = ""
        try:
            run_check(check)
        except BaseException:  # noqa: BLE001 - the host's tests raise it
            said[f"{title}: {name}"] = traceback.format_exc()
    return said
