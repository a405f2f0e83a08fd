"""Rows 54 to 75: ports and protocols."""

from __future__ import annotations

from tests.builders import block, egress, ingress, namespaces, pod, pods, policy, selector
from tests.spec.policy.case import (
    B_DB,
    B_WEB,
    DB,
    N2,
    OUTSIDE,
    TOOL,
    WEB,
    Case,
    Flow,
    case,
    no,
    ok,
    packet,
)

IN, OUT = ("Ingress",), ("Egress",)
WEB_ONLY = selector(role="web")


def _ports(*ports: str | dict[str, object]) -> dict[str, object]:
    """A policy that opens these ports of role=web in namespace a."""
    return policy("a/p", WEB_ONLY, ingress=[ingress(ports=ports)], types=IN)


def _out(
    *ports: str | dict[str, object], to: tuple[dict[str, object], ...] = ()
) -> dict[str, object]:
    return policy("c/p", egress=[egress(*to, ports=ports)], types=OUT)


def _all(allow: bool, *ports: str) -> list[Flow]:
    return [(ok if allow else no)(B_DB, WEB, p) for p in ports]


def _web(*, ports: tuple[str, ...], **more: tuple[str, ...]) -> dict[str, object]:
    """The pod a/web with other ports."""
    return pod(
        WEB,
        ip=("10.244.1.10", "fd00:10:1::10"),
        ports=ports,
        sidecar_ports=more.get("sidecar", ()),
        init_ports=more.get("init", ()),
        role="web",
    )


def _nd(kind: int) -> Flow:
    flow = ok(B_WEB, WEB, "ICMP", family=6)
    return packet(flow, icmp_type=kind, hop_limit=255)


