"""`explain --fix`: the smallest NetworkPolicies that let a denied connection through.

Policies only add: what is printed never isolates a pod that was open, because every subject selector
also demands what an isolating policy of the same direction already selects. The result is checked by
judging the same question again with the new policies in place.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from netpol.ctl.ends import End, Part
from netpol.ctl.judge import Finding, findings
from netpol.ctl.output import emit, remark, to_yaml, write
from netpol.ctl.ports import Span
from netpol.ctl.source import Cluster, compiled
from netpol.lib.errors import NoAnswerError
from netpol.model.flow import Verdict
from netpol.model.ids import Direction, ObjectKey
from netpol.model.labels import NAMESPACE_NAME_LABEL, Operator, Requirement, Selector, selector
from netpol.model.net import Prefix
from netpol.model.networkpolicy import NetworkPolicy, NetworkPolicySpec
from netpol.model.objects import Endpoint
from netpol.model.policy import CompiledPolicy
from netpol.policy.world import World

#: Labels that controllers write anew at each rollout: a policy that names one ends with the pod.
_VOLATILE = frozenset(("pod-template-hash", "controller-revision-hash", "pod-template-generation"))
#: Longest name of an object (RFC 1123 subdomain), less room for a number.
_NAME_MAX = 240


class _Grant(NamedTuple):
    """One rule to add for one subject."""

    subject: Endpoint
    direction: Direction
    peers: tuple[dict[str, Any], ...]
    spans: tuple[Span, ...]
    other: str


def run(
    args: argparse.Namespace, where: Cluster, src: End, dst: End, found: Sequence[Finding]
) -> int:
    """Print the policies; always 0, since the question is what would allow it."""
    bad = [f for f in found if f.verdict is Verdict.DENY]
    if not bad:
        remark(f"{src.label} -> {dst.label} is allowed already: nothing to add")
    manifests = policies(where.world, src, dst, bad)
    check(where.world, src, dst, found, manifests)
    document = {"apiVersion": "v1", "kind": "List", "items": manifests}
    if args.output == "json":
        emit(document, "", form="json")
    else:
        write("---\n".join(to_yaml(m) for m in manifests))
    return 0


def policies(world: World, src: End, dst: End, bad: Iterable[Finding]) -> list[dict[str, Any]]:
    """The manifests that allow what is denied."""
    grants: list[_Grant] = []
    for f in bad:
        if f.trace.egress.verdict is Verdict.DENY and f.src.party.endpoint is not None:
            peers = _peers(f.src.party.endpoint, f.dst, f.destinations, is_block=dst.is_block)
            name = _short(f.dst, dst)
            grants.append(_Grant(f.src.party.endpoint, Direction.EGRESS, peers, f.spans, name))
        if f.trace.ingress.verdict is Verdict.DENY and f.dst.party.endpoint is not None:
            peers = _peers(f.dst.party.endpoint, f.src, f.sources, is_block=src.is_block)
            name = _short(f.src, src)
            grants.append(_Grant(f.dst.party.endpoint, Direction.INGRESS, peers, f.spans, name))
    taken = set(world.policies)
    out: dict[tuple[str, Selector, Direction], dict[str, Any]] = {}
    for grant in grants:
        subject = _subject(world, grant.subject, grant.direction)
        key = (grant.subject.key.namespace, subject, grant.direction)
        manifest = out.get(key)
        if manifest is None:
            name = _free_name(grant, taken)
            manifest = out[key] = _manifest(grant, name, subject)
        rules = manifest["spec"][grant.direction.value]
        rule = _rule(grant)
        if rule not in rules:
            rules.append(rule)
    return list(out.values())


def check(
    world: World, src: End, dst: End, found: Sequence[Finding], manifests: list[dict[str, Any]]
) -> None:
    """Judge again with the new policies.

    Raises:
        NoAnswerError: they would not do.
    """
    new = compiled(_decoded(m) for m in manifests)
    again = World.build(
        namespaces=world.namespaces.values(),
        pods=world.pods.values(),
        policies=[*world.policies.values(), *new],
        nodes=world.nodes.values(),
        services=world.services.values(),
        slices=world.slices,
    )
    asked = tuple(dict.fromkeys(s for f in found for s in f.spans))
    left = [f for f in findings(again, src, dst, asked) if f.verdict is Verdict.DENY]
    if left or any(p.problems for p in new):
        raise NoAnswerError(
            "no NetworkPolicy was found that allows it", got=f"{src.label} -> {dst.label}"
        )


def _decoded(manifest: dict[str, Any]) -> NetworkPolicy:
    meta = manifest["metadata"]
    return NetworkPolicy(
        key=ObjectKey(meta["namespace"], meta["name"]),
        spec=msgspec.convert(manifest["spec"], NetworkPolicySpec),
    )


# -- parts of a manifest ------------------------------------------------------------------------


def _subject(world: World, pod: Endpoint, direction: Direction) -> Selector:
    """Selects pods like this one, and only such as a policy isolates already."""
    isolating = world.isolating(pod, direction)
    return selector([*_like(pod).requirements, *_narrowest(isolating).requirements])


def _narrowest(isolating: Sequence[CompiledPolicy]) -> Selector:
    """The selector with the fewest demands: any of them keeps open pods out."""
    return min((p.subject for p in isolating), key=lambda s: (len(s.requirements), s))


def _like(pod: Endpoint) -> Selector:
    return selector(Requirement(k, Operator.IN, (v,)) for k, v in pod.labels if k not in _VOLATILE)


def _peers(
    subject: Endpoint, other: Part, prefixes: Sequence[Prefix], *, is_block: bool
) -> tuple[dict[str, Any], ...]:
    """Peers that match the other end."""
    pod = other.party.endpoint
    if pod is None or is_block:
        return tuple({"ipBlock": {"cidr": str(p)}} for p in sorted(prefixes))
    peer: dict[str, Any] = {"podSelector": _selector(_like(pod))}
    if pod.key.namespace != subject.key.namespace:
        own = {NAMESPACE_NAME_LABEL: pod.key.namespace}
        peer = {"namespaceSelector": {"matchLabels": own}, **peer}
    return (peer,)


def _selector(source: Selector) -> dict[str, Any]:
    """A LabelSelector as people write it: matchLabels where that says it."""
    pairs: dict[str, str] = {}
    expressions: list[dict[str, Any]] = []
    for r in source.requirements:
        if r.operator is Operator.IN and len(r.values) == 1 and r.key not in pairs:
            pairs[r.key] = r.values[0]
        else:
            expression: dict[str, Any] = {"key": r.key, "operator": r.operator.value}
            if r.values:
                expression["values"] = list(r.values)
            expressions.append(expression)
    out: dict[str, Any] = {}
    if pairs:
        out["matchLabels"] = pairs
    if expressions:
        out["matchExpressions"] = expressions
    return out


def _manifest(grant: _Grant, name: str, subject: Selector) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": grant.subject.key.namespace},
        "spec": {
            "podSelector": _selector(subject),
            "policyTypes": [grant.direction.value.capitalize()],
            grant.direction.value: [],
        },
    }


def _rule(grant: _Grant) -> dict[str, Any]:
    ports: list[dict[str, Any]] = []
    for span in grant.spans:
        port: dict[str, Any] = {"protocol": span.protocol.value, "port": span.first}
        if span.last != span.first:
            port["endPort"] = span.last
        ports.append(port)
    side = "from" if grant.direction is Direction.INGRESS else "to"
    return {side: list(grant.peers), "ports": ports}


def _short(part: Part, end: End) -> str:
    if end.is_block:
        return end.label
    return part.pod.key.name if part.pod is not None else part.label


def _free_name(grant: _Grant, taken: set[ObjectKey]) -> str:
    """A name that says what the policy does and that no policy has (it would be replaced)."""
    verb = "from" if grant.direction is Direction.INGRESS else "to"
    raw = f"allow-{grant.subject.key.name}-{verb}-{grant.other}"
    base = re.sub(r"[^a-z0-9.]+", "-", raw.lower())[:_NAME_MAX].strip("-.")
    base = re.sub(r"\.-|-\.|\.\.", "-", base)
    name, number = base, 1
    while ObjectKey(grant.subject.key.namespace, name) in taken:
        number += 1
        name = f"{base}-{number}"
    taken.add(ObjectKey(grant.subject.key.namespace, name))
    return name
