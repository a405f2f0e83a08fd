"""A cluster of namespaces for the case table: two nodes with pods behind a bridge, and one host outside.

Owns the pool, made once and re-addressed for each step, and the rules on its nodes. Everything is routed by
static entries, so that no packet waits for ARP, neighbour discovery or duplicate address detection:

    pod eth0 -- br0 node eth0 -- switch -- outside eth0

Every leaf sends to a gateway of a fixed link-local address; parents have one host route per address.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.kernel.drivers import Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.lab.probe import TIMEOUT_S
from netpol.lab.probeengine import End, Engine, SourcePorts
from netpol.model.flow import Verdict
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES, format_address
from netpol.policy.world import World
from netpol.render.node import graph_of
from netpol.render.options import RenderOptions
from tests.kernel.caseecho import Echoes
from tests.kernel.caselayout import LEAVES, NODES, OUTSIDE, Shot, prefix_text

BRIDGE = "br0"
#: Interfaces of all parents have this one: each is alone on its link.
PARENT_MAC = "02:00:00:00:fe:01"
GATEWAY, GATEWAY6 = "169.254.1.1", "fe80::1:1"

_SETTINGS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    *(
        f"net.ipv{v}.conf.{which}.{setting}"
        for which in ("all", "default")
        for v, setting in (
            (4, "rp_filter=0"),
            (4, "send_redirects=0"),
            (4, "accept_redirects=0"),
            (6, "accept_dad=0"),
            (6, "accept_ra=0"),
            (6, "accept_redirects=0"),
        )
    ),
)


def run(*args: str, stdin: str = "") -> str:
    """Run a tool that must succeed."""
    done = subprocess.run(args, input=stdin, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{' '.join(args)}: {done.stderr}\n{stdin}"
    return done.stdout


def _tell(
    was: Mapping[Any, Any],
    now: Mapping[Any, Any],
    put: Callable[[Any], None],
    remove: Callable[[Any], None],
) -> None:
    """Tell a graph how one kind of objects differs between two worlds."""
    for key in was.keys() - now.keys():
        remove(key)
    for key, value in now.items():
        if was.get(key) != value:
            put(value)


class NodeRules:
    """One node's drivers, and what is in its kernel."""

    def __init__(self, name: str, netns: str, variant: Variant, lock_file: Path) -> None:
        self.name, self.netns, self.variant = name, netns, variant
        self.sets = in_netns(netns, NetlinkSets)
        self.tables = RestoreTables(variant, netns=netns, lock_file=str(lock_file))
        self._plane: Dataplane | None = None
        self._world: World | None = None

    def put(self, world: World) -> None:
        """Bring the kernel to what a world says, from whatever is there, as an agent that starts."""
        known = world.nodes[self.name]
        options = RenderOptions(
            pod_interfaces=(BRIDGE,), hold_ranges=known.pod_cidrs, own_addresses=known.addresses
        )
        self._plane = Dataplane(graph_of(world, self.name), options)
        dump = dump_kernel(self.sets, self.tables)
        execute(self._plane.reconcile(dump), self.sets, self.tables)
        execute(self._plane.collect(), self.sets, self.tables)
        self._world = world

    def follow(self, world: World) -> None:
        """Bring the kernel from the world that was put to the next by changes, as an agent that runs."""
        before, plane = self._world, self._plane
        assert before is not None
        assert plane is not None
        graph = plane.graph
        for was, now, put, remove in (
            (before.namespaces, world.namespaces, graph.upsert_namespace, graph.remove_namespace),
            (before.pods, world.pods, graph.upsert_pod, graph.remove_pod),
            (before.policies, world.policies, graph.upsert_policy, graph.remove_policy),
        ):
            _tell(was, now, put, remove)
        while True:
            delta = graph.flush()
            if delta.empty and not graph.pending:
                break
            execute(plane.change(delta), self.sets, self.tables)
        self._world = world

    def text(self) -> str:
        """Rules and sets, for messages."""
        parts = [
            f"# {self.name}, {self.variant}, IPv{family}\n{self.tables.save_text('mangle', family)}"
            for family in FAMILIES
        ]
        return "\n".join([*parts, run("ip", "netns", "exec", self.netns, "ipset", "save")])


