"""Worlds for Hypothesis: few names, so that everything overlaps.

Three namespaces, two label keys with two values, nine addresses a node, blocks over those addresses, and
now and then something that an API server would refuse.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from hypothesis import strategies as st

from tests import builders as make

Json = dict[str, Any]

NAMESPACES = ("a", "b", "c")
#: Where pods and policies are: mostly together, so that several policies meet in one pod.
HOMES = ("a", "a", "a", "b", "b", "c")
KEYS = ("k", "l")
VALUES = ("1", "2")
NODES = {"n1": ("172.18.0.2", "fd00:18::2"), "n2": ("172.18.0.3", "fd00:18::3")}
RANGES = {"n1": ("10.0.1.0/24", "fd00:0:1::/64"), "n2": ("10.0.2.0/24", "fd00:0:2::/64")}
PORT_NAMES = ("http", "dns")
PORTS = ("80/TCP", "81/TCP", "90/TCP", "80/UDP", "53/UDP", "81/SCTP", "ICMP")
#: Addresses that are no pod's: outside, and the nodes'.
ADDRESSES = (
    "198.51.100.7",
    "10.0.3.9",
    "255.255.255.254",
    "2001:db8::7",
    "fd00:0:3::9",
    *NODES["n1"],
    *NODES["n2"],
)

one = st.sampled_from


def _rarely(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """About one in eight is of the rare kind."""
    return st.integers(0, 7).flatmap(lambda n: rare if n == 5 else usual)


labels = st.dictionaries(one(KEYS), one(VALUES), max_size=2)
values = st.lists(one(VALUES), min_size=1, max_size=2)


@st.composite
def _term(draw: st.DrawFn) -> Json:
    operator = draw(one(("In", "NotIn", "Exists", "DoesNotExist")))
    has_values = operator in ("In", "NotIn")
    if draw(st.integers(0, 11)) == 7:  # the API would refuse it
        operator = draw(one((operator, "Near")))
        has_values = not has_values
    return make.term(draw(one(KEYS)), operator, *(draw(values) if has_values else ()))


@st.composite
def selectors(draw: st.DrawFn) -> Json:
    out: Json = {}
    if draw(st.booleans()):
        out["matchLabels"] = draw(labels)
    if draw(st.integers(0, 2)) == 1:
        out["matchExpressions"] = draw(st.lists(_term(), max_size=2))
    return out


@st.composite
def namespace_selectors(draw: st.DrawFn) -> Json:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return {}
    if kind == 1:
        names = draw(st.lists(one(NAMESPACES), min_size=1, max_size=2))
        return make.selector(make.term("kubernetes.io/metadata.name", "In", *names))
    return draw(selectors())


@st.composite
def cidrs(draw: st.DrawFn) -> str:
    if draw(st.booleans()):
        base, lengths = (
            draw(one(("10.0.1.0", "10.0.2.4", "10.0.3.9", "172.18.0.2", "198.51.100.7"))),
            (0, 1, 8, 16, 22, 23, 24, 29, 30, 31, 32),
        )
    else:
        base, lengths = (
            draw(one(("fd00:0:1::", "fd00:0:2::4", "fd00:0:3::9", "2001:db8::7"))),
            (0, 1, 7, 16, 46, 47, 48, 64, 125, 126, 127, 128),
        )
    return str(ipaddress.ip_network(f"{base}/{draw(one(lengths))}", strict=False))


@st.composite
def blocks(draw: st.DrawFn) -> Json:
    cidr = ipaddress.ip_network(draw(cidrs()))
    excepts = []
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.integers(0, 9)) == 3 or cidr.prefixlen == cidr.max_prefixlen:
            excepts.append(draw(one((draw(cidrs()), str(cidr), "junk"))))
            continue
        top = min(cidr.max_prefixlen, cidr.prefixlen + 33)
        length = draw(st.integers(cidr.prefixlen + 1, top))
        bases = [
            a
            for a in (
                "10.0.1.3",
                "10.0.2.4",
                "198.51.100.7",
                "fd00:0:1::3",
                "fd00:0:2::4",
                "2001:db8::7",
            )
            if ipaddress.ip_address(a) in cidr
        ]
        base = draw(one(bases)) if bases else str(cidr.network_address)
        excepts.append(str(ipaddress.ip_network(f"{base}/{length}", strict=False)))
    return make.block(str(cidr), *excepts)


@st.composite
def peers(draw: st.DrawFn) -> Json:
    kind = draw(st.integers(0, 11))
    if kind == 7:
        return draw(
            one(({}, {**make.block("10.0.0.0/8"), "podSelector": {}}, make.block("10.0.0.0/40")))
        )
    if kind <= 3:
        return draw(blocks())
    out: Json = {}
    if kind in (4, 5, 6, 8):
        out["podSelector"] = draw(selectors())
    if kind in (6, 8, 9, 10, 11):
        out["namespaceSelector"] = draw(namespace_selectors())
    return out


def _range() -> st.SearchStrategy[Json]:
    return st.tuples(st.integers(78, 92), st.integers(0, 8)).map(
        lambda t: {"port": t[0], "endPort": t[0] + t[1]}
    )


good_ports = st.one_of(
    one(({"port": 80}, {"port": 80, "protocol": "UDP"}, {"protocol": "TCP"}, {})),
    one(({"port": 81, "protocol": "SCTP"}, {"protocol": "SCTP"}, {"port": 53, "protocol": "UDP"})),
    st.tuples(one(PORT_NAMES), one(("TCP", "UDP"))).map(lambda t: {"port": t[0], "protocol": t[1]}),
    _range(),
)
bad_ports = one(
    (
        {"port": 0},
        {"port": 65536},
        {"port": 80, "protocol": "QUIC"},
        {"port": 80, "endPort": 79},
        {"endPort": 90},
        {"port": "http", "endPort": 90},
        {"port": "HTTP"},
        {"port": "80"},
        {"port": "a--b"},
    )
)
ports = _rarely(good_ports, bad_ports)


@st.composite
def rules(draw: st.DrawFn, key: str) -> Json:
    out: Json = {}
    if draw(st.integers(0, 5)):
        out[key] = draw(st.lists(peers(), max_size=3))
    if draw(st.integers(0, 3)):
        out["ports"] = draw(st.lists(ports, max_size=3))
    return out


types = _rarely(
    one((None, ("Ingress",), ("Egress",), ("Ingress", "Egress"))),
    one(((), ("Ingress", "Ingress"), ("Egress", "Sideways"), ("Ingress", "Egress", "Ingress"))),
)


@st.composite
def policies(draw: st.DrawFn, name: str | None = None) -> Json:
    ref = f"{draw(one(HOMES))}/{name or draw(one(('p', 'q', 'r')))}"
    subject = draw(selectors()) if draw(st.integers(0, 2)) else {}
    made = make.policy(ref, subject, types=draw(types))
    if draw(st.booleans()):
        made["spec"]["ingress"] = draw(st.lists(rules("from"), max_size=3))
    if draw(st.booleans()):
        made["spec"]["egress"] = draw(st.lists(rules("to"), max_size=3))
    return made


container_ports = st.lists(
    one(("http=80", "http=81", "http=80/UDP", "dns=53/UDP", "dns=81/SCTP", "dns=53", "90")),
    unique=True,
    max_size=3,
)


@st.composite
def pods(draw: st.DrawFn, name: str) -> Json:
    node = draw(one(("n1", "n1", "n2")))
    ref = f"{draw(one(HOMES))}/{name}"
    phase = draw(_rarely(st.just("Running"), one(("Pending", "Succeeded", "Failed", "Unknown"))))
    common: Json = {
        "node": node,
        "phase": phase,
        "labels": draw(labels),
        "ports": draw(container_ports),
        "created": draw(one(("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"))),
        "terminating": draw(st.integers(0, 9)) == 4,
    }
    if draw(st.integers(0, 9)) == 6:
        return make.pod(ref, ip=NODES[node], host_network=True, **common)
    last = draw(st.integers(2, 5))  # 1 is the gateway; few, so that addresses are used again
    v4, v6 = (f"10.0.{node[1]}.{last}", f"fd00:0:{node[1]}::{last}")
    # mostly both families, now and then one, none, or another host's part
    ips = draw(one(((v4, v6), (v4, v6), (v4, v6), (v6, v4), (v4,), (v6,), ())))
    sidecars = draw(container_ports) if draw(st.integers(0, 5)) == 2 else ()
    return make.pod(ref, ip=ips, sidecar_ports=sidecars, init_ports=("http=90",), **common)


@st.composite
def namespaces(draw: st.DrawFn, name: str) -> Json:
    return make.namespace(name, **draw(labels))


@st.composite
def worlds(draw: st.DrawFn, *, max_policies: int = 4) -> make.World:
    nodes = [make.node(n, *NODES[n], cidrs=RANGES[n]) for n in NODES]
    spaces = [draw(namespaces(n)) for n in NAMESPACES if draw(st.integers(0, 9)) != 5]
    running = [draw(pods(f"p{i}")) for i in range(draw(st.integers(2, 6)))]
    found = [draw(policies(f"p{i}")) for i in range(draw(st.integers(1, max_policies)))]
    return make.world(*nodes, *spaces, *running, *found)


@st.composite
def crowded(draw: st.DrawFn) -> make.World:
    """One node with pods of seven classes: more than a field of three bits can number."""
    spaces = [make.namespace("a", k="1"), make.namespace("b", k="2")]
    marks = ("x", "y", "z")
    running = []
    for number in range(1, 2 ** len(marks)):
        have = {m: "1" for bit, m in enumerate(marks) if number >> bit & 1}
        addresses = (f"10.0.1.{number + 1}", f"fd00:0:1::{number + 1}")
        ports = draw(container_ports)
        running.append(
            make.pod(f"a/p{number}", ip=addresses, labels=have | draw(labels), ports=ports)
        )
    running.append(make.pod("b/far", ip=("10.0.2.2", "fd00:0:2::2"), node="n2", k="1"))
    found = []
    for mark in marks:
        made = make.policy(
            f"a/{mark}", make.selector(labels={mark: "1"}), types=("Ingress", "Egress")
        )
        made["spec"]["ingress"] = draw(st.lists(rules("from"), max_size=2))
        made["spec"]["egress"] = draw(st.lists(rules("to"), max_size=2))
        found.append(made)
    nodes = [make.node(n, *NODES[n], cidrs=RANGES[n]) for n in NODES]
    return make.world(*nodes, *spaces, *running, *found)


def ends(world: make.World) -> list[str]:
    """What a flow can be between: every pod, and addresses outside of pods."""
    return [make.reference(p) for p in world["pods"]] + list(ADDRESSES)
