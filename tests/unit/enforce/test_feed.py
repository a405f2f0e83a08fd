"""Two watches, one graph: whatever order their news comes in, a local pod stays what it is."""

from __future__ import annotations

from netpol.enforce.feed import Feed
from netpol.k8s.cache import Change
from netpol.model.ids import ObjectKey
from netpol.model.objects import Endpoint
from netpol.policy.graph import Graph

KEY = ObjectKey("a", "web-0")
OLD = Endpoint(key=KEY, uid="u1", node="n2", addresses=(b"\x0a\x01\x02\x02",), created="2026-01-01")
NEW = Endpoint(key=KEY, uid="u2", node="n1", addresses=(b"\x0a\x01\x01\x02",), created="2026-01-02")
PENDING = Endpoint(key=KEY, uid="u2", node="", phase="Pending", created="2026-01-02")


def feed(cluster: dict[ObjectKey, Endpoint]) -> tuple[Feed, Graph]:
    graph = Graph("n1")
    return Feed(graph, lambda: None, cluster=cluster.get), graph


def test_late_news_of_the_predecessor_elsewhere_does_not_touch_the_local_pod() -> None:
    made, graph = feed({})
    made.cluster_pod(Change(KEY, None, OLD))
    made.local_pod(Change(KEY, None, NEW))
    made.cluster_pod(Change(KEY, OLD, None))
    made.cluster_pod(Change(KEY, None, PENDING))
    made.cluster_pod(Change(KEY, PENDING, NEW))

    assert graph.members.pod(KEY) == NEW


def test_a_local_pod_that_goes_leaves_its_successor_on_another_node() -> None:
    successor = Endpoint(key=KEY, uid="u3", node="n2", addresses=(b"\x0a\x01\x02\x03",))
    cluster = {KEY: successor}
    made, graph = feed(cluster)
    made.local_pod(Change(KEY, None, NEW))
    made.cluster_pod(Change(KEY, NEW, successor))
    made.local_pod(Change(KEY, NEW, None))

    assert graph.members.pod(KEY) == successor


def test_a_local_pod_that_goes_is_gone_though_the_other_watch_still_has_it() -> None:
    made, graph = feed({KEY: NEW})
    made.local_pod(Change(KEY, None, NEW))
    made.local_pod(Change(KEY, NEW, None))

    assert graph.members.pod(KEY) is None


def test_a_remote_pod_that_comes_back_here_waits_for_the_local_watch() -> None:
    made, graph = feed({})
    made.cluster_pod(Change(KEY, None, OLD))
    made.cluster_pod(Change(KEY, OLD, NEW))

    assert graph.members.pod(KEY) is None
