"""Corners of the probe: refusals, old connections, silent servers, nodes, shared namespaces, many pods."""

import asyncio
import socket
import time

import pytest

from netpol.kernel.netns import open_socket
from netpol.lab import neighbours, netsock
from netpol.lab.probe import ProbeEnd, probe, run_probe
from netpol.lib.errors import InputError, KernelError
from netpol.model.ids import Protocol
from netpol.model.net import Family, parse_address
from tests.kernel.probespaces import Bridge, run

pytestmark = pytest.mark.kernel

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
PORTS = [(TCP, 80), (UDP, 80), (SCTP, 80)]
ESTABLISHED = "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
OPEN = ":INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT"


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    with Bridge("edge", 3, tmp_path=tmp_path_factory.mktemp("lock")) as it:
        yield it


@pytest.fixture(autouse=True)
def _clean(bridge):
    yield
    for family in (4, 6):
        bridge.rules("nft", family, OPEN)


def verdicts(result, src="t/p0", dst="t/p1"):
    return {port: rows[src][dst] for port, rows in result.verdicts.items()}


ALLOW = {"80/TCP": "allow", "80/UDP": "allow", "80/SCTP": "allow"}
DENY = {"80/TCP": "deny", "80/UDP": "deny", "80/SCTP": "deny"}


def test_without_rules_and_servers_everything_passes(bridge):
    result = run_probe(pods=bridge.ends, ports=PORTS)
    assert all(
        v == "allow" for p in result.verdicts.values() for r in p.values() for v in r.values()
    )
    assert result.document() == {"pods": ["t/p0", "t/p1", "t/p2"], "verdicts": result.verdicts}
    assert (result.probes, result.packets, result.faults) == (18, 18, ())


@pytest.mark.parametrize(
    ("family", "target"),
    [
        (4, "REJECT"),
        (4, "REJECT --reject-with icmp-admin-prohibited"),
        (4, "REJECT --reject-with icmp-host-unreachable"),
        (4, "REJECT --reject-with icmp-proto-unreachable"),
        (6, "REJECT"),
        (6, "REJECT --reject-with icmp6-adm-prohibited"),
        (6, "REJECT --reject-with icmp6-no-route"),
    ],
)
def test_a_refusal_with_an_icmp_error_on_the_way_is_a_deny(bridge, family, target):
    # Refusals beyond the kernel's rate of ICMP errors would be silence: a deny too, but a slower one.
    limits = ("net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0")
    run("ip", "netns", "exec", bridge.node, "sysctl", "-qw", *limits)
    reject = f"-A FORWARD -d {bridge.texts(1)[family == 6]} -j {target}"
    discovery = "-A FORWARD -p ipv6-icmp -j ACCEPT" if family == 6 else ""
    bridge.rules("nft", family, f"{OPEN}\n{ESTABLISHED}\n{discovery}\n{reject}")
    result = run_probe(pods=bridge.ends, ports=PORTS, family=Family(family))
    assert verdicts(result) == DENY
    assert verdicts(result, dst="t/p2") == ALLOW
    # A refusal is final: nothing is asked twice, nothing waits for silence.
    assert result.packets == result.probes


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_reset_of_a_firewall_is_a_deny_and_one_of_the_destination_is_not(bridge, family, variant):
    """Nobody listens on port 80 of any pod: both resets have the destination's address."""
    reject = (
        f"-A FORWARD -p tcp -d {bridge.texts(1)[family == 6]} -j REJECT --reject-with tcp-reset"
    )
    bridge.rules(variant, family, f"{OPEN}\n{ESTABLISHED}\n{reject}")
    try:
        result = run_probe(pods=bridge.ends, ports=PORTS, family=Family(family))
    finally:
        bridge.rules(variant, family, OPEN)
    assert verdicts(result) == {**ALLOW, "80/TCP": "deny"}
    assert verdicts(result, dst="t/p2") == ALLOW
    assert result.packets == result.probes


