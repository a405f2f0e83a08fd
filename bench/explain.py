"""An answer of `explain`, from the evaluator to the text, in a world that is built."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from bench import worlds
from bench.measure import Row, p99, settle, spread, timed
from netpol.ctl import explain_doc, explain_text
from netpol.ctl.ends import resolve
from netpol.ctl.explain import spans
from netpol.ctl.judge import findings
from netpol.ctl.ports import parse_port
from netpol.ctl.refs import parse_ref
from netpol.ctl.source import Cluster
from netpol.k8s.decode import Page, decode_list
from netpol.model.net import Family
from netpol.policy.compile import compile_policy
from netpol.policy.world import World

ANSWERS = 2_000


def explain() -> Iterator[Row]:
    """Random pairs of pods and a port, distinct, so that nothing is cached; the text is made too."""
    cluster = worlds.make(worlds.BROAD_WORLD)
    raw = {
        kind: msgspec.json.encode(worlds.as_list(kind, items))
        for kind, items in (
            ("Namespace", cluster.namespaces),
            ("Pod", cluster.pods),
            ("NetworkPolicy", cluster.policies),
            ("Node", cluster.nodes),
        )
    }
    pages: dict[str, list[Any]] = {
        kind: [i.value for i in _page(kind, body).items] for kind, body in raw.items()
    }
    compiled = [compile_policy(p) for p in pages["NetworkPolicy"]]

    def build() -> World:
        return World.build(
            namespaces=pages["Namespace"],
            pods=pages["Pod"],
            policies=compiled,
            nodes=pages["Node"],
        )

    settle()
    build_ms = min(timed(build) for _ in range(5)) * 1000
    where = Cluster(build(), offline=True)
    rng = random.Random(8)
    names = [f"{p.key.namespace}/pod/{p.key.name}" for p in pages["Pod"]]
    samples, words = [], 0
    for _ in range(ANSWERS):
        source, target = rng.sample(names, 2)
        begin = time.perf_counter()
        words += len(_answer(where, source, target, str(rng.choice(worlds.PORTS))))
        samples.append((time.perf_counter() - begin) * 1000)
    yield Row(
        "explain.p99_ms",
        p99(samples),
        "ms",
        target=200.0,
        note=f"{spread(samples)}; {words // ANSWERS} characters each",
    )
    yield Row("explain.world.ms", build_ms, "ms", note="World.build from objects in memory")


def _page(kind: str, body: bytes) -> Page[Any]:
    page: Page[Any] = decode_list(kind, body)
    return page


def _answer(where: Cluster, source: str, target: str, port: str) -> str:
    ports = [parse_port(port)]
    src = resolve(where, parse_ref(source, namespace=""), family=Family.V4, ports=None)
    dst = resolve(where, parse_ref(target, namespace=""), family=Family.V4, ports=ports)
    found = findings(where.world, src, dst, spans(dst, ports))
    explain_doc.connection(src, dst, found, offline=True)
    return explain_text.connection(src, dst, found)
