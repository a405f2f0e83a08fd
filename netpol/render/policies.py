"""One policy's rules as a chain, and the prefix sets they need.

A rule that matches goes to the OK chain, which clears the mark field. Ports stand before sets, since a
set lookup costs more than any other match.
"""

from __future__ import annotations

from collections.abc import Iterator

from netpol.model.ids import PORT_MAX, PORT_MIN, Direction, ObjectKey, Protocol, SetName
from netpol.model.net import Family, Prefix, collapse, masked, prefixes_of
from netpol.model.policy import (
    BlockPeer,
    CompiledPolicy,
    PodPeer,
    PolicyRule,
    PortName,
    PortRange,
)
from netpol.model.ruleset import (
    COMMENT_MAX,
    Chain,
    DstPorts,
    Goto,
    IpProtocol,
    Match,
    Members,
    NetMatch,
    PortSpan,
    Rule,
    SetKind,
    SetMatch,
    SetSpec,
    Side,
)
from netpol.policy.members import ALL_PODS, LocalPods, PortSet
from netpol.render import names

#: Slots of one multiport match (XT_MULTI_PORTS); a span takes two.
_MULTIPORT_SLOTS = 15


def policy_rules(policy: CompiledPolicy, direction: Direction, family: Family) -> Chain:
    """The chain of one direction of a policy."""
    out: list[Rule] = []
    for number, rule in enumerate(policy.rules(direction)):
        comment = comment_of(policy.key, f"{direction}[{number}]")
        for matches in _rule(rule, direction, family):
            candidate = Rule(Goto(names.OK), matches, comment)
            if candidate not in out:
                out.append(candidate)
    return tuple(out)


def comment_of(key: ObjectKey, tail: str = "") -> str:
    """An object's name as a comment that the kernel does not cut."""
    text = f"{key} {tail}".rstrip()
    return text if len(text) <= COMMENT_MAX else f"{text[: COMMENT_MAX - 3]}..."


def policy_net_sets(
    policy: CompiledPolicy, family: Family
) -> dict[SetName, tuple[SetSpec, Members]]:
    """The prefix sets that a policy's ipBlocks need in one family."""
    out: dict[SetName, tuple[SetSpec, Members]] = {}
    for direction in policy.isolates:
        for rule in policy.rules(direction):
            prefixes = _prefixes(rule, family)
            if len(prefixes) > 1:
                name = names.net_set(prefixes, family)
                members: Members = dict.fromkeys(_without_zero(prefixes))
                out[name] = SetSpec(name, SetKind.HASH_NET, family), members
    return out


def _without_zero(prefixes: tuple[Prefix, ...]) -> Iterator[Prefix]:
    """hash:net refuses /0: it becomes two halves."""
    for prefix in prefixes:
        if prefix.length:
            yield prefix
        else:
            yield masked(prefix.address, 1)
            yield masked(b"\x80" + prefix.address[1:], 1)


def _rule(rule: PolicyRule, direction: Direction, family: Family) -> Iterator[tuple[Match, ...]]:
    side = Side.SRC if direction is Direction.INGRESS else Side.DST
    peers = list(_peer_matches(rule, side, family))
    numbers, named = _split_ports(rule)
    for ports in numbers:
        for peer in peers:
            yield _join(ports, peer)
    for name in named:
        if direction is Direction.INGRESS:
            at = _port_set_match(PortSet(LocalPods(), name.protocol, name.name), family)
            for peer in peers:
                yield _join((IpProtocol(name.protocol), at), peer)
            continue
        # A name means something only on a pod: the set holds the peers' addresses with their numbers.
        pods = [p for p in rule.peers if isinstance(p, PodPeer)] if rule.peers else [ALL_PODS]
        for pod in pods:
            at = _port_set_match(PortSet(pod, name.protocol, name.name), family)
            yield (IpProtocol(name.protocol), at)


def _join(ports: tuple[Match, ...], peer: tuple[Match, ...]) -> tuple[Match, ...]:
    """Ports before peers, but addresses first of all, where the kernel looks at them anyway."""
    first = tuple(m for m in peer if isinstance(m, NetMatch))
    return (*first, *ports, *(m for m in peer if m not in first))


def _port_set_match(key: PortSet, family: Family) -> SetMatch:
    return SetMatch(names.member_set(key, family), (Side.DST, Side.DST))


def _peer_matches(rule: PolicyRule, side: Side, family: Family) -> Iterator[tuple[Match, ...]]:
    if rule.peers is None:
        yield ()
        return
    prefixes = _prefixes(rule, family)
    if len(prefixes) == 1:
        # The whole family needs no match: the table is the family.
        yield (NetMatch(side, prefixes[0]),) if prefixes[0].length else ()
    elif prefixes:
        yield (SetMatch(names.net_set(prefixes, family), (side,)),)
    for peer in dict.fromkeys(rule.peers):
        if isinstance(peer, PodPeer):
            yield (SetMatch(names.member_set(peer, family), (side,)),)


def _prefixes(rule: PolicyRule, family: Family) -> tuple[Prefix, ...]:
    """The union of a rule's ipBlocks, each without its own excepts, in one family."""
    blocks = [p for p in rule.peers or () if isinstance(p, BlockPeer)]
    return collapse(prefixes_of((x for b in blocks for x in b.prefixes), family))


def _split_ports(rule: PolicyRule) -> tuple[list[tuple[Match, ...]], list[PortName]]:
    """The numeric ports as matches (one for each protocol, or more), and the named ones."""
    if rule.ports is None:
        return [()], []
    named = [p for p in rule.ports if isinstance(p, PortName)]
    by_protocol: dict[Protocol, list[PortSpan]] = {}
    for port in rule.ports:
        if isinstance(port, PortRange):
            by_protocol.setdefault(port.protocol, []).append(PortSpan(port.first, port.last))
    out: list[tuple[Match, ...]] = []
    for protocol, spans in by_protocol.items():
        merged = _merge(spans)
        if merged == [PortSpan(PORT_MIN, PORT_MAX)]:
            out.append((IpProtocol(protocol),))
            continue
        out.extend((IpProtocol(protocol), DstPorts(protocol, chunk)) for chunk in _chunks(merged))
    return out, named


def _merge(spans: list[PortSpan]) -> list[PortSpan]:
    out: list[PortSpan] = []
    for span in sorted(spans):
        if out and span.first <= out[-1].last + 1:
            out[-1] = PortSpan(out[-1].first, max(out[-1].last, span.last))
        else:
            out.append(span)
    return out


def _chunks(spans: list[PortSpan]) -> Iterator[tuple[PortSpan, ...]]:
    chunk: list[PortSpan] = []
    slots = 0
    for span in spans:
        need = 1 if span.first == span.last else 2
        if slots + need > _MULTIPORT_SLOTS:
            yield tuple(chunk)
            chunk, slots = [], 0
        chunk.append(span)
        slots += need
    yield tuple(chunk)
