"""Rows 76 to 98: pods, nodes, services, time, and odd objects."""

from __future__ import annotations

from tests.builders import (
    block,
    egress,
    ingress,
    namespace,
    namespaces,
    node,
    pod,
    pods,
    policy,
    selector,
    term,
)
from tests.spec.policy.case import (
    B_DB,
    B_WEB,
    DB,
    N1,
    N1_6,
    N2,
    N2_6,
    OUTSIDE,
    OUTSIDE_OTHER,
    TOOL,
    WEB,
    Case,
    case,
    no,
    ok,
    packet,
    relabelled,
    steps,
    with_,
)

IN, OUT, BOTH = ("Ingress",), ("Egress",), ("Ingress", "Egress")
WEB_ONLY = selector(role="web")
DENY = policy("a/deny", types=BOTH)
#: An address of the Service range, which no object of the world has.
CLUSTER_IP = "10.96.0.10"
#: A local address that no pod of the world has.
NOBODY, NOBODY6 = "10.244.1.77", "fd00:10:1::77"

HOST1 = pod("c/host1", ip=(N1, N1_6), node="n1", host_network=True, role="host")
HOST2 = pod("c/host2", ip=(N2, N2_6), node="n2", host_network=True, role="host")
NEW = pod("a/new", ip=(NOBODY, NOBODY6), node="n1", role="new")

