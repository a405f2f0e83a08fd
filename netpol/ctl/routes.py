"""`netpol-ctl routes`: what a node routes. `routes render` prints the BIRD configuration it would get."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from netpol.ctl.output import emit, remark
from netpol.ctl.source import offline_manifests
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.net import Prefix, parse_prefix
from routes.annotations import peer_of, read_yaml
from routes.bird.render import render
from routes.options import (
    ASN_MAX,
    Encapsulation,
    ExternalPeer,
    OverlayMode,
    RouteOptions,
)
from routes.plan import plan
from routes.vips import announced


def run(args: argparse.Namespace) -> int:
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
    made = plan(found.nodes.values(), args.node, options, vips=vips)
    for problem in made.problems:
        remark(problem)
    if args.strict and made.problems:
        raise InputError("--strict: problems with nodes or peers", needed="none")
    text = render(made)
    emit({"node": args.node, "config": text}, text.rstrip("\n"), form=args.output)
    return 0


def _options(args: argparse.Namespace) -> RouteOptions:
    asn = args.asn
    if not 0 < asn < ASN_MAX:
        raise InputError("--asn", needed=f"1..{ASN_MAX - 1}", got=str(asn))
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
        overlay=OverlayMode(args.overlay),
        encapsulation=Encapsulation(args.encapsulation),
        mesh=args.mesh,
        peers=read_peers(args.peers) if args.peers else (),
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


def read_peers(path: str) -> tuple[ExternalPeer, ...]:
    """Read the peers that every node has: a YAML list (docs/routes.md).

    Raises:
        InputError: with the item that is wrong, without what it holds.
    """
    try:
        items: Any = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"--peers {path}", got=e.strerror or str(e)) from e
    except ValueError as e:
        raise InputError(f"--peers {path}", needed="YAML") from e
    if not isinstance(items, list):
        raise InputError(f"--peers {path}", needed="a list of peers", got=type(items).__name__)
    out = []
    for number, item in enumerate(items):
        try:
            out.append(peer_of(item, encoded=False))
        except ValueError as e:
            raise InputError(f"--peers {path}: [{number}]: {e}") from e
    return tuple(out)
