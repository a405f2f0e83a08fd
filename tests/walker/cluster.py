"""A cluster of rendered rules: which hooks of which nodes a connection passes, and what they say.

Owns the topology that the rules are written for: pods behind one bridge on each node, one link between the
nodes and to the outside. The rules come from `render_node` and pass through their text forms, exactly
those that the drivers write.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any, NamedTuple

from netpol.kernel.drivers import AddMembers, CreateSet, SetTransaction, TableTransaction
from netpol.kernel.set_text import restore_text
from netpol.kernel.table_text import transaction_text
from netpol.model.flow import Flow, Party, PartyKind
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES, Family, Prefix
from netpol.policy.world import World
from netpol.render.node import Desired, render_node
from netpol.render.options import DEFAULT_FIELD_MASK, DENIED, DenyWith, RenderOptions
from tests.walker.packet import Packet, WalkError
from tests.walker.sets import parse_sets
from tests.walker.tables import Step, Table, Walk, parse_table

BRIDGE, UPLINK = "cni0", "eth0"
#: Bits that others own (kube-proxy's, and one more): they must come out as they went in.
FOREIGN_MARK = 0x0000_C001
PROTOCOLS = {
    Protocol.TCP: "tcp",
    Protocol.UDP: "udp",
    Protocol.SCTP: "sctp",
    Protocol.ICMP: "icmp",
    Protocol.ICMPV6: "ipv6-icmp",
}
ECHO_REQUEST = {Protocol.ICMP: 8, Protocol.ICMPV6: 128}


class Text(NamedTuple):
    """What a node would be fed: `ipset restore`, and `iptables-restore` of each family and table."""

    sets: str
    tables: dict[Family, str]
    filters: dict[Family, str]


class Hop(NamedTuple):
    """One hook of one node that a packet passes."""

    node: str
    hook: str
    iif: str
    oif: str


class Outcome(NamedTuple):
    """A connection's first packet through all hooks; the last one is where it was dropped, if it was."""

    passed: bool
    hops: tuple[tuple[Hop, Walk], ...]

    def __str__(self) -> str:
        return "\n".join(f"{hop.node} {hop.hook}: {walk}" for hop, walk in self.hops)


def text_of(desired: Desired, *, field_mask: int) -> Text:
    """Write a node's desired state as its drivers would."""
    ops: list[CreateSet | AddMembers] = []
    for spec, members in desired.sets.values():
        ops.append(CreateSet(spec, len(members)))
        ops.append(AddMembers(spec, members))
    tables, filters = (
        {
            family: transaction_text(
                TableTransaction(table, family, replace=rules.chains, hooks=rules.hooks)
            )
            for family, rules in rulesets.items()
        }
        for table, rulesets in (("mangle", desired.rulesets), ("filter", desired.filters))
    )
    return Text(restore_text(SetTransaction(tuple(ops)), mark_mask=field_mask), tables, filters)


def gateways(ranges: tuple[Prefix, ...]) -> list[bytes]:
    """The first address of each pod range, which the bridge has."""
    return [(int.from_bytes(r.address, "big") + 1).to_bytes(len(r.address), "big") for r in ranges]


def options_of(
    world: World,
    node: str,
    *,
    field_mask: int = DEFAULT_FIELD_MASK,
    deny_with: DenyWith = DenyWith.DROP,
) -> RenderOptions:
    """The options with which a node of this topology renders."""
    known = world.nodes[node]
    own = (*known.addresses, *gateways(known.pod_cidrs))
    return RenderOptions(
        field_mask=field_mask,
        pod_interfaces=(BRIDGE,),
        hold_ranges=known.pod_cidrs,
        own_addresses=own,
        deny_with=deny_with,
    )


