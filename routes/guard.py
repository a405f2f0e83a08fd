"""Who may send us tunnelled packets: nodes of the cluster and nobody else. Chains and sets as values; pure.

A tunnel's end takes whatever comes: a pod, or a host outside, could send a packet that claims to come from
any pod, and it would enter behind the check of sources that pod interfaces have. So packets of the
overlay's own encapsulation are dropped at INPUT unless an address of a node sent them. What is not our
overlay's is not looked at, and where none are taken there is no rule.
"""

from __future__ import annotations

from collections.abc import Iterable

from netpol.model.ids import ROUTES, ChainName, Protocol, SetName
from netpol.model.net import FAMILIES, Family, family_of
from netpol.model.ruleset import (
    Drop,
    DstPorts,
    Hook,
    IpProtocol,
    Members,
    PortSpan,
    Rule,
    Ruleset,
    SetKind,
    SetMatch,
    SetSpec,
    Side,
)
from routes.options import VXLAN_PORT, Encapsulation
from routes.plan import RoutePlan

TABLE = "filter"
INPUT = ChainName(f"{ROUTES.prefix}IN")
#: Addresses of all nodes.
NODE = {f: SetSpec(SetName(f"{ROUTES.prefix}NODE{f.value}"), SetKind.HASH_IP, f) for f in FAMILIES}
SPECS: dict[SetName, SetSpec] = {s.name: s for s in NODE.values()}

#: IPv4 in IPv4 (RFC 2003), IPv6 in IPv6 (RFC 2473).
_ENCAPSULATED = {Family.V4: Protocol.IPIP, Family.V6: Protocol.IPV6}


def taken(plan: RoutePlan) -> tuple[Encapsulation, ...]:
    """The encapsulations that this node takes packets out of."""
    own = (plan.options.encapsulation,) if plan.tunnels else ()
    return tuple(dict.fromkeys((*own, *plan.options.accept)))


def needed(plan: RoutePlan) -> bool:
    """Whether a node takes tunnelled packets at all."""
    return bool(taken(plan))


def ruleset(plan: RoutePlan, family: Family) -> Ruleset:
    """The chain and its hook; nothing where no tunnelled packets are taken."""
    if not needed(plan):
        return Ruleset()
    stranger = SetMatch(NODE[family].name, (Side.SRC,), negate=True)
    port = DstPorts(Protocol.UDP, (PortSpan(VXLAN_PORT, VXLAN_PORT),))
    what = {
        Encapsulation.VXLAN: (IpProtocol(Protocol.UDP), port),
        Encapsulation.IPIP: (IpProtocol(_ENCAPSULATED[family]),),
    }
    rules = tuple(Rule(Drop(), (*what[e], stranger)) for e in taken(plan))
    return Ruleset({INPUT: rules}, {Hook.INPUT: INPUT})


def members(nodes: Iterable[bytes]) -> dict[SetName, Members]:
    """What stands in the sets: the addresses of all nodes."""
    known = list(nodes)
    return {NODE[f].name: dict.fromkeys(a for a in known if family_of(a) is f) for f in FAMILIES}
