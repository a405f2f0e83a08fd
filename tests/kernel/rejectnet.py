"""A node with two pods on its bridge, one behind a link of its own, and a host outside: what a client sees.

Owns the namespaces, the node's rules and the sockets of the tests of `--deny-with`.

    a, b -- cni0 -+- node -- cali0 -- c (a pod without a bridge)
                          -- up0   -- out (nobody's address)
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.kernel.drivers import TableDriver, TableDump, Variant
from netpol.kernel.iptc_tables import IptcTables
from netpol.kernel.netns import in_netns, open_socket
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.net import Family
from netpol.policy.graph import Graph
from netpol.render.options import DenyWith, RenderOptions
from tests.prop import churn

#: Namespace to the end of its addresses; n1's ranges are 10.0.1.0/24 and fd00:0:1::/64. c is not on the
#: bridge's link, whose prefixes are /27 and /122.
PODS = {"a": 2, "b": 3, "c": 100}
OUTSIDE = {4: "198.51.100.7", 6: "2001:db8::7"}
GATEWAY = {4: "10.0.1.1", 6: "fd00:0:1::1"}
#: A Service of b, by foreign NAT rules.
VIP = {4: "10.96.0.10", 6: "fd00:96::10"}
TIMEOUT_S = 0.7
_NO_DAD = [f"net.ipv6.conf.{which}.accept_dad=0" for which in ("all", "default")]
_SETTINGS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.bridge.bridge-nf-call-iptables=1",
    "net.bridge.bridge-nf-call-ip6tables=1",
    *(f"net.ipv4.conf.{which}.rp_filter=0" for which in ("all", "default")),
    # Each answer counts here.
    "net.ipv4.icmp_ratelimit=0",
    "net.ipv6.icmp.ratelimit=0",
)
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class Seen(NamedTuple):
    """What a client got: "" for an answer of the peer, else the error's name; and after how long."""

    error: str
    seconds: float


