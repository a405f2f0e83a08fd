"""Questions of many addresses and ports: the shortcuts give what judging each alone gives."""

import argparse
import ipaddress
import itertools
import random

import pytest
import yaml

from netpol.ctl import fix, matrix
from netpol.ctl.ends import End, Part, address_part, resolve
from netpol.ctl.explain import choose_family, spans
from netpol.ctl.judge import findings
from netpol.ctl.ports import Span, parse_port
from netpol.ctl.refs import parse_ref
from netpol.ctl.source import offline
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.flow import Flow, Verdict
from netpol.model.ids import Protocol
from netpol.model.net import Family, host_prefix, parse_address
from netpol.policy.evaluate import verdict


def world_text(rng):
    """A small world in which selectors, ranges, names and blocks overlap."""
    out = []
    for i in range(8):
        ports = [
            {"containerPort": 80 + i % 3, "name": "web"},
            {"containerPort": 90, "protocol": "UDP"},
        ]
        out.append(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"p{i}",
                    "namespace": rng.choice("ab"),
                    "labels": {"app": rng.choice("xyz"), "tier": rng.choice("12")},
                },
                "spec": {
                    "nodeName": rng.choice(["n1", "n2"]),
                    "hostNetwork": i == 7,
                    "containers": [{"name": "c", "ports": ports}],
                },
                "status": {"podIPs": [{"ip": f"10.0.0.{i + 1}"}]},
            }
        )
    out += [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"np{i}", "namespace": rng.choice("ab")},
            "spec": {
                "podSelector": rng.choice([{}, {"matchLabels": {"app": rng.choice("xyz")}}]),
                "policyTypes": rng.choice([["Ingress"], ["Egress"], ["Ingress", "Egress"]]),
                "ingress": [{"from": peers(rng), "ports": ports_of(rng)}],
                "egress": [{"to": peers(rng), "ports": ports_of(rng)}],
            },
        }
        for i in range(5)
    ]
    return yaml.safe_dump_all(out)


def peers(rng):
    some = [
        {"podSelector": {"matchLabels": {"tier": rng.choice("12")}}},
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": rng.choice("xyz")}}},
        {"ipBlock": {"cidr": "10.0.0.0/28", "except": [f"10.0.0.{rng.choice([0, 4])}/30"]}},
        {"ipBlock": {"cidr": f"10.0.0.{rng.choice([16, 32])}/27"}},
    ]
    return rng.sample(some, rng.randint(1, 3))


def ports_of(rng):
    some = [{"port": "web"}, {"port": 70, "endPort": 81}, {"protocol": "UDP"}, {"port": 90}]
    return rng.sample(some, rng.randint(0, 3))


@pytest.fixture(params=range(6))
def cluster(request, tmp_path, capsys):
    path = tmp_path / "w.yaml"
    path.write_text(world_text(random.Random(request.param)))
    return offline([str(path)])


def test_the_matrix_is_the_verdict_of_every_pair(cluster):
    everyone = [*matrix.members(cluster, namespace=None), matrix._external("10.0.0.40")]
    asked = [Span(Protocol.TCP, 80, 80), Span(Protocol.TCP, 82, 82), Span(Protocol.UDP, 90, 90)]
    found, _ = matrix.judge(cluster, everyone, asked, family=None)
    world = cluster.world
    for span, src, dst in itertools.product(asked, everyone, everyone):
        if src is dst:
            want = "allow"
        else:
            ends = [
                world.pod_party(m.pod) if m.pod else address_part(cluster, m.address).party
                for m in (src, dst)
            ]
            want = verdict(world, Flow(*ends, span.protocol, span.first)).value
        assert found[str(span)][src.name][dst.name] == want, (span, src.name, dst.name)


