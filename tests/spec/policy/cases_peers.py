"""Rows 22 to 40: who counts as a peer."""

from __future__ import annotations

from tests.builders import (
    block,
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
    N2,
    OUTSIDE,
    OUTSIDE6,
    TOOL,
    WEB,
    Case,
    base_pod,
    case,
    no,
    ok,
    relabelled,
    steps,
    with_,
)

IN, OUT = ("Ingress",), ("Egress",)
WEB_ONLY = selector(role="web")


def _from(*peers: dict[str, object], ports: list[str] | None = None) -> dict[str, object]:
    """A policy of namespace a that lets these peers in to role=web."""
    return policy("a/p", WEB_ONLY, ingress=[ingress(*peers, ports=ports)], types=IN)


def _empty_from(key: str, kind: str) -> dict[str, object]:
    made = policy("a/p", WEB_ONLY, types=(kind,))
    made["spec"][kind.lower()] = [{key: []}]
    return made


OLD_DB = pod(
    "a/old",
    ip=("10.244.2.10", "fd00:10:2::10"),
    node="n2",
    phase="Succeeded",
    created="2026-01-03T00:00:00Z",  # finished, so that being newer must not matter
    role="old",
)

CASES: list[Case] = [
    case(
        22,
        "from absent or [] is everybody, also outside and nodes",
        [_empty_from("from", "Ingress")],
        ok(B_DB, WEB),
        ok(OUTSIDE, WEB),
        ok(OUTSIDE6, WEB),
        ok(N2, WEB),
    ),
    case(
        22,
        "to absent or [] is everybody, also outside and nodes",
        [_empty_from("to", "Egress")],
        ok(WEB, B_DB),
        ok(WEB, OUTSIDE),
        ok(WEB, N2),
    ),
    case(
        23,
        "an empty peer matches nothing and takes nothing from its neighbours",
        [_from({}, pods(role="db"))],
        ok(DB, WEB),
        no(B_DB, WEB),
        no(OUTSIDE, WEB),
        invalid=True,
    ),
    case(
        24,
        "namespaceSelector {} is all pods and nothing else",
        [_from(namespaces())],
        ok(DB, WEB),
        ok(B_DB, WEB),
        ok(TOOL, WEB),
        no(OUTSIDE, WEB),
        no(OUTSIDE6, WEB),
        no(N2, WEB),
    ),
    case(
        25,
        "podSelector {} alone is the policy's own namespace",
        [_from(pods())],
        ok(DB, WEB),
        no(B_DB, WEB),
        no(OUTSIDE, WEB),
    ),
    case(
        26,
        "both selectors in one peer must hold together",
        [_from(pods(role="db", namespaces=selector(team="blue")))],
        ok(B_DB, WEB),
        no(B_WEB, WEB),
        no(DB, WEB),
    ),
    case(
        27,
        "two peers are alternatives",
        [_from(pods(role="db"), namespaces(team="blue"))],
        ok(DB, WEB),
        ok(B_WEB, WEB),
        ok(TOOL, WEB),
        no(OUTSIDE, WEB),
    ),
    case(
        28,
        "without namespaceSelector a peer is in the policy's namespace",
        [_from(pods(role="db"))],
        ok(DB, WEB),
        no(B_DB, WEB),
    ),
    case(
        29,
        "selector and ipBlock in one peer match nothing",
        [_from({**pods(role="db"), **block("10.244.0.0/16")})],
        no(DB, WEB),
        no(B_DB, WEB),
        invalid=True,
    ),
    case(
        30,
        "matchLabels and matchExpressions must all hold",
        [_from(pods(term("tier", "Exists"), role="db", namespaces=selector()))],
        ok(B_DB, WEB),
        no(DB, WEB),
        no(TOOL, WEB),
    ),
    case(
        31,
        "In takes any of its values",
        [_from(pods(term("role", "In", "db", "tool"), namespaces=selector()))],
        ok(B_DB, WEB),
        ok(TOOL, WEB),
        no(B_WEB, WEB),
    ),
    case(
        31,
        "NotIn also takes objects without the key",
        [_from(pods(term("tier", "NotIn", "back"), namespaces=selector()))],
        ok(DB, WEB),
        ok(B_WEB, WEB),
        no(B_DB, WEB),
    ),
    case(
        32,
        "Exists and DoesNotExist ask for the key alone",
        [
            _from(pods(term("tier", "Exists"), namespaces=selector())),
            policy(
                "a/q",
                selector(role="db"),
                ingress=[ingress(pods(term("tier", "DoesNotExist"), namespaces=selector()))],
                types=IN,
            ),
        ],
        ok(B_DB, WEB),
        no(B_WEB, WEB),
        no(B_DB, DB),
        ok(B_WEB, DB),
    ),
    case(
        32,
        "Exists and DoesNotExist with values match nobody",
        [_from(pods(term("tier", "Exists", "back")), pods(term("none", "DoesNotExist", "x")))],
        no(B_DB, WEB),
        no(DB, WEB),
        invalid=True,
    ),
    case(
        33,
        "an invalid term in a peer matches nobody",
        [
            _from(
                pods(term("role", "In")),
                pods(term("role", "NotIn")),
                pods(term("role", "Near", "db")),
            )
        ],
        no(DB, WEB),
        no(B_DB, WEB),
        invalid=True,
    ),
    case(
        33,
        "an invalid term in the subject isolates more and grants nothing",
        [
            policy(
                "a/p",
                selector(term("tier", "Near", "x"), role="web"),
                ingress=[ingress()],
                types=IN,
            )
        ],
        no(DB, WEB),
        ok(WEB, DB),
        invalid=True,
    ),
    case(
        34,
        "a namespace's name is one of its labels",
        [_from(namespaces(term("kubernetes.io/metadata.name", "In", "b")))],
        ok(B_DB, WEB),
        no(TOOL, WEB),
    ),
    steps(
        35,
        "a peer namespace matches from its creation",
        (
            with_(
                _from(namespaces(labels_of_new := term("new", "Exists"))),
            ),
            [no(TOOL, WEB), no(DB, WEB)],
        ),
        (
            with_(
                _from(namespaces(labels_of_new)),
                namespace("d", new="yes"),
                pod("d/tool", ip=("10.244.1.60", "fd00:10:1::60"), role="tool"),
            ),
            [no(TOOL, WEB), ok("d/tool", WEB)],
        ),
    ),
    case(
        36,
        "no peers is everybody",
        [policy("a/p", WEB_ONLY, ingress=[ingress(ports=["80"])], types=IN)],
        ok(B_DB, WEB),
        ok(OUTSIDE, WEB),
    ),
    case(
        36,
        "an empty resolved set is nobody",
        [
            _from(pods(x="none"), ports=["80"]),
            policy(
                "a/q", selector(role="db"), egress=[egress(pods(x="none"), ports=["80"])], types=OUT
            ),
        ],
        no(B_DB, WEB),
        no(DB, WEB),
        no(OUTSIDE, WEB),
        no(DB, B_WEB),
        no(DB, OUTSIDE),
    ),
    case(
        37,
        "a pending pod without address is no member and no failure",
        [
            _from(pods(namespaces=selector(), role="db")),
            pod("a/pending", phase="Pending", role="db"),
            pod("a/pending-web", phase="Pending", node="", role="web"),
        ],
        ok(DB, WEB),
        ok(B_DB, WEB),
        no(TOOL, WEB),
    ),
    case(
        38,
        "a finished pod's labels do not count for an address in use again",
        [_from(pods(role="old")), OLD_DB],
        no(DB, WEB),
        no("10.244.2.10", WEB),
    ),
    case(
        38,
        "a failed pod is no subject and leaves its address open",
        [
            policy("a/p", selector(role="old"), types=IN),
            {**OLD_DB, "status": {**OLD_DB["status"], "phase": "Failed"}},
        ],
        ok(B_DB, DB),
        ok(WEB, "10.244.2.10", family=4),
    ),
    case(
        38,
        "of two live pods with one address the later created owns it",
        [
            _from(pods(role="db")),
            pod(
                "a/late",
                ip=("10.244.2.10", "fd00:10:2::10"),
                node="n2",
                created="2026-01-03T00:00:00Z",
                role="late",
            ),
        ],
        no(DB, WEB),
        no("a/late", WEB),
    ),
    case(
        39,
        "a terminating pod is still subject and peer",
        [
            _from(pods(namespaces=selector(), role="db")),
            {
                **base_pod(WEB),
                "metadata": base_pod(WEB)["metadata"]
                | {"deletionTimestamp": "2026-01-02T00:00:00Z"},
            },
            {
                **base_pod(B_DB),
                "metadata": base_pod(B_DB)["metadata"]
                | {"deletionTimestamp": "2026-01-02T00:00:00Z"},
            },
        ],
        ok(B_DB, WEB),
        no(B_WEB, WEB),
    ),
    case(
        40,
        "both addresses of a dual-stack pod are isolated and both are peers",
        [_from(pods(role="db"))],
        ok(DB, WEB, family=4),
        ok(DB, WEB, family=6),
        no(B_DB, WEB, family=4),
        no(B_DB, WEB, family=6),
        no(OUTSIDE6, WEB),
    ),
    case(
        40,
        "a pod of one family beside dual-stack ones",
        [
            _from(pods(role="six")),
            pod("a/six", ip="fd00:10:2::66", node="n2", role="six"),
            relabelled(DB, role="db"),
        ],
        ok("a/six", WEB, family=6),
        no(DB, WEB),
    ),
]
