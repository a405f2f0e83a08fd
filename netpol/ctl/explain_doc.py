"""The documents of `explain -o json`; their schema is part of docs/cli.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from netpol.ctl.ends import End, Part
from netpol.ctl.judge import Finding
from netpol.model.flow import DirectionTrace, PartyKind, PolicyTrace, RuleTrace, TermTrace, Verdict
from netpol.model.net import Prefix, format_address
from netpol.model.objects import Service
from netpol.model.policy import RuleRef

_SERVICE_NOTES = (
    (
        "policy judges the backend pods, after the Service's address was translated; an ipBlock that "
        "names the Service's own address matches nothing"
    ),
    (
        "where the Service path rewrites the source to a node's address (masquerading, or a backend "
        "reached through another node), selectors do not match it and only an ipBlock can"
    ),
)
_HAIRPIN_NOTE = (
    "a pod that reaches itself through a Service is allowed; the API leaves that case open"
)


def connection(
    src: End, dst: End, found: Sequence[Finding], *, offline: bool = False
) -> dict[str, Any]:
    """The answer about a connection."""
    return {
        "from": src.label,
        "to": dst.label,
        "verdict": overall(found).value,
        "source": "manifests" if offline else "api",
        "findings": [_finding(f) for f in found],
        "notes": list(notes(src, dst, found)),
    }


def overall(found: Sequence[Finding]) -> Verdict:
    """Deny when anything of the question is denied."""
    return Verdict.DENY if any(f.verdict is Verdict.DENY for f in found) else Verdict.ALLOW


def notes(src: End, dst: End, found: Sequence[Finding]) -> tuple[str, ...]:
    """Decisions where the API leaves a case open, each once."""
    out = list(dst.notes)
    if dst.service is not None:
        out.extend(_SERVICE_NOTES)
        out.extend(_forwarding_notes(src, dst.service, found))
        if any(f.src.pod and f.dst.pod and f.src.pod.key == f.dst.pod.key for f in found):
            out.append(_HAIRPIN_NOTE)
    for f in found:
        out.extend((*f.trace.egress.notes, *f.trace.ingress.notes))
    if src.service is not None:
        out.append("the source is each backend of the Service: a Service never opens a connection")
    return tuple(dict.fromkeys(out))


def _forwarding_notes(src: End, service: Service, found: Sequence[Finding]) -> tuple[str, ...]:
    """Whom ingress policy sees when a client outside the cluster dials the Service on a node."""
    exposed = service.type in ("NodePort", "LoadBalancer") or bool(service.external_ips)
    outside = any(part.party.kind is PartyKind.EXTERNAL for part in src.parts)
    if not exposed or not outside:
        return ()
    if service.external_local:
        return (
            (
                f"svc/{service.key} has externalTrafficPolicy Local: a node passes outside clients to its "
                "own backends only, and ingress policy sees the client's address"
            ),
        )
    nodes = sorted({f.dst.party.node for f in found if f.dst.party.node})
    where = f" ({', '.join(nodes[:5])}{', ...' if len(nodes) > 5 else ''})" if nodes else ""
    return (
        (
            f"svc/{service.key} has externalTrafficPolicy Cluster: a client that dials it on another node "
            f"than the backend's{where} comes to ingress policy with that other node's address, which only "
            "an ipBlock or nothing matches; on the backend's node, or with Local, with its own"
        ),
    )


def rule_name(ref: RuleRef) -> str:
    """A rule's field in the manifest."""
    return f"spec.{ref.direction}[{ref.number}]"


def _finding(f: Finding) -> dict[str, Any]:
    return {
        "from": _party(f.src, f.sources),
        "to": _party(f.dst, f.destinations),
        "ports": [str(s) for s in f.spans],
        "verdict": f.verdict.value,
        "egress": _direction(f.trace.egress),
        "ingress": _direction(f.trace.ingress),
    }


def _party(part: Part, prefixes: Sequence[Prefix]) -> dict[str, Any]:
    kind = part.party.kind
    return {
        "kind": (PartyKind.POD if part.pod is not None else kind).value,
        "name": str(part.pod.key) if part.pod is not None else part.party.name or None,
        "address": format_address(part.party.address),
        "addresses": [format_address(p.address) if p.is_host else str(p) for p in prefixes],
        "node": part.party.node or None,
        "hostNetwork": part.pod.host_network if part.pod is not None else False,
    }


def _direction(d: DirectionTrace) -> dict[str, Any]:
    return {
        "verdict": d.verdict.value,
        "subject": str(d.subject) if d.subject else None,
        "reason": d.reason,
        "policies": [_policy(p) for p in d.isolating],
    }


def _policy(p: PolicyTrace) -> dict[str, Any]:
    return {
        "policy": str(p.policy),
        "matched": p.matched,
        "rules": [_rule(r) for r in p.rules],
    }


def _rule(r: RuleTrace) -> dict[str, Any]:
    return {
        "rule": rule_name(r.ref),
        "matched": r.matched,
        # No terms listed means "any": null, never an empty list.
        "peers": [_term(t) for t in r.peers] or None,
        "ports": [_term(t) for t in r.ports] or None,
    }


def _term(t: TermTrace) -> dict[str, Any]:
    return {"term": t.term, "matched": t.matched, "reason": t.reason}
