"""Clusters at their corners in real BIRDs: shared ranges, several ASes, nodes without IPv4."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec
import pytest

from netpol.model.net import Family, family_of, parse_prefix
from netpol.model.objects import Node
from routes.bird.render import render
from routes.options import RouteOptions
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, Host, bird_net

pytestmark = pytest.mark.kernel


def start(net: BirdNet, nodes: Mapping[str, Node]) -> None:
    for name, host in net.hosts.items():
        made = plan(nodes.values(), name, RouteOptions(run_dir=str(host.folder)))
        net.start(name, render(made))


def hops(host: Host) -> dict[str, str]:
    """The next hop of each of BIRD's routes in the kernel."""
    out = {}
    for family in ("-4", "-6"):
        found = json.loads(host.run("ip", family, "-j", "route", "show", "proto", "bird") or "[]")
        for route in found:
            out[route["dst"]] = route.get("gateway") or route.get("via", {}).get("host", "")
    return out


def test_two_nodes_with_one_range_keep_each_its_own() -> None:
    """IPv6's connected route has a higher metric than BIRD's: the other node's would go before it."""
    with bird_net([(1, 1), (1, 2), (1, 3)]) as net:
        nodes = {n: h.node() for n, h in net.hosts.items()}
        one, two, three = net.hosts.values()
        shared = tuple(parse_prefix(p) for p in one.pods)
        nodes["n1"] = msgspec.structs.replace(nodes["n1"], created="2026-01-01T00:00:00Z")
        nodes["n2"] = msgspec.structs.replace(
            nodes["n2"], created="2026-02-01T00:00:00Z", pod_cidrs=shared
        )
        start(net, nodes)
        assert net.wait(lambda: three.routes() == set(one.pods))
        assert net.wait(lambda: two.routes() == set(three.pods)), two.routes()
        assert one.routes() == set(three.pods)


def test_a_reflector_of_another_as_is_not_in_the_way() -> None:
    """Routes that it tells nodes of other ASes lead to the nodes themselves."""
    with bird_net([(1, 1), (1, 2), (1, 3), (1, 4)]) as net:
        of = net.hosts
        nodes = {
            "n1": of["n1"].node(**{"rr.server": "42", "node.asn": "65001"}),
            "n2": of["n2"].node(**{"rr.client": "42", "node.asn": "65001"}),
            "n3": of["n3"].node(),
            "n4": of["n4"].node(**{"node.asn": "4200000000"}),
        }
        start(net, nodes)

        def direct() -> bool:
            return all(
                hops(h)
                == {
                    p: a
                    for o in of.values()
                    if o is not h
                    for p, a in zip(o.pods, o.addresses, strict=True)
                }
                for h in of.values()
            )

        assert net.wait(direct), {h.name: hops(h) for h in of.values()}
        assert of["n3"].pings(of["n2"])


def test_ipv4_pods_on_nodes_with_ipv6_alone() -> None:
    with bird_net([(1, 1), (1, 2), (1, 3)]) as net:
        nodes = {}
        for name, host in net.hosts.items():
            node = host.node()
            if name != "n1":
                six = tuple(a for a in node.addresses if family_of(a) is Family.V6)
                node = msgspec.structs.replace(node, addresses=six)
                host.run("ip", "-4", "address", "flush", "dev", "eth0")
            nodes[name] = node
        start(net, nodes)
        want = {
            h.name: {p: o.addresses[1] for o in net.hosts.values() if o is not h for p in o.pods}
            for h in net.hosts.values()
        }
        assert net.wait(lambda: all(hops(h) == want[h.name] for h in net.hosts.values())), [
            hops(h) for h in net.hosts.values()
        ]
        one, two, three = net.hosts.values()
        assert one.pings(two)
        assert two.pings(three)