@pytest.mark.parametrize("family", [4, 6])
def test_a_destination_that_rejects_in_its_own_firewall_is_a_deny(bridge, family):
    gateway = ("10.9.0.1", "fd09::1")[family == 6]
    node = ProbeEnd(gateway, bridge.node, (parse_address(gateway),))
    source = bridge.texts(0)[family == 6]
    lines = [f"-A INPUT -p {p} -s {source} -j REJECT" for p in ("udp", "sctp")]
    lines.append(f"-A INPUT -p tcp -s {source} -j REJECT --reject-with tcp-reset")
    bridge.rules("nft", family, "\n".join((OPEN, *lines)))
    result = run_probe(pods=bridge.ends, ports=PORTS, externals=[node], family=Family(family))
    assert verdicts(result, dst=gateway) == DENY
    assert verdicts(result, src="t/p2", dst=gateway) == ALLOW


def test_the_next_run_does_not_ride_on_connections_of_the_last(bridge):
    """Conntrack holds the first run's connections; rule 1 passes them, so reused ports would show allow."""
    drop = f"-A FORWARD -s {bridge.texts(0)[0]} -j DROP"
    for _ in range(3):
        bridge.rules("nft", 4, f"{OPEN}\n{ESTABLISHED}")
        assert verdicts(run_probe(pods=bridge.ends, ports=PORTS)) == ALLOW
        bridge.rules("nft", 4, f"{OPEN}\n{ESTABLISHED}\n{drop}")
        result = run_probe(pods=bridge.ends, ports=PORTS)
        assert verdicts(result) == DENY
        assert verdicts(result, src="t/p1", dst="t/p0") == ALLOW


def test_a_blocked_way_back_is_a_deny(bridge):
    bridge.rules(
        "nft", 4, f"{OPEN}\n-A FORWARD -s {bridge.texts(1)[0]} -d {bridge.texts(0)[0]} -j DROP"
    )
    assert verdicts(run_probe(pods=bridge.ends, ports=PORTS)) == DENY


def test_a_udp_server_that_stays_silent_hides_nothing(bridge):
    with open_socket(bridge.pods[1], socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 80))
        assert verdicts(run_probe(pods=bridge.ends, ports=PORTS)) == ALLOW
        bridge.rules("nft", 4, f"{OPEN}\n-A FORWARD -p udp -d {bridge.texts(1)[0]} -j DROP")
        assert verdicts(run_probe(pods=bridge.ends, ports=PORTS)) == {**ALLOW, "80/UDP": "deny"}


def test_udp_is_judged_on_more_closed_ports_than_icmp_errors_are_sent(bridge):
    ports = [(UDP, n) for n in range(1000, 1400)]
    result = run_probe(pods=bridge.ends, ports=ports)
    assert {v for p in result.verdicts.values() for v in p["t/p0"].values()} == {"allow"}
    assert result.packets == result.probes


@pytest.mark.parametrize("family", [4, 6])
def test_nodes_and_outside_hosts_are_rows_and_columns(bridge, family):
    gateway = ("10.9.0.1", "fd09::1")[family == 6]
    node = ProbeEnd(gateway, bridge.node, (parse_address(gateway),))
    silent = ProbeEnd("203.0.113.9", None, (parse_address("203.0.113.9"),))
    bridge.rules(
        "nft", family, f"{OPEN}\n-A INPUT -p tcp -s {bridge.texts(0)[family == 6]} -j DROP"
    )
    externals = (node, silent) if family == 4 else (node,)
    result = run_probe(pods=bridge.ends, ports=PORTS, externals=externals, family=Family(family))
    assert verdicts(result, dst=gateway) == {**ALLOW, "80/TCP": "deny"}
    assert verdicts(result, src="t/p1", dst=gateway) == ALLOW
    # The answers to the node's own connections come in through INPUT as well.
    assert verdicts(result, src=gateway, dst="t/p0") == {**ALLOW, "80/TCP": "deny"}
    assert verdicts(result, src=gateway, dst="t/p1") == ALLOW
    assert "203.0.113.9" not in result.verdicts["80/TCP"]
    if family == 4:
        assert verdicts(result, dst="203.0.113.9") == DENY
        assert result.faults[0] == "t/p0 to 203.0.113.9: Network is unreachable"