def test_blocks_and_ranges_are_the_verdict_of_every_address_and_port(cluster):
    block = parse_ref("10.0.0.0/26", namespace="a")
    for pod in matrix.members(cluster, namespace=None)[:2]:
        ref = parse_ref(pod.name, namespace="a")
        for src_ref, dst_ref in ((block, ref), (ref, block)):
            src = resolve(cluster, src_ref, family=Family.V4, ports=None)
            dst = resolve(cluster, dst_ref, family=Family.V4, ports=[parse_port("60-100")])
            got = {}
            for f in findings(cluster.world, src, dst, [Span(Protocol.TCP, 60, 100)]):
                for s, d, span in itertools.product(f.sources, f.destinations, f.spans):
                    for a, b in itertools.product(hosts(s), hosts(d)):
                        for port in range(span.first, span.last + 1):
                            assert got.setdefault((a, b, port), f.verdict) is f.verdict
            assert len(got) == 64 * 41
            for (a, b, port), given in got.items():
                one, two = cluster.world.party(a), cluster.world.party(b)
                assert verdict(cluster.world, Flow(one, two, Protocol.TCP, port)) is given


def hosts(prefix):
    return [a.packed for a in ipaddress.ip_network(str(prefix))]


def test_fixes_allow_what_was_denied_and_nothing_that_was_open_closes(cluster):
    everyone = matrix.members(cluster, namespace=None)
    asked = [Span(Protocol.TCP, 80, 80)]
    before, _ = matrix.judge(cluster, everyone, asked, family=None)
    tried = 0
    for a, b in itertools.product(everyone, everyone):
        src = resolve(cluster, parse_ref(a.name, namespace=""), family=Family.V4, ports=None)
        dst = resolve(cluster, parse_ref(b.name, namespace=""), family=Family.V4, ports=[])
        found = findings(cluster.world, src, dst, asked)
        bad = [f for f in found if f.verdict is Verdict.DENY]
        if not bad:
            continue
        tried += 1
        manifests = fix.policies(cluster.world, src, dst, bad)
        fix.check(cluster.world, src, dst, found, manifests)
        after = with_policies(cluster, manifests)
        now, _ = matrix.judge(after, everyone, asked, family=None)
        assert now["80/TCP"][a.name][b.name] == "allow"
        for x, y in itertools.product(before["80/TCP"], before["80/TCP"]):
            if before["80/TCP"][x][y] == "allow":
                assert now["80/TCP"][x][y] == "allow"
    assert tried or all(v == "allow" for row in before["80/TCP"].values() for v in row.values())


def with_policies(cluster, manifests):
    from netpol.ctl.source import Cluster, compiled
    from netpol.policy.world import World

    world = cluster.world
    new = compiled(fix._decoded(m) for m in manifests)
    again = World.build(
        namespaces=world.namespaces.values(),
        pods=world.pods.values(),
        policies=[*world.policies.values(), *new],
        nodes=world.nodes.values(),
    )
    return Cluster(world=again)


def test_a_matrix_beyond_reason_is_refused(tmp_path, capsys):
    path = tmp_path / "w.yaml"
    path.write_text(world_text(random.Random(1)))
    args = argparse.Namespace(
        ports=["1-65535"], external=[], files=[str(path)], strict=False, namespace_given=None
    )
    args.ports += ["1-65535/udp", "1-65535/sctp"]
    with pytest.raises(InputError, match="too large a matrix"):
        matrix.run(args)


def test_the_family_is_the_destinations_first_unless_an_address_or_the_user_says(tmp_path, capsys):
    path = tmp_path / "w.yaml"
    path.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: six}\n"
        "status: {podIPs: [{ip: 'fd00::1'}, {ip: 10.0.0.1}]}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: four}\nstatus: {podIPs: [{ip: 10.0.0.2}]}\n"
    )
    cluster = offline([str(path)])
    six, four, outside = (
        parse_ref(t, namespace="default") for t in ("pod/six", "pod/four", "192.0.2.1")
    )
    assert choose_family(cluster, six, six, forced=None) is Family.V6
    assert choose_family(cluster, six, six, forced=4) is Family.V4
    assert choose_family(cluster, six, four, forced=None) is Family.V4
    assert choose_family(cluster, outside, six, forced=None) is Family.V4
    with pytest.raises(NoAnswerError, match="share no IP family"):
        choose_family(cluster, four, six, forced=None)
    with pytest.raises(NoAnswerError, match="has no IPv6 address"):
        choose_family(cluster, four, six, forced=6)


def test_a_name_where_no_pod_can_have_it_is_a_bad_argument():
    address = parse_address("192.0.2.1")
    party = Part(None, "192.0.2.1", None, (host_prefix(address),))
    with pytest.raises(InputError, match="only a pod gives a port a name"):
        spans(End("192.0.2.1", (party,)), [parse_port("http")])