class CaseNet:
    """The pool. Use `pool`."""

    def __init__(self, label: str, variant: Variant, lock_file: Path) -> None:
        self._prefix = f"knpt-case{label}-{os.getpid()}"
        self._variant, self._lock_file = variant, lock_file
        self._leaves = {n: [f"{n}-{i}" for i in range(LEAVES)] for n in NODES}
        self.names = ("switch", OUTSIDE, *NODES, *(x for n in NODES for x in self._leaves[n]))
        #: Address to namespace, as it is now.
        self.placed: dict[bytes, str] = {}
        self.nodes: list[NodeRules] = []
        self._ports = SourcePorts()
        self._echoes = Echoes()

    def netns(self, name: str) -> str:
        """The namespace's real name."""
        return f"{self._prefix}-{name}"

    def build(self) -> None:
        """Make all namespaces and links."""
        run("ip", "-b", "-", stdin="\n".join(f"netns add {self.netns(n)}" for n in self.names))
        for name in self.names:
            run("ip", "netns", "exec", self.netns(name), "sysctl", "-qw", *_SETTINGS)
            self._ip(name, ["link set lo up"])
        for node in NODES:
            self._ip(node, [f"link add {BRIDGE} address {PARENT_MAC} type bridge"])
            self._ip(node, [f"link set {BRIDGE} up"])
            for number, leaf in enumerate(self._leaves[node], 1):
                self._join(node, leaf, number, bridge=BRIDGE)
        for number, name in enumerate((*NODES, OUTSIDE), 1):
            self._join("switch", name, number)
        self.nodes = [NodeRules(n, self.netns(n), self._variant, self._lock_file) for n in NODES]

    def _join(self, parent: str, leaf: str, number: int, bridge: str = "") -> None:
        """A link between two; each knows the other's addresses and MAC by heart."""
        mac, near, near6 = f"02:00:00:00:00:{number:02x}", *self._near(number, bridge or "v")
        peer = f"peer name eth0 address {mac} netns {self.netns(leaf)}"
        own = f"master {bridge}" if bridge else f"address {PARENT_MAC}"
        self._ip(parent, [f"link add v{number} type veth {peer}", f"link set v{number} {own} up"])
        # Whoever loses his last IPv4 address loses his routes: so everyone keeps one of his own.
        self._ip(
            leaf,
            [
                "link set eth0 up",
                f"addr add {near}/32 dev eth0 scope link",
                *(
                    f"neigh replace {g} lladdr {PARENT_MAC} dev eth0 nud permanent"
                    for g in (GATEWAY, GATEWAY6)
                ),
                f"route add default via {GATEWAY} dev eth0 onlink",
                f"route add ::/0 via {GATEWAY6} dev eth0",
            ],
        )
        link = bridge or f"v{number}"
        self._ip(
            parent,
            [f"neigh replace {a} lladdr {mac} dev {link} nud permanent" for a in (near, near6)],
        )

    @staticmethod
    def _near(number: int, link: str) -> tuple[str, str]:
        """The own addresses of the namespace at the other end of a link."""
        kind = 2 if link == BRIDGE else 3
        return f"169.254.{kind}.{number}", f"fe80::{kind}:{number:x}"

    def _ip(self, name: str, lines: Iterable[str]) -> None:
        run("ip", "-n", self.netns(name), "-b", "-", stdin="\n".join(lines))

    def _parents(self, name: str) -> Iterator[tuple[str, str, int]]:
        """Namespaces that need a route to an address in this one: (namespace, link, number)."""
        top = name
        if "-" in name:
            top, _, index = name.partition("-")
            yield top, BRIDGE, int(index) + 1
        number = (*NODES, OUTSIDE).index(top) + 1
        yield "switch", f"v{number}", number

    def place(self, spaces: Mapping[bytes, str]) -> None:
        """Give the namespaces these addresses, and routes to them; others are taken away."""
        lines: dict[str, list[str]] = {}
        for verb, moved in (
            ("del", self.placed.items() - spaces.items()),
            ("add", spaces.items() - self.placed.items()),
        ):
            for address, name in sorted(moved):
                text, v6 = prefix_text(address), len(address) > 4
                nodad = " nodad" if v6 and verb == "add" else ""
                lines.setdefault(name, []).append(f"addr {verb} {text} dev eth0{nodad}")
                for parent, link, number in self._parents(name):
                    via = self._near(number, link)[v6]
                    lines.setdefault(parent, []).append(
                        f"route {verb} {text} via {via} dev {link} onlink"
                    )
        for name, batch in lines.items():
            self._ip(name, batch)
        self.placed = dict(spaces)

    def rules(self, world: World, *, follow: bool = False) -> None:
        """Put a world's rules on every node, from nothing known or from the world before."""
        with ThreadPoolExecutor(len(self.nodes)) as threads:
            list(threads.map(lambda n: n.follow(world) if follow else n.put(world), self.nodes))

    def send(self, shots: Sequence[Shot]) -> list[bool]:
        """Send every connection's first packet; for each, whether something came back."""
        addresses = sorted({a for s in shots for a in s.ends})
        index = {a: i for i, a in enumerate(addresses)}
        ends = [End(format_address(a), self.netns(self.placed[a]), (a,)) for a in addresses]
        engine = Engine(ends=ends, source_ports=self._ports, timeout_s=TIMEOUT_S)
        planned: dict[int, tuple[int, int, tuple[Protocol, int]]] = {}
        for number, shot in enumerate(shots):
            protocol, port = shot.port
            if port is None:
                continue
            src, dst = (index[a] for a in shot.ends)
            planned[number] = src, dst, (protocol, port)
            engine.plan(source=src, destination=dst, address=shot.ends[1], port=(protocol, port))
        answered = [False] * len(shots)
        if planned:
            with ThreadPoolExecutor(1) as own:  # the engine changes its thread's namespace for good
                outcome = own.submit(engine.run).result()
            assert not outcome.faults, outcome.faults
            for number, at in planned.items():
                answered[number] = outcome.verdicts[at] is Verdict.ALLOW
        for number, shot in enumerate(shots):
            if number not in planned:
                answered[number] = self._echoes.answered(
                    self.netns(self.placed[shot.ends[0]]), *shot.ends
                )
        return answered

    def remove(self) -> None:
        """Remove all namespaces."""
        for rules in self.nodes:
            rules.sets.close()
        for name in self.names:
            if Path("/run/netns", self.netns(name)).exists():
                run("ip", "netns", "del", self.netns(name))


@contextmanager
def pool(label: str, variant: Variant, lock_file: Path) -> Iterator[CaseNet]:
    """A pool that is gone afterwards."""
    net = CaseNet(label, variant, lock_file)
    try:
        net.build()
        yield net
    finally:
        net.remove()
