"""Everything that one node should have, computed from scratch: the twin of the incremental agent.

`netpol-ctl render` prints it, tests walk packets through it, and the agent's state must equal it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from netpol.render import classes, names, policies, static
from netpol.render.options import FIRST_CLASS, RenderOptions


@dataclass(frozen=True, slots=True)
class Desired:
    """Sets with members, and the mangle table of each family."""

    sets: dict[SetName, tuple[SetSpec, Members]]
    rulesets: dict[Family, Ruleset]


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
    sets: dict[SetName, tuple[SetSpec, dict[Member, int | None]]] = {}

    def put(spec: SetSpec, members: Members) -> None:
        sets.setdefault(spec.name, (spec, {}))[1].update(members)

    rulesets: dict[Family, Ruleset] = {}
    overflow = [k for k in used if k not in numbers]
    for family in FAMILIES:
        chains: dict[ChainName, Chain] = static.static_chains(options, family)
        for direction in Direction:
            put(classes.map_spec(direction, family), {})
            put(
                classes.map_spec(direction, family),
                classes.fixed_map_members(direction, options, family),
            )
            chains |= classes.tree_chains(
                direction, numbers, overflow, options=options, family=family
            )
        for key in overflow:
            put(classes.overflow_spec(key, family), {})
        for key in used:
            chains[names.class_chain(key)] = classes.class_rules(key, options, family)
        for identity, policy in graph.active_policies.items():
            for direction in identity.isolates:
                chain = names.policy_chain(identity, direction)
                chains[chain] = policies.policy_rules(policy, direction, family)
            for spec, members in policies.policy_net_sets(policy, family).values():
                put(spec, members)
        for set_key in graph.members.active():
            put(member_spec(set_key, family), member_values(graph, set_key, family))
        for pod in graph.local_pods.values():
            for spec, members in classes.pod_set_members(pod, numbers, options, family).values():
                put(spec, members)
        hooks = {hook: names.hook_chain(hook) for hook in static.HOOKS}
        rulesets[family] = Ruleset(chains, hooks)
    return Desired(dict(sets), rulesets)


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
