"""`netpol-ctl explain pod/foo`: who isolates a pod, each rule in words, and what its kernel does."""

from __future__ import annotations

import argparse
from typing import Any

from netpol.ctl.ends import find_pod
from netpol.ctl.output import emit, plural, remark
from netpol.ctl.refs import Ref
from netpol.ctl.source import Cluster
from netpol.lib.errors import NetpolError
from netpol.model.ids import Direction
from netpol.model.net import format_address
from netpol.model.objects import Endpoint
from netpol.model.policy import BlockPeer, CompiledPolicy, PolicyRule, PortName
from netpol.policy.evaluate import describe_peer, describe_port

#: Members of a set that are listed in the text; the document has them all.
_MEMBERS_SHOWN = 20

_NOTES = {
    "icmp": "ICMP has no ports: only a rule without ports allows it; errors of allowed connections "
    "and IPv6 neighbour discovery pass",
    "node": "connections from the pod's own node (probes) always pass; connections from the pod to "
    "its node are judged like any other",
    "block": "an ipBlock is compared with the source address that arrives at the pod, after any "
    "source NAT (NodePort, load balancers)",
    "service": "what goes to a Service is judged at the backend pod, after translation; an ipBlock "
    "with the Service's address matches nothing. The same holds for external and load-balancer "
    "addresses used inside the cluster, where the API leaves it open",
    "snat": "what another node forwards with its own address (Services with source NAT) is matched "
    "by no selector, only by an ipBlock",
    "self": "the pod always reaches itself, also through a Service (the API leaves that case open)",
    "host": "the pod is in its host's network: no policy isolates it, and as a peer it is its node",
    "named": "a named port is looked up on the destination pod; where there is none it matches nothing",
}


def run(args: argparse.Namespace, ref: Ref, where: Cluster) -> int:
    """Answer about a pod; always 0."""
    pod = find_pod(where, ref)
    kernel = None if where.offline and not args.socket_given else _kernel(args, pod)
    document = describe(where, pod)
    document["kernel"] = kernel
    emit(document, text(document), form=args.output)
    return 0


def describe(where: Cluster, pod: Endpoint) -> dict[str, Any]:
    """The document about a pod, without its kernel."""
    sides = {d: where.world.isolating(pod, d) for d in Direction}
    return {
        "pod": str(pod.key),
        "phase": pod.phase,
        "node": pod.node or None,
        "addresses": [format_address(a) for a in pod.addresses],
        "labels": dict(pod.labels),
        "ports": [
            {"name": p.name or None, "port": p.number, "protocol": p.protocol.value}
            for p in pod.ports
        ],
        "hostNetwork": pod.host_network,
        **{
            d.value: {
                "isolated": bool(policies),
                "policies": [_policy(p, d) for p in policies],
            }
            for d, policies in sides.items()
        },
        "notes": [_NOTES[n] for n in _notes(pod, sides)],
    }


def _notes(pod: Endpoint, sides: dict[Direction, tuple[CompiledPolicy, ...]]) -> list[str]:
    if pod.host_network:
        return ["host"]
    ingress, egress = sides[Direction.INGRESS], sides[Direction.EGRESS]
    out = []
    if ingress or egress:
        out += ["self", "icmp", "node"]
    if ingress:
        out.append("snat")
    if any(_has_block(p, Direction.INGRESS) for p in ingress):
        out.append("block")
    if egress:
        out.append("service")
    rules = [r for d in Direction for p in sides[d] for r in p.rules(d)]
    if any(isinstance(m, PortName) for r in rules for m in r.ports or ()):
        out.append("named")
    return out


def _has_block(policy: CompiledPolicy, direction: Direction) -> bool:
    return any(
        isinstance(peer, BlockPeer) for r in policy.rules(direction) for peer in r.peers or ()
    )


def _policy(policy: CompiledPolicy, direction: Direction) -> dict[str, Any]:
    return {
        "policy": str(policy.key),
        "podSelector": str(policy.subject),
        "rules": [_rule(policy, r, direction, i) for i, r in enumerate(policy.rules(direction))],
        "problems": [{"field": p.field, "message": p.message} for p in policy.problems],
    }


def _rule(
    policy: CompiledPolicy, rule: PolicyRule, direction: Direction, number: int
) -> dict[str, Any]:
    return {
        "rule": f"spec.{direction}[{number}]",
        # null is "any"; an empty list is "nothing is left of what was named".
        "peers": None if rule.peers is None else [describe_peer(p, policy) for p in rule.peers],
        "ports": None if rule.ports is None else [describe_port(p) for p in rule.ports],
    }