class Cluster:
    """All nodes of a world with their rules."""

    def __init__(
        self,
        world: World,
        texts: dict[str, Text],
        *,
        field_mask: int = DEFAULT_FIELD_MASK,
        foreign_mark: int = FOREIGN_MARK,
        nets: dict[str, Text] | None = None,
    ) -> None:
        """Args: nets: whose last hook of mangle a packet meets, where that is of another moment."""
        self.world, self.texts, self.field_mask = world, texts, field_mask
        self.foreign_mark = foreign_mark
        self._tables: dict[tuple[str, Family], Table] = {}
        self._filters: dict[tuple[str, Family], Table] = {}
        self._nets: dict[tuple[str, Family], Table] = {}
        self._local = {
            name: frozenset(
                ipaddress.ip_address(a) for a in (*node.addresses, *gateways(node.pod_cidrs))
            )
            for name, node in world.nodes.items()
        }
        for node, text in texts.items():
            sets = parse_sets(text.sets)
            for family in FAMILIES:
                at = node, family
                self._tables[at] = parse_table(text.tables[family], int(family), sets)
                self._filters[at] = parse_table(text.filters.get(family, ""), int(family), sets)
                last = (nets or texts)[node].tables[family]
                self._nets[at] = parse_table(last, int(family), sets) if nets else self._tables[at]

    @classmethod
    def rendered(
        cls,
        world: World,
        *,
        field_mask: int = DEFAULT_FIELD_MASK,
        foreign_mark: int = FOREIGN_MARK,
        deny_with: DenyWith = DenyWith.DROP,
    ) -> Cluster:
        """Render every node of a world."""
        texts = {}
        for node in world.nodes:
            options = options_of(world, node, field_mask=field_mask, deny_with=deny_with)
            texts[node] = text_of(render_node(world, node, options), field_mask=field_mask)
        return cls(world, texts, field_mask=field_mask, foreign_mark=foreign_mark)

    def place(self, party: Party) -> tuple[str, str]:
        """Where an address is: ("pod", node), ("host", node) or ("outside", "")."""
        if party.kind is PartyKind.POD:
            return "pod", party.node
        if party.kind is PartyKind.NODE:
            return "host", party.node
        for node in self.world.nodes.values():
            if any(r.contains(party.address) for r in node.pod_cidrs):
                return "pod", node.name
        return "outside", ""

    def hops(self, flow: Flow) -> list[Hop]:
        """The hooks on the way of a new connection's packet."""
        kind, home = self.place(flow.src)
        to_kind, to_home = self.place(flow.dst)
        out: list[Hop] = []
        last_link = BRIDGE if kind == "pod" else UPLINK
        if kind == "host":
            near = to_kind == "pod" and to_home == home
            out.append(Hop(home, "OUTPUT", "", BRIDGE if near else UPLINK))
            if near or (to_kind == "host" and to_home == home):
                return out
            last_link = UPLINK
        elif kind == "pod" and not (to_kind in ("pod", "host") and to_home == home):
            out.append(Hop(home, "FORWARD", BRIDGE, UPLINK))
            last_link = UPLINK
        if to_kind == "pod":
            out.append(Hop(to_home, "FORWARD", last_link, BRIDGE))
        elif to_kind == "host":
            out.append(Hop(to_home, "INPUT", last_link, ""))
        return out

    def packet(self, flow: Flow, **fields: Any) -> Packet:
        """The packet of a flow, with fields set otherwise."""
        base = Packet(
            ipaddress.ip_address(flow.src.address),
            ipaddress.ip_address(flow.dst.address),
            PROTOCOLS[flow.protocol],
            flow.port,
            icmp_type=ECHO_REQUEST.get(flow.protocol),
            mark=self.foreign_mark,
        )
        return replace(base, **fields)

    def walk(self, flow: Flow, *, hook: str | None = None, **fields: Any) -> Outcome:
        """Send a connection's packet through all hooks on its way.

        Args:
            flow: who speaks to whom.
            hook: only this hook of the destination's node (of the source's, where it has none).
            fields: of the packet, see `Packet`.

        Raises:
            WalkError: no node is on the way, or a law of the walker is broken.
        """
        hops = self.hops(flow)
        if hook is not None:
            home = self.place(flow.src)[1] or self.place(flow.dst)[1]
            hops = [Hop(home, hook, "", BRIDGE)]
        if not hops:
            raise WalkError(f"{flow.src} to {flow.dst} passes no node")
        seen: list[tuple[Hop, Walk]] = []
        for hop in hops:
            walk = self._at(hop, flow, fields)
            seen.append((hop, walk))
            if not walk.passed:
                return Outcome(passed=False, hops=tuple(seen))
        return Outcome(passed=True, hops=tuple(seen))

    def walk_at(self, node: str, flow: Flow, **fields: Any) -> Walk:
        """Send a packet through the hook of one node on its way, whatever others say."""
        (hop,) = [h for h in self.hops(flow) if h.node == node]
        return self._at(hop, flow, fields)

    def _at(self, hop: Hop, flow: Flow, fields: dict[str, Any]) -> Walk:
        packet = replace(
            self.packet(flow, **fields), iif=hop.iif, oif=hop.oif, local=self._local[hop.node]
        )
        return self._through(hop, packet, flow.family)

    def _through(self, hop: Hop, packet: Packet, family: Family) -> Walk:
        """Mangle, then filter in the same hook, then (but for INPUT) mangle's last hook."""
        field = self.field_mask
        denied = DENIED * (field & -field)
        mangle, answers = self._tables[hop.node, family], self._filters[hop.node, family]
        stages = [(mangle, hop.hook), (answers, hop.hook)]
        if hop.hook != "INPUT":
            stages.append((self._nets[hop.node, family], "POSTROUTING"))
        trail: list[Step] = []
        prefix, mark = None, packet.mark
        for number, (table, hook) in enumerate(stages, 1):
            left = denied if number < len(stages) else None
            walk = table.walk(hook, replace(packet, mark=mark), field_mask=field, denied=left)
            trail += walk.trail
            prefix, mark = prefix or walk.prefix, walk.mark
            if not walk.passed:
                break
        return Walk(walk.passed, mark, tuple(trail), prefix, walk.answer)
