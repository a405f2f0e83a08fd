"""The proxy's rules on real packets: what a VIP lets in, which server takes it, whose address a backend sees.

The guest is the node, with policy's tables in place before the proxy's; a backend of another node hangs on
a second link. Rows become servers and members of sets by the product's own `proxy.lower`.
"""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from netpol.kernel import netns
from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    SetTransaction,
    TableTransaction,
    Variant,
)
from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.sysctl import BRIDGE_NF_KEYS, keep_sysctl
from netpol.kernel.tables import RestoreTables
from netpol.kernel.vips import DummyVips
from netpol.model.ids import SERVICES, ObjectKey, Protocol, SetName
from netpol.model.ipvs import AddReal, AddServer, DeleteServer, SetServer
from netpol.model.net import FAMILIES, Family, parse_address, parse_prefix
from netpol.model.ruleset import AddressPort, Member
from proxy import names
from proxy.lower import Entry, lower, server_id
from proxy.marks import Marks
from proxy.rows import ServicePlan, ServiceRow
from proxy.rules import VIP, RuleOptions, rulesets
from tests import builders as make
from tests.uml.inside import lan, traffic
from tests.uml.inside.policy import Json, Node
from tests.uml.inside.rows_proxy_rules import (
    BOTH,
    HOST_PORT,
    MASK,
    NODE_OWN,
    NODE_PORTS,
    OUTSIDER4,
    OUTSIDER6,
    REMOTE,
    TOWARDS_REMOTE,
    address,
    outcomes,
    rows,
)
from tests.uml.inside.steps import CLIENT, POD_DNS, POD_PORT, Ask


class Proxy:
    """The proxy's part of the kernel."""

    def __init__(self) -> None:
        self.ipvs = NetlinkIpvs()
        self.vips = DummyVips()
        self.sets = NetlinkSets(mark_mask=MASK, owner=SERVICES)
        self.tables = RestoreTables(Variant.LEGACY, owner=SERVICES)

    def serve(self) -> None:
        """Servers, addresses, sets: all but the rules."""
        marks = Marks(MASK)
        plans: dict[ObjectKey, list[ServiceRow]] = {}
        for row in (*rows(Family.V4), *rows(Family.V6)):
            plans.setdefault(row.service, []).append(row)
        parts = [lower(ServicePlan(k, rows=tuple(v)), marks.assign) for k, v in plans.items()]
        for part in parts:
            ops = [AddServer(server.virtual) for server in part.servers]
            reals = [
                AddReal(server.virtual.id, real, config)
                for server in part.servers
                for real, config in server.reals.items()
            ]
            refused = self.ipvs.apply([*ops, *reals])
            assert not refused, refused
        self.sets.apply(SetTransaction(tuple(CreateSet(spec) for spec in names.SPECS.values())))
        self._fill(entry for part in parts for entry in part.entries)
        for family in FAMILIES:
            net = parse_prefix("10.244.1.0/24" if family is Family.V4 else "fd00:10:244:1::/64")
            self.sets.apply(SetTransaction((AddMembers(names.POD[family], {net: None}),)))
        sources = {Family.V4: parse_address(lan.NODE4), Family.V6: parse_address(lan.NODE6)}
        vips = [vip for part in parts for vip in part.vips]
        bad = self.vips.apply(add=vips, remove=(), sources=sources)
        assert not bad, bad

    def _fill(self, entries: Iterable[Entry]) -> None:
        members: dict[SetName, dict[Member, int | None]] = {}
        for entry in entries:
            members.setdefault(entry.name, {})[entry.member] = entry.mark
        adds = (AddMembers(names.SPECS[name], some) for name, some in members.items())
        self.sets.apply(SetTransaction(tuple(adds)))

    def protect(self) -> list[str]:
        """The rules; the tables whose dump is not what was wanted."""
        wrong = []
        for (table, family), want in rulesets(RuleOptions(MASK)).items():
            state = self.tables.dump(table, family).hooks
            self.tables.apply(TableTransaction(table, family, want.chains, (), want.hooks, state))
            dump = self.tables.dump(table, family)
            good = all(
                dump.hooks[hook].jumps == ((dump.hooks[hook].place, chain),)
                for hook, chain in want.hooks.items()
            )
            if dict(dump.chains) != dict(want.chains) or not good:
                wrong.append(f"{table} of IPv{family}: {dump}")
        return wrong

    def end(self, row: ServiceRow) -> None:
        """A port of a Service goes, its address stays: first the port is closed, then the server goes."""
        member = AddressPort(row.address, row.protocol, row.port)
        port = names.PORT[row.family]
        self.sets.apply(SetTransaction((DeleteMembers(port, [member]),)))
        assert not self.ipvs.apply([DeleteServer(server_id(row))])


