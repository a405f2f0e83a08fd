"""`--deny-with=reject` as a client sees it: real packets, both variants and families, bridged and routed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Self

import pytest

from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.enforce.worker import PolicyRoom
from netpol.kernel.drivers import TableDump, Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.model.net import Family
from netpol.render import names
from netpol.render.options import DENIED, DenyWith
from tests import builders as make
from tests.kernel.rejectnet import PODS, TIMEOUT_S, VIP, RejectNet, net
from tests.kernel.roomhost import until
from tests.prop.test_plan_safety import pod, policy

pytestmark = pytest.mark.kernel

#: b hears one port of each protocol and may not say anything; a may not call one.
DEAF = policy(
    "deaf",
    make.selector(role="b"),
    "Ingress Egress",
    ingress=[make.ingress(ports=["81/TCP", "54/UDP"])],
)
MUTE = policy(
    "mute", make.selector(role="a"), "Egress", egress=[make.egress(ports=["1-89/TCP", "1-89/UDP"])]
)
PODS_EVENTS = [pod(name, last, role=name) for name, last in PODS.items()]
FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
#: What the kernel makes of "administratively prohibited" (net/ipv4/icmp.c, net/ipv6/icmp.c).
PROHIBITED = {4: "EHOSTUNREACH", 6: "EACCES"}
SOON_S = 0.3
VALUE = f"{DENIED << 20:#x}/0xfff00000"


@pytest.fixture(scope="module", params=list(Variant))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RejectNet]:
    with net(request.param, tmp_path_factory.mktemp("reject") / "xtables.lock") as found:
        for family in Family:
            bracketed = "[{}]:{}" if family is Family.V6 else "{}:{}"
            for protocol, port in (("tcp", 80), ("udp", 53)):
                to = bracketed.format(found.address("b", family), port)
                found.iptables(
                    int(family),
                    *f"-t nat -A PREROUTING -d {VIP[family]} -p {protocol} --dport {port}".split(),
                    *f"-j DNAT --to-destination {to}".split(),
                )
        yield found


@pytest.fixture
def world(made: RejectNet) -> RejectNet:
    """Rules that reject, on a node where nobody changed anything."""
    made.know(*PODS_EVENTS, DEAF, MUTE)
    made.start(DenyWith.REJECT)
    return made


#: From, to, port of TCP, port of UDP: by which judgement and over which links.
WAYS = {
    "ingress, bridged": ("a", "b", 80, 53),
    "ingress, from outside": ("out", "b", 80, 53),
    "ingress, from a pod without a bridge": ("c", "b", 80, 53),
    "egress, bridged": ("a", "b", 90, 90),
    "egress, to outside": ("a", "out", 90, 90),
    "egress, to a pod without a bridge": ("a", "c", 90, 90),
    "egress of one who may say nothing": ("b", "c", 90, 90),
}


@FAMILIES
@pytest.mark.parametrize("way", WAYS)
def test_a_denied_client_knows_at_once(world: RejectNet, way: str, family: int) -> None:
    src, dst, tcp, udp = WAYS[way]
    address = world.address(dst, family)
    for seen, wanted in (
        (world.connect(src, address, tcp), "ECONNREFUSED"),
        (world.ask(src, address, udp), PROHIBITED[family]),
    ):
        assert seen.error == wanted, (way, world.saved())
        assert seen.seconds < SOON_S


@FAMILIES
@pytest.mark.parametrize("src", ["a", "out", "c"])
def test_a_client_of_a_service_too(world: RejectNet, src: str, family: int) -> None:
    """A reset would come from an address that the client never called, at least over a bridge.

    An ICMPv6 error that comes before connect() has let go of the socket ends the connection only when it is
    repeated, after the first retransmission.
    """
    for seen, soon_s in (
        (world.connect(src, VIP[family], 80, timeout_s=3.0), SOON_S if family == 4 else 1.5),
        (world.ask(src, VIP[family], 53), SOON_S),
    ):
        assert seen.error == PROHIBITED[family]
        assert seen.seconds < soon_s


@FAMILIES
def test_what_is_allowed_passes(world: RejectNet, family: int) -> None:
    with world.listening("b", 81):
        for src in ("a", "out", "c"):
            assert world.connect(src, world.address("b", family), 81).error == "", src


@FAMILIES
def test_what_a_pod_may_not_say_to_the_node_is_dropped(world: RejectNet, family: int) -> None:
    with world.listening("node", 8090):
        assert world.connect("a", world.address("node", family), 8090).error == "silence"
    with world.listening("node", 80):
        assert world.connect("a", world.address("node", family), 80).error == ""


@FAMILIES
def test_unknown_addresses_and_borrowed_ones_stay_dropped(world: RejectNet, family: int) -> None:
    nobody = {4: "10.0.1.20", 6: "fd00:0:1::20"}[family]
    assert world.connect("out", nobody, 80).error in ("silence", "EHOSTUNREACH")
    counters = world.counted("filter", family, "KNP-REJECT")
    world.know(DEAF, MUTE, *PODS_EVENTS[1:])  # a is nobody's address now
    world.start(DenyWith.REJECT)
    assert world.connect("a", world.address("b", family), 81).error == "silence"
    assert world.counted("filter", family, "KNP-REJECT")[1:] == counters[1:]


@FAMILIES
def test_the_log_is_the_same(world: RejectNet, family: int) -> None:
    def logged() -> int:
        dump = world.tables.dump("mangle", Family(family))
        (chain,) = [n for n in dump.chains if n.startswith("KNP-CI-")]
        return world.counted("mangle", family, chain)[-2]

    before = logged()
    assert world.connect("a", world.address("b", family), 80).error == "ECONNREFUSED"
    assert logged() == before + 1


def _no_jump(world: RejectNet, family: int) -> None:
    world.iptables(family, "-D", "FORWARD", "-j", "KNP-REJECT")


def _empty(world: RejectNet, family: int) -> None:
    world.iptables(family, "-F", "KNP-REJECT")


def _all_of_filter(world: RejectNet, family: int) -> None:
    world.iptables(family, "-F")
    world.iptables(family, "-X")


def _accepted_before(world: RejectNet, family: int) -> None:
    world.iptables(family, "-I", "FORWARD", "1", "-j", "ACCEPT")


@FAMILIES
@pytest.mark.parametrize(
    "harm", [_no_jump, _empty, _all_of_filter, _accepted_before], ids=lambda f: f.__name__[1:]
)
def test_without_filter_it_is_denied_still_and_then_repaired(
    made: RejectNet, harm: Callable[[RejectNet, int], None], family: int
) -> None:
    made.know(*PODS_EVENTS, DEAF, MUTE)
    plane = made.start(DenyWith.REJECT)
    assert plane.drift(dump_kernel(made.sets, made.tables)) == ""
    harm(made, family)
    try:
        with made.listening("b", 80):
            for src in ("a", "out"):
                assert made.connect(src, made.address("b", family), 80).error == "silence"
        assert made.counted("mangle", family, "KNP-POSTROUTING")[0] > 0
        assert "-t filter" in plane.drift(dump_kernel(made.sets, made.tables))
        execute(plane.reconcile(dump_kernel(made.sets, made.tables)), made.sets, made.tables)
        assert plane.drift(dump_kernel(made.sets, made.tables)) == ""
        seen = made.connect("a", made.address("b", family), 80)
        assert seen.error == "ECONNREFUSED"
    finally:
        if harm is _accepted_before:
            made.iptables(family, "-D", "FORWARD", "-j", "ACCEPT")


@contextlib.asynccontextmanager
async def running(made: RejectNet, deny_with: DenyWith) -> AsyncIterator[PolicyRoom]:
    """The agent's room; it ends as an agent does, and leaves the rules."""
    made.know(*PODS_EVENTS, DEAF, MUTE)
    room = PolicyRoom(
        made.graph,
        sets=in_netns(made.netns("node"), NetlinkSets),
        tables=made.tables,
        options=replace(made.options, deny_with=deny_with),
    )
    task = asyncio.create_task(room.run_forever())
    room.start()
    try:
        assert await until(lambda: room.ready)
        yield room
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        room.close()


