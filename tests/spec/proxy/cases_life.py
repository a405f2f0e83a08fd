"""The life of an endpoint: ready, serving, terminating, and what that does behind either policy."""

from __future__ import annotations

from tests.spec.proxy.case import (
    OUTSIDE4,
    THERE,
    Case,
    broken,
    endpoint,
    going,
    piece,
    port,
    ready,
    service,
)

LOCAL_INSIDE = service(internalTrafficPolicy="Local")
LOCAL_OUTSIDE = service(external=(OUTSIDE4,), externalTrafficPolicy="Local")
UDP = [{"name": "", "port": 8080, "protocol": "UDP"}]

LIFE = (
    Case(
        "endpoints that are not ready are not used",
        service(),
        [piece(*ready("a"), *broken("b"))],
        {"cluster": "a"},
    ),
    Case("no ready endpoint is reject", service(), [piece(*broken("ab"))], {"cluster": "reject"}),
    Case(
        "beside a ready endpoint, those that terminate drain",
        service(),
        [piece(*ready("a"), *going("b"))],
        {"cluster": "a/b"},
    ),
    Case(
        "one that terminates and serves no more is gone",
        service(),
        [piece(*ready("a"), *going("b", serving=False))],
        {"cluster": "a"},
    ),
    Case(
        "without a ready endpoint, those that terminate and serve are used",
        service(),
        [piece(*going("ab"), *broken("c"))],
        {"cluster": "a b"},
    ),
    Case(
        "without a ready endpoint, one that serves no more is not used",
        service(),
        [piece(*going("a"), *going("b", serving=False))],
        {"cluster": "a"},
    ),
    Case(
        "all terminate and none serves: reject",
        service(),
        [piece(*going("ab", serving=False))],
        {"cluster": "reject"},
    ),
    Case(
        "serving alone does not make an endpoint usable",
        service(),
        [piece(endpoint("a", ready=False, serving=True, terminating=False))],
        {"cluster": "reject"},
    ),
    Case(
        "ready while it terminates (publishNotReadyAddresses) is ready",
        service(publishNotReadyAddresses=True),
        [piece(endpoint("a", ready=True, serving=False, terminating=True), *ready("b"))],
        {"cluster": "a b"},
    ),
    Case(
        "ready while it terminates and serves does not drain",
        service(publishNotReadyAddresses=True),
        [
            piece(
                endpoint("a", ready=True, serving=True, terminating=True), *ready("b"), *broken("c")
            )
        ],
        {"cluster": "a b"},
    ),
    Case(
        "ready counts whatever serving says",
        service(),
        [piece(endpoint("a", ready=True, serving=False))],
        {"cluster": "a"},
    ),
    Case(
        "UDP endpoints do not drain",
        service(port(53, protocol="UDP")),
        [piece(*ready("a"), *going("b"), ports=UDP)],
        {"cluster": "a"},
    ),
    Case(
        "without a ready one, UDP endpoints that terminate are used too",
        service(port(53, protocol="UDP")),
        [piece(*going("b"), ports=UDP)],
        {"cluster": "b"},
    ),
    Case(
        "policy Local judges by itself: the one here that terminates is used, others being ready",
        LOCAL_INSIDE,
        [piece(*going("a"), *ready("b", THERE))],
        {"cluster": "a"},
    ),
    Case(
        "policy Local with a ready one here lets the other one here drain",
        LOCAL_INSIDE,
        [piece(*going("a"), *ready("b"), *going("c", THERE))],
        {"cluster": "b/a"},
    ),
    Case(
        "policy Local with only terminating ones elsewhere drops",
        LOCAL_INSIDE,
        [piece(*going("b", THERE), *broken("a"))],
        {"cluster": "drop"},
    ),
    Case(
        "policy Local with nothing that serves elsewhere rejects",
        LOCAL_INSIDE,
        [piece(*going("b", THERE, serving=False), *broken("a"))],
        {"cluster": "reject"},
    ),
    Case(
        "from outside the terminating one here, from inside the ready one elsewhere",
        LOCAL_OUTSIDE,
        [piece(*going("a"), *ready("b", THERE))],
        {"cluster": "b/a", "external": "a"},
        inside={"cluster": "b/a", "external": "b/a"},
        plan={"local_ready": 0},
    ),
    Case(
        "nothing ready anywhere: either policy takes the terminating ones it may",
        LOCAL_OUTSIDE,
        [piece(*going("a"), *going("b", THERE))],
        {"cluster": "a b", "external": "a"},
        inside={"cluster": "a b", "external": "a b"},
    ),
    Case(
        "hints do not hold back terminating endpoints when none is ready",
        service(),
        [piece(*going("a", zones=("z1",)), *going("b", THERE, zones=("z2",)))],
        {"cluster": "a b"},
    ),
    Case(
        "an endpoint hinted elsewhere has nothing to drain here",
        service(),
        [piece(*ready("a", zones=("z1",)), *going("b", THERE, zones=("z2",)), *going("c"))],
        {"cluster": "a/c"},
    ),
    Case(
        "one that goes without a hint drains in its own zone alone",
        service(),
        [
            piece(
                *ready("a", zones=("z1",)),
                *({**e, "zone": "z1"} for e in going("b")),
                *({**e, "zone": "z2"} for e in going("c", THERE)),
            )
        ],
        {"cluster": "a/b"},
    ),
    Case(
        "one that goes without a hint drains on its own node alone where hints are by node",
        service(),
        [piece(*ready("a", zones=("z1",), nodes=("here",)), *going("b"), *going("c", THERE))],
        {"cluster": "a/b"},
    ),
)
