"""The form of the case table: a claim, one world or several in a row, and the flows that prove it.

Cases are data without any of netpol, so that the evaluator, the oracle, rendered rules and real packets
can all be held against the same table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.builders import Json, World, namespace, node, pod, replace, world


class Flow(NamedTuple):
    """One probe.

    Attributes:
        src: a pod as `namespace/name`, or an address.
        dst: likewise.
        port: `80/TCP`, or `ICMP` for an echo request.
        allow: the verdict that must come.
        family: 4, 6, or None for every family that both ends have.
        packet: None for a new connection. Else fields of the packet (ctstate, icmp_type, hop_limit, connmark,
            hook): only rendered rules can be asked then, since the evaluator judges new connections.
    """

    src: str
    dst: str
    port: str
    allow: bool
    family: int | None = None
    packet: dict[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """A world and what holds in it."""

    world: World
    flows: tuple[Flow, ...]


@dataclass(frozen=True)
class Case:
    """One claim of the semantics table.

    Attributes:
        row: the row's number.
        claim: the claim in a few words.
        steps: one world, or several that follow one another.
        part: what of the row is asserted here, where the rest is proven elsewhere.
        invalid: the API server would refuse an object, so that a lab cannot run the case.
    """

    row: str
    claim: str
    steps: tuple[Step, ...]
    part: str = ""
    invalid: bool = False

    @property
    def id(self) -> str:
        """The test id."""
        return f"row{self.row}_" + re.sub(r"\W+", "_", self.claim.lower()).strip("_")


def ok(src: str, dst: str, port: str = "80/TCP", family: int | None = None) -> Flow:
    """A flow that must pass."""
    return Flow(src, dst, port, allow=True, family=family)


def no(src: str, dst: str, port: str = "80/TCP", family: int | None = None) -> Flow:
    """A flow that must not pass."""
    return Flow(src, dst, port, allow=False, family=family)


def packet(flow: Flow, **fields: Any) -> Flow:
    """The flow as a packet with these fields, for rendered rules alone."""
    return flow._replace(packet=fields)


def case(
    row: int | str,
    claim: str,
    objects: list[Json],
    *flows: Flow,
    part: str = "",
    invalid: bool = False,
) -> Case:
    """A claim about `BASE` with these objects put in."""
    step = Step(replace(BASE, *objects), flows)
    return Case(str(row), claim, (step,), part=part, invalid=invalid)


def steps(row: int | str, claim: str, *parts: tuple[World, list[Flow]], part: str = "") -> Case:
    """A claim about worlds that follow one another."""
    made = tuple(Step(state, tuple(flows)) for state, flows in parts)
    return Case(str(row), claim, made, part=part)


def with_(*objects: Json, without: tuple[str, ...] = ()) -> World:
    """`BASE` with objects put in, or gone."""
    return replace(BASE, *objects, without=without)


#: Addresses outside of the cluster (RFC 5737 and RFC 3849).
OUTSIDE = "198.51.100.7"
OUTSIDE_NEAR = "198.51.100.200"
OUTSIDE_OTHER = "203.0.113.9"
OUTSIDE6 = "2001:db8::7"

N1, N1_6 = "172.18.0.2", "fd00:18::2"
N2, N2_6 = "172.18.0.3", "fd00:18::3"

WEB, DB, B_WEB, B_DB, TOOL = "a/web", "a/db", "b/web", "b/db", "c/tool"

#: Two nodes, three namespaces, five dual-stack pods; every role stands on both nodes.
BASE = world(
    node("n1", N1, N1_6, cidrs=("10.244.1.0/24", "fd00:10:1::/64")),
    node("n2", N2, N2_6, cidrs=("10.244.2.0/24", "fd00:10:2::/64")),
    namespace("a", team="red"),
    namespace("b", team="blue"),
    namespace("c", team="blue", tools="yes"),
    pod(
        WEB,
        ip=("10.244.1.10", "fd00:10:1::10"),
        node="n1",
        ports=("http=80/TCP", "dns=53/UDP"),
        role="web",
        tier="front",
    ),
    pod(DB, ip=("10.244.2.10", "fd00:10:2::10"), node="n2", ports=("http=8080/TCP",), role="db"),
    pod(B_WEB, ip=("10.244.1.20", "fd00:10:1::20"), node="n1", ports=("http=80",), role="web"),
    pod(B_DB, ip=("10.244.2.20", "fd00:10:2::20"), node="n2", role="db", tier="back"),
    pod(TOOL, ip=("10.244.1.30", "fd00:10:1::30"), node="n1", role="tool"),
)


def base_pod(ref: str) -> Json:
    """A pod of `BASE`."""
    namespace_name, name = ref.split("/")
    return next(
        p
        for p in BASE["pods"]
        if p["metadata"]["namespace"] == namespace_name and p["metadata"]["name"] == name
    )


def relabelled(ref: str, **labels: str) -> Json:
    """A pod of `BASE` with other labels."""
    old = base_pod(ref)
    return {**old, "metadata": {**old["metadata"], "labels": labels}}
