"""Rows 1 to 21: which pods a policy isolates, in which direction, and what happens over time."""

from __future__ import annotations

from tests.builders import (
    egress,
    ingress,
    namespace,
    namespaces,
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
    OUTSIDE,
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
DENY_IN = policy("a/deny", ingress=[], types=IN)


def _no_subject() -> dict[str, object]:
    made = policy("a/deny", types=IN)
    del made["spec"]["podSelector"]
    return made


CASES: list[Case] = [
    case(
        1,
        "no policy, all traffic passes",
        [],
        ok(B_DB, WEB),
        ok(WEB, B_DB, "9/UDP"),
        ok(WEB, OUTSIDE),
    ),
    case(
        1,
        "a pod that no policy selects is open beside an isolated one",
        [policy("a/deny", WEB_ONLY, types=IN)],
        no(B_WEB, WEB),
        ok(B_WEB, DB),
    ),
    case(
        1,
        "the other direction stays open",
        [policy("a/deny", types=IN)],
        ok(WEB, B_DB),
        ok(WEB, OUTSIDE),
        no(B_DB, WEB),
    ),
    case(
        2, "podSelector {} is every pod of the namespace", [DENY_IN], no(B_WEB, WEB), no(B_WEB, DB)
    ),
    case(
        3,
        "podSelector omitted is {}",
        [_no_subject()],
        no(B_WEB, WEB),
        no(B_WEB, DB),
        ok(WEB, B_WEB),
    ),
    case(
        4,
        "policyTypes omitted without egress is Ingress only",
        [policy("a/p", ingress=[ingress(pods(role="db"))])],
        ok(DB, WEB),
        no(B_DB, WEB),
        ok(WEB, B_DB),
    ),
    case(
        5,
        "policyTypes omitted with an egress rule is both",
        [policy("a/p", WEB_ONLY, egress=[egress(pods(role="db"))])],
        ok(WEB, DB),
        no(WEB, B_DB),
        no(B_DB, WEB),
    ),
    case(
        6,
        "policyTypes omitted with egress [] is Ingress only",
        [policy("a/p", WEB_ONLY, egress=[])],
        ok(WEB, B_DB),
        no(B_DB, WEB),
    ),
    case(
        6,
        "policyTypes [] is as omitted",
        [policy("a/p", WEB_ONLY, types=())],
        ok(WEB, B_DB),
        no(B_DB, WEB),
    ),
    case(
        7,
        "types Egress only: ingress rules count for nothing and isolate nothing",
        [policy("a/p", WEB_ONLY, ingress=[ingress(pods(role="db"))], egress=[], types=OUT)],
        ok(B_DB, WEB),
        ok(DB, WEB),
        no(WEB, DB),
    ),
    case(
        8,
        "ingress absent denies all ingress",
        [policy("a/p", types=IN)],
        no(DB, WEB),
        no(OUTSIDE, WEB),
    ),
    case(
        8, "ingress [] denies all ingress", [DENY_IN], no(DB, WEB), no(OUTSIDE, WEB), ok(WEB, B_WEB)
    ),
    case(
        9,
        "ingress [{}] allows all ingress",
        [policy("a/p", ingress=[ingress()], types=IN)],
        ok(B_DB, WEB),
        ok(OUTSIDE, WEB, "9/UDP"),
        ok(B_DB, WEB, "ICMP"),
    ),
    case(
        10,
        "both types and nothing else denies both ways",
        [policy("a/p", WEB_ONLY, types=BOTH)],
        no(B_DB, WEB),
        no(WEB, B_DB),
        no(WEB, OUTSIDE),
        no(OUTSIDE, WEB),
    ),
    steps(
        11,
        "a policy that selects nobody has no effect until a pod matches",
        (with_(policy("a/p", selector(role="new"), types=IN)), [ok(B_DB, WEB), ok(B_DB, DB)]),
        (
            with_(policy("a/p", selector(role="new"), types=IN), relabelled(DB, role="new")),
            [ok(B_DB, WEB), no(B_DB, DB)],
        ),
    ),
    case(
        12,
        "a policy never isolates pods of another namespace",
        [policy("a/p", ingress=[ingress(namespaces())], types=IN)],
        ok(OUTSIDE, B_WEB),
        no(OUTSIDE, WEB),
        ok(B_DB, WEB),
    ),
    case(
        12,
        "names of policies are hashed with their fields apart",
        [
            namespace("team"),
            namespace("teama"),
            pod("team/web", ip=("10.244.1.40", "fd00:10:1::40"), role="web"),
            pod("teama/db", ip=("10.244.1.50", "fd00:10:1::50"), role="db"),
            policy("team/adeny", ingress=[ingress(namespaces(tools="yes"))], types=IN),
            policy("teama/deny", ingress=[ingress(namespaces(team="red"))], types=IN),
        ],
        ok(TOOL, "team/web"),
        no(DB, "team/web"),
        ok(DB, "teama/db"),
        no(TOOL, "teama/db"),
    ),
    case(
        13,
        "several policies allow their union",
        [
            policy("a/p", WEB_ONLY, ingress=[ingress(pods(role="db"))], types=IN),
            policy(
                "a/q",
                WEB_ONLY,
                ingress=[ingress(pods(namespaces=selector(team="blue"), role="db"))],
                types=IN,
            ),
            policy("a/r", ingress=[ingress(ports=["443"])], types=IN),
        ],
        ok(DB, WEB),
        ok(B_DB, WEB),
        no(B_WEB, WEB),
        ok(B_WEB, WEB, "443/TCP"),
        ok(B_WEB, DB, "443/TCP"),
        no(B_WEB, DB),
    ),
    case(
        14,
        "a deny-all beside an allow with the same selector takes nothing away",
        [
            policy("a/a-deny", WEB_ONLY, types=BOTH),
            policy(
                "a/b-allow",
                WEB_ONLY,
                ingress=[ingress(pods(role="db"))],
                egress=[egress(pods(role="db"))],
                types=BOTH,
            ),
        ],
        ok(DB, WEB),
        ok(WEB, DB),
        no(B_DB, WEB),
        no(WEB, B_DB),
    ),
    case(
        15,
        "each direction is isolated by its own policy only",
        [
            policy("a/in", WEB_ONLY, ingress=[ingress(namespaces(team="blue"))], types=IN),
            policy("a/out", WEB_ONLY, egress=[egress(pods(role="db"))], types=OUT),
        ],
        ok(B_DB, WEB),
        no(DB, WEB),
        ok(WEB, DB),
        no(WEB, B_DB),
    ),
    case(
        16,
        "an egress rule never opens ingress though subject and peers overlap",
        [
            policy(
                "a/p",
                selector(),
                ingress=[ingress(pods(role="db"), ports=["80"])],
                egress=[egress(pods(term("role", "Exists")), ports=["80", "443"])],
                types=BOTH,
            )
        ],
        ok(DB, WEB, "80/TCP"),
        no(DB, WEB, "443/TCP"),  # egress of db allows it, ingress of web does not
        no(WEB, DB, "80/TCP"),
        no(WEB, DB, "443/TCP"),
    ),
    case(
        17,
        "egress of the source and ingress of the destination must both allow",
        [
            policy("a/out", egress=[egress(namespaces(team="blue"), ports=["80"])], types=OUT),
            policy("b/in", WEB_ONLY, ingress=[ingress(namespaces(team="red"))], types=IN),
            policy("b/none", selector(role="db"), types=IN),
        ],
        ok(WEB, B_WEB),
        no(WEB, B_DB),  # only ingress denies
        no(WEB, B_WEB, "443/TCP"),  # only egress denies
        no(TOOL, B_WEB),
        ok(DB, B_WEB),
        ok(WEB, TOOL),
    ),
    case(
        18,
        "replies of an allowed connection need no rule",
        [
            policy("a/p", WEB_ONLY, ingress=[ingress(pods(role="db"))], types=BOTH),
            policy("b/p", selector(role="db"), types=IN),
        ],
        ok(DB, WEB),
        no(WEB, DB),
        packet(ok(WEB, DB, "40000/TCP"), ctstate="ESTABLISHED"),
        ok(B_DB, OUTSIDE),
        packet(ok(OUTSIDE, B_DB, "40000/TCP"), ctstate="ESTABLISHED"),
        packet(no(OUTSIDE, B_DB, "40000/TCP"), ctstate="RELATED"),
    ),
    steps(
        19,
        "without its last policy a pod is open again",
        (with_(DENY_IN), [no(B_DB, WEB)]),
        (with_(), [ok(B_DB, WEB)]),
    ),
    steps(
        20,
        "a pod's labels move it in and out of subject and peer",
        (
            with_(policy("a/p", WEB_ONLY, ingress=[ingress(pods(role="db"))], types=IN)),
            [ok(DB, WEB), no(B_DB, WEB)],
        ),
        (
            with_(
                policy("a/p", WEB_ONLY, ingress=[ingress(pods(role="db"))], types=IN),
                relabelled(DB, role="other"),
            ),
            [no(DB, WEB)],
        ),
        (
            with_(
                policy("a/p", WEB_ONLY, ingress=[ingress(pods(role="db"))], types=IN),
                relabelled(WEB, role="other"),
            ),
            [ok(DB, WEB), ok(B_DB, WEB)],
        ),
    ),
    steps(
        21,
        "a namespace's labels move all of its pods",
        (
            with_(policy("a/p", ingress=[ingress(namespaces(team="blue"))], types=IN)),
            [ok(B_DB, WEB), ok(TOOL, WEB)],
        ),
        (
            with_(
                policy("a/p", ingress=[ingress(namespaces(team="blue"))], types=IN),
                namespace("b", team="green"),
            ),
            [no(B_DB, WEB), no(B_WEB, DB), ok(TOOL, WEB)],
        ),
        (
            with_(policy("a/p", ingress=[ingress(namespaces(team="blue"))], types=IN)),
            [ok(B_DB, WEB)],
        ),
    ),
]
