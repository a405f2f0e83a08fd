"""Where the addresses of a case live: behind which node, in which namespace of the pool.

Owns the assignment of addresses to homes; `casenet` owns the namespaces and moves the addresses there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from netpol.model.flow import Flow, Party, PartyKind
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES
from netpol.policy.world import World
from tests import engine
from tests.spec.policy.case import Flow as CaseFlow
from tests.spec.policy.case import Step

#: The nodes of every world of the table, and the host that has every other address.
NODES = ("n1", "n2")
OUTSIDE = "outside"
#: Pods of one node at a time, at most.
LEAVES = 7


class Shot(NamedTuple):
    """A new connection of a step in one family, and the verdict that must come."""

    asked: CaseFlow
    flow: Flow

    @property
    def ends(self) -> tuple[bytes, bytes]:
        """Addresses of source and destination."""
        return self.flow.src.address, self.flow.dst.address

    @property
    def port(self) -> tuple[Protocol, int | None]:
        """Protocol, and destination port of those that have one."""
        return self.flow.protocol, self.flow.port


def is_new(flow: CaseFlow) -> bool:
    """Whether a flow is the first packet of a connection, with nothing else prescribed about it."""
    return flow.packet is None or flow.packet in ({}, {"ctstate": "NEW"})


def shots_of(world: World, step: Step) -> tuple[list[Shot], list[tuple[CaseFlow, int]]]:
    """The new connections of a step in every family that both ends have.

    Returns:
        The connections, and the (flow, family) that asked for both families where an end has only one.
    """
    made: list[Shot] = []
    absent: list[tuple[CaseFlow, int]] = []
    for asked in step.flows:
        if not is_new(asked):
            continue
        found = []
        for family in FAMILIES if asked.family is None else (asked.family,):
            try:
                flow = engine.flow(world, asked.src, asked.dst, asked.port, int(family))
            except engine.NoPartyError:
                absent.append((asked, int(family)))
                continue
            found.append(Shot(asked, flow))
        assert found, f"no end of {asked} has an address"
        made += found
    return made, absent


def home_of(world: World, party: Party) -> tuple[str, bool]:
    """The node that an address is on or behind ("outside" without one), and whether it is behind."""
    if party.kind is PartyKind.POD:
        return party.node, True
    if party.kind is PartyKind.NODE:
        return party.node, False
    for node in world.nodes.values():
        if any(r.contains(party.address) for r in node.pod_cidrs):
            return node.name, True
    return OUTSIDE, False


def spaces_of(world: World, shots: Iterable[Shot], before: Mapping[bytes, str]) -> dict[bytes, str]:
    """The namespace of every address that the flows use: "n1", "n1-4" (a pod there) or "outside".

    Whatever stands right stays where it was `before`.
    """
    out: dict[bytes, str] = {}
    groups: dict[tuple[str, str], list[bytes]] = {}
    for party in dict.fromkeys(p for s in shots for p in (s.flow.src, s.flow.dst)):
        home, behind = home_of(world, party)
        if not behind:
            out[party.address] = home
            continue
        # Addresses of one pod share a namespace; one that nobody has is a machine of its own.
        name = party.name if party.kind is PartyKind.POD else str(party.address)
        groups.setdefault((home, name), []).append(party.address)
    taken: set[str] = set()
    late = []
    for (home, name), addresses in groups.items():
        were = [before.get(a, "") for a in addresses]
        keep = next((w for w in were if w.startswith(f"{home}-") and w not in taken), None)
        if keep is None:
            late.append((home, name))
            continue
        taken.add(keep)
        out.update(dict.fromkeys(addresses, keep))
    for home, name in late:
        free = next(s for i in range(LEAVES) if (s := f"{home}-{i}") not in taken)
        taken.add(free)
        out.update(dict.fromkeys(groups[home, name], free))
    return out


def prefix_text(address: bytes) -> str:
    """The address as a host's prefix."""
    return f"{ipaddress.ip_address(address)}/{len(address) * 8}"