def test_pods_in_one_namespace_are_each_judged(bridge):
    """Pods in the host's network: one namespace, one address, several names."""
    gateway = (parse_address("10.9.0.1"),)
    hosts = [ProbeEnd(f"t/h{i}", bridge.node, gateway) for i in range(3)]
    result = run_probe(pods=[*hosts, bridge.end(0)], ports=PORTS)
    for src, dst in (("t/h0", "t/h1"), ("t/h2", "t/h0"), ("t/p0", "t/h2"), ("t/h1", "t/p0")):
        assert verdicts(result, src=src, dst=dst) == ALLOW


def test_without_an_address_of_the_family_a_cell_is_a_named_fault(bridge):
    bare = ProbeEnd("t/bare", bridge.pods[2], (parse_address(bridge.texts(2)[0]),))
    result = run_probe(pods=[bridge.end(0), bare], ports=PORTS, family=Family.V6)
    assert verdicts(result, dst="t/bare") == DENY
    assert result.faults == (
        "t/p0 to t/bare: t/bare has no IPv6 address",
        "t/bare to t/p0: t/bare has no IPv6 address",
    )


def test_bad_questions_are_refused_by_name(bridge):
    with pytest.raises(InputError, match="nothing to probe"):
        run_probe(pods=[], ports=PORTS)
    with pytest.raises(InputError, match="must differ; got t/p0"):
        run_probe(pods=[bridge.end(0), bridge.end(0)], ports=PORTS)
    with pytest.raises(InputError, match="got 70000/TCP"):
        run_probe(pods=bridge.ends, ports=[(TCP, 70000)])
    with pytest.raises(KernelError, match="knpt-none"):
        run_probe(pods=[ProbeEnd("t/x", "knpt-none", (b"\n\0\0\1",)), bridge.end(0)], ports=PORTS)


async def test_the_loop_turns_while_a_probe_runs(bridge):
    bridge.rules("nft", 4, f"{OPEN}\n-A FORWARD -d {bridge.texts(1)[0]} -j DROP")
    turns = 0
    task = asyncio.create_task(probe(pods=bridge.ends, ports=PORTS), name="probe")
    while not task.done():
        turns += 1
        await asyncio.sleep(0.001)
    assert verdicts(await task) == DENY
    assert turns > 30


def test_a_probe_leaves_no_file_open_and_the_thread_where_it_was(bridge):
    run_probe(pods=bridge.ends, ports=PORTS)
    before = netsock.netns_id("/proc/thread-self/ns/net")
    with open_socket(bridge.pods[0]) as sock:
        lowest = sock.fileno()
    run_probe(pods=bridge.ends, ports=PORTS)
    with open_socket(bridge.pods[0]) as sock:
        assert sock.fileno() == lowest
    assert netsock.netns_id("/proc/thread-self/ns/net") == before


def test_more_pods_than_the_neighbour_table_holds_are_judged_right(tmp_path):
    """40 pods on one bridge are 1,560 entries; the kernel's default limit is 1,024 a machine."""
    full = neighbours.overflows()
    assert full is not None
    with Bridge("many", 40, tmp_path=tmp_path) as many:
        many.rules("nft", 4, f"{OPEN}\n-A FORWARD -s {many.texts(7)[0]} -p udp -j DROP")
        start = time.monotonic()
        result = run_probe(pods=many.ends, ports=PORTS, family=Family.V4)
        took_s = time.monotonic() - start
    wrong = [
        (port, s, d)
        for port, rows in result.verdicts.items()
        for s, row in rows.items()
        for d, v in row.items()
        if (v == "deny") != (port == "80/UDP" and s == "t/p7" and d != s)
    ]
    assert wrong == []
    print(f"\n{result.probes} cells in {took_s:.2f} s: {result.probes / took_s:.0f}/s")
    assert took_s < 20  # on a machine that others keep busy; the figure is printed
