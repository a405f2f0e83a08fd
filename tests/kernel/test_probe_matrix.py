"""The probe on real namespaces: its matrix equals the rules that drop some of the cells."""

import random

import pytest

from netpol.lab.podserver import PodServers
from netpol.lab.probe import port_label, probe
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import Family
from tests.kernel.probespaces import Bridge

pytestmark = pytest.mark.kernel

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
PORTS = [(p, n) for p in (TCP, UDP, SCTP) for n in (80, 81)]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    with Bridge("probe", 9, tmp_path=tmp_path_factory.mktemp("lock")) as it:
        yield it


def drops(bridge, *, share=0.4, seed=1):
    """Cells to drop: (source, destination, port)."""
    rng = random.Random(seed)
    return {
        (s, d, port)
        for s in range(bridge.count)
        for d in range(bridge.count)
        for port in PORTS
        if s != d and rng.random() < share
    }


def rule_text(bridge, family, cells, target="DROP"):
    index = 0 if family == 4 else 1
    out = [":FORWARD ACCEPT", "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]
    out += [
        f"-A FORWARD -s {bridge.texts(s)[index]} -d {bridge.texts(d)[index]}"
        f" -p {port[0].lower()} --dport {port[1]} -j {target}"
        for s, d, port in sorted(cells)
    ]
    return "\n".join(out)


def truth(bridge, cells):
    names = [e.name for e in bridge.ends]
    return {
        port_label(*port): {
            names[s]: {
                names[d]: "deny" if (s, d, port) in cells else "allow" for d in range(bridge.count)
            }
            for s in range(bridge.count)
        }
        for port in PORTS
    }


@pytest.fixture
async def served(bridge):
    """Half of the pods serve half of the ports; policy must be judged on the others all the same."""
    servers = PodServers()
    for i in range(0, bridge.count, 2):
        await servers.add(ObjectKey("t", f"p{i}"), bridge.pods[i], PORTS[::2])
    yield servers
    await servers.close()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("variant", ["nft", "legacy"])
async def test_the_matrix_is_exactly_what_the_rules_say(bridge, served, variant, family):
    cells = drops(bridge)
    bridge.rules(variant, family, rule_text(bridge, family, cells))
    try:
        result = await probe(pods=bridge.ends, ports=PORTS, family=Family(family))
    finally:
        bridge.rules(variant, family, ":FORWARD ACCEPT")
    assert result.verdicts == truth(bridge, cells)
    assert result.pods == tuple(e.name for e in bridge.ends)
    assert result.faults == ()
    rate = result.probes / result.duration_s
    print(
        f"\n{variant} IPv{family}: {result.probes} cells, {len(cells)} denied, {result.packets} packets,"
        f" {result.duration_s:.3f} s, {rate:.0f} cells/s"
    )
    assert result.duration_s < 6  # on a machine that others keep busy; the figure is printed