def run(say: Callable[[str, Any], None]) -> None:
    """All steps."""
    subprocess.run(["/run/modprobe", "-a", "br_netfilter", "sctp", "ip_vs"], check=True)
    _build()
    servers = traffic.Servers()
    for name in ("client", "backend", "other"):
        servers.listen(name, name, POD_PORT)
        servers.listen(name, name, POD_DNS, "udp")
        servers.listen(name, name, POD_PORT, "sctp")
    servers.listen(REMOTE, REMOTE, POD_PORT)
    for at in (f"::ffff:{address('remote', Family.V4)}", address("remote", Family.V6)):
        # Its address is on no link, so that answers would have another one.
        servers.listen(REMOTE, REMOTE, POD_DNS, "udp", address=at)
    for port in (NODE_OWN, 80, POD_PORT):
        servers.listen("node", "", port)
    servers.listen("node", "", NODE_OWN, "udp")
    servers.start()
    node, proxy = Node(), Proxy()
    proxy.serve()
    node.watch.look()
    node.apply([])
    bare = ("far tcp", "local tcp", "web tcp", "web udp 9000", "itself")
    say("no rules", outcomes({w: q for w, q in BOTH.items() if any(b in w for b in bare)}))
    served = {w: q for w, q in BOTH.items() if "to web tcp 80" in w}
    say("no rules, port 20", outcomes(served, sport=20))
    say("tables", proxy.protect())
    say("policy's drift", node.serve()["drift"])
    _count_marks("-A")
    say("rules", outcomes(BOTH))
    say("marks that left", _marks_that_left())
    say("port 20", outcomes(served, sport=20))
    say("ping", _pings())
    say("many at once", _many())
    say("on the link", _on_the_link())
    say("established at a drop", _established_at_a_drop(proxy))
    _under_policy(node, say)
    node.apply([])
    say("errors about a connection", _errors(proxy))
    say("another program's bit", _foreign_bit())
    say("affinity by mark", _affinity_by_mark(proxy))
    say("another program's DNAT", _under_dnat())
    say("a port that goes", _a_port_goes(proxy))


def _build() -> None:
    lan.build()
    for key in BRIDGE_NF_KEYS:
        assert keep_sysctl(key, "1") in (None, "")
    for name, value in (
        ("ipv4/vs/conntrack", "1"),
        ("ipv4/conf/all/arp_ignore", "1"),
        ("ipv4/conf/all/arp_announce", "2"),
    ):
        (Path("/proc/sys/net") / name).write_text(value)
    netns.create(REMOTE)
    lan._batch(
        [
            f"link add eth1 type veth peer name eth0 netns {REMOTE}",
            "link set eth1 up",
            f"addr add {TOWARDS_REMOTE[Family.V4]}/24 dev eth1",
            f"addr add {TOWARDS_REMOTE[Family.V6]}/64 dev eth1 nodad",
            "route add 10.244.2.0/24 via 172.19.0.3",
            "route add fd00:10:244:2::/64 via fd00:172:19::3",
        ]
    )
    # No default route: it answers those it knows, this node and its pods, as a node elsewhere whose way
    # to a client of ours does not lead through us.
    lan._batch(
        [
            "link set lo up",
            "link set eth0 up",
            "addr add 172.19.0.3/24 dev eth0",
            "addr add fd00:172:19::3/64 dev eth0 nodad",
            "addr add 10.244.2.20/32 dev lo",
            "addr add fd00:10:244:2::20/128 dev lo nodad",
            "route add 10.244.1.0/24 via 172.19.0.2",
            "route add 172.18.0.2/32 via 172.19.0.2",
            "route add fd00:10:244:1::/64 via fd00:172:19::2",
            "route add fd00:172:18::2/128 via fd00:172:19::2",
        ],
        REMOTE,
    )
    lan._batch([f"route add default via {lan.NODE6}"], lan.OUTSIDER)


def _pings() -> dict[str, bool]:
    asked = {
        f"{who} to {name}, IPv{family}": (space, address(name, family))
        for who, space in (("client", "client"), ("node", ""), (lan.OUTSIDER, lan.OUTSIDER))
        for name in ("web", "nobody")
        for family in FAMILIES
    }
    return _answered(asked)