CASES: list[Case] = [
    case(
        76,
        "a pod always reaches itself",
        [DENY],
        ok(WEB, WEB),
        ok(WEB, WEB, "53/UDP"),
        ok(DB, DB, "ICMP"),
    ),
    case(
        77,
        "a pod reaches itself through a Service",
        [DENY],
        ok(WEB, WEB, "80/TCP"),
        no(DB, WEB, "80/TCP"),
        part="the packet after the Service's rewriting",
    ),
    case(
        78,
        "the node reaches its own pods",
        [DENY],
        ok(N1, WEB),
        ok(N1_6, WEB),
        ok(N2, DB),
        ok(N1, WEB, "ICMP"),
    ),
    case(
        79,
        "another node needs an ipBlock",
        [DENY, policy("a/p", selector(role="db"), ingress=[ingress(block(f"{N1}/32"))], types=IN)],
        no(N2, WEB),
        no(N2_6, WEB),
        ok(N1, DB),
        no(N1_6, DB),
    ),
    case(
        "79a",
        "a hostNetwork pod of the node is the node",
        [DENY, HOST1, HOST2],
        ok("c/host1", WEB),
        no("c/host2", WEB),
        ok("c/host2", DB),
    ),
    case(
        "79b",
        "traffic rewritten to another node's address matches no selector",
        [
            policy("a/p", WEB_ONLY, ingress=[ingress(namespaces())], types=IN),
            policy("a/q", selector(role="db"), ingress=[ingress(block(f"{N1}/32"))], types=IN),
        ],
        no(N2, WEB),
        ok(N1, DB),
        no(B_DB, DB),
    ),
    case(
        80,
        "a hostNetwork pod is no subject",
        [policy("c/deny", types=BOTH), HOST1],
        ok(WEB, "c/host1"),
        ok("c/host1", WEB),
        ok("c/host1", OUTSIDE),
        ok(OUTSIDE, N1),
        no(WEB, TOOL),
    ),
    case(
        81,
        "a hostNetwork pod is no selector peer but its address is in blocks",
        [
            policy(
                "a/p",
                WEB_ONLY,
                ingress=[ingress(pods(role="host", namespaces=selector()))],
                types=IN,
            ),
            policy("a/q", selector(role="db"), ingress=[ingress(block("172.18.0.2/32"))], types=IN),
            policy("c/r", selector(role="tool"), egress=[egress(pods(role="host"))], types=OUT),
            HOST1,
            HOST2,
        ],
        no("c/host2", WEB),
        ok("c/host1", DB, family=4),
        no("c/host1", DB, family=6),
        no(TOOL, "c/host2"),
    ),
    case(
        82,
        "egress to the own node is policed, ingress from it is not",
        [DENY, policy("a/p", selector(role="db"), egress=[egress(block(f"{N2}/32"))], types=OUT)],
        no(WEB, N1),
        no(WEB, N1_6),
        no(WEB, N2),
        ok(DB, N2),
        no(DB, N1),
        ok(N1, WEB),
    ),
    case(
        83,
        "behind a ClusterIP the backend counts, not the ClusterIP",
        [
            policy("a/p", WEB_ONLY, egress=[egress(block("10.96.0.0/12"))], types=OUT),
            policy("a/q", selector(role="db"), egress=[egress(namespaces(team="blue"))], types=OUT),
        ],
        no(WEB, B_WEB),
        ok(DB, B_WEB),
        part="the tuple after DNAT is judged",
    ),
    case(
        84,
        "packets that IPVS sends out locally are judged in OUTPUT",
        [
            DENY,
            policy(
                "a/p", WEB_ONLY, egress=[egress(namespaces(team="blue"), ports=["80"])], types=OUT
            ),
        ],
        packet(ok(WEB, B_DB, "80/TCP"), hook="OUTPUT"),
        packet(no(WEB, B_DB, "81/TCP"), hook="OUTPUT"),
        packet(no(B_DB, DB, "80/TCP"), hook="OUTPUT"),
        packet(ok(WEB, WEB, "80/TCP"), hook="OUTPUT"),
        part="the re-injected packet; the client's packet to the VIP is a test of the kernel",
    ),
    case(
        85,
        "an address of a headless Service is the pod's",
        [
            policy(
                "a/p",
                WEB_ONLY,
                egress=[egress(pods(role="db", namespaces=selector(team="blue")))],
                types=OUT,
            )
        ],
        ok(WEB, "10.244.2.20"),
        no(WEB, "10.244.2.10"),
    ),
    case(
        86,
        "after an egress deny DNS needs UDP and TCP 53",
        [
            policy(
                "a/p", WEB_ONLY, egress=[egress(namespaces(team="blue"), ports=["80"])], types=OUT
            ),
            policy(
                "a/q", selector(role="db"), egress=[egress(ports=["53/UDP", "53/TCP"])], types=OUT
            ),
        ],
        no(WEB, TOOL, "53/UDP"),
        no(WEB, TOOL, "53/TCP"),
        ok(DB, TOOL, "53/UDP"),
        ok(DB, TOOL, "53/TCP"),
        no(DB, TOOL, "80/TCP"),
    ),
    case(
        87,
        "a client whose address is kept is matched by ipBlock",
        [
            policy(
                "a/p", WEB_ONLY, ingress=[ingress(block("198.51.100.0/24"), ports=["80"])], types=IN
            )
        ],
        ok(OUTSIDE, WEB),
        no(OUTSIDE, WEB, "81/TCP"),
        no(OUTSIDE_OTHER, WEB),
    ),
    case(
        88,
        "an external address of a Service is judged as the address on the wire",
        [policy("a/p", WEB_ONLY, egress=[egress(block("203.0.113.0/24"))], types=OUT)],
        ok(WEB, OUTSIDE_OTHER),
        no(WEB, B_WEB),
        part="whether it is rewritten before is the proxy's affair",
    ),
    steps(
        89,
        "a policy that comes later denies new connections",
        (with_(), [ok(B_DB, WEB)]),
        (
            with_(DENY),
            [no(B_DB, WEB), packet(ok(B_DB, WEB), ctstate="ESTABLISHED")],
        ),
        part="which open flows are cut is decided by marks on connections, tested with real packets",
    ),
    steps(
        90,
        "what is allowed later starts to work with the same tuple",
        (with_(DENY), [no(B_DB, WEB), packet(no(B_DB, WEB), ctstate="NEW")]),
        (
            with_(policy("a/deny", ingress=[ingress(namespaces(team="blue"))], types=BOTH)),
            [ok(B_DB, WEB), packet(ok(B_DB, WEB), ctstate="NEW")],
        ),
    ),
    steps(
        91,
        "a pod that is not known yet is held, then isolated, then allowed",
        (
            with_(policy("a/p", selector(role="new"), types=IN)),
            [packet(no(B_DB, NOBODY)), packet(no(NOBODY, B_DB)), packet(no(NOBODY6, B_DB))],
        ),
        (
            with_(policy("a/p", selector(role="new"), types=IN), NEW),
            [no(B_DB, "a/new"), ok("a/new", B_DB)],
        ),
        (
            with_(
                policy("a/p", selector(role="new"), ingress=[ingress(pods(role="db"))], types=IN),
                NEW,
            ),
            [no(B_DB, "a/new"), ok(DB, "a/new")],
        ),
        part="each rendered state; the order of kernel writes between them is tested with the agent",
    ),
    steps(
        92,
        "a policy made while the agent was down holds after catching up",
        (with_(policy("a/p", WEB_ONLY, types=IN)), [no(B_DB, WEB), ok(B_DB, DB)]),
        (
            with_(policy("a/p", WEB_ONLY, types=IN), policy("a/q", selector(role="db"), types=IN)),
            [no(B_DB, WEB), no(B_DB, DB)],
        ),
        part="the states before and after; that nothing opens between them is tested with the agent",
    ),
    steps(
        93,
        "without news the same state comes out",
        (with_(DENY), [no(B_DB, WEB)]),
        (with_(DENY), [no(B_DB, WEB)]),
        part="rendering is a function, see test_rendered; losing a watch is tested with the agent",
    ),
    case(
        94,
        "two policies that differ in name alone are one result",
        [
            policy("a/p", WEB_ONLY, ingress=[ingress(pods(role="db"))], types=IN),
            policy("a/q", WEB_ONLY, ingress=[ingress(pods(role="db"))], types=IN),
        ],
        ok(DB, WEB),
        no(B_DB, WEB),
        part="test_cases asserts that the trace names both",
    ),
    case(
        95,
        "a selector with many values and a rule with many blocks",
        [
            policy(
                "a/p",
                WEB_ONLY,
                ingress=[
                    ingress(pods(term("role", "In", "db", *(f"v{i}" for i in range(500))))),
                    ingress(
                        *(
                            block(f"10.{i // 256}.{i % 256}.0/24", f"10.{i // 256}.{i % 256}.7/32")
                            for i in range(300)
                        )
                    ),
                ],
                types=IN,
            )
        ],
        ok(DB, WEB),
        no(B_DB, WEB),
        ok("10.1.5.1", WEB),
        no("10.1.5.7", WEB),
        part="test_cases asserts maxelem; a refusal of the kernel is tested with the agent",
    ),
    steps(
        96,
        "a namespace made again has none of the old one's labels",
        (
            with_(policy("a/p", ingress=[ingress(namespaces(team="blue"))], types=IN)),
            [ok(B_DB, WEB)],
        ),
        (
            with_(
                policy("a/p", ingress=[ingress(namespaces(team="blue"))], types=IN),
                without=("namespace/b",),
            ),
            [no(B_DB, WEB), ok(TOOL, WEB)],
        ),
        (
            with_(
                policy("a/p", ingress=[ingress(namespaces(team="blue"))], types=IN),
                {**namespace("b"), "metadata": namespace("b")["metadata"] | {"uid": "second"}},
            ),
            [no(B_DB, WEB), ok(TOOL, WEB)],
        ),
    ),
    case(
        97,
        "a type that stands twice counts once",
        [policy("a/p", WEB_ONLY, egress=[egress(pods(x="none"))], types=("Ingress", "Ingress"))],
        no(B_DB, WEB),
        ok(WEB, B_DB),
    ),
    case(
        98,
        "an unknown type isolates both ways, with the rules as written",
        [
            policy(
                "a/p",
                WEB_ONLY,
                ingress=[ingress(pods(role="db"))],
                egress=[egress(namespaces(team="blue"))],
                types=("Ingress", "Sideways"),
            )
        ],
        ok(DB, WEB),
        no(B_DB, WEB),
        ok(WEB, B_DB),
        no(WEB, DB),
        invalid=True,
    ),
    case(
        98,
        "three types are both",
        [policy("a/p", WEB_ONLY, types=("Ingress", "Egress", "Ingress"))],
        no(B_DB, WEB),
        no(WEB, B_DB),
        invalid=True,
    ),
    steps(
        20,
        "a label change moves a pod between nodes' classes and back",
        (
            with_(
                policy("a/p", selector(role="db"), types=IN), relabelled(WEB, role="db", tier="x")
            ),
            [no(B_DB, WEB)],
        ),
        (
            with_(
                policy("a/p", selector(role="db"), types=IN), relabelled(WEB, role="db", tier="y")
            ),
            [no(B_DB, WEB)],
        ),
        (
            with_(
                policy("a/p", selector(role="db"), types=IN), relabelled(WEB, role="web", tier="y")
            ),
            [ok(B_DB, WEB)],
        ),
    ),
    case(
        78,
        "a node with several addresses",
        [DENY, node("n1", N1, N1_6, "192.0.2.1", cidrs=("10.244.1.0/24", "fd00:10:1::/64"))],
        ok("192.0.2.1", WEB),
        no("192.0.2.1", DB),
    ),
]
