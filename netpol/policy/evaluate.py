"""The judgement of one connection, with every reason.

`verdict` and `evaluate` ask the same predicates (`policy.match`), so they cannot disagree; `evaluate`
also asks those whose answer no longer matters, and words the answers.
"""

from __future__ import annotations

from collections.abc import Mapping

from netpol.model.flow import (
    DirectionTrace,
    Flow,
    Party,
    PartyKind,
    PolicyTrace,
    RuleTrace,
    TermTrace,
    Trace,
    Verdict,
)
from netpol.model.ids import Direction, Protocol
from netpol.model.net import family_of, format_address
from netpol.model.objects import Endpoint
from netpol.model.policy import (
    BlockPeer,
    CompiledPolicy,
    InvalidPeer,
    PodPeer,
    PolicyPeer,
    PolicyRule,
    PortMatch,
    PortName,
    PortRange,
    RuleRef,
)
from netpol.policy.match import named_ports, peer_matches, port_matches
from netpol.policy.world import World


def verdict(world: World, flow: Flow) -> Verdict:
    """Judge a connection; no reasons."""
    for direction in (Direction.EGRESS, Direction.INGRESS):
        if _exemption(flow, direction) is not None:
            continue
        subject = _subject(flow, direction)
        policies = world.isolating(subject, direction) if subject else ()
        if policies and not any(
            _rule_matches(world, rule, flow, direction)
            for policy in policies
            for rule in policy.rules(direction)
        ):
            return Verdict.DENY
    return Verdict.ALLOW


def evaluate(world: World, flow: Flow) -> Trace:
    """Judge a connection and say why: each isolating policy, each rule, each term."""
    egress = _direction(world, flow, Direction.EGRESS)
    ingress = _direction(world, flow, Direction.INGRESS)
    denied = Verdict.DENY in (egress.verdict, ingress.verdict)
    return Trace(flow, Verdict.DENY if denied else Verdict.ALLOW, egress, ingress)


def _subject(flow: Flow, direction: Direction) -> Endpoint | None:
    return (flow.src if direction is Direction.EGRESS else flow.dst).endpoint


def _other(flow: Flow, direction: Direction) -> Party:
    return flow.dst if direction is Direction.EGRESS else flow.src


def _exemption(flow: Flow, direction: Direction) -> str | None:
    """Why policy does not judge this direction at all, or None."""
    src, dst = flow.src, flow.dst
    if src.endpoint and dst.endpoint and src.endpoint.key == dst.endpoint.key:
        return "a pod always reaches itself"
    if (
        direction is Direction.INGRESS
        and src.kind is PartyKind.NODE
        and dst.endpoint is not None
        and src.node
        and src.node == dst.endpoint.node
    ):
        return f"node {src.node} always reaches its own pods"
    return None


def _rule_matches(world: World, rule: PolicyRule, flow: Flow, direction: Direction) -> bool:
    if rule.ports is not None:
        target = _namer(world, rule, flow, direction)
        if not any(port_matches(p, flow.protocol, flow.port, target) for p in rule.ports):
            return False
    if rule.peers is None:
        return True
    other = _other(flow, direction)
    return any(peer_matches(p, other, world) for p in rule.peers)


def _namer(world: World, rule: PolicyRule, flow: Flow, direction: Direction) -> Endpoint | None:
    """The pod whose containers give a rule's port names their numbers, or None.

    For egress it must be a pod by a selector (or by no peers at all): an ipBlock names no pod (row 68).
    """
    pod = flow.dst.endpoint
    if direction is Direction.INGRESS or rule.peers is None or pod is None:
        return pod
    by_selector = any(
        isinstance(p, PodPeer) and peer_matches(p, flow.dst, world) for p in rule.peers
    )
    return pod if by_selector else None


# -- the trace ----------------------------------------------------------------------------------


def _direction(world: World, flow: Flow, direction: Direction) -> DirectionTrace:
    subject = _subject(flow, direction)
    notes = _notes(flow, direction)
    exemption = _exemption(flow, direction)
    if exemption is not None or subject is None:
        party = flow.src if direction is Direction.EGRESS else flow.dst
        reason = exemption or f"{party} is not a pod that policy isolates"
        key = subject.key if subject else None
        return DirectionTrace(direction, Verdict.ALLOW, key, reason, notes=notes)
    traces = tuple(
        _policy(world, policy, flow, direction) for policy in world.isolating(subject, direction)
    )
    if not traces:
        reason = f"no policy isolates {subject.key} for {direction}"
        return DirectionTrace(direction, Verdict.ALLOW, subject.key, reason, notes=notes)
    allowed = [t for t in traces if t.matched]
    if allowed:
        names = ", ".join(str(t.policy) for t in allowed)
        reason = f"allowed by {names}"
    else:
        count = "1 policy isolates" if len(traces) == 1 else f"{len(traces)} policies isolate"
        reason = f"{count} {subject.key} for {direction} and no rule allows it"
    return DirectionTrace(
        direction,
        Verdict.ALLOW if allowed else Verdict.DENY,
        subject.key,
        reason,
        traces,
        notes,
    )


def _policy(world: World, policy: CompiledPolicy, flow: Flow, direction: Direction) -> PolicyTrace:
    rules = []
    for number, rule in enumerate(policy.rules(direction)):
        peers = tuple(
            _peer_term(world, p, _other(flow, direction), policy) for p in rule.peers or ()
        )
        namer = _namer(world, rule, flow, direction)
        ports = tuple(_port_term(p, flow, namer) for p in rule.ports or ())
        if rule.ports == ():  # no port is left: the opposite of no ports
            ports = (TermTrace("an invalid port", matched=False, reason="matches nothing"),)
        rules.append(
            RuleTrace(
                RuleRef(policy.key, direction, number),
                _rule_matches(world, rule, flow, direction),
                peers,
                ports,
            )
        )
    return PolicyTrace(policy.key, any(r.matched for r in rules), tuple(rules))