async def test_the_agent_repairs_filter_and_takes_it_back_when_told(made: RejectNet) -> None:
    async with running(made, DenyWith.REJECT) as room:
        right = made.tables_now()
        for family, harm in itertools.product((4, 6), (_no_jump, _empty, _all_of_filter)):
            await asyncio.to_thread(harm, made, family)
            assert made.tables_now() != right
            assert await until(lambda: made.tables_now() == right), room.status
        assert "-t filter" in room.status.drift
        drifts = room.status.drifts
        await asyncio.sleep(1.0)
        assert room.status.drifts == drifts
        assert room.status.failures == 0, room.status.error
    async with running(made, DenyWith.DROP) as room:
        # What filter and the net have goes with the garbage.
        assert "KNP-REJECT" in made.saved()
        assert await until(lambda: "KNP-REJECT" not in made.saved(), 8.0), room.status
        assert await until(lambda: "KNP-POSTROUTING" not in made.saved(), 8.0), room.status
        assert (room.status.drifts, room.status.failures) == (0, 0), room.status
    assert made.connect("a", made.address("b", 4), 80).error == "silence"


@FAMILIES
def test_open_connections_and_others_marks_are_left_alone(made: RejectNet, family: int) -> None:
    """A connection from before the policy; and somebody sets the very value, on every packet."""
    made.know(*PODS_EVENTS)
    made.start(DenyWith.REJECT)
    rule = ["-t", "mangle", "PREROUTING", "-j", "MARK", "--set-xmark", VALUE]
    with made.listening("b", 80) as heard, made.open("a", family) as client:
        client.settimeout(TIMEOUT_S)
        client.connect((made.address("b", family), 80))
        server, _ = heard[family].accept()
        with server:
            made.know(*PODS_EVENTS, DEAF, MUTE)
            made.start(DenyWith.REJECT)
            made.iptables(family, *rule[:2], "-A", *rule[2:])
            try:
                for sock, other in ((client, server), (server, client)):
                    sock.sendall(b"still here")
                    other.settimeout(TIMEOUT_S)
                    assert other.recv(64) == b"still here"
                assert made.connect("a", made.address("b", family), 80).error == "ECONNREFUSED"
                with made.listening("b", 81):
                    assert made.connect("a", made.address("b", family), 81).error == ""
                with made.listening("node", 80):
                    assert made.connect("a", made.address("node", family), 80).error == ""
            finally:
                made.iptables(family, *rule[:2], "-D", *rule[2:])


