from collections import Counter

import msgspec

from bench import worlds
from netpol.k8s.decode import KINDS, decode
from netpol.policy.compile import compile_policy


def decoded(kind, objects):
    return [decode(KINDS[kind], msgspec.json.encode(o)).value for o in objects]


def test_a_shape_always_makes_the_same_world():
    shape = worlds.Shape(pods=300, policies=40, local=50, namespaces=10)
    assert worlds.make(shape) == worlds.make(shape)
    assert worlds.make(shape) != worlds.make(worlds.Shape(300, 40, 50, 10, seed=21))


def test_a_world_has_the_size_of_its_shape_and_every_object_is_valid():
    shape = worlds.Shape(pods=500, policies=60, local=110, namespaces=20, broad=True)
    cluster = worlds.make(shape)
    pods = decoded("Pod", cluster.pods)
    assert len({p.key for p in pods}) == len({p.addresses for p in pods}) == 500
    assert Counter(p.node for p in pods)["node1"] == len(cluster.local) == 110
    assert {n.name for n in decoded("Node", cluster.nodes)} >= {p.node for p in pods}
    assert len(decoded("Namespace", cluster.namespaces)) == 20
    policies = [compile_policy(p) for p in decoded("NetworkPolicy", cluster.policies)]
    assert len(policies) == 60
    assert not [p.problems for p in policies if p.problems]


def test_pods_of_a_node_have_addresses_of_its_range():
    cluster = worlds.make(worlds.Shape(pods=400, policies=0))
    ranges = {n.name: n.pod_cidrs[0] for n in decoded("Node", cluster.nodes)}
    assert all(ranges[p.node].contains(p.addresses[0]) for p in decoded("Pod", cluster.pods))


def test_broad_peers_reach_over_namespaces_more_often_than_narrow_ones():
    def wide(*, broad):
        cluster = worlds.make(worlds.Shape(pods=1, policies=400, local=1, broad=broad))
        peers = [p for x in cluster.policies for p in x["spec"]["ingress"][0]["from"]]
        return sum("namespaceSelector" in p for p in peers) / len(peers)

    assert wide(broad=False) < 0.3
    assert wide(broad=True) > 0.5


def test_in_the_dispatchers_worst_case_every_local_pod_is_in_a_class_of_its_own():
    cluster = worlds.one_policy_each(local=30, others=5, namespaces=3)
    policies = [compile_policy(p) for p in decoded("NetworkPolicy", cluster.policies)]
    for pod in decoded("Pod", cluster.local):
        mine = [
            p
            for p in policies
            if p.key.namespace == pod.key.namespace and p.subject.matches(dict(pod.labels))
        ]
        assert len(mine) == 1
        assert len(mine[0].isolates) == 2
