"""Everything that one node should have, computed from scratch: the twin of the incremental agent.

`netpol-ctl render` prints it, tests walk packets through it, and the agent's state must equal it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from netpol.model.ids import ChainName, Direction, SetName
from netpol.model.net import FAMILIES, Family, family_of
from netpol.model.ruleset import (
    AddressPort,
    Chain,
    Member,
    Members,
    Ruleset,
    SetKind,
    SetSpec,
)
from netpol.policy.graph import ClassKey, Graph, LocalPod
from netpol.policy.members import PortSet, SetKey
from netpol.policy.world import World
from netpol.render import classes, names, policies, reject, static
from netpol.render.options import FIRST_CLASS, RenderOptions

T = TypeVar("T")

#: Policies, or address sets, of one part of `set_parts`: about a millisecond of work.
_PART = 16


@dataclass(frozen=True, slots=True)
class Desired:
    """Sets with members, and the tables of each family: mangle judges, filter answers (or is empty)."""

    sets: dict[SetName, tuple[SetSpec, Members]]
    rulesets: dict[Family, Ruleset]
    filters: dict[Family, Ruleset] = field(default_factory=dict)


def graph_of(world: World, node: str) -> Graph:
    """A graph that has seen the whole world and was flushed."""
    graph = Graph(node)
    for namespace in world.namespaces.values():
        graph.upsert_namespace(namespace)
    for pod in world.pods.values():
        graph.upsert_pod(pod)
    for policy in world.policies.values():
        graph.upsert_policy(policy)
    graph.flush(together=True)
    return graph


def render_node(world: World, node: str, options: RenderOptions | None = None) -> Desired:
    """What a node would get from a fresh start."""
    return render_graph(graph_of(world, node), options or RenderOptions())


def render_graph(
    graph: Graph, options: RenderOptions, numbers: dict[ClassKey, int] | None = None
) -> Desired:
    """What a flushed graph stands for; class numbers as given, or counted up in order of name."""
    used = classes_in_use(graph)
    if numbers is None:
        numbers = fresh_numbers(used, options)
    rulesets: dict[Family, Ruleset] = {}
    overflow = [k for k in used if k not in numbers]
    for family in FAMILIES:
        chains: dict[ChainName, Chain] = static.static_chains(options, family)
        for direction in Direction:
            chains |= classes.tree_chains(
                direction, numbers, overflow, options=options, family=family
            )
        for key in used:
            chains[names.class_chain(key)] = classes.class_rules(key, options, family)
        for identity, policy in graph.active_policies.items():
            for direction in identity.isolates:
                chain = names.policy_chain(identity, direction)
                chains[chain] = policies.policy_rules(policy, direction, family)
        rulesets[family] = Ruleset(chains, static.hook_jumps(options))
    sets: dict[SetName, tuple[SetSpec, Members]] = {}
    for part in set_parts(graph, options, numbers):
        sets.update(part)
    return Desired(sets, rulesets, {f: reject.filter_ruleset(options, f) for f in FAMILIES})


def set_parts(
    graph: Graph, options: RenderOptions, numbers: Mapping[ClassKey, int]
) -> Iterator[dict[SetName, tuple[SetSpec, Members]]]:
    """All sets with members, some at a time, so that a reader need not do all at once.

    The parts are of one moment only if the graph does not change in between.
    """
    for family in FAMILIES:
        yield _pod_sets(graph, options, numbers, family)
    for some in _batches(list(graph.active_policies.values())):
        yield {
            name: found
            for policy in some
            for family in FAMILIES
            for name, found in policies.policy_net_sets(policy, family).items()
        }
    for keys in _batches(list(graph.members.active())):
        part: dict[SetName, tuple[SetSpec, Members]] = {}
        for key in keys:
            for family in FAMILIES:
                spec = member_spec(key, family)
                part[spec.name] = spec, member_values(graph, key, family)
        yield part


def _pod_sets(
    graph: Graph, options: RenderOptions, numbers: Mapping[ClassKey, int], family: Family
) -> dict[SetName, tuple[SetSpec, Members]]:
    """What local pods and the node itself have: maps, overflow sets, what IPVS serves."""
    sets: dict[SetName, tuple[SetSpec, dict[Member, int | None]]] = {}

    def put(spec: SetSpec, members: Members) -> None:
        sets.setdefault(spec.name, (spec, {}))[1].update(members)

    if options.ipvs_services is not None:
        put(static.ipvs_spec(family), static.ipvs_members(options, family))
    for spec, members in static.answer_sets(options, family):
        put(spec, members)
    for direction in Direction:
        put(
            classes.map_spec(direction, family),
            classes.fixed_map_members(direction, options, family),
        )
    for key in classes_in_use(graph):
        if key not in numbers:
            put(classes.overflow_spec(key, family), {})
    for pod in graph.local_pods.values():
        for spec, members in classes.pod_set_members(pod, numbers, options, family).values():
            put(spec, members)
    return dict(sets)


def _batches(items: list[T]) -> Iterator[list[T]]:
    for at in range(0, len(items), _PART):
        yield items[at : at + _PART]


def classes_in_use(graph: Graph) -> list[ClassKey]:
    """The classes that local pods have, in order of name."""
    return sorted({k for p in graph.local_pods.values() for k in _classes(p)})


def _classes(pod: LocalPod) -> list[ClassKey]:
    return [k for k in (pod.ingress, pod.egress) if k is not None]


def fresh_numbers(used: list[ClassKey], options: RenderOptions) -> dict[ClassKey, int]:
    """Number classes from scratch, each direction for itself, as far as the field goes."""
    out: dict[ClassKey, int] = {}
    for direction in Direction:
        mine = [k for k in used if k.direction is direction]
        mine = mine[: classes.number_capacity(options)]
        out.update({key: number for number, key in enumerate(mine, FIRST_CLASS)})
    return out


def member_spec(key: SetKey, family: Family) -> SetSpec:
    """What the set of a peer, or of a peer's named port, is."""
    kind = SetKind.HASH_IP_PORT if isinstance(key, PortSet) else SetKind.HASH_IP
    return SetSpec(names.member_set(key, family), kind, family)


def member_values(graph: Graph, key: SetKey, family: Family) -> Members:
    """All members of an active set in one family."""
    out: dict[Member, int | None] = {}
    for address, holding in graph.members.holdings(key):
        if family_of(address) is family:
            out.update(dict.fromkeys(members_at(key, address, holding)))
    return out


def members_at(key: SetKey, address: bytes, holding: tuple[int, ...] | None) -> list[Member]:
    """The members that a set has for one address that holds something there."""
    if holding is None:
        return []
    if isinstance(key, PortSet):
        return [AddressPort(address, key.protocol, port) for port in holding]
    return [address]
