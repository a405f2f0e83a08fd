"""What BIRD says, read."""

from __future__ import annotations

import pytest

from netpol.model.net import parse_address, parse_prefix
from routes.bird import reply
from routes.bird.reply import Reader, Reply

PROTOCOLS = """\
0001 BIRD 2.0.12 ready.
"""

SHOWN = """\
2002-Name       Proto      Table      State  Since         Info
1002-d_device   Device     ---        up     2026-11-24 13:46:02.100
1006-
1002-k_kernel4  Kernel     master4    up     2026-11-24 13:46:02.100
1006-  Channel ipv4
     State:          UP
     Table:          master4
     Routes:         0 imported, 2 exported, 2 preferred
1002-node_n2_0480a93d BGP        ---        up     2026-11-24 13:46:03.200  Established
1006-  Description:    node n2
   BGP state:          Established
     Neighbor address: 10.0.1.2
     Neighbor AS:      64512
     Hold timer:       71.3/90
   Channel ipv4
     State:          UP
     Import limit:   50 [HIT]
       Action:       block
     Routes:         1 imported, 3 filtered, 1 exported, 1 preferred
   Channel ipv6
     Routes:         2 imported, 0 filtered, 1 exported, 2 preferred
1002-node_n3_8721d664 BGP        ---        start  2026-11-24 13:46:02.100  Active  Socket: Connection refused
1006-  BGP state:          Active
     Neighbor address: fd00:2::3
     Neighbor AS:      64513
     Last error:       Socket: Connection refused
0000\x20
"""

ROUTES = """\
1007-Table master4:
 10.1.2.0/24          unicast [node_n2_0480a93d 2026-11-24 13:46:03.200] * (100/0) [i]
 \tvia 10.0.1.2 on eth0
                      unicast [node_n3_8721d664 2026-11-24 13:46:04.000] (100/0) [i]
 \tvia 10.0.2.3 on knp-vxlan0 onlink
 10.1.3.0/24          unreachable [node_n3_8721d664 2026-11-24 13:46:04.000 from 10.0.2.3] *! (100/-) [i]
 10.200.0.0/16        unicast [peer_a 2026-11-24 13:46:04.000] * (100) [AS65000i]
 \tvia 10.0.1.254 on eth0 weight 1
 \tvia 10.0.1.253 on eth0 weight 1
 10.1.1.0/24          blackhole [own_pods4 2026-11-24 13:46:02.100] * (200)
1007-
1007-Table master6:
 fd01:0:0:2::/64      unicast [node_n2_0480a93d 2026-11-24 13:46:03.200] * (100/0) [i]
 \tvia fd00:1::2 on eth0
0000\x20
"""


def read(text: str) -> Reply:
    reader = Reader()
    found = [r for line in text.splitlines() if (r := reader.feed(line)) is not None]
    assert len(found) == 1
    return found[0]


def test_a_greeting() -> None:
    hello = read(PROTOCOLS)
    assert (hello.code, hello.failed, str(hello)) == (reply.READY, False, "BIRD 2.0.12 ready.")


def test_protocols_with_all_that_is_said_of_them() -> None:
    states = reply.protocols(read(SHOWN))
    assert list(states) == ["d_device", "k_kernel4", "node_n2_0480a93d", "node_n3_8721d664"]
    up, down = states["node_n2_0480a93d"], states["node_n3_8721d664"]
    assert up.established
    assert up.since == "2026-11-24 13:46:03.200"
    assert (up.neighbor, up.asn, up.error) == ("10.0.1.2", 64512, "")
    assert (up.imported, up.exported, up.filtered) == (3, 2, 3)
    assert up.limits == ["Import limit"]
    assert (down.bgp, down.neighbor, down.asn) == ("Active", "fd00:2::3", 64513)
    assert down.error == "Socket: Connection refused"
    assert reply.established(states.values()) == 1


def test_routes_with_their_flags_and_gateways() -> None:
    found = reply.routes(read(ROUTES))
    first, second, closed, many, own, six = found
    assert first.prefix == second.prefix == parse_prefix("10.1.2.0/24")
    assert (first.best, second.best) == (True, False)
    assert second.interface == "knp-vxlan0"
    assert closed.unreachable
    assert closed.refused
    assert many.gateways == (parse_address("10.0.1.254"), parse_address("10.0.1.253"))
    assert own.protocol == "own_pods4"
    assert six.prefix == parse_prefix("fd01:0:0:2::/64")
    assert six.gateways == (parse_address("fd00:1::2"),)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("8002 /run/x/bird.conf.tmp:7:12 syntax error, unexpected '}'", 7, "syntax error"),
        ("8002 /run/x/bird.conf.tmp: No such file or directory", 0, "No such file"),
    ],
)
def test_where_a_configuration_is_wrong(text: str, line: int, what: str) -> None:
    answer = read(f"0002-Reading configuration from /run/x/bird.conf.tmp\n{text}\n")
    assert answer.failed
    fault = reply.config_fault(answer)
    assert fault.line == line
    assert what in fault.what


def test_what_nobody_asked_for_is_passed_over() -> None:
    reader = Reader()
    assert reader.feed("+0001 something happened") is None
    done = reader.feed("0003 Reconfigured")
    assert done is not None
    assert done.code == reply.RECONFIGURED
