"""How EndpointSlices are read: several of them, repetitions, what is absent, what does not fit."""

from __future__ import annotations

from tests.spec.proxy.case import (
    HERE,
    THERE,
    VIP4,
    VIP6,
    Case,
    broken,
    endpoint,
    piece,
    port,
    ready,
    service,
)

NAMED = service(port(80, name="web"))


def ports(*names: str, number: int | None = 8080, protocol: str = "TCP") -> list[dict[str, object]]:
    made = [{"name": n, "protocol": protocol} for n in names]
    return [p | {"port": number} if number is not None else p for p in made]


SLICES = (
    Case("no slice at all is reject", service(), [], {"cluster": "reject"}),
    Case("a slice without endpoints is reject", service(), [piece()], {"cluster": "reject"}),
    Case(
        "endpoints of several slices are put together",
        service(),
        [piece(*ready("b"), name="w-2"), piece(*ready("ac"), name="w-1")],
        {"cluster": "a b c"},
    ),
    Case(
        "an endpoint in two slices is one backend",
        service(),
        [piece(*ready("ab"), name="w-1"), piece(*ready("bc"), name="w-2")],
        {"cluster": "a b c"},
    ),
    Case(
        "an endpoint twice in one slice is one backend",
        service(),
        [piece(*ready("aa"))],
        {"cluster": "a"},
    ),
    Case(
        "of an endpoint that stands there twice, the one on this node counts",
        service(internalTrafficPolicy="Local"),
        [piece(*ready("a", THERE), name="w-1"), piece(*ready("a", HERE), name="w-2")],
        {"cluster": "a"},
    ),
    Case(
        "of an endpoint that stands there twice, the first one counts",
        service(),
        [piece(*ready("a", THERE), name="w-2"), piece(*broken("a", THERE), name="w-1")],
        {"cluster": "reject"},
    ),
    Case(
        "one address at two ports is two backends",
        service(),
        [
            piece(*ready("a"), name="w-1"),
            piece(*ready("a"), name="w-2", ports=ports("", number=9090)),
        ],
        rows={
            "cluster": {
                "backends": [
                    {"address": "10.1.0.1", "port": 8080, "weight": 1},
                    {"address": "10.1.0.1", "port": 9090, "weight": 1},
                ]
            }
        },
    ),
    Case(
        "a port name must match",
        NAMED,
        [
            piece(*ready("a"), ports=ports("web")),
            piece(*ready("b"), name="x", ports=ports("other")),
        ],
        {"cluster": "a"},
        port="web",
    ),
    Case(
        "a named port does not take an unnamed one",
        NAMED,
        [piece(*ready("a"), ports=ports(""))],
        {"cluster": "reject"},
        port="web",
    ),
    Case(
        "the protocol must match",
        NAMED,
        [piece(*ready("a"), ports=ports("web", protocol="UDP"))],
        {"cluster": "reject"},
        port="web",
    ),
    Case(
        "a port without a number is skipped",
        service(),
        [piece(*ready("a"), ports=ports("", number=None))],
        {"cluster": "reject"},
    ),
    Case(
        "a slice without ports has nothing to dial",
        service(),
        [piece(*ready("a"), ports=[])],
        {"cluster": "reject"},
    ),
    Case(
        "a port without name and protocol is the unnamed TCP port",
        service(),
        [piece(*ready("a"), ports=[{"port": 8080}])],
        {"cluster": "a"},
    ),
    Case(
        "of an endpoint with several addresses the first one counts",
        service(),
        [piece({**endpoint("a"), "addresses": ["10.1.0.1", "10.1.0.2"]})],
        {"cluster": "a"},
    ),
    Case(
        "an endpoint without an address is skipped",
        service(),
        [piece({**endpoint("a"), "addresses": []}, endpoint("b"))],
        {"cluster": "b"},
    ),
    Case(
        "an endpoint without a node is used with policy Cluster",
        service(),
        [piece(*ready("a", None))],
        {"cluster": "a"},
    ),
    Case(
        "an endpoint without a node is on no node",
        service(internalTrafficPolicy="Local"),
        [piece(*ready("a", None))],
        {"cluster": "drop"},
    ),
    Case(
        "slices of host names are skipped",
        service(),
        [
            piece({"addresses": ["db.example.com"]}, name="names", kind="FQDN"),
            piece(*ready("a")),
        ],
        {"cluster": "a"},
    ),
    Case(
        "a slice serves its own family alone",
        service(ips=(VIP4, VIP6)),
        [piece(*ready("a")), piece(*ready("b", family=6), name="six", kind="IPv6")],
        {"cluster": "a", "cluster6": "b"},
    ),
    Case(
        "an address of the wrong family in a slice is skipped",
        service(ips=(VIP4, VIP6)),
        [piece(*ready("a"), *ready("b", family=6))],
        {"cluster": "a", "cluster6": "reject"},
    ),
    Case(
        "a slice labelled for another proxy is skipped",
        service(),
        [piece(*ready("a"), labels={"service.kubernetes.io/service-proxy-name": "other"})],
        {"cluster": "reject"},
    ),
    Case(
        "a slice labelled as headless is skipped",
        service(),
        [piece(*ready("a"), labels={"service.kubernetes.io/headless": ""})],
        {"cluster": "reject"},
    ),
    Case(
        "absent conditions are ready",
        service(),
        [piece(endpoint("a", ready=None))],
        {"cluster": "a"},
    ),
    Case(
        "null conditions are ready",
        service(),
        [piece({"addresses": ["10.1.0.1"], "conditions": None, "nodeName": None, "hints": None})],
        {"cluster": "a"},
    ),
    Case(
        "absent serving of one that terminates is serving",
        service(),
        [piece(endpoint("a", ready=False, terminating=True))],
        {"cluster": "a"},
    ),
    Case(
        "absent serving does not make an endpoint ready",
        service(),
        [piece(endpoint("a", ready=False))],
        {"cluster": "reject"},
    ),
)
