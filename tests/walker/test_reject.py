"""`--deny-with=reject` in the walker: who is told, how, and who must not be."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from netpol.model.flow import Flow
from netpol.model.net import Family
from netpol.render.options import DENIED, DenyWith
from tests import builders as make
from tests import engine
from tests.spec.policy.case import B_WEB, N1, N1_6, TOOL, WEB, with_
from tests.walker.cluster import BRIDGE, Cluster, Hop, Text
from tests.walker.tables import Walk

#: A pod that hears nobody, and one that says nothing, on one node.
DEAF = make.policy("c/deaf", make.selector(role="tool"), types=["Ingress"])
MUTE = make.policy("a/mute", make.selector(role="web"), types=["Egress"])
VALUE = DENIED << 20
FAMILIES = pytest.mark.parametrize("family", [4, 6])
SYN, ACK, RST = frozenset({"SYN"}), frozenset({"ACK"}), frozenset({"RST", "ACK"})


def cluster_of(*policies: make.Json, deny_with: DenyWith = DenyWith.REJECT) -> Cluster:
    return Cluster.rendered(engine.build(with_(*policies)), deny_with=deny_with)


def flow_of(cluster: Cluster, port: str, family: int, to: str = TOOL) -> Flow:
    return engine.flow(cluster.world, WEB, to, port, family)


def at(cluster: Cluster, hook: str, flow: Flow, iif: str = BRIDGE, **fields: object) -> Walk:
    return cluster._at(Hop("n1", hook, iif, ""), flow, dict(fields))


PROHIBITED = {4: "icmp-admin-prohibited", 6: "icmp6-adm-prohibited"}


@FAMILIES
@pytest.mark.parametrize(
    ("port", "fields", "answer"),
    [
        ("80/TCP", {}, "tcp-reset"),
        ("80/TCP", {"dnat": True}, "prohibited"),
        ("53/UDP", {}, "prohibited"),
        ("53/UDP", {"dnat": True}, "prohibited"),
        ("90/SCTP", {}, "prohibited"),
        ("ICMP", {}, "prohibited"),
        # The middle of a connection, perhaps the other end's.
        ("80/TCP", {"tcp_flags": ACK}, ""),
        ("80/TCP", {"tcp_flags": SYN | ACK}, ""),
        ("80/TCP", {"tcp_flags": RST}, ""),
        ("80/TCP", {"ctstate": "INVALID"}, ""),
        ("53/UDP", {"ctstate": "INVALID"}, ""),
    ],
)
@pytest.mark.parametrize("policy", [DEAF, MUTE], ids=["ingress", "egress"])
def test_answers(
    policy: make.Json, port: str, fields: dict[str, Any], answer: str, family: int
) -> None:
    cluster = cluster_of(policy)
    walk = cluster.walk(flow_of(cluster, port, family), **fields).hops[-1][1]
    assert not walk.passed
    assert walk.answer == (PROHIBITED[family] if answer == "prohibited" else answer)
    silent = cluster_of(policy, deny_with=DenyWith.DROP)
    before = silent.walk(flow_of(silent, port, family), **fields).hops[-1][1]
    assert walk.prefix == before.prefix
    assert walk.prefix is not None
    assert before.answer == ""


@FAMILIES
def test_held_and_forged_packets_get_no_answer(family: int) -> None:
    cluster = cluster_of()
    nobody = {4: "10.244.1.77", 6: "fd00:10:1::77"}[family]
    held = cluster.walk(engine.flow(cluster.world, WEB, nobody, "80/TCP", family))
    forged = {4: "198.51.100.7", 6: "2001:db8::7"}[family]
    spoofed = cluster.walk(flow_of(cluster, "80/TCP", family), src=ipaddress.ip_address(forged))
    for outcome in (held, spoofed):
        assert not outcome.passed
        assert outcome.hops[-1][1].answer == ""


@FAMILIES
def test_what_input_denies_is_dropped(family: int) -> None:
    cluster = cluster_of(MUTE)
    walk = at(cluster, "INPUT", flow_of(cluster, "80/TCP", family))
    assert (walk.passed, walk.answer) == (False, "")
    free = cluster_of()
    assert at(free, "INPUT", flow_of(free, "80/TCP", family)).passed


@FAMILIES
@pytest.mark.parametrize(
    ("port", "fields", "answer"),
    [
        ("80/TCP", {}, {4: PROHIBITED[4], 6: "tcp-reset"}),
        ("53/UDP", {}, PROHIBITED),
        ("80/TCP", {"tcp_flags": ACK}, {4: "", 6: ""}),
        ("80/TCP", {"ctstate": "INVALID"}, {4: "", 6: ""}),
    ],
)
def test_answers_behind_ipvs(
    port: str, fields: dict[str, Any], answer: dict[int, str], family: int
) -> None:
    cluster = cluster_of(MUTE)
    walk = at(cluster, "OUTPUT", flow_of(cluster, port, family), iif="", **fields)
    assert (walk.passed, walk.answer) == (False, answer[family])


@FAMILIES
@pytest.mark.parametrize("hook", ["FORWARD", "OUTPUT"])
def test_the_value_on_a_packet_that_comes_with_it_means_nothing(hook: str, family: int) -> None:
    """Of an open connection, of the node itself, or of a flow that policy allows."""
    cluster = cluster_of()
    flow = flow_of(cluster, "80/TCP", family, B_WEB)
    mark = 0xC001 | VALUE
    assert at(cluster, hook, flow, mark=mark, ctstate="ESTABLISHED").passed
    assert at(cluster, hook, flow, mark=mark).passed
    node = engine.flow(cluster.world, {4: N1, 6: N1_6}[family], WEB, "80/TCP", family)
    assert at(cluster, "OUTPUT", node, iif="", mark=mark).passed


@FAMILIES
def test_the_reset_passes_output_and_no_other_packet_does(family: int) -> None:
    """It has the address of the pod that it speaks for, which may not say anything itself."""
    cluster = cluster_of(MUTE)
    back = engine.flow(cluster.world, WEB, TOOL, "40000/TCP", family)

    def passes(**fields: object) -> bool:
        return at(cluster, "OUTPUT", back, iif="", **fields).passed

    assert passes(ctstate="RELATED", tcp_flags=RST)
    assert passes(ctstate="RELATED", tcp_flags=RST, mark=0xC001 | VALUE)  # fwmark_reflect
    assert not passes(ctstate="RELATED", tcp_flags=SYN)
    assert not passes(tcp_flags=RST)
    datagram = engine.flow(cluster.world, WEB, TOOL, "53/UDP", family)
    assert not at(cluster, "OUTPUT", datagram, iif="", ctstate="RELATED").passed


@FAMILIES
def test_without_filter_postrouting_drops(family: int) -> None:
    world = engine.build(with_(DEAF))
    whole = Cluster.rendered(world, deny_with=DenyWith.REJECT)
    texts = {n: Text(t.sets, t.tables, {}) for n, t in whole.texts.items()}
    flushed = Cluster(world, texts)
    flow = flow_of(flushed, "80/TCP", family)
    walk = flushed.walk(flow).hops[-1][1]
    assert not walk.passed
    assert walk.trail[-1].chain == "KNP-POSTROUTING"
    # Nothing but the net stops it there.
    lines = texts["n1"].tables[Family(family)].splitlines(keepends=True)
    bare = "".join(x for x in lines if "POSTROUTING" not in x)
    with_out = {
        **texts,
        "n1": Text(texts["n1"].sets, {**texts["n1"].tables, Family(family): bare}, {}),
    }
    with pytest.raises(Exception, match="the field is 0x100000 after a pass"):
        Cluster(world, with_out).walk(flow)


def test_a_node_that_drops_has_nothing_of_it() -> None:
    for text in cluster_of(DEAF, deny_with=DenyWith.DROP).texts.values():
        for table in (*text.tables.values(), *text.filters.values()):
            assert "KNP-REJECT" not in table
            assert "POSTROUTING" not in table
            assert "ACCEPT" not in table
