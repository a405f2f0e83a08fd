"""Rows 41 to 53: ipBlock."""

from __future__ import annotations

from tests.builders import block, egress, ingress, pods, policy, selector
from tests.spec.policy.case import (
    B_DB,
    B_WEB,
    DB,
    N1,
    N2,
    OUTSIDE,
    OUTSIDE6,
    OUTSIDE_NEAR,
    OUTSIDE_OTHER,
    WEB,
    Case,
    case,
    no,
    ok,
)

IN, OUT = ("Ingress",), ("Egress",)
WEB_ONLY = selector(role="web")


def _from(*peers: dict[str, object], name: str = "p") -> dict[str, object]:
    return policy(f"a/{name}", WEB_ONLY, ingress=[ingress(*peers)], types=IN)


def _to(*peers: dict[str, object], name: str = "p") -> dict[str, object]:
    return policy(f"a/{name}", WEB_ONLY, egress=[egress(*peers)], types=OUT)


CASES: list[Case] = [
    case(
        41,
        "an ipBlock without ports is the whole range and everything in it",
        [_from(block("198.51.100.0/24"))],
        ok(OUTSIDE, WEB),
        ok(OUTSIDE_NEAR, WEB, "9/UDP"),
        ok(OUTSIDE, WEB, "132/SCTP"),
        ok(OUTSIDE, WEB, "ICMP"),
        no(OUTSIDE_OTHER, WEB),
    ),
    case(
        42,
        "except takes its addresses out",
        [_to(block("198.51.100.0/24", "198.51.100.0/28", "198.51.100.200/32"))],
        no(WEB, OUTSIDE),
        no(WEB, OUTSIDE_NEAR),
        ok(WEB, "198.51.100.16"),
        ok(WEB, "198.51.100.201"),
        no(WEB, OUTSIDE_OTHER),
    ),
    case(
        43,
        "the except of one peer leaves another peer of the rule alone",
        [_to(block("198.51.100.0/24", "198.51.100.0/28"), block("198.51.100.0/29"))],
        ok(WEB, OUTSIDE),
        no(WEB, "198.51.100.8"),
        ok(WEB, OUTSIDE_NEAR),
    ),
    case(
        43,
        "an except leaves a selector peer of the rule alone",
        [_from(block("10.244.0.0/16", "10.244.2.0/24"), pods(role="db"))],
        ok(DB, WEB, family=4),
        no(B_DB, WEB, family=4),
        ok(B_WEB, WEB, family=4),
    ),
    case(
        44,
        "what one policy excepts another may allow",
        [
            _to(block("198.51.100.0/24", "198.51.100.0/28"), name="p"),
            _to(block("198.51.100.7/32"), name="q"),
        ],
        ok(WEB, OUTSIDE),
        no(WEB, "198.51.100.8"),
        ok(WEB, OUTSIDE_NEAR),
    ),
    case(
        45,
        "an except that is not strictly inside closes its peer",
        [
            _to(block("198.51.100.0/24", "198.51.100.0/24"), name="equal"),
            _to(block("198.51.100.0/24", "203.0.113.0/28"), name="outside"),
            _to(block("198.51.100.0/24", "198.51.0.0/16"), name="wider"),
            _to(block("198.51.100.0/24", "2001:db8::/64"), name="family"),
            _to(block("198.51.100.0/24", "nonsense"), name="bad"),
            _to(block("nonsense"), block("203.0.113.0/24"), name="cidr"),
        ],
        no(WEB, OUTSIDE),
        no(WEB, OUTSIDE_NEAR),
        ok(WEB, OUTSIDE_OTHER),
        invalid=True,
    ),
    case(
        46,
        "an ipBlock also matches pods by their addresses",
        [_from(block("10.244.2.0/24"))],
        ok(DB, WEB, family=4),
        ok(B_DB, WEB, family=4),
        no(B_WEB, WEB, family=4),
        no(B_DB, WEB, family=6),
    ),
    case(
        47,
        "0.0.0.0/0 is IPv4 alone",
        [_from(block("0.0.0.0/0")), _to(block("0.0.0.0/0"), name="q")],
        ok(OUTSIDE, WEB),
        ok(B_DB, WEB, family=4),
        no(OUTSIDE6, WEB),
        no(B_DB, WEB, family=6),
        ok(WEB, OUTSIDE),
        no(WEB, OUTSIDE6),
        ok("255.1.2.3", WEB),
    ),
    case(
        47,
        "0.0.0.0/0 with an except",
        [_to(block("0.0.0.0/0", "10.0.0.0/8"))],
        ok(WEB, OUTSIDE),
        no(WEB, B_DB, family=4),
        no(WEB, OUTSIDE6),
    ),
    case(
        48,
        "::/0 is every IPv6 address",
        [_to(block("::/0"))],
        ok(WEB, OUTSIDE6),
        ok(WEB, "fc00::1"),
        ok(WEB, "fdff::1"),
        ok(WEB, "64:ff9b::1"),
        ok(WEB, "::2"),
        ok(WEB, B_DB, family=6),
        no(WEB, B_DB, family=4),
        no(WEB, OUTSIDE),
        part="link-local addresses are not routed between pods, see test_rendered",
    ),
    case(
        49,
        "an IPv6 block in an IPv4 policy is inert",
        [_to(block("2001:db8::/32"), block("198.51.100.0/24"))],
        ok(WEB, OUTSIDE),
        no(WEB, OUTSIDE_OTHER),
        ok(WEB, OUTSIDE6),
    ),
    case(
        50,
        "host bits and leading zeros are read as of old",
        [
            _to(block("198.51.100.77/24")),
            _to(block("0203.000.0113.000/024", "203.0.113.010/32"), name="q"),
        ],
        ok(WEB, OUTSIDE),
        ok(WEB, OUTSIDE_OTHER),
        no(WEB, "203.0.113.10"),
        ok(WEB, "203.0.113.8"),
        invalid=True,
    ),
    case(
        51,
        "a v4-mapped block is the IPv4 block",
        [_to(block("::ffff:198.51.100.0/120", "198.51.100.0/28"))],
        ok(WEB, OUTSIDE_NEAR),
        no(WEB, OUTSIDE),
        no(WEB, OUTSIDE_OTHER),
        no(WEB, OUTSIDE6),
        invalid=True,
    ),
    case(
        52,
        "the address seen at the pod counts, not the client behind a NAT",
        [_from(block(f"{N2}/32"), block("203.0.113.0/24"))],
        ok(N2, WEB),  # a client of a NodePort on n2, rewritten there
        no(OUTSIDE, WEB),
        ok(OUTSIDE_OTHER, WEB),
        part="the tuple after rewriting is judged; who rewrites is not simulated",
    ),
    case(
        53,
        "the same CIDR with and without except is the whole CIDR",
        [_to(block("198.51.100.0/24", "198.51.100.0/28"), block("198.51.100.0/24"))],
        ok(WEB, OUTSIDE),
        ok(WEB, OUTSIDE_NEAR),
        no(WEB, OUTSIDE_OTHER),
        no(WEB, N1),
    ),
    case(
        53,
        "overlapping and adjacent blocks",
        [_to(block("198.51.100.0/25"), block("198.51.100.128/25"), block("198.51.100.64/26"))],
        ok(WEB, OUTSIDE),
        ok(WEB, OUTSIDE_NEAR),
        ok(WEB, "198.51.100.100"),
        no(WEB, "198.51.101.0"),
    ),
]