def _kernel(args: argparse.Namespace, pod: Endpoint) -> dict[str, Any] | None:
    """What the node's agent shows of the pod's chains and sets; None where no agent answers."""
    from netpol.admin import client

    try:
        answer = client.call(args.socket, "explain", pod=str(pod.key))
    except NetpolError as e:
        if args.socket_given:
            raise
        remark(f"kernel not shown: {e}")
        return None
    return answer if isinstance(answer, dict) else {"answer": answer}


# -- text ---------------------------------------------------------------------------------------


def text(document: dict[str, Any]) -> str:
    """The document for people."""
    states = [_state(document, d) for d in Direction]
    lines = [f"{document['pod']}: {', '.join(states)}"]
    where = f"on node {document['node']}" if document["node"] else "on no node yet"
    addresses = ", ".join(document["addresses"]) or "no address"
    labels = ", ".join(f"{k}={v}" for k, v in document["labels"].items()) or "no labels"
    lines.append(f"  {document['phase']} {where}, {addresses}; {labels}")
    lines.append(f"  ports: {', '.join(map(_port, document['ports'])) or 'none declared'}")
    for direction in Direction:
        lines += _side(document, direction)
    lines += [f"note: {n}" for n in document["notes"]]
    if document.get("kernel"):
        lines += _kernel_text(document["kernel"])
    return "\n".join(lines)


def _state(document: dict[str, Any], direction: Direction) -> str:
    count = len(document[direction.value]["policies"])
    if not count:
        return f"{direction} open"
    return f"{direction} isolated by {plural(count, 'policy', 'policies')}"


def _port(port: dict[str, Any]) -> str:
    shown = f"{port['port']}/{port['protocol']}"
    return f"{port['name']} {shown}" if port["name"] else shown


def _side(document: dict[str, Any], direction: Direction) -> list[str]:
    policies = document[direction.value]["policies"]
    if not policies:
        return [f"  {direction}: no policy isolates the pod, everything is allowed"]
    lines = [f"  {direction}: only what these policies allow"]
    for policy in policies:
        lines.append(f"    {policy['policy']} (selects pods with {policy['podSelector']})")
        if not policy["rules"]:
            lines.append(f"      no {direction} rule: it allows nothing")
        lines += [f"      {r['rule']}: {_sentence(r, direction)}" for r in policy["rules"]]
        lines += [f"      invalid: {p['field']}: {p['message']}" for p in policy["problems"]]
    return lines


def _sentence(rule: dict[str, Any], direction: Direction) -> str:
    ingress = direction is Direction.INGRESS
    peers, ports = rule["peers"], rule["ports"]
    if peers is None:
        who = "from anyone" if ingress else "to anyone"
    else:
        who = ("from " if ingress else "to ") + (" or ".join(peers) or "nobody (no valid peer)")
    if ports is None:
        return f"allow {who}, all ports and protocols"
    return f"allow {who}, {' or '.join(ports) or 'no port (none is valid)'}"


def _kernel_text(kernel: dict[str, Any]) -> list[str]:
    state = "in sync" if kernel.get("in_sync", True) else "not in sync: what follows is older"
    at = f", generation {kernel['generation']}" if "generation" in kernel else ""
    lines = [f"kernel: {state}{at}"]
    if kernel.get("deny_with"):
        why = f", not answered: {kernel['deny_fallback']}" if kernel.get("deny_fallback") else ""
        lines.append(f"  denied packets: {kernel['deny_with']}{why}")
    if kernel.get("unpoliced"):
        lines.append(
            f"  its packets come by {kernel['unpoliced']} and pass no rule of this node: policy cannot hold"
        )
    for chain in kernel.get("chains", ()):
        lines.append(f"  chain {_title(chain)}")
        rules = _items(chain, "rules")
        lines += [f"    {_rule_line(r)}" for r in rules] or ["    no rule: it allows nothing"]
    for found in kernel.get("sets", ()):
        members = _items(found, "members")
        size = found.get("size", len(members)) if isinstance(found, dict) else len(members)
        lines.append(f"  set {_title(found)}: {plural(size, 'member')}")
        lines += [f"    {m}" for m in members[:_MEMBERS_SHOWN]]
        if len(members) > _MEMBERS_SHOWN:
            lines.append(f"    and {len(members) - _MEMBERS_SHOWN} more")
    return lines


def _title(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    extra = " ".join(str(item[k]) for k in ("table", "direction", "class") if k in item)
    family = f" (IPv{item['family']})" if "family" in item else ""
    return f"{item.get('name', '')} {extra}".strip() + family


def _items(item: Any, key: str) -> list[Any]:
    found = item.get(key) if isinstance(item, dict) else None
    return list(found) if isinstance(found, list) else []


def _rule_line(rule: Any) -> str:
    if not isinstance(rule, dict):
        return str(rule)
    counts = f"[{rule.get('packets', 0)} packets, {rule.get('bytes', 0)} bytes] "
    return f"{counts if 'packets' in rule else ''}{rule.get('text', rule)}"