CASES: list[Case] = [
    case(
        54,
        "ports absent is all ports and all protocols",
        [policy("a/p", WEB_ONLY, ingress=[ingress(namespaces(team="blue"))], types=IN)],
        *_all(True, "1/TCP", "65535/UDP", "9/SCTP", "ICMP"),
        no(DB, WEB),
    ),
    case(
        54,
        "ports [] is all ports and all protocols",
        [_ports()],
        *_all(True, "1/TCP", "65535/UDP", "9/SCTP", "ICMP"),
    ),
    case(
        55,
        "ports [{}] is all of TCP and nothing of UDP",
        [_ports({})],
        *_all(True, "1/TCP", "65535/TCP"),
        *_all(False, "53/UDP", "9/SCTP", "ICMP"),
    ),
    case(
        56,
        "protocol alone is all of its ports",
        [_ports("/UDP")],
        *_all(True, "1/UDP"),
        *_all(False, "1/TCP"),
    ),
    case(
        57,
        "a number alone is TCP",
        [_ports("80")],
        *_all(True, "80/TCP"),
        *_all(False, "80/UDP", "81/TCP"),
    ),
    case(
        58,
        "peers and ports must hold in the same rule",
        [
            policy(
                "a/p",
                WEB_ONLY,
                ingress=[
                    ingress(pods(role="db"), namespaces(tools="yes"), ports=["80", "443"]),
                    ingress(namespaces(team="blue"), ports=["22"]),
                ],
                types=IN,
            )
        ],
        ok(DB, WEB, "80/TCP"),
        ok(TOOL, WEB, "443/TCP"),
        no(DB, WEB, "22/TCP"),
        ok(B_DB, WEB, "22/TCP"),
        no(B_DB, WEB, "80/TCP"),
    ),
    case(
        59,
        "the same number of another protocol does not match",
        [_ports("80/TCP", "81/UDP", "82/SCTP")],
        *_all(True, "80/TCP", "81/UDP", "82/SCTP"),
        *_all(False, "80/UDP", "80/SCTP", "81/TCP", "81/SCTP", "82/TCP", "82/UDP"),
    ),
    case(
        60,
        "an SCTP rule isolates the pod for TCP too",
        [_ports("80/SCTP")],
        *_all(True, "80/SCTP"),
        *_all(False, "80/TCP", "80/UDP"),
    ),
    case(
        61,
        "an unknown protocol matches nothing and isolates",
        [_ports("80/XYZ", "443")],
        *_all(False, "80/TCP", "80/UDP"),
        *_all(True, "443/TCP"),
        invalid=True,
    ),
    case(
        62,
        "endPort is an inclusive range and may be equal",
        [_ports("8000-8003", "9000-9000/UDP")],
        *_all(True, "8000/TCP", "8002/TCP", "8003/TCP", "9000/UDP"),
        *_all(False, "7999/TCP", "8004/TCP", "8001/UDP", "9001/UDP"),
    ),
    case(
        63,
        "endPort without port, with a name, or below port matches nothing",
        [
            _ports(
                {"endPort": 90},
                {"port": "http", "endPort": 90},
                {"port": 70, "endPort": 60},
                {"port": 60, "endPort": 65536},
            )
        ],
        *_all(False, "80/TCP", "90/TCP", "65/TCP", "70/TCP", "60/TCP"),
        invalid=True,
    ),
    case(
        64,
        "the whole range is enforced, not its first port",
        [_ports("1000-1999", "3000-3999", "65000-65535")],
        *_all(True, "1500/TCP", "3999/TCP", "65535/TCP"),
        *_all(False, "2000/TCP", "2999/TCP", "4000/TCP", "64999/TCP"),
    ),
    case(
        64,
        "more ports than one multiport match holds",
        [_ports(*(f"{n}-{n + 1}" for n in range(1000, 1100, 4)), *map(str, range(2000, 2040, 2)))],
        *_all(True, "1000/TCP", "1097/TCP", "2000/TCP", "2038/TCP"),
        *_all(False, "1002/TCP", "2001/TCP", "2040/TCP"),
    ),
    case(
        65,
        "a named port is resolved on each subject",
        [policy("a/p", ingress=[ingress(ports=["http"])], types=IN)],
        ok(B_DB, WEB, "80/TCP"),
        no(B_DB, WEB, "8080/TCP"),
        ok(B_DB, DB, "8080/TCP"),
        no(B_DB, DB, "80/TCP"),
    ),
    case(
        66,
        "one name may be another number on each pod, with peers",
        [policy("a/p", ingress=[ingress(namespaces(team="blue"), ports=["http", "22"])], types=IN)],
        ok(TOOL, WEB, "80/TCP"),
        ok(TOOL, DB, "8080/TCP"),
        ok(TOOL, DB, "22/TCP"),
        no(TOOL, DB, "80/TCP"),
        no(DB, WEB, "80/TCP"),
    ),
    case(
        67,
        "a named port of egress is resolved on the destination",
        [_out("http", to=(namespaces(team="red"),))],
        ok(TOOL, WEB, "80/TCP"),
        ok(TOOL, DB, "8080/TCP"),
        no(TOOL, DB, "80/TCP"),
        no(TOOL, B_WEB, "80/TCP"),
    ),
    case(
        68,
        "a named port to an ipBlock matches nothing outside of pods",
        [_out("http", to=(block("198.51.100.0/24"), block("172.18.0.0/16")))],
        no(TOOL, OUTSIDE, "80/TCP"),
        no(TOOL, N2, "80/TCP"),
        no(TOOL, WEB, "80/TCP"),
    ),
    case(
        68,
        "a named port to an ipBlock matches nothing even where the block covers pods",
        [_out("http", "22", to=(block("10.244.0.0/16"), block("fd00::/8")))],
        no(TOOL, WEB, "80/TCP"),
        no(TOOL, DB, "8080/TCP"),
        ok(TOOL, DB, "22/TCP"),
    ),
    case(
        68,
        "a named port to an ipBlock and a selector is the selector's",
        [_out("http", to=(block("10.244.0.0/16"), namespaces(team="red")))],
        ok(TOOL, WEB, "80/TCP"),
        ok(TOOL, DB, "8080/TCP"),
        no(TOOL, B_WEB, "80/TCP"),
    ),
    case(
        69,
        "a named port to everybody is every pod that has it and nothing else",
        [_out("http")],
        ok(TOOL, WEB, "80/TCP"),
        ok(TOOL, DB, "8080/TCP"),
        ok(TOOL, B_WEB, "80/TCP"),
        no(TOOL, DB, "80/TCP"),
        no(TOOL, B_DB, "80/TCP"),
        no(TOOL, OUTSIDE, "80/TCP"),
        no(TOOL, N2, "80/TCP"),
    ),
    case(
        70,
        "a name of another protocol does not match",
        [_ports("http/UDP", "dns/TCP")],
        *_all(False, "80/TCP", "80/UDP", "53/TCP", "53/UDP"),
    ),
    case(
        71,
        "a name that the pod lacks matches nothing and the pod stays isolated",
        [_ports("metrics")],
        *_all(False, "80/TCP", "9090/TCP", "53/UDP"),
    ),
    case(
        72,
        "a name that stands twice is both, by protocol",
        [
            _ports("http/TCP", "dns/UDP"),
            _web(ports=("http=80", "http=81", "dns=53/UDP", "dns=54/TCP")),
        ],
        *_all(True, "80/TCP", "81/TCP", "53/UDP"),
        *_all(False, "54/TCP", "53/TCP", "54/UDP", "80/UDP"),
    ),
    case(
        73,
        "names of restartable init containers resolve, those of others do not",
        [_ports("side", "once"), _web(ports=(), sidecar=("side=15000",), init=("once=16000",))],
        *_all(True, "15000/TCP"),
        *_all(False, "16000/TCP", "80/TCP"),
    ),
    case(
        74,
        "port 0, over 65535 or a bad name match nothing",
        [
            _ports(
                {"port": 0},
                {"port": 65536},
                {"port": "80"},
                {"port": "Bad_Name"},
                {"port": "-http"},
                "443",
            )
        ],
        *_all(False, "80/TCP", "65535/TCP", "1/TCP"),
        *_all(True, "443/TCP"),
        invalid=True,
    ),
    case(
        75,
        "an echo request needs a rule without ports",
        [
            _ports("80", "/UDP"),
            policy("a/q", selector(role="db"), ingress=[ingress(pods())], types=IN),
        ],
        no(B_DB, WEB, "ICMP"),
        ok(WEB, DB, "ICMP"),
        no(B_DB, DB, "ICMP"),
    ),
    case(
        75,
        "neighbour discovery and related ICMP errors pass",
        [policy("a/p", types=("Ingress", "Egress"))],
        *(_nd(kind) for kind in range(133, 138)),
        packet(no(B_WEB, WEB, "ICMP", family=6), icmp_type=135, hop_limit=64),
        packet(no(B_WEB, WEB, "ICMP", family=6), icmp_type=128, hop_limit=255),
        packet(ok(B_DB, WEB, "ICMP", family=4), icmp_type=3, ctstate="RELATED"),
        packet(ok(B_DB, WEB, "ICMP", family=6), icmp_type=2, ctstate="RELATED"),
    ),
]
