"""Masquerade of what pods send out of the cluster: chains and sets as values. Pure.

In nat POSTROUTING, which sees the first packet of a connection, after policy has judged it with the pod's own
address. The chains never change; three sets of each family do:

    POD   whose packets leave masqueraded: this node's pod ranges, or the pods that ask for it
    OFF   pods that are left alone, though their range is in POD
    IN    what is no "out": pods of all nodes, nodes, Services, and what the operator names
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from netpol.model.ids import ROUTES, ChainName, SetName
from netpol.model.net import FAMILIES, Family, Prefix, collapse, family_of, host_prefix
from netpol.model.objects import Endpoint
from netpol.model.ruleset import (
    AddrType,
    Goto,
    Hook,
    Masquerade,
    Members,
    Return,
    Rule,
    Ruleset,
    SetKind,
    SetMatch,
    SetSpec,
    Side,
)
from routes.plan import RoutePlan

TABLE = "nat"
#: Of the hook, and of a connection of a pod.
POSTROUTING = ChainName(f"{ROUTES.prefix}POST")
_LEAVING = ChainName(f"{ROUTES.prefix}OUT")


def _pair(word: str, kind: SetKind) -> dict[Family, SetSpec]:
    return {f: SetSpec(SetName(f"{ROUTES.prefix}{word}{f.value}"), kind, f) for f in FAMILIES}


POD, OFF, IN = (
    _pair("POD", SetKind.HASH_NET),
    _pair("OFF", SetKind.HASH_IP),
    _pair("IN", SetKind.HASH_NET),
)
SPECS: dict[SetName, SetSpec] = {s.name: s for pair in (POD, OFF, IN) for s in pair.values()}


@dataclass(frozen=True, slots=True)
class EgressOptions:
    """What the operator chose.

    Attributes:
        enabled: whether anything of this is there at all.
        by_default: whether pods are masqueraded that nobody says anything about.
        exclude: destinations that see the pod's own address.
    """

    enabled: bool = False
    by_default: bool = True
    exclude: tuple[Prefix, ...] = ()


def ruleset(family: Family) -> Ruleset:
    """The chains and the hook of one family."""
    of_pod = SetMatch(POD[family].name, (Side.SRC,))
    chains = {
        POSTROUTING: (Rule(Goto(_LEAVING), (of_pod,)),),
        _LEAVING: (
            Rule(Return(), (SetMatch(OFF[family].name, (Side.SRC,)),)),
            Rule(Return(), (SetMatch(IN[family].name, (Side.DST,)),)),
            # Nobody answers a multicast group's packets to the node.
            Rule(Return(), (AddrType(Side.DST, "MULTICAST"),)),
            Rule(Masquerade()),
        ),
    }
    return Ruleset(chains, {Hook.POSTROUTING: POSTROUTING})


def members(
    plan: RoutePlan,
    options: EgressOptions,
    pods: Iterable[Endpoint],
    *,
    namespaces: Mapping[str, bool],
    nodes: Iterable[bytes],
) -> dict[SetName, Members]:
    """What stands in the sets.

    Args:
        plan: pod ranges of all nodes, and this node's.
        options: the operator's choice.
        pods: those of this node; `masquerade` of each says otherwise for itself.
        namespaces: those that say otherwise for their pods.
        nodes: addresses of all nodes.
    """
    out: dict[SetName, Members] = {}
    inside = [*plan.pods, *plan.options.cluster_cidrs, *plan.options.service_cidrs, *plan.vips]
    inside += [*options.exclude, *map(host_prefix, nodes)]
    on: set[bytes] = set()
    off: set[bytes] = set()
    for pod in pods:
        if not pod.policed:
            continue
        wanted = pod.masquerade
        if wanted is None:
            wanted = namespaces.get(pod.key.namespace, options.by_default)
        (on if wanted else off).update(pod.addresses)
    own = plan.own_pods if options.by_default else ()
    for family in FAMILIES:
        # A pod's address may come from elsewhere than the node's podCIDR.
        mine = [p for p in own if p.family is family]
        alone = [a for a in on if family_of(a) is family and not any(p.contains(a) for p in mine)]
        out[POD[family].name] = dict.fromkeys([*mine, *map(host_prefix, alone)])
        out[OFF[family].name] = dict.fromkeys(a for a in off if family_of(a) is family)
        out[IN[family].name] = dict.fromkeys(
            half
            for p in collapse(p for p in inside if p.family is family)
            for half in _as_sets_take(p)
        )
    return out


def _as_sets_take(prefix: Prefix) -> Iterable[Prefix]:
    """hash:net has no /0: its two halves stand for it."""
    if prefix.length:
        return (prefix,)
    size = len(prefix.address)
    return (Prefix(bytes(size), 1), Prefix(b"\x80" + bytes(size - 1), 1))
