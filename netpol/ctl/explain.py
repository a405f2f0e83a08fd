"""`netpol-ctl explain`: may this reach that, and why; or who isolates this pod.

Asks the questions and decides the exit code; words are `explain_text`'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from netpol.ctl import explain_doc, explain_pod, explain_text, fix
from netpol.ctl.ends import End, families, resolve
from netpol.ctl.explain_routes import route_notes
from netpol.ctl.judge import Finding, findings
from netpol.ctl.output import emit
from netpol.ctl.ports import Ports, Span, declared, parse_port, spans_on
from netpol.ctl.refs import Ref, RefKind, parse_pod_ref, parse_ref
from netpol.ctl.source import Cluster, cluster, namespace
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.flow import Verdict
from netpol.model.net import Family


def run(args: argparse.Namespace) -> int:
    """Answer; 0 for allow (or an answer without a verdict), 1 for deny."""
    source, target = _ends(args)
    ports = [parse_port(p) for p in args.ports]
    if target is None:
        if ports or args.fix:
            raise InputError("--port and --fix are about a connection", needed="--to")
        parse_pod_ref(source, namespace="default")  # a wrong one is said before a cluster is asked
        ref = parse_pod_ref(source, namespace=namespace(args))
        return explain_pod.run(args, ref, cluster(args))
    for text in (source, target):
        parse_ref(text, namespace="default")
    own = namespace(args)
    src_ref, dst_ref = parse_ref(source, namespace=own), parse_ref(target, namespace=own)
    where = cluster(args)
    family = choose_family(where, src_ref, dst_ref, forced=args.ip_family)
    src = resolve(where, src_ref, family=family, ports=None)
    dst = resolve(where, dst_ref, family=family, ports=ports)
    found = findings(where.world, src, dst, spans(dst, ports))
    if not found:
        raise NoAnswerError(f"nothing of {dst.label} to judge", needed="--port")
    if args.fix:
        return fix.run(args, where, src, dst, found)
    if not where.offline:
        dst = replace(dst, notes=(*dst.notes, *route_notes(args.socket, found)))
    document = explain_doc.connection(src, dst, found, offline=where.offline)
    emit(document, explain_text.connection(src, dst, found), form=args.output)
    return 1 if denied(found) else 0


def denied(found: Sequence[Finding]) -> list[Finding]:
    """Those that do not pass."""
    return [f for f in found if f.verdict is Verdict.DENY]


def _ends(args: argparse.Namespace) -> tuple[str, str | None]:
    """Source and destination as typed; no destination when the question is about one pod."""
    given, source, target = args.ref, args.source, args.target
    if given is not None:
        if source is not None and target is not None:
            raise InputError("three references", needed="a reference and --to, or --from and --to")
        if source is not None:
            return source, given
        return given, target
    if source is None and target is None:
        raise InputError("nothing to explain", needed="a pod, or --from and --to")
    if source is None or target is None:
        raise InputError("one end is missing", needed="both --from and --to")
    return source, target


def choose_family(where: Cluster, src: Ref, dst: Ref, *, forced: int | None) -> Family:
    """The family to judge: as forced, or the destination's first, or the one an address gives.

    Raises:
        NoAnswerError: the ends share no family.
    """
    of_src, of_dst = families(where, src), families(where, dst)
    for ref, have in ((src, of_src), (dst, of_dst)):
        if not have:
            raise NoAnswerError(f"{ref.text} has no address")
    if forced is not None:
        family = Family(forced)
        for ref, have in ((src, of_src), (dst, of_dst)):
            if family not in have:
                raise NoAnswerError(f"{ref.text} has no IPv{forced} address")
        return family
    if src.kind is RefKind.BLOCK and dst.kind is not RefKind.BLOCK:
        of_dst = tuple(f for f in of_dst if f in of_src)
    if not of_dst or of_dst[0] not in of_src:
        raise NoAnswerError(
            f"{src.text} and {dst.text} share no IP family",
            got=f"{_shown(of_src)} and {_shown(families(where, dst))}",
        )
    return of_dst[0]


def _shown(of: Sequence[Family]) -> str:
    return "+".join(f"IPv{int(f)}" for f in of)


def spans(dst: End, ports: Sequence[Ports]) -> tuple[Span, ...]:
    """The ports to judge on a destination that is no Service.

    Raises:
        InputError: none given and none declared, or a name where no pod can have it.
        NoAnswerError: a name that the pod does not have.
    """
    if dst.service is not None:
        return ()
    part = dst.parts[0]
    if not ports:
        own = declared(part.pod) if part.pod is not None and not dst.is_block else ()
        if not own:
            raise InputError(f"{dst.label} declares no port", needed="--port NUMBER/PROTO")
        return own
    out: list[Span] = []
    for port in ports:
        if port.name and (part.pod is None or dst.is_block):
            raise InputError(
                f"--port {port.text}: only a pod gives a port a name", needed="a number"
            )
        on = spans_on(port, part.pod)
        if not on:
            names = sorted({p.name for p in part.pod.ports if p.name}) if part.pod else []
            raise NoAnswerError(
                f"{dst.label} declares no port named {port.text}",
                got=f"names {', '.join(names)}" if names else "no names",
            )
        out.extend(s for s in on if s not in out)
    return tuple(out)