@FAMILIES
def test_marks_that_are_reflected_do_not_stop_answers(world: RejectNet, family: int) -> None:
    name = "net.ipv4.fwmark_reflect" if family == 4 else "net.ipv6.fwmark_reflect"
    world.run("sysctl", "-qw", f"{name}=1")
    try:
        for src in ("a", "c", "out"):
            assert world.connect(src, world.address("b", family), 80).error == "ECONNREFUSED"
            assert world.ask(src, world.address("b", family), 53).error == PROHIBITED[family]
    finally:
        world.run("sysctl", "-qw", f"{name}=0")


def _tcp(src: str, dst: str, flags: int) -> bytes:
    """A TCP segment without data to port 80."""
    version = socket.AF_INET6 if ":" in src else socket.AF_INET
    ends = socket.inet_pton(version, src) + socket.inet_pton(version, dst)
    head = struct.pack("!HHIIBBHHH", 40001, 80, 1000, 2000, 5 << 4, flags, 512, 0, 0)
    pseudo = ends + struct.pack("!BBH", 0, 6, len(head))
    total = sum(struct.unpack(f"!{len(pseudo + head) // 2}H", pseudo + head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:]


@FAMILIES
@pytest.mark.parametrize("flags", [0x10, 0x12, 0x11], ids=["ACK", "SYN ACK", "FIN ACK"])
def test_the_middle_of_a_connection_gets_no_reset(
    world: RejectNet, flags: int, family: int
) -> None:
    """It may be the other direction of one that is allowed, which conntrack has forgotten."""
    src, dst = (world.address(n, family) for n in ("out", "b"))
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    raw = in_netns(
        world.netns("out"), lambda: socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_TCP)
    )
    before = world.counted("filter", family, "KNP-REJECT")
    with raw:
        raw.sendto(_tcp(src, dst, flags), (dst, 0))
    time.sleep(0.1)
    after = world.counted("filter", family, "KNP-REJECT")
    gained = [b - a for a, b in zip(before, after, strict=True)]
    assert sum(gained[1:]) == 1
    assert gained[2:4] == [0, 0]
    assert gained[5] == 0


