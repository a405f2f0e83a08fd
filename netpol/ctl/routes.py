"""`netpol-ctl routes`: what this node routes and where an address goes; `routes render` for BIRD."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from netpol.admin import client
from netpol.ctl.output import emit, plural, remark, table
from netpol.ctl.source import offline_manifests
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.ids import ObjectKey
from netpol.model.net import Prefix, format_address, parse_address, parse_prefix
from routes.bird.render import render
from routes.options import (
    ASN_MAX,
    NO_ASNS,
    Encapsulation,
    OverlayMode,
    RouteOptions,
)
from routes.peers_file import read_peers
from routes.plan import plan
from routes.vips import announced, service_addresses

if TYPE_CHECKING:
    from netpol.k8s.manifests import Manifests


def run(args: argparse.Namespace) -> int:
    """Answer what was asked of routes."""
    if args.action == "drain":
        return _drain(args)
    return _render(args) if args.action == "render" else _show(args)


def _drain(args: argparse.Namespace) -> int:
    answer = client.call(args.socket, "drain", on=not args.off)
    text = (
        f"{answer['node']}: drains: routers outside are asked to take other ways; addresses of Services "
        "are withdrawn half a minute later, podCIDRs stay"
        if answer["draining"]
        else f"{answer['node']}: does not drain"
    )
    emit(answer, text, form=args.output)
    return 0


def _show(args: argparse.Namespace) -> int:
    if args.address is None:
        answer = client.call(args.socket, "routes")
        emit(answer, _text(answer), form=args.output)
        return 0
    try:
        address = format_address(parse_address(args.address))
    except ValueError as e:
        raise InputError("routes", needed="an IP address", got=repr(args.address)) from e
    answer = client.call(args.socket, "routes", address=address)
    emit(answer, _lookup_text(answer), form=args.output)
    return 0


def _lookup_text(answer: dict[str, Any]) -> str:
    line = f"{answer['address']}: {answer['where']}"
    if answer["prefix"]:
        line += f" ({answer['prefix']}" + (f" of {answer['peer']})" if answer["peer"] else ")")
    if answer["learnt"] and answer["by"] != "bird":
        line += f"; not by {answer['learnt']}, which BGP has told"
    return line


def _text(answer: dict[str, Any]) -> str:
    rows = answer["routes"]
    odd = sum(r["kernel"] != "agrees" for r in rows) + len(answer["extra"])
    state = (
        "BIRD and the kernel agree" if not odd else f"{plural(odd, 'disagreement')} with the kernel"
    )
    lines = [f"{answer['node']}: {plural(len(rows), 'route')}, {state}"]
    lines += table([_row(r) for r in rows], indent="  ")
    lines += [f"  {p}: in the kernel, but not of BIRD's any more" for p in answer["extra"]]
    lines += [f"  {p}: a node's range that nobody announces" for p in answer["missing"]]
    return "\n".join(lines)


def _row(route: dict[str, Any]) -> list[str]:
    via = ", ".join(route["via"]) if route["reachable"] else "unreachable"
    where = f"{via} on {route['interface']}" if route["reachable"] and route["interface"] else via
    row = [route["prefix"], where, f"of {route['peer']}"]
    return row if route["kernel"] == "agrees" else [*row, f"kernel: {route['kernel']}"]


def _render(args: argparse.Namespace) -> int:
    """Print a node's BIRD configuration."""
    if not args.files:
        raise InputError("routes render", needed="-f PATH with the Node manifests")
    options = _options(args)
    found = offline_manifests(args.files, strict=args.strict)
    if args.node not in found.nodes:
        known = ", ".join(sorted(found.nodes)[:20]) or "none"
        raise NoAnswerError(f"no node {args.node}", got=f"nodes: {known}")
    vips = announced(
        found.services.values(),
        found.slices.values(),
        found.nodes.values(),
        node=args.node,
        options=options,
    )
    services = service_addresses(found.services.values())
    made = plan(found.nodes.values(), args.node, options, vips=vips, services=services)
    for problem in made.problems:
        remark(_located(problem, found))
    keyed = sum(bool(p.password) for p in made.external)
    if keyed:
        remark(f"{plural(keyed, 'password')} in the configuration: keep it as a secret")
    if args.strict and made.problems:
        raise InputError("--strict: problems with nodes or peers", needed="none")
    text = render(made)
    emit({"node": args.node, "config": text}, text.rstrip("\n"), form=args.output)
    return 0


def _located(problem: str, found: Manifests) -> str:
    """A problem with the file and document of the Node that it is about."""
    words = problem.split(maxsplit=2)
    name = words[1].removesuffix(":") if len(words) == 3 and words[0] == "node" else ""
    origin = found.origins.get(("Node", ObjectKey("", name)))
    return problem if origin is None else f"{origin}: {problem}"


def _options(args: argparse.Namespace) -> RouteOptions:
    asn = args.asn
    if not 0 < asn < ASN_MAX or asn in NO_ASNS:
        raise InputError("--asn", needed=f"an AS of 1..{ASN_MAX - 1}", got=str(asn))
    if args.keepalive_time > args.hold_time:
        raise InputError(
            "--keepalive-time", needed="at most --hold-time", got=str(args.keepalive_time)
        )
    if not 0 < len(args.interface) <= 15 or not all(
        c.isalnum() or c in "_.@:-" for c in args.interface
    ):
        raise InputError("--interface", needed="the name of a link", got=repr(args.interface))
    return RouteOptions(
        interface=args.interface,
        asn=asn,
        subnets=_prefixes("--subnet", args.subnets),
        cluster_cidrs=_prefixes("--cluster-cidr", args.cluster_cidrs),
        service_cidrs=_prefixes("--service-cidr", args.service_cidrs),
        vip_cidrs=_prefixes("--vip-cidr", args.vip_cidrs),
        hold_s=args.hold_time,
        keepalive_s=args.keepalive_time,
        graceful_restart=args.graceful_restart,
        listen_port=args.bgp_port,
        overlay=OverlayMode(args.overlay),
        encapsulation=Encapsulation(args.encapsulation),
        mesh=args.mesh,
        peers=read_peers(args.peers, flag="--peers") if args.peers else (),
        advertise_pod_cidr=args.advertise_pod_cidr,
        advertise_cluster_ip=args.advertise_cluster_ip,
        advertise_external_ip=args.advertise_external_ip,
        advertise_load_balancer_ip=args.advertise_load_balancer_ip,
        drain=args.drain,
    )


def _prefixes(flag: str, texts: list[str]) -> tuple[Prefix, ...]:
    out = []
    for text in texts:
        try:
            out.append(parse_prefix(text))
        except ValueError as e:
            raise InputError(flag, needed="a CIDR such as 10.0.1.0/24", got=repr(text)) from e
    return tuple(out)
