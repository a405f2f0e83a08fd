"""Traffic policies and traffic distribution: who reaches which endpoints."""

from __future__ import annotations

from typing import Any

from tests.builders import Json
from tests.spec.proxy.case import (
    BALANCER4,
    HERE,
    OUTSIDE4,
    THERE,
    VIP4,
    VIP6,
    Case,
    broken,
    endpoint,
    going,
    here,
    piece,
    ready,
    service,
)

SPLIT = [piece(*ready("a"), *ready("b", THERE))]
ELSEWHERE = [piece(*ready("b", THERE))]
LOCAL = "Local"


def outside(**spec: Any) -> Json:
    """A Service with all kinds of addresses and externalTrafficPolicy Local."""
    given = {"externalTrafficPolicy": LOCAL, "healthCheckNodePort": 31000, **spec}
    return service(type="LoadBalancer", external=(OUTSIDE4,), ingress=({"ip": BALANCER4},), **given)


def everywhere(what: str) -> dict[str, str]:
    return dict.fromkeys(("node", "node outside", "external", "balancer"), what)


def hinted(letters: str, node: str, zone: str, *, by_node: bool = False) -> list[Json]:
    return ready(letters, node, zones=(zone,), nodes=(node,) if by_node else ())


POLICIES = (
    # -- internalTrafficPolicy ------------------------------------------------------------------
    Case(
        "internalTrafficPolicy Cluster takes all",
        service(internalTrafficPolicy="Cluster"),
        SPLIT,
        {"cluster": "a b"},
    ),
    Case(
        "internalTrafficPolicy Local takes those of this node",
        service(internalTrafficPolicy=LOCAL),
        SPLIT,
        {"cluster": "a"},
    ),
    Case(
        "internalTrafficPolicy Local without an endpoint here drops",
        service(internalTrafficPolicy=LOCAL),
        ELSEWHERE,
        {"cluster": "drop"},
    ),
    Case(
        "internalTrafficPolicy Local without an endpoint anywhere rejects",
        service(internalTrafficPolicy=LOCAL),
        [piece(*broken("a"))],
        {"cluster": "reject"},
    ),
    Case(
        "internalTrafficPolicy Local says nothing of addresses outside",
        outside(internalTrafficPolicy=LOCAL, externalTrafficPolicy="Cluster"),
        ELSEWHERE,
        {"cluster": "drop", **everywhere("b")},
    ),
    # -- externalTrafficPolicy ------------------------------------------------------------------
    Case(
        "externalTrafficPolicy Local: outside reaches this node's, pods and the node all",
        outside(),
        SPLIT,
        {"cluster": "a b", **everywhere("a")},
        inside={"cluster": "a b", **everywhere("a b")},
        plan={"policy_local": True, "health_port": 31000, "local_ready": 1},
    ),
    Case(
        "externalTrafficPolicy Local with endpoints elsewhere drops outside and serves inside",
        outside(),
        ELSEWHERE,
        {"cluster": "b", **everywhere("drop")},
        inside={"cluster": "b", **everywhere("b")},
        plan={"local_ready": 0},
    ),
    Case(
        "externalTrafficPolicy Local without any endpoint rejects",
        outside(),
        [piece(*broken("ab"))],
        {"cluster": "reject", **everywhere("reject")},
    ),
    Case(
        "externalTrafficPolicy Cluster: everybody reaches all",
        outside(externalTrafficPolicy="Cluster"),
        SPLIT,
        {"cluster": "a b", **everywhere("a b")},
        plan={"policy_local": False, "health_port": 0},
    ),
    Case(
        "both policies Local: pods reach all on external addresses, this node's on the ClusterIP",
        outside(internalTrafficPolicy=LOCAL),
        SPLIT,
        {"cluster": "a", **everywhere("a")},
        inside={"cluster": "a", **everywhere("a b")},
    ),
    Case(
        "externalTrafficPolicy Local counts for a ClusterIP service with external IPs",
        service(external=(OUTSIDE4,), externalTrafficPolicy=LOCAL),
        SPLIT,
        {"cluster": "a b", "external": "a"},
        inside={"cluster": "a b", "external": "a b"},
        plan={"health_port": 0},
    ),
    Case(
        "externalTrafficPolicy Local of a NodePort service has no health check port",
        service(type="NodePort", externalTrafficPolicy=LOCAL, healthCheckNodePort=31000),
        SPLIT,
        {"node": "a"},
        inside={"node": "a b"},
        plan={"health_port": 0, "policy_local": True},
    ),
    Case(
        "the health check counts addresses of ready endpoints, not ports",
        outside(),
        [
            piece(*ready("ab"), *ready("c", THERE), *going("d"), name="w-1"),
            piece(*ready("a"), name="w-2", ports=[{"name": "more", "port": 9}]),
            piece(*ready("e"), name="w-3", ports=[{"name": "numberless"}]),
        ],
        plan={"local_ready": 2},
    ),
    Case(
        "the health check of a dual-stack Service counts a pod once",
        outside(ips=(VIP4, VIP6)),
        [piece(*ready("a")), piece(*ready("a", family=6), name="six", kind="IPv6")],
        plan={"local_ready": 1},
    ),
    # -- trafficDistribution, by hints ----------------------------------------------------------
    Case(
        "every ready endpoint has a node hint and one names this node",
        service(trafficDistribution="PreferSameNode"),
        [piece(*hinted("a", HERE, "z1", by_node=True), *hinted("b", THERE, "z2", by_node=True))],
        {"cluster": "a"},
    ),
    Case(
        "node hints of which none names this node: by zone then",
        service(),
        [
            piece(
                *ready("a", "near", zones=("z1",), nodes=("near",)),
                *hinted("b", THERE, "z2", by_node=True),
            )
        ],
        {"cluster": "a"},
    ),
    Case(
        "a ready endpoint without a node hint: by zone then",
        service(),
        [piece(*hinted("a", HERE, "z1", by_node=True), *ready("b", THERE, zones=("z1", "z2")))],
        {"cluster": "a b"},
    ),
    Case(
        "zone hints that name this zone",
        service(),
        [piece(*hinted("ab", HERE, "z1"), *hinted("c", THERE, "z2"))],
        {"cluster": "a b"},
    ),
    Case(
        "zone hints of which none names this zone: all",
        service(),
        [piece(*hinted("a", THERE, "z2"), *hinted("b", THERE, "z3"))],
        {"cluster": "a b"},
    ),
    Case(
        "one ready endpoint without a zone hint: all",
        service(),
        [piece(*hinted("a", HERE, "z1"), *hinted("b", THERE, "z2"), *ready("c", THERE))],
        {"cluster": "a b c"},
    ),
    Case(
        "endpoints that are not ready do not count for completeness",
        service(),
        [piece(*hinted("a", HERE, "z1"), *hinted("b", THERE, "z2"), *broken("c"))],
        {"cluster": "a"},
    ),
    Case(
        "a hint of an endpoint that is not ready names nothing",
        service(),
        [piece(*broken("a", zones=("z1",)), *hinted("b", THERE, "z2"))],
        {"cluster": "b"},
    ),
    Case(
        "a node without a zone uses all",
        service(),
        [piece(*hinted("a", HERE, "z1"), *hinted("b", THERE, "z2"))],
        {"cluster": "a b"},
        node=here(zone=""),
    ),
    Case(
        "node hints do not need a zone",
        service(),
        [piece(*hinted("a", HERE, "z1", by_node=True), *hinted("b", THERE, "z2", by_node=True))],
        {"cluster": "a"},
        node=here(zone=""),
    ),
    Case(
        "an endpoint hinted for several zones serves each",
        service(),
        [piece(*ready("a", THERE, zones=("z1", "z2")), *hinted("b", THERE, "z2"))],
        {"cluster": "a"},
    ),
    Case(
        "the endpoint's own zone is no hint",
        service(),
        [piece({**endpoint("a"), "zone": "z1"}, {**endpoint("b", THERE), "zone": "z2"})],
        {"cluster": "a b"},
    ),
    Case(
        "hints count whatever trafficDistribution says",
        service(trafficDistribution="PreferClose"),
        [piece(*ready("a"), *ready("b", THERE))],
        {"cluster": "a b"},
    ),
    Case(
        "policy Local ignores hints",
        service(internalTrafficPolicy=LOCAL),
        [piece(*hinted("a", HERE, "z2"), *hinted("b", THERE, "z1"))],
        {"cluster": "a"},
    ),
    Case(
        "externalTrafficPolicy Local ignores hints, and clients of this node heed them",
        outside(),
        [piece(*hinted("a", HERE, "z2"), *hinted("b", THERE, "z1"))],
        {"cluster": "b", **everywhere("a")},
        inside={"cluster": "b", **everywhere("b")},
    ),
    Case(
        "hints are judged in each family by itself",
        service(ips=(VIP4, VIP6)),
        [
            piece(*hinted("a", HERE, "z1"), *hinted("b", THERE, "z2")),
            piece(*ready("a", family=6), *ready("b", THERE, family=6), name="six", kind="IPv6"),
        ],
        {"cluster": "a", "cluster6": "a b"},
    ),
)
