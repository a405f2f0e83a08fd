"""The proxy's rules on packets in both variants, as far as they go without IPVS.

What a served port leads to is the node's own listener here. With IPVS, and so in legacy tables alone, the
rest is in `tests/uml/test_proxy_rules.py`.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

from netpol.kernel import netns
from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    SetTransaction,
    TableTransaction,
    Variant,
)
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import SERVICES, Protocol
from netpol.model.net import FAMILIES, Family, host_prefix, parse_address
from netpol.model.ruleset import AddressPort, AddressPortNet
from proxy import names
from proxy.rules import RuleOptions, rulesets
from tests.kernel.test_proxy_rules import without_ipvs

pytestmark = pytest.mark.kernel

MASK = 0x1FFF
NODE = {Family.V4: "10.9.0.1", Family.V6: "fd09::1"}
CLIENT = {Family.V4: "10.9.0.2", Family.V6: "fd09::2"}
VIP = {Family.V4: "10.96.1.1", Family.V6: "fd96::1"}
SERVED, DROPPED, REJECTED, SHUT_OUT, LET_IN, OWN = 80, 81, 82, 83, 84, 9000
SILENCE = "silence"


@pytest.fixture
def client(space: str) -> Iterator[str]:
    """A machine beside the node, which has an address of a Service."""
    name = f"{space}c"
    netns.create(name)
    try:
        _ip(
            space,
            f"link add to-client type veth peer name eth0 netns {name}",
            "link set lo up",
            "link set to-client up",
            *(f"addr add {a}/{n} dev to-client nodad" for a, n in _lengths(NODE)),
            f"addr add {VIP[Family.V4]}/32 dev lo",
            f"addr add {VIP[Family.V6]}/128 dev lo nodad",
        )
        _ip(
            name,
            "link set eth0 up",
            *(f"addr add {a}/{n} dev eth0 nodad" for a, n in _lengths(CLIENT)),
            *(f"route add default via {address}" for address in NODE.values()),
        )
        yield name
    finally:
        netns.delete(name)


def _lengths(addresses: dict[Family, str]) -> list[tuple[str, int]]:
    return [(addresses[Family.V4], 24), (addresses[Family.V6], 64)]


def _ip(space: str, *lines: str) -> None:
    done = subprocess.run(
        ["ip", "-n", space, "-batch", "-"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def listeners(space: str) -> Iterator[None]:
    """The node listens on every port, at all of its addresses."""
    ports = (SERVED, DROPPED, REJECTED, SHUT_OUT, LET_IN, OWN)

    def listen(port: int) -> socket.socket:
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

    sockets = [in_netns(space, lambda port=port: listen(port)) for port in ports]
    yield
    for sock in sockets:
        sock.close()


def _protect(space: str, variant: Variant, family: Family) -> RestoreTables:
    vip, client = parse_address(VIP[family]), parse_address(CLIENT[family])

    def at(port: int) -> AddressPort:
        return AddressPort(vip, Protocol.TCP, port)

    sets = in_netns(space, lambda: NetlinkSets(mark_mask=MASK, owner=SERVICES))
    try:
        ports = (SERVED, DROPPED, REJECTED, SHUT_OUT, LET_IN)
        allowed = AddressPortNet(vip, Protocol.TCP, LET_IN, host_prefix(client))
        nobody = AddressPortNet(vip, Protocol.TCP, SHUT_OUT, host_prefix(vip))
        sets.apply(
            SetTransaction(
                (
                    *(CreateSet(spec) for spec in names.SPECS.values()),
                    AddMembers(names.VIP[family], {vip: None}),
                    AddMembers(names.PORT[family], {at(port): None for port in ports}),
                    AddMembers(names.DROP[family], {at(DROPPED): None}),
                    AddMembers(names.REJECT[family], {at(REJECTED): None}),
                    AddMembers(names.LB[family], {at(SHUT_OUT): None, at(LET_IN): None}),
                    AddMembers(names.SRC[family], {allowed: None, nobody: None}),
                    AddMembers(names.MARK[family], {at(SERVED): 5, at(DROPPED): 6}),
                )
            )
        )
    finally:
        sets.close()
    tables = RestoreTables(variant, netns=space, owner=SERVICES)
    for (table, of), whole in rulesets(RuleOptions(MASK)).items():
        if of is family:
            want = without_ipvs(whole)
            tables.apply(TableTransaction(table, family, want.chains, hooks=want.hooks))
    return tables


def _dial(space: str, address: str, port: int, *, sport: int = 0) -> str:
    """What becomes of a connection: "open", "refused" or silence."""

    def dial() -> str:
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(kind) as sock:
            sock.settimeout(0.4)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sport:
                sock.bind(("", sport))
            try:
                sock.connect((address, port))
            except ConnectionRefusedError:
                return "refused"
            except TimeoutError:
                return SILENCE
            return "open"

    return in_netns(space, dial)


def _ping(space: str, address: str) -> bool:
    words = ["ip", "netns", "exec", space, "ping", "-c1", "-W1", address]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.usefixtures("listeners")
@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
@pytest.mark.parametrize("variant", Variant)
def test_what_a_vip_lets_in(space: str, client: str, variant: Variant, family: Family) -> None:
    vip = VIP[family]
    assert _dial(client, vip, OWN) == "open", "the node does not listen, so that nothing is shown"
    tables = _protect(space, variant, family)
    answers = {
        port: _dial(client, vip, port)
        for port in (SERVED, DROPPED, REJECTED, SHUT_OUT, LET_IN, OWN)
    }
    assert answers == {
        SERVED: "open",
        DROPPED: SILENCE,
        REJECTED: "refused",
        SHUT_OUT: SILENCE,
        LET_IN: "open",
        OWN: "refused",
    }
    assert _dial(client, vip, SERVED, sport=20) == "refused"
    assert _ping(client, vip)
    assert _dial(client, NODE[family], OWN) == "open"
    # The node itself: sources are asked of it too, and nothing but served ports is open to it.
    assert _dial(space, vip, SERVED) == "open"
    assert _dial(space, vip, OWN) == "refused"
    assert _dial(space, vip, LET_IN) == SILENCE
    # A client of this node has the mark, which a drop is not for.
    sets = in_netns(space, lambda: NetlinkSets(mark_mask=MASK, owner=SERVICES))
    pod = host_prefix(parse_address(CLIENT[family]))
    sets.apply(SetTransaction((AddMembers(names.POD[family], {pod: None}),)))
    sets.close()
    assert _dial(client, vip, DROPPED) == "open"
    marked = _counted(space, variant, family)
    assert _dial(client, vip, SERVED) == "open"
    assert _counted(space, variant, family) > marked
    assert set(tables.counters("filter", family)) == {
        "KNP-SVC-IN",
        "KNP-SVC-NEW",
        "KNP-SVC-VIP",
        "KNP-SVC-REFUSE",
        "KNP-SVC-FWD",
    }


def _counted(space: str, variant: Variant, family: Family) -> int:
    """Packets at INPUT that bear the mark of the served port; counting begins with the first call."""
    tool = f"{'iptables' if family is Family.V4 else 'ip6tables'}-{variant}"

    def run(*words: str) -> str:
        done = in_netns(
            space,
            lambda: subprocess.run(
                [tool, "-w", "-t", "mangle", *words], capture_output=True, text=True, check=True
            ),
        )
        return done.stdout

    listed = run("-S", "INPUT", "-v")
    if "0x5" not in listed:
        run("-A", "INPUT", "-m", "mark", "--mark", "5", "-j", "ACCEPT")
        return 0
    (line,) = (line for line in listed.splitlines() if "0x5" in line)
    words = line.split()
    return int(words[words.index("-c") + 1])
