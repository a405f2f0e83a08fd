"""What annotations ask for, and what becomes of values that cannot be followed."""

from __future__ import annotations

from typing import Any

from tests.spec.proxy.case import (
    BALANCER4,
    OUTSIDE4,
    THERE,
    VIP4,
    Case,
    endpoint,
    piece,
    port,
    ready,
    service,
)

SPLIT = [piece(*ready("a"), *ready("b", THERE))]
ROUTER, OURS = "kube-router.io/service.", "netpol.io/service."


def asks(claim: str, scheduler: str, *refused: str, **annotations: str) -> Case:
    """The scheduler that annotations lead to; `__` stands for the prefix of kube-router."""
    given = {k.replace("__", ROUTER).replace("_our_", OURS): v for k, v in annotations.items()}
    row: dict[str, Any] = {"scheduler": scheduler}
    return Case(claim, service(annotations=given), SPLIT, rows={"cluster": row}, refused=refused)


def weights(**by_letter: int) -> dict[str, Any]:
    listed = [
        {"address": f"10.1.0.{ord(c) - 96}", "port": 8080, "weight": w}
        for c, w in by_letter.items()
    ]
    return {"backends": listed}


SAME_PORT = service(port(8080), external=(OUTSIDE4,), annotations={f"{ROUTER}dsr": "tunnel"})

ANNOTATIONS = (
    *(
        asks(f"the scheduler {name} is taken", name, __scheduler=name)
        for name in ("rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh")
    ),
    asks(
        "netpol's annotation counts before kube-router's",
        "lc",
        _our_scheduler="lc",
        __scheduler="sh",
    ),
    asks(
        "an unknown scheduler is the default, and named",
        "rr",
        "needed one of rr wrr lc wlc sh dh sed nq mh, got 'fastest'; the default is used",
        __scheduler="fastest",
    ),
    Case(
        "the default scheduler is a setting",
        service(),
        SPLIT,
        rows={"cluster": {"scheduler": "lc"}},
        options={"scheduler": "lc"},
    ),
    asks("flags by their bits", "mh", __scheduler="mh", __schedflags="flag-1,flag-2"),
    asks(
        "a flag that is none is named",
        "mh",
        "got 'flag-9'",
        __scheduler="mh",
        __schedflags="flag-9",
    ),
    asks(
        "a flag of another scheduler is named",
        "sh",
        "needed flags of sh, got 'mh-port'",
        __scheduler="sh",
        __schedflags="sh-port, mh-port",
    ),
    Case(
        "kube-router's local makes both policies Local",
        service(external=(OUTSIDE4,), annotations={f"{ROUTER}local": "true"}),
        SPLIT,
        {"cluster": "a", "external": "a"},
        inside={"cluster": "a", "external": "a b"},
        plan={"policy_local": True},
    ),
    Case(
        "local false changes nothing",
        service(annotations={f"{ROUTER}local": "false"}),
        SPLIT,
        {"cluster": "a b"},
    ),
    Case(
        "a switch that is neither on nor off is named",
        service(annotations={f"{ROUTER}local": "maybe"}),
        SPLIT,
        {"cluster": "a b"},
        refused=("needed true or false, got 'maybe'",),
    ),
    Case(
        "skiplbips leaves load balancers' addresses alone",
        service(
            type="LoadBalancer",
            ingress=({"ip": BALANCER4},),
            annotations={f"{ROUTER}skiplbips": "true"},
        ),
        SPLIT,
        {"cluster": "a b", "node": "a b", "balancer": "-"},
    ),
    Case(
        "hairpin is there without being asked for",
        service(
            annotations={f"{ROUTER}hairpin": "", f"{ROUTER}hairpin.externalips": ""},
        ),
        SPLIT,
        {"cluster": "a b"},
    ),
    Case(
        "direct server return where the ports are the same",
        SAME_PORT,
        SPLIT,
        {"cluster": "a b", "external": "a b"},
    ),
    Case(
        "direct server return where they differ is NAT, and named",
        service(port(80), external=(OUTSIDE4,), annotations={f"{ROUTER}dsr": "tunnel"}),
        SPLIT,
        {"external": "a b"},
        refused=("endpoint 10.1.0.1 listens on 8080, and a tunnel cannot change the port",),
    ),
    Case(
        "another way of direct return is named",
        service(annotations={f"{ROUTER}dsr": "gre"}),
        SPLIT,
        {"cluster": "a b"},
        refused=("needed tunnel, got 'gre'",),
    ),
    Case(
        "weights by node make a weighted scheduler",
        service(annotations={f"{OURS}weights": "node/there=5"}),
        SPLIT,
        rows={"cluster": {"scheduler": "wrr", **weights(a=1, b=5)}},
    ),
    Case(
        "weights by address count before the pod's, those before the node's",
        service(
            annotations={f"{OURS}weights": "10.1.0.1=7, pod/web-a=6, pod/web-b=5, node/here=4"}
        ),
        [piece(endpoint("a", pod="web-a"), endpoint("b", pod="web-b"), endpoint("c"))],
        rows={"cluster": weights(a=7, b=5, c=4)},
    ),
    Case(
        "a named scheduler stays with weights",
        service(annotations={f"{OURS}weights": "node/there=5", f"{OURS}scheduler": "rr"}),
        SPLIT,
        rows={"cluster": {"scheduler": "rr"}},
    ),
    Case(
        "weights that cannot be read are named",
        service(annotations={f"{OURS}weights": "node/there=0, pod/x, b=2, node/here=3"}),
        SPLIT,
        rows={"cluster": weights(a=3, b=1)},
        refused=("got 'node/there=0'", "got 'pod/x'", "got 'b=2'"),
    ),
    Case(
        "a slice gives its endpoints a weight",
        service(),
        [
            piece(*ready("a"), name="w-1", annotations={"netpol.io/weight": "9"}),
            piece(*ready("b"), name="w-2"),
        ],
        rows={"cluster": {"scheduler": "wrr", **weights(a=9, b=1)}},
    ),
    Case(
        "the Service's weights count before the slice's",
        service(annotations={f"{OURS}weights": "node/here=2"}),
        [piece(*ready("a"), *ready("b", THERE), annotations={"netpol.io/weight": "9"})],
        rows={"cluster": weights(a=2, b=9)},
    ),
    Case(
        "annotations of a headless Service are not read",
        service(ips=("None",), annotations={f"{OURS}scheduler": "fastest"}),
        SPLIT,
        {"cluster": "-"},
    ),
    Case(
        "other annotations are nobody's business",
        service(ips=(VIP4,), annotations={"example.com/scheduler": "fastest"}),
        SPLIT,
        rows={"cluster": {"scheduler": "rr"}},
    ),
)