def _answered(asked: dict[str, tuple[str, str]]) -> dict[str, bool]:
    """Whether a ping is answered; all at once, since each is a process."""
    started = {
        name: subprocess.Popen(
            [*_in(space), "ping", "-c1", "-W0.7", at],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name, (space, at) in asked.items()
    }
    return {name: process.wait() == 0 for name, process in started.items()}


def _in(space: str) -> list[str]:
    return ["ip", "netns", "exec", space] if space else []


def _many() -> dict[str, int]:
    """How many of twenty connections are refused at once."""
    out = {}
    for name, port in (("nobody", 80), ("web", NODE_OWN)):
        for family in FAMILIES:
            asked = {str(n): Ask("other", address(name, family), port) for n in range(20)}
            refused = [a for a in outcomes(asked).values() if a == "refused"]
            out[f"{name} {port}, IPv{family}"] = len(refused)
    return out


def _on_the_link() -> dict[str, bool]:
    """Whether a neighbour that looks for a VIP on the link is told where it is."""
    vips = {f"IPv{family}": (lan.OUTSIDER, address("web", family)) for family in FAMILIES}
    lan._batch([f"route add {vip} dev up0" for _, vip in vips.values()], lan.OUTSIDER)
    out = _answered(vips)
    lan._batch([f"route del {vip} dev up0" for _, vip in vips.values()], lan.OUTSIDER)
    return out


def _established_at_a_drop(proxy: Proxy) -> dict[str, list[str]]:
    """An external client's flow before and after the last endpoint of this node left; then a new one."""
    asked = {f"IPv{f}": Ask(lan.OUTSIDER, address("local", f), 53, "udp") for f in FAMILIES}
    flows = {name: traffic.UdpFlow(question) for name, question in asked.items()}
    answers = {name: [flow.ask()] for name, flow in flows.items()}
    members = {
        names.DROP[f]: AddressPort(parse_address(address("local", f)), Protocol.UDP, 53)
        for f in FAMILIES
    }
    adds = (AddMembers(spec, {member: None}) for spec, member in members.items())
    proxy.sets.apply(SetTransaction(tuple(adds)))
    fresh = outcomes(asked)
    for name, flow in flows.items():
        answers[name] += [flow.ask(), fresh[name]]
    deletes = (DeleteMembers(spec, [member]) for spec, member in members.items())
    proxy.sets.apply(SetTransaction(tuple(deletes)))
    return answers


_TOOLS = {Family.V4: "iptables-legacy", Family.V6: "ip6tables-legacy"}


def _count_marks(verb: str) -> None:
    """Begin or end to count packets that have a mark behind all rules."""
    for tool in _TOOLS.values():
        words = f"-t mangle {verb} POSTROUTING -m mark ! --mark 0 -j ACCEPT"
        subprocess.run([tool, *words.split()], check=True)


def _marks_that_left() -> dict[str, int]:
    """How many packets had a mark behind all rules, and how many lost one before."""
    out = {}
    for family, tool in _TOOLS.items():
        listed = subprocess.run(
            [f"{tool}-save", "-c", "-t", "mangle"], capture_output=True, text=True, check=True
        ).stdout
        for line in listed.splitlines():
            if "-A POSTROUTING -m mark" in line:
                out[f"left, IPv{family}"] = int(line[1:].split(":")[0])
            if "-A KNP-SVC-POST " in line:
                out[f"cleared, IPv{family}"] = int(line[1:].split(":")[0])
    _count_marks("-D")
    return out


def _under_policy(node: Node, say: Callable[[str, Any], None]) -> None:
    """Policy judges the backend that a packet goes to, whichever server picked it."""
    far = [make.block("10.244.2.0/24"), make.block("fd00:10:244:2::/64")]
    outside = [make.block(f"{OUTSIDER4}/32"), make.block(f"{OUTSIDER6}/128")]
    vips = [make.block("203.0.113.0/24"), make.block("2001:db8::/64")]
    other, backend = make.selector(app="other"), make.selector(app="backend")
    to_backend = [make.egress(make.pods(app="backend"))]
    rounds: dict[str, list[Json]] = {
        "egress of two": [
            make.policy("a/client-to-remote-pods", CLIENT, egress=[make.egress(*far)]),
            make.policy("a/other-to-backend", other, egress=to_backend),
        ],
        "egress names addresses of Services": [
            make.policy("a/client-to-vips", CLIENT, egress=[make.egress(*vips)])
        ],
        "ingress names the outsider": [
            make.policy("a/from-outside", backend, ingress=[make.ingress(*outside)])
        ],
    }
    asked = {
        words: question
        for words, question in BOTH.items()
        if any(
            f" to {name}" in words
            for name in ("web tcp 80", "web udp", "local", "nodeport", "itself")
        )
        and not words.startswith("node to")
    }
    for name, policies in rounds.items():
        node.apply(policies)
        say(name, outcomes(asked))


def _errors(proxy: Proxy) -> dict[str, int]:
    """How many errors about a client's connection a VIP lets in, and how many about none."""
    out = {}
    for family in FAMILIES:
        flow = traffic.UdpFlow(Ask(lan.OUTSIDER, address("web", family), 53, "udp"))
        assert flow.ask()
        before = _let_in(proxy, family)
        port = flow._socket.getsockname()[1]
        _too_big(family, port)
        known = _let_in(proxy, family)
        _too_big(family, port ^ 1)
        out[f"known, IPv{family}"] = known - before
        out[f"unknown, IPv{family}"] = _let_in(proxy, family) - known
    return out


def _let_in(proxy: Proxy, family: Family) -> int:
    return proxy.tables.counters("filter", family)[VIP][_RELATED][0]


#: The rule of the chain for VIPs that lets errors in.
_RELATED = 3


def _too_big(family: Family, port: int) -> None:
    """Say to the VIP, as a router on the way does, that its answer to the outsider did not fit."""
    source, to = (parse_address(address(name, family)) for name in ("web", "outsider"))
    udp = struct.pack("!HHHH", 53, port, 8, 0)
    if family is Family.V4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 7, 0, 64, 17, 0) + source + to
        head = head[:10] + traffic._checksum(head) + head[12:]
        body = struct.pack("!BBHHH", 3, 4, 0, 0, 1400) + head + udp
        body = body[:2] + traffic._checksum(body) + body[4:]
        kind = (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    else:
        head = struct.pack("!IHBB", 6 << 28, 8, 17, 64) + source + to
        body = struct.pack("!BBHI", 2, 0, 0, 1400) + head + udp
        kind = (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    with in_netns(lan.OUTSIDER, lambda: socket.socket(*kind)) as mouth:
        mouth.sendto(body, (address("web", family), 0))


def _foreign_bit() -> dict[str, str]:
    """A bit of the mark that is nobody's of ours: IPVS compares the whole mark."""
    words = (
        f"-t mangle {{}} PREROUTING -m mark ! --mark 0/{MASK:#x} -j MARK --set-mark 0x10000/0x10000"
    )
    for tool in _TOOLS.values():
        subprocess.run([tool, *words.format("-A").split()], check=True)
    answers = outcomes({w: q for w, q in BOTH.items() if w.startswith("client to local tcp")})
    for tool in _TOOLS.values():
        subprocess.run([tool, *words.format("-D").split()], check=True)
    return answers


def _affinity_by_mark(proxy: Proxy) -> dict[str, str]:
    """What a server by mark would do with persistence: its packets keep the port that was dialled."""
    by_mark = {id_: s.server for id_, s in proxy.ipvs.dump().items() if id_.fwmark}
    sticky = [SetServer(replace(server, persistence_s=60)) for server in by_mark.values()]
    assert not proxy.ipvs.apply(sticky)
    answers = outcomes({w: q for w, q in BOTH.items() if w.startswith("client to local tcp")})
    assert not proxy.ipvs.apply([SetServer(server) for server in by_mark.values()])
    return answers


def _under_dnat() -> dict[str, str]:
    """What another program translates of all that is LOCAL, as the portmap plugin does for host ports."""
    lines = {
        Family.V4: _translations(lan.v4(30)),
        Family.V6: _translations(f"[{lan.v6(30)}]"),
    }
    for family, words in lines.items():
        _restore(family, [f"-A {line}" for line in words])
    asked = {
        words: question
        for words, question in BOTH.items()
        if "to web tcp" in words or "to nodeport," in words
    }
    for family in FAMILIES:
        words = f"{lan.OUTSIDER} to the node's host port, IPv{family}"
        asked[words] = Ask(lan.OUTSIDER, address("node", family), HOST_PORT)
    answers = outcomes(asked)
    for family, words in lines.items():
        _restore(family, [f"-D {line}" for line in words])
    return answers


def _translations(to: str) -> list[str]:
    return [
        f"{hook} -p tcp -m tcp --dport {port} -m addrtype --dst-type LOCAL "
        f"-j DNAT --to-destination {to}:{POD_PORT}"
        for hook in ("PREROUTING", "OUTPUT")
        for port in (80, HOST_PORT, NODE_PORTS["nodeport"])
    ]


def _restore(family: Family, lines: list[str]) -> None:
    text = "\n".join(["*nat", *lines, "COMMIT", ""])
    tool = f"{_TOOLS[family]}-restore"
    subprocess.run([tool, "--noflush"], input=text, text=True, check=True)


def _a_port_goes(proxy: Proxy) -> dict[str, list[str]]:
    """One tuple before and after its port went, while the node listens on that very port."""
    out = {}
    for family in FAMILIES:
        asked = {"": Ask("other", address("web", family), 80)}
        before = outcomes(asked, sport=45000)[""]
        row = next(r for r in rows(family) if r.port == 80)
        proxy.end(row)
        out[f"IPv{family}"] = [before, outcomes(asked, sport=45000)[""]]
    return out