def _peer_term(world: World, peer: PolicyPeer, party: Party, policy: CompiledPolicy) -> TermTrace:
    matched = peer_matches(peer, party, world)
    return TermTrace(describe_peer(peer, policy), matched, _peer_reason(world, peer, party))


def _peer_reason(world: World, peer: PolicyPeer, party: Party) -> str:
    address = format_address(party.address)
    match peer:
        case InvalidPeer(reason):
            return f"matches nothing: {reason}"
        case BlockPeer():
            if any(p.contains(party.address) for p in peer.prefixes):
                return f"{address} is inside"
            if family_of(party.address) is not peer.cidr.family:
                return f"{address} is IPv{int(family_of(party.address))}"
            for hole in peer.excepts:
                if hole.contains(party.address):
                    return f"{address} is excepted by {hole}"
            return f"{address} is outside"
        case PodPeer(scope, pods):
            pod = party.endpoint
            if pod is None:
                if party.kind is PartyKind.NODE:
                    return f"{party} is a node (selectors match pods outside the host network)"
                return f"{party} is not a pod"
            if isinstance(scope, str):
                if scope != pod.key.namespace:
                    return f"{pod.key} is in namespace {pod.key.namespace}, not {scope}"
            else:
                have = world.namespace_labels(pod.key.namespace)
                failing = scope.failing(have)
                if failing is not None:
                    return f"namespace {pod.key.namespace} has {_has(have, failing.key)}"
            labels = dict(pod.labels)
            failing = pods.failing(labels)
            if failing is not None:
                return f"{pod.key} has {_has(labels, failing.key)}"
            return f"{pod.key} matches"


def _has(labels: Mapping[str, str], key: str) -> str:
    value = labels.get(key)
    return f"no label {key}" if value is None else f"{key}={value}"


def _port_term(match: PortMatch, flow: Flow, namer: Endpoint | None) -> TermTrace:
    matched = port_matches(match, flow.protocol, flow.port, namer)
    return TermTrace(describe_port(match), matched, _port_reason(match, flow, namer))


def _port_reason(match: PortMatch, flow: Flow, namer: Endpoint | None) -> str:
    if flow.protocol is not match.protocol:
        return f"the protocol is {flow.protocol}"
    if isinstance(match, PortRange):
        return f"the port is {flow.port}"
    pod = flow.dst.endpoint
    if pod is None:
        return f"{flow.dst} is not a pod, so no port has a name there"
    if namer is None:
        return f"no selector of the rule covers {pod.key}, and an ipBlock gives no port a name"
    numbers = named_ports(pod, match.protocol, match.name)
    if not numbers:
        return f"{pod.key} declares no {match.protocol} port named {match.name}"
    return f"{match.name} is {', '.join(map(str, numbers))} on {pod.key}, the port is {flow.port}"


def describe_peer(peer: PolicyPeer, policy: CompiledPolicy) -> str:
    """A peer in words, as a reader of the manifest would say it."""
    match peer:
        case InvalidPeer():
            return "an invalid peer"
        case BlockPeer(cidr, excepts):
            return f"{cidr} except {', '.join(map(str, excepts))}" if excepts else f"{cidr}"
        case PodPeer(scope, pods):
            who = f"pods with {pods}" if pods.requirements else "all pods"
            if isinstance(scope, str):
                return f"{who} in {policy.key.namespace}"
            if scope.requirements:
                return f"{who} in namespaces with {scope}"
            return f"{who} in all namespaces"


def describe_port(match: PortMatch) -> str:
    """A port in words."""
    match match:
        case PortName(protocol, name):
            return f"port {name}/{protocol}"
        case PortRange(protocol, 1, 65535):
            return f"all {protocol} ports"
        case PortRange(protocol, first, last) if first == last:
            return f"port {first}/{protocol}"
        case PortRange(protocol, first, last):
            return f"ports {first}-{last}/{protocol}"


def _notes(flow: Flow, direction: Direction) -> tuple[str, ...]:
    """Decisions where the API leaves a case open, stated where they bear on the answer."""
    out = []
    src, dst = flow.src, flow.dst
    if flow.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        out.append(
            "ICMP has no ports: only a rule without ports allows it; errors of allowed flows pass"
        )
    ingress = direction is Direction.INGRESS
    to_node = not ingress and src.endpoint is not None and dst.kind is PartyKind.NODE
    if to_node and src.endpoint and dst.node == src.endpoint.node:
        out.append("egress to the pod's own node is judged like any other destination")
    from_node = ingress and dst.endpoint is not None and src.kind is PartyKind.NODE
    if from_node and dst.endpoint and src.node != dst.endpoint.node:
        out.append(
            "another node is not exempt; traffic that a node forwards with its own address "
            "(Services, NodePort) matches only ipBlock"
        )
    if src.kind is PartyKind.SERVICE or dst.kind is PartyKind.SERVICE:
        out.append("policy judges the Service's backends, never its virtual address")
    if (
        direction is Direction.INGRESS
        and src.kind is PartyKind.EXTERNAL
        and dst.endpoint is not None
    ):
        out.append(
            "ipBlock is compared with the source address that arrives at the pod, after any NAT"
        )
    return tuple(out)