@FAMILIES
def test_output_is_judged_and_answered(world: RejectNet, family: int) -> None:
    """As IPVS sends: by the node, with the address of another. Here it is the client outside."""
    world.run("sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1", "net.ipv6.ip_nonlocal_bind=1")
    client = world.address("out", family)
    try:
        with world.open("node", family) as sock:
            # IP_TRANSPARENT, IPV6_TRANSPARENT
            sock.setsockopt(*((socket.SOL_IP, 19) if family == 4 else (41, 75)), 1)
            sock.settimeout(TIMEOUT_S)
            sock.bind((client, 0))
            before = world.counted("filter", family, "KNP-REJECT-OUT")[2]
            with pytest.raises(OSError):
                sock.connect((world.address("b", family), 80))
        assert world.counted("filter", family, "KNP-REJECT-OUT")[2] > before
    finally:
        world.run("sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=0", "net.ipv6.ip_nonlocal_bind=0")


class Fire:
    """Sends datagrams of new flows as fast as it goes, and counts those that arrive."""

    def __init__(self, made: RejectNet, family: int) -> None:
        self.sent = 0
        self._address = made.address("b", family)
        self._stop = threading.Event()
        self._denied, self._allowed = (made.open("b", family, socket.SOCK_DGRAM) for _ in "da")
        for sock, port in ((self._denied, 53), (self._allowed, 54)):
            sock.bind((self._address, port))
            sock.setblocking(False)
        self._ends = [made.open("out", family, socket.SOCK_DGRAM) for _ in range(64)]
        self._thread = threading.Thread(target=self._run)
        self.arrived = self.allowed = 0
        self.errors: Counter[int | None] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for sock in (self._denied, self._allowed, *self._ends):
            sock.close()

    def _run(self) -> None:
        ends = itertools.cycle(self._ends)
        while not self._stop.is_set():
            sock = next(ends)
            for port in (53, 54):
                try:
                    sock.sendto(b"!", (self._address, port))
                except OSError as e:  # an earlier one's
                    self.errors[e.errno] += 1
            self.sent += 1
            self.arrived += _drain(self._denied)
            self.allowed += _drain(self._allowed)


def _drain(sock: socket.socket) -> int:
    count = 0
    while True:
        try:
            sock.recv(16)
        except BlockingIOError:
            return count
        count += 1


@FAMILIES
def test_no_packet_slips_through_while_the_setting_changes(made: RejectNet, family: int) -> None:
    made.know(*PODS_EVENTS, DEAF, MUTE)
    made.start(DenyWith.DROP)
    with Fire(made, family) as fire:
        for deny_with in (DenyWith.REJECT, DenyWith.DROP) * 4:
            made.start(deny_with)
            if deny_with is DenyWith.REJECT:
                made.iptables(family, "-D", "FORWARD", "-j", "KNP-REJECT")
                made.start(deny_with)
    assert fire.sent > 1000
    assert fire.arrived == 0
    assert fire.allowed > 0.9 * fire.sent, (
        fire.errors,
        made.run("ip", "-6", "neigh"),
        made.saved(),
    )


def test_back_to_drops_nothing_is_left(made: RejectNet) -> None:
    made.know(*PODS_EVENTS, DEAF, MUTE)
    made.start(DenyWith.DROP)
    before = made.saved()
    assert "POSTROUTING -j" not in before
    made.start(DenyWith.REJECT)
    assert made.saved() != before
    made.start(DenyWith.DROP)
    for of in Family:
        assert made.tables.dump("filter", of) == TableDump()
        mangle = made.tables.dump("mangle", of)
        assert {str(h) for h in mangle.hooks} == {"FORWARD", "INPUT", "OUTPUT"}
        assert names.REJECT not in mangle.chains
        assert "KNP-POSTROUTING" not in mangle.chains
    for family in (4, 6):
        assert made.connect("a", made.address("b", family), 80).error == "silence"
