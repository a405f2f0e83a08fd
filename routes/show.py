"""What people ask about routes, as documents: sessions, routes, where an address goes. Pure.

BIRD's view and the kernel's stand side by side, since only their agreement means that packets go that way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from netpol.kernel.fib import Way
from netpol.kernel.routes import KernelRoute
from netpol.model.net import Prefix, format_address
from routes.bird.render import node_name, peer_name
from routes.bird.reply import ProtocolState, RouteView
from routes.plan import RoutePlan

Json = dict[str, Any]


def peers_document(plan: RoutePlan | None, states: Mapping[str, ProtocolState]) -> list[Json]:
    """Every session that should be, with how it is; then those that BIRD has besides."""
    out: list[Json] = []
    known: set[str] = set()
    for name, kind, label, address, asn in _wanted(plan):
        known.add(name)
        out.append(_session(states.get(name), kind=kind, label=label, address=address, asn=asn))
    out += [
        _session(s, kind="unknown", label=s.name, address=s.neighbor, asn=s.asn)
        for name, s in sorted(states.items())
        if s.kind == "BGP" and name not in known
    ]
    return out


def _wanted(plan: RoutePlan | None) -> Iterable[tuple[str, str, str, str, int]]:
    if plan is None:
        return
    for node in plan.peers:
        yield node_name(node.node), "node", node.node, format_address(node.address), node.asn
    for peer in plan.external:
        address = format_address(peer.address)
        yield peer_name(peer), "external", address, address, peer.asn


def _session(state: ProtocolState | None, *, kind: str, label: str, address: str, asn: int) -> Json:
    if state is None:
        return {
            "peer": label,
            "kind": kind,
            "address": address,
            "asn": asn,
            "state": "missing",
            "since": None,
            "lastError": None,
            "imported": 0,
            "exported": 0,
            "filtered": 0,
            "limits": [],
        }
    return {
        "peer": label,
        "kind": kind,
        "address": address,
        "asn": asn,
        "state": state.bgp or state.state,
        "since": state.since,
        "lastError": state.error or None,
        "imported": state.imported,
        "exported": state.exported,
        "filtered": state.filtered,
        "limits": list(state.limits),
    }


def routes_document(
    plan: RoutePlan | None, bird: Iterable[RouteView], kernel: Iterable[KernelRoute]
) -> Json:
    """Routes to other nodes and to what routers outside announce, and where BIRD and kernel differ."""
    labels = {name: label for name, _, label, _, _ in _wanted(plan)}
    best = {v.prefix: v for v in bird if v.best and v.protocol in labels}
    have = {r.prefix: r for r in kernel}
    rows = []
    for prefix, view in sorted(best.items()):
        there = have.get(prefix)
        rows.append(
            {
                "prefix": str(prefix),
                "peer": labels[view.protocol],
                "via": [format_address(g) for g in view.gateways],
                "interface": view.interface or None,
                "reachable": not view.unreachable,
                "kernel": _agreement(view, there),
            }
        )
    return {
        "routes": rows,
        "extra": [str(p) for p in sorted(have) if p not in best],
        "missing": [str(p) for p in _not_learnt(plan, best)],
    }


def _agreement(view: RouteView, there: KernelRoute | None) -> str:
    if there is None:
        return "refused" if view.refused else "missing"
    return "agrees" if there.reachable is not view.unreachable else "differs"


def _not_learnt(plan: RoutePlan | None, best: Mapping[Prefix, RouteView]) -> list[Prefix]:
    """Ranges of other nodes that nobody has announced."""
    if plan is None:
        return []
    return sorted(p for p in set(plan.pods) - set(plan.own_pods) if p not in best)


def lookup_document(
    plan: RoutePlan | None, address: bytes, bird: Iterable[RouteView], way: Way
) -> Json:
    """Where packets to an address go, as the kernel says, and what BIRD has for it.

    Args:
        plan: the node's.
        address: is asked for.
        bird: its routes that hold the address.
        way: the kernel's.
    """
    labels = {name: label for name, _, label, _, _ in _wanted(plan)}
    learnt = [v for v in bird if v.best and v.protocol in labels and v.prefix.contains(address)]
    best = max(learnt, key=lambda v: v.prefix.length, default=None)
    own = plan is not None and any(p.contains(address) for p in plan.own_pods)
    # Of a route that refuses, IPv4 does not say which one it is.
    ours = best is not None and (
        (way.maker == "bird" and way.prefix == best.prefix)
        or (way.refused and way.prefix is None and best.unreachable)
    )
    return {
        "address": format_address(address),
        "where": _where(way, own=own, ours=ours),
        "prefix": str(best.prefix) if ours and best is not None else _text(way.prefix),
        "peer": labels[best.protocol] if ours and best is not None else None,
        "by": "bird" if ours else way.maker or None,
        "learnt": _text(best.prefix if best is not None else None),
    }


def _text(prefix: Prefix | None) -> str | None:
    return None if prefix is None else str(prefix)


def _where(way: Way, *, own: bool, ours: bool) -> str:
    if own and way.reachable and not way.gateways:
        return "this node's own pods"
    if way.local:
        return "this node itself"
    if way.refused:
        return (
            "nowhere: the next hop is not reached, so it is refused"
            if ours
            else "nowhere: one of the kernel's own routes refuses it"
        )
    if not way.reachable:
        return "nowhere: the kernel has no route"
    hops = ", ".join(format_address(g) for g in way.gateways)
    where = f"via {hops}" if hops else "directly"
    where += f" on {', '.join(way.links)}" if way.links else ""
    return where if ours or way.maker == "bird" else f"{where}: one of the kernel's own routes"
