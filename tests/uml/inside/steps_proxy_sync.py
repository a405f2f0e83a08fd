"""The proxy's room on a real kernel: real rules, sets, servers, addresses, and clients that stay connected.

The guest is the node. The room runs as in the agent, in a loop of its own; a restart is another room on the
same kernel and the same run folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from netpol.config import DEFAULT_SERVICE_MARK_MASK
from netpol.kernel.conntrack import NetlinkFlows
from netpol.kernel.drivers import Variant
from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.kept_sysctls import KeptSysctls, service_sysctls
from netpol.kernel.modules import load_module
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.sysctl import BRIDGE_NF_KEYS, keep_sysctl
from netpol.kernel.tables import RestoreTables
from netpol.kernel.vips import DummyVips
from netpol.model.ids import SERVICES, ObjectKey, Protocol
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    DeleteServer,
    RealConfig,
    RealServer,
    ServerId,
    SetServer,
    VirtualServer,
)
from netpol.model.net import Family, parse_address, parse_prefix
from netpol.model.ruleset import Hook
from proxy import names
from proxy.apply import Drivers
from proxy.ledger_file import LedgerFile
from proxy.rows import Action, Backend, Kind, ServicePlan, ServiceRow
from proxy.rules import RuleOptions, rulesets
from proxy.status import SyncOptions
from proxy.sync import ProxyRoom
from proxy.work import Static
from tests.uml.inside import lan, traffic
from tests.uml.inside.steps import POD_DNS, POD_PORT, Ask

Say = Callable[[str, Any], None]
T = TypeVar("T")

MASK = DEFAULT_SERVICE_MARK_MASK
RUN_DIR = Path("/run/netpol-sync")
#: Where a server keeps its connections.
POD_LONG = 8081
WEB, LONG, DNS, STICKY, LOCAL = "web", "long", "dns", "sticky", "local"
ADDRESSES = {WEB: "10.96.2.1", LONG: "10.96.2.2", DNS: "10.96.2.3", STICKY: "10.96.2.4"}
ADDRESSES[LOCAL] = "203.0.113.7"
TARGETS = {WEB: POD_PORT, LONG: POD_LONG, DNS: POD_DNS, STICKY: POD_PORT, LOCAL: POD_PORT}
BACKENDS = ("backend", "other")
GRACE_S = 2.0
FOREIGN = ServerId(Family.V4, Protocol.TCP, parse_address(lan.NODE4), 31000)
#: The first one that is given.
MARK = ServerId.by_mark(Family.V4, MASK & -MASK)
STEP_S = 10.0


class Agent:
    """A room in a loop of its own, as in the agent; `kill` leaves the kernel as it is."""

    def __init__(self, *, drain_s: float) -> None:
        sources = {Family.V4: parse_address(lan.NODE4), Family.V6: parse_address(lan.NODE6)}
        pods = {names.POD[Family.V4].name: {parse_prefix("10.244.1.0/24"): None}}
        static = Static(rulesets(RuleOptions(MASK)), pods, sources)
        # Not in the loop's thread, which pyroute2 refuses.
        self.drivers = Drivers(
            NetlinkIpvs(),
            DummyVips(),
            NetlinkSets(mark_mask=MASK, owner=SERVICES),
            RestoreTables(Variant.LEGACY, owner=SERVICES),
            NetlinkFlows(),
            eyes=NetlinkIpvs(),
        )
        keeper = KeptSysctls(service_sysctls(), RUN_DIR / "sysctls.json")
        self.room = ProxyRoom(
            self.drivers,
            ledger=LedgerFile(RUN_DIR / "ipvs.ledger"),
            static=lambda: static,
            options=SyncOptions(mark_mask=MASK, drain_s=drain_s),
            sysctls=keeper.keep,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._forever = asyncio.run_coroutine_threadsafe(self.room.run_forever(), self._loop)

    def call(self, coro: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coro, self._loop).result(STEP_S)

    def serve(self, *plans: ServicePlan, gone: tuple[str, ...] = ()) -> float:
        """Have the room apply plans; how long it took from the telling, in seconds."""
        told = {p.service: p for p in plans} | {ObjectKey("ns", n): None for n in gone}

        async def apply() -> float:
            self.room.changed(told)
            if not self.room._started:
                self.room.start()
            await asyncio.wait_for(self.room.runner.wait_idle(), STEP_S)
            return self.room.status.latency_s or 0.0

        took_s = self.call(apply())
        assert self.room.in_sync, self.room.status
        return took_s

    def until(self, holds: Callable[[], bool]) -> float:
        """Wait until something holds; after how long it did, or -1.0."""
        begin_s = time.monotonic()
        while time.monotonic() < begin_s + STEP_S:
            if holds():
                return time.monotonic() - begin_s
            time.sleep(0.05)
        return -1.0

    def kill(self) -> None:
        self._forever.cancel()
        with contextlib.suppress(asyncio.CancelledError, TimeoutError):
            self.call(asyncio.sleep(0))
        self._loop.call_soon_threadsafe(self.room.close)


def plan(
    name: str,
    *to: str,
    draining: tuple[str, ...] = (),
    locally: tuple[str, ...] | None = None,
    affinity_s: int = 0,
    kind: Kind = Kind.CLUSTER_IP,
) -> ServicePlan:
    """A Service of one port with these pods as backends."""

    def backends(pods: tuple[str, ...], weight: int = 1) -> tuple[Backend, ...]:
        addresses = (parse_address(lan.v4(lan.PODS[p])) for p in pods)
        return tuple(Backend(a, TARGETS[name], weight) for a in addresses)

    there = backends(to) + backends(draining, 0)
    row = ServiceRow(
        ObjectKey("ns", name),
        "",
        kind,
        parse_address(ADDRESSES[name]),
        80,
        Protocol.UDP if name == DNS else Protocol.TCP,
        affinity_s=affinity_s,
        backends=there,
        local_client_backends=there if locally is None else backends(locally),
        action=Action.FORWARD if to else Action.DROP if locally else Action.REJECT,
    )
    return ServicePlan(row.service, rows=(row,))


def server_of(name: str) -> ServerId:
    protocol = Protocol.UDP if name == DNS else Protocol.TCP
    return ServerId(Family.V4, protocol, parse_address(ADDRESSES[name]), 80)


def ask(name: str) -> Ask:
    return Ask("client", ADDRESSES[name], 80, "udp" if name == DNS else "tcp")


def who(name: str, times: int = 1) -> list[str]:
    """Who answers new connections, one after the other."""
    answers = [traffic.ask({"": ask(name)})[""] for _ in range(times)]
    return [answer.split(" ")[0] for answer in answers]


class LongServers:
    """Servers whose connections stay: each line is answered by the pod's name."""

    def listen(self, pod: str) -> None:
        sock = in_netns(pod, lambda: socket.create_server(("", POD_LONG)))
        threading.Thread(target=self._serve, args=(pod, sock), daemon=True).start()

    def _serve(self, pod: str, sock: socket.socket) -> None:
        while True:
            peer, _ = sock.accept()
            threading.Thread(target=self._answer, args=(pod, peer), daemon=True).start()

    def _answer(self, pod: str, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            while peer.recv(16):
                peer.sendall(pod.encode())


class LongClient:
    """A TCP connection of the client pod that stays."""

    def __init__(self) -> None:
        self._sock = in_netns("client", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        self._sock.settimeout(traffic.ANSWER_TIMEOUT_S)
        self._sock.connect((ADDRESSES[LONG], 80))

    def ask(self) -> str:
        """The name of the pod at the other end; "" when nobody answers any more."""
        try:
            self._sock.sendall(b"who?\n")
            return self._sock.recv(64).decode()
        except OSError:
            return ""


def refused(question: Ask) -> bool:
    """Whether a client is refused before it would ask again."""
    kind = socket.SOCK_DGRAM if question.protocol == "udp" else socket.SOCK_STREAM
    with in_netns(question.src, lambda: socket.socket(socket.AF_INET, kind)) as sock:
        sock.settimeout(traffic.ANSWER_TIMEOUT_S)
        try:
            sock.connect((question.address, question.port))
            if question.protocol == "udp":
                sock.send(b"who?")
                sock.recv(16)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    return False


def run(say: Say) -> None:
    """All steps."""
    for module in ("br_netfilter",):
        load_module(module)
    RUN_DIR.mkdir(exist_ok=True)
    lan.build()
    for key in BRIDGE_NF_KEYS:
        keep_sysctl(key, "1")
    servers, long_servers = traffic.Servers(), LongServers()
    for pod in BACKENDS:
        servers.listen(pod, pod, POD_PORT)
        servers.listen(pod, pod, POD_DNS, "udp")
        long_servers.listen(pod)
    servers.listen("node", "", 80)
    servers.start()
    other_program = NetlinkIpvs()
    other_program.apply(
        [
            AddServer(VirtualServer(FOREIGN, "wlc", 0, 77)),
            AddReal(FOREIGN, RealServer(parse_address("192.0.2.9"), 1), RealConfig(3)),
        ]
    )
    foreign = repr(other_program.dump())
    agent = Agent(drain_s=600.0)
    say("first", round(agent.serve(*(plan(name, *BACKENDS) for name in (WEB, LONG, DNS))), 3))
    say("foreign", [str(id_) for id_ in agent.room.status.foreign])
    say("faults", agent.room.status.faults)
    say("asked", sorted(set(who(WEB, 4))))
    say("flags", _flags())
    agent = _drain_over_a_restart(say, agent)
    _udp_moves(say, agent)
    _affinity(say, agent)
    _refusal(say, agent)
    _by_mark(say, agent)
    _drift(say, agent)
    agent.serve(gone=(WEB, LONG, DNS, STICKY, LOCAL))
    say("at the end", repr(agent.drivers.ipvs.dump()) == foreign)
    say("addresses at the end", agent.drivers.vips.dump() == frozenset())
    agent.kill()


def _flags() -> dict[str, str]:
    """What the kernel has of the settings that drains and affinity need."""
    return {
        key: Path(f"/proc/sys/net/ipv4/vs/{key}").read_text().strip()
        for key in ("conntrack", "expire_nodest_conn", "expire_quiescent_template")
    }


def _drain_over_a_restart(say: Say, agent: Agent) -> Agent:
    client = LongClient()
    said = [held := client.ask()]
    left = next(pod for pod in BACKENDS if pod != held)
    agent.serve(plan(LONG, left, draining=(held,)))
    said.append(client.ask())
    fresh = [LongClient().ask() for _ in range(3)]
    # Longer than the room waits before it looks at what drains.
    time.sleep(1.3)
    said.append(client.ask())
    agent.kill()
    restarted = Agent(drain_s=GRACE_S)
    plans = (plan(WEB, *BACKENDS), plan(LONG, left), plan(DNS, *BACKENDS))
    restarted.serve(*plans)
    said.append(client.ask())
    repaired, draining = restarted.room.status.repaired, restarted.room.status.draining
    live = restarted.call(restarted.room.live(ObjectKey("ns", LONG)))
    assert live is not None
    reals = live.states[server_of(LONG)].reals
    real = RealServer(parse_address(lan.v4(lan.PODS[held])), POD_LONG)
    weight, active = reals[real].config.weight, reals[real].active

    def gone() -> bool:
        states = restarted.drivers.ipvs.read([server_of(LONG)])
        return real not in states[server_of(LONG)].reals

    ended_s = restarted.until(gone)
    said.append(client.ask())
    say(
        "drain",
        {
            "said": [("held", "left", "")[(held, left, "").index(s)] for s in said],
            "new": [s == left for s in fresh],
            "repaired": repaired,
            "draining": draining,
            "weight": weight,
            "active": active,
            "ended": ended_s,
        },
    )
    # One that nobody is connected to goes as soon as it is looked at.
    restarted.serve(plan(LONG, held, left))
    restarted.serve(plan(LONG, left))
    say("idle", restarted.until(gone))
    return restarted


def _udp_moves(say: Say, agent: Agent) -> None:
    flow = traffic.UdpFlow(ask(DNS))
    held = flow.ask().split(" ")[0]
    left = next(pod for pod in BACKENDS if pod != held)
    stays = flow.ask().split(" ")[0] == held
    agent.serve(plan(DNS, left))
    say("udp", {"stays": stays, "moves": [flow.ask().split(" ")[0] == left for _ in range(2)]})
    agent.serve(plan(DNS))
    say("udp refused", flow.ask() == "" and refused(ask(DNS)))
    agent.serve(plan(DNS, *BACKENDS))


def _affinity(say: Say, agent: Agent) -> None:
    agent.serve(plan(STICKY, *BACKENDS, affinity_s=600))
    before = who(STICKY, 4)
    left = next(pod for pod in BACKENDS if pod != before[0])
    agent.serve(plan(STICKY, left, affinity_s=600))
    say("affinity", {"kept": set(before) == {before[0]}, "after": set(who(STICKY, 3)) == {left}})


def _refusal(say: Say, agent: Agent) -> None:
    agent.serve(plan(WEB))
    say("refused", [refused(ask(WEB)) for _ in range(3)])
    agent.serve(plan(WEB, *BACKENDS))
    say("served again", sorted(set(who(WEB, 4))))
    agent.serve(gone=(WEB,))
    # The node listens on the port, which must not be reached by the address that was a Service's.
    say("nobody's", who(WEB))


def _by_mark(say: Say, agent: Agent) -> None:
    """No endpoint for outsiders: the client is served by mark, with affinity."""
    agent.serve(plan(LOCAL, locally=BACKENDS, affinity_s=600, kind=Kind.EXTERNAL_IP))
    say("by mark", who(LOCAL, 4))
    # Persistence instead: the port that was dialled is kept, where nobody listens.
    persistent = VirtualServer(MARK, "rr", 0, 600)
    assert not agent.drivers.ipvs.apply([SetServer(persistent)])
    say("by mark, persistent", who(LOCAL))
    agent.call(_resync(agent))
    say("by mark, repaired", who(LOCAL))
    agent.serve(gone=(LOCAL,))


async def _resync(agent: Agent) -> None:
    agent.room.resync()
    await asyncio.wait_for(agent.room.runner.wait_idle(), STEP_S)


def _drift(say: Say, agent: Agent) -> None:
    """Somebody deletes a server and our jump; a look finds out."""
    agent.serve(plan(WEB, *BACKENDS))
    agent.drivers.eyes.apply([DeleteServer(server_of(WEB))])
    subprocess.run(["iptables-legacy", "-t", "filter", "-F", "INPUT"], check=True)

    def repaired() -> bool:
        there = agent.drivers.ipvs.read([server_of(WEB)])
        return bool(
            there and agent.drivers.tables.dump("filter", Family.V4).hooks[Hook.INPUT].jumps
        )

    # One look is enough: a look of the room's own that overtakes it has found the same.
    agent.call(agent.room._look())
    found_s = agent.until(repaired)
    say("drift", [found_s >= 0, agent.room.status.drifts > 0, sorted(set(who(WEB, 4)))])
