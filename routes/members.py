"""The nodes as BGP sees them, and who is in the right where two of them claim the same: pure.

A kubelet writes its own addresses and annotations: none of them may take what is another node's, or make a
configuration that BIRD refuses on every node.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from netpol.model.net import (
    Family,
    Prefix,
    family_of,
    format_address,
    host_prefix,
    parse_prefix,
)
from netpol.model.objects import Node
from routes.annotations import NodeBgp
from routes.annotations import read as read_annotations
from routes.options import RouteOptions


@dataclass(frozen=True, slots=True)
class Member:
    """A node as BGP sees it.

    Attributes:
        addresses: one of each family.
        pods: podCIDRs that are its own, and nobody else's.
        claimed: podCIDRs that it says it has; where pods run whoever is in the right.
    """

    node: Node
    bgp: NodeBgp
    addresses: Mapping[Family, bytes]
    pods: tuple[Prefix, ...]
    claimed: tuple[Prefix, ...] = ()


#: What no router may tell us: this network, loopback, link-local, multicast and what is reserved.
NEVER = (
    *(
        parse_prefix(p)
        for p in (
            *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
            *("::/128", "::1/128", "fe80::/10", "ff00::/8"),
        )
    ),
    # IPv4-mapped (RFC 4291 section 2.5.5.2), which the parser would read as IPv4.
    Prefix(bytes(10) + b"\xff\xff" + bytes(4), 96),
)


def members_of(
    nodes: Iterable[Node], name: str, options: RouteOptions, problems: list[str]
) -> dict[str, Member]:
    """All nodes by name, with what is theirs; what is not is left out and told in `problems`.

    Args:
        nodes: all of the cluster.
        name: of the node that plans.
        options: the cluster's settings.
        problems: is added to.
    """
    members = {n.name: _member(n, options, problems) for n in sorted(nodes, key=lambda n: n.name)}
    members = _with_own_addresses(members, name, problems)
    members = _without_nodes(members, options, problems)
    return {m.node.name: m for m in _without_overlaps(members.values(), problems)}


def _member(node: Node, options: RouteOptions, problems: list[str]) -> Member:
    member, found = _read_member(node, options.cluster_cidrs)
    problems += found
    return member


# Of a thousand nodes one changes at a time; reading the others again would be half of the work.
@lru_cache(maxsize=16384)
def _read_member(node: Node, cluster_cidrs: tuple[Prefix, ...]) -> tuple[Member, tuple[str, ...]]:
    bgp, found = read_annotations(dict(node.annotations))
    problems = [f"node {node.name}: {p}" for p in found]
    addresses: dict[Family, bytes] = {}
    for address in node.addresses:
        if any(bad.contains(address) for bad in NEVER):
            # A kubelet writes its own: BIRD's refusal of one would stop every node's changes.
            problems.append(f"node {node.name}: {host_prefix(address)} is no address of a node")
        else:
            addresses.setdefault(family_of(address), address)
    pods: list[Prefix] = []
    claimed: list[Prefix] = []
    for block in dict.fromkeys(node.pod_cidrs):
        bounds = [c for c in cluster_cidrs if c.family is block.family]
        if any(overlap(block, bad) for bad in NEVER):
            problems.append(f"node {node.name}: podCIDR {block} is no range that can be routed")
            continue
        claimed.append(block)
        if bounds and not any(c.covers(block) for c in bounds):
            problems.append(f"node {node.name}: podCIDR {block} is outside the cluster's ranges")
        else:
            pods.append(block)
    return Member(node, bgp, addresses, tuple(pods), tuple(claimed)), tuple(problems)


def _rank(member: Member) -> tuple[str, str]:
    """Who is in the right where two nodes claim the same: the older one, then the first by name."""
    return member.node.created, member.node.name


def _with_own_addresses(
    members: Mapping[str, Member], name: str, problems: list[str]
) -> dict[str, Member]:
    """An address that several nodes claim is one's only: two sessions with it would end each other.

    The node that plans knows that its own are its own.
    """
    owner: dict[bytes, Member] = {}
    for m in members.values():
        for a in m.addresses.values():
            there = owner.get(a)
            if there is None or (
                there.node.name != name and (m.node.name == name or _rank(m) < _rank(there))
            ):
                owner[a] = m
    out = {}
    for key, m in members.items():
        lost = {f: a for f, a in m.addresses.items() if owner[a] is not m}
        problems += [
            f"node {key}: {format_address(a)} is the address of node {owner[a].node.name}"
            for a in lost.values()
        ]
        kept = {f: a for f, a in m.addresses.items() if f not in lost}
        out[key] = replace(m, addresses=kept) if lost else m
    return out


def _without_nodes(
    members: Mapping[str, Member], options: RouteOptions, problems: list[str]
) -> dict[str, Member]:
    """A podCIDR may hold no other node's address, no Service range and no whole subnet of nodes.

    Its route would lead what nodes say to each other into a node's pods. Where the subnets of nodes do not
    tell who is in the right (a kubelet writes addresses, and could name one of somebody's pods), the older
    node is.
    """
    holders = sorted((a, m.node.name) for m in members.values() for a in m.addresses.values())
    keys = [a for a, _ in holders]
    out = {}
    for name, m in members.items():
        bad = {}
        for block in m.pods:
            what = _touches(block, options)
            size = len(block.address)
            last = (
                int.from_bytes(block.address, "big") | ((1 << size * 8 - block.length) - 1)
            ).to_bytes(size, "big")
            for a, other in holders[bisect_left(keys, block.address) : bisect_right(keys, last)]:
                if what or other == name or len(a) != size:
                    continue
                known = any(s.contains(a) for s in options.subnets)
                if known or _rank(members[other]) < _rank(m):
                    what = f"{format_address(a)} of node {other}"
            if what:
                bad[block] = what
        problems += [f"node {name}: podCIDR {b} overlaps {w}" for b, w in bad.items()]
        out[name] = replace(m, pods=tuple(p for p in m.pods if p not in bad)) if bad else m
    return out


def _touches(block: Prefix, options: RouteOptions) -> str:
    for c in options.service_cidrs:
        if overlap(block, c):
            return f"the Service range {c}"
    for s in options.subnets:
        if block.covers(s):
            return f"the subnet {s} of nodes"
    return ""


def _without_overlaps(members: Iterable[Member], problems: list[str]) -> Iterable[Member]:
    """Nobody's podCIDR may lie in another node's: the older node keeps it, then the first by name.

    Sorted by network, every overlap is with a block that is still open, so this takes one pass.
    """
    members = list(members)
    rank = {m.node.name: _rank(m) for m in members}
    blocks = sorted(
        ((p, m.node.name) for m in members for p in m.pods),
        key=lambda b: (b[0].family, b[0].address, b[0].length),
    )
    lost: set[tuple[Prefix, str]] = set()
    open_: list[tuple[Prefix, str]] = []
    for block in blocks:
        open_ = [o for o in open_ if o[0].covers(block[0])]
        for other in open_:
            if other in lost or other[1] == block[1]:
                continue
            loser, winner = (block, other) if rank[other[1]] < rank[block[1]] else (other, block)
            if loser not in lost:
                lost.add(loser)
                problems.append(
                    f"node {loser[1]}: podCIDR {loser[0]} overlaps {winner[0]} of node {winner[1]}"
                )
        open_.append(block)
    losers = {name for _, name in lost}
    for m in members:
        if m.node.name in losers:
            yield replace(m, pods=tuple(p for p in m.pods if (p, m.node.name) not in lost))
        else:
            yield m


def router_id(me: Member, members: Iterable[Member], problems: list[str]) -> bytes:
    """The node's BGP identifier (RFC 6286): four bytes that no other speaker of its AS has.

    That of its annotation; or its IPv4 address; or a hash of its name, and another one where an older node
    has the same.

    Args:
        me: the node.
        members: all of the cluster.
        problems: is added to.
    """
    said = {m.bgp.router_id or m.addresses.get(Family.V4): m for m in members if m is not me}
    wanted = me.bgp.router_id or me.addresses.get(Family.V4)
    if wanted is not None:
        other = said.get(wanted)
        if other is not None:
            problems.append(
                f"node {me.node.name}: its BGP identifier {format_address(wanted)} is that of node "
                f"{other.node.name} too: no session inside one AS with it"
            )
        return wanted
    taken = set(said)
    unnamed = [m for m in members if not (m.bgp.router_id or Family.V4 in m.addresses)]
    for m in sorted(unnamed, key=_rank):
        made = _hashed_id(m.node.name, taken)
        if m is me:
            return made
        taken.add(made)
    return _hashed_id(me.node.name, taken)


def _hashed_id(name: str, taken: Collection[bytes | None]) -> bytes:
    """Four bytes out of a name that are not taken; 0.0.0.0 is no identifier."""
    digest = hashlib.sha256(name.encode()).digest()
    while not any(digest[:4]) or digest[:4] in taken:
        digest = hashlib.sha256(digest).digest()
    return digest[:4]


def overlap(one: Prefix, two: Prefix) -> bool:
    """Whether two blocks have an address in common."""
    return one.covers(two) or two.covers(one)