class RejectNet:
    """Use `net`."""

    def __init__(self, label: str, variant: Variant, lock_file: Path) -> None:
        self.prefix = f"knpt-rej{label}-{os.getpid()}"
        self.variant, self.lock_file = variant, lock_file
        self.names = ("node", *PODS, "out")
        self.graph = Graph(churn.NODE)
        self.options = replace(
            churn.options_of(churn.WIDE), pod_interfaces=("cni0", "cali+"), log_per_second=1000
        )

    def netns(self, name: str) -> str:
        """The namespace's real name."""
        return f"{self.prefix}-{name}"

    def run(self, *args: str, name: str = "node", stdin: str = "") -> str:
        """Run a program in a namespace; it must succeed."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.netns(name), *args],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XTABLES_LOCKFILE": str(self.lock_file)},
        )
        assert done.returncode == 0, f"{args}: {done.stderr}\n{stdin}"
        return done.stdout

    def iptables(self, family: int, *args: str) -> None:
        """Run iptables in the node, as others do."""
        wait = ["-w"] if self.variant is Variant.LEGACY else []
        self.run(f"ip{'' if family == 4 else '6'}tables-{self.variant}", *wait, *args)

    def build(self) -> None:
        """Make namespaces and links."""
        for name in self.names:
            subprocess.run(["ip", "netns", "add", self.netns(name)], check=True)
            # Before there are links, which take it from here: while its own address is being examined,
            # a link asks for no neighbour.
            self.run("sysctl", "-qw", *_NO_DAD, name=name)
            self.run("ip", "link", "set", "lo", "up", name=name)
        self.run("ip", "link", "add", "cni0", "type", "bridge")
        self.run("sysctl", "-qw", *_SETTINGS)
        self.run("ip", "link", "set", "cni0", "up")
        for address in GATEWAY.values():
            nodad = ["nodad"] if ":" in address else []
            self.run(
                "ip", "addr", "add", f"{address}/{122 if nodad else 27}", "dev", "cni0", *nodad
            )
        for name, last in PODS.items():
            link = "cali0" if name == "c" else f"v{name}"
            self._veth(link, name)
            if name != "c":
                self.run("ip", "link", "set", link, "master", "cni0")
                self._addresses(name, [f"10.0.1.{last}/27", f"fd00:0:1::{last}/122"], GATEWAY)
                continue
            # As Calico does it: a link of its own, and a route to the address.
            self._own_link(link, name, {4: f"10.0.1.{last}", 6: f"fd00:0:1::{last}"}, 1)
        self._veth("up0", "out")
        self._own_link("up0", "out", OUTSIDE, 2)
        self.sets = in_netns(self.netns("node"), NetlinkSets)
        self.restore = RestoreTables(
            self.variant, netns=self.netns("node"), lock_file=str(self.lock_file)
        )
        self.tables: TableDriver = self.restore
        if self.variant is Variant.LEGACY:  # as the agent does
            self.tables = in_netns(
                self.netns("node"),
                lambda: IptcTables(self.restore, lock_file=str(self.lock_file)),
            )

    def _veth(self, link: str, name: str) -> None:
        peer = ["peer", "name", "eth0", "netns", self.netns(name)]
        self.run("ip", "link", "add", link, "type", "veth", *peer)
        self.run("ip", "link", "set", link, "up")
        self.run("ip", "link", "set", "eth0", "up", name=name)

    def _own_link(self, link: str, name: str, addresses: dict[int, str], number: int) -> None:
        near = {4: f"169.254.{number}.1", 6: f"fe80::{number}:1"}
        for family, address in addresses.items():
            six = ["-6"] if family == 6 else []
            nodad = ["nodad"] if family == 6 else []
            length = 32 if family == 4 else 128
            self.run("ip", "addr", "add", near[family], "dev", link, *nodad)
            self.run("ip", *six, "route", "add", f"{address}/{length}", "dev", link)
            self.run("ip", "addr", "add", f"{address}/{length}", "dev", "eth0", *nodad, name=name)
            if family == 4:
                self.run("ip", "route", "add", near[4], "dev", "eth0", name=name)
            self.run(
                "ip", *six, "route", "add", "default", "via", near[family], "dev", "eth0", name=name
            )

    def _addresses(self, name: str, addresses: list[str], via: dict[int, str]) -> None:
        for address in addresses:
            nodad = ["nodad"] if ":" in address else []
            self.run("ip", "addr", "add", address, "dev", "eth0", *nodad, name=name)
        self.run("ip", "route", "add", "default", "via", via[4], name=name)
        self.run("ip", "-6", "route", "add", "default", "via", via[6], name=name)

    def remove(self) -> None:
        """Remove all namespaces."""
        if hasattr(self, "sets"):
            self.sets.close()
        if hasattr(self, "tables") and isinstance(self.tables, IptcTables):
            self.tables.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", self.netns(name)], check=False)

    # -- rules ------------------------------------------------------------------------------

    def know(self, *events: churn.Event) -> None:
        """A new agent's caches: these objects."""
        self.graph = Graph(churn.NODE)
        for event in events:
            event.tell(self.graph)

    def start(self, deny_with: DenyWith, *, options: RenderOptions | None = None) -> Dataplane:
        """A new agent that applies what it knows, and then removes its garbage."""
        made = replace(options or self.options, deny_with=deny_with)
        plane = Dataplane(self.graph, made)
        self.graph.flush(together=True)
        execute(plane.reconcile(dump_kernel(self.sets, self.tables)), self.sets, self.tables)
        execute(plane.collect(), self.sets, self.tables)
        return plane

    def saved(self) -> str:
        """All rules of the node, without counters."""
        return "".join(self.restore.save_text(t, f) for t in ("mangle", "filter") for f in Family)

    def tables_now(self) -> list[TableDump]:
        """What is ours in the node's tables."""
        return [self.restore.dump(t, f) for t in ("mangle", "filter") for f in Family]

    # -- packets ----------------------------------------------------------------------------

    def address(self, name: str, family: int) -> str:
        """The address of a namespace."""
        if name == "out":
            return OUTSIDE[family]
        if name == "node":
            return GATEWAY[family]
        return f"10.0.1.{PODS[name]}" if family == 4 else f"fd00:0:1::{PODS[name]}"

    def open(self, name: str, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of a namespace."""
        return open_socket(self.netns(name), _FAMILIES[family], kind)

    @contextmanager
    def listening(self, name: str, port: int) -> Iterator[dict[int, socket.socket]]:
        """Both families' TCP listeners on a port."""
        made = {}
        for family in (4, 6):
            made[family] = sock = self.open(name, family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.address(name, family), port))
            sock.listen(16)
            sock.settimeout(TIMEOUT_S)
        try:
            yield made
        finally:
            for sock in made.values():
                sock.close()

    def connect(self, name: str, address: str, port: int, *, timeout_s: float = TIMEOUT_S) -> Seen:
        """Try a TCP connection."""
        with self.open(name, 6 if ":" in address else 4) as sock:
            sock.settimeout(timeout_s)
            return _timed(lambda: sock.connect((address, port)))

    def ask(self, name: str, address: str, port: int) -> Seen:
        """Send a datagram and wait for an answer."""
        with self.open(name, 6 if ":" in address else 4, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT_S)

            def ask() -> None:
                sock.connect((address, port))
                sock.send(b"?")
                sock.recv(16)

            return _timed(ask)

    def counted(self, table: str, family: int, chain: str) -> list[int]:
        """Packets that each rule of a chain has seen."""
        found = self.tables.counters(table, Family(family))
        return [packets for name, rows in found.items() if name == chain for packets, _ in rows]


def _timed(work: Callable[[], None]) -> Seen:
    began = time.monotonic()
    try:
        work()
    except TimeoutError:
        return Seen("silence", time.monotonic() - began)
    except OSError as e:
        return Seen(errno.errorcode.get(e.errno or 0, str(e)), time.monotonic() - began)
    return Seen("", time.monotonic() - began)


_numbers = itertools.count()


@contextmanager
def net(variant: Variant, lock_file: Path) -> Iterator[RejectNet]:
    """A net that is gone afterwards."""
    made = RejectNet(f"{str(variant)[0]}{next(_numbers)}", variant, lock_file)
    try:
        made.build()
        yield made
    finally:
        made.remove()
