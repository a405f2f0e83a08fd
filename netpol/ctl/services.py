"""`netpol-ctl services`: what can be dialled on a node, and where it leads.

With -f the plan is made of manifests alone, and nothing of this machine is read. `print_plans` prints any
plans; whoever knows the kernel too gives it `live`.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from netpol.ctl.output import emit, plural, remark, table
from netpol.ctl.source import offline_manifests
from netpol.k8s.manifests import Manifests
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.ids import ObjectKey
from netpol.model.net import Prefix, format_address, host_prefix, parse_prefix
from proxy.changes import Tracker
from proxy.plan import NO_ADDRESS, ProxyOptions, skipped
from proxy.rows import Action, Backend, ServicePlan, ServiceRow

#: What is known of a backend beyond the plan (connections, state), as fields of its document.
Live = Callable[[ServiceRow, Backend], Mapping[str, Any]]


def run(args: argparse.Namespace) -> int:
    """Print the plan of a node, or what this node's agent serves."""
    if not args.files:
        return _run_live(args)
    if not args.node:
        raise InputError("services -f", needed="--node NODE")
    options = _options(args)
    found = offline_manifests(args.files, strict=args.strict)
    _check_node(found, args.node)
    _remark_services(found)
    plans = plan_all(found, args.node, options)
    if args.name:
        plans = [_named(found, plans, args.name, args.namespace)]
    if args.output != "text":  # which says it too
        for plan in plans:
            for refused in plan.refused:
                remark(f"Service {plan.service}: {refused.reason}: {refused.message}")
    print_plans(plans, node=args.node, form=args.output)
    return 0


def _run_live(args: argparse.Namespace) -> int:
    """Ask the node's agent, which knows the kernel too."""
    if args.node or args.service_cidrs or args.nodeport_addresses or args.external_ip_cidr:
        raise InputError("services", needed="-f PATH with manifests beside options of a plan")
    from netpol.ctl import services_live

    return services_live.run(args)


def plan_all(found: Manifests, node: str, options: ProxyOptions) -> list[ServicePlan]:
    """The plans of all Services of some manifests, in order of their names."""
    pods = (p for p in found.pods.values() if p.live and not p.host_network)
    hosts = tuple(host_prefix(a) for p in pods for a in p.addresses)
    tracker = Tracker(node, replace(options, pod_ranges=(*options.pod_ranges, *hosts)))
    for each in found.nodes.values():
        tracker.node(None, each)
    for piece in found.slices.values():
        tracker.slice(None, piece)
    for service in found.services.values():
        tracker.service(None, service)
    tracker.flush()
    plans = (tracker.explained(key) for key in sorted(found.services))
    return [p for p in plans if p is not None]


def print_plans(
    plans: Sequence[ServicePlan], *, node: str, form: str, live: Live | None = None
) -> None:
    """Print plans as a document or as text for people.

    Args:
        plans: in the order in which they are printed.
        node: whose plans they are.
        form: text, json or yaml.
        live: what else is known of a backend.
    """
    document = {"services": [describe(row, live) for plan in plans for row in plan.rows]}
    emit(document, _text(plans, node, live), form=form)


def describe(row: ServiceRow, live: Live | None = None) -> dict[str, Any]:
    """A row as a document."""
    return {
        "service": str(row.service),
        "portName": row.port_name,
        "kind": row.kind.value,
        "address": format_address(row.address),
        "port": row.port,
        "protocol": row.protocol.value,
        "scheduler": row.scheduler,
        "affinitySeconds": row.affinity_s,
        "sourceRanges": [str(r) for r in row.source_ranges],
        "backends": [_backend(row, b, live) for b in row.backends],
        "localClientBackends": [_backend(row, b, live) for b in row.local_client_backends],
        "action": row.action.value,
    }


def _backend(row: ServiceRow, backend: Backend, live: Live | None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "address": format_address(backend.address),
        "port": backend.port,
        "weight": backend.weight,
    }
    return {**document, **(live(row, backend) if live else {})}


# -- the question -------------------------------------------------------------------------------


def _options(args: argparse.Namespace) -> ProxyOptions:
    return ProxyOptions(
        nodeport_cidrs=_prefixes("--nodeport-addresses", args.nodeport_addresses),
        external_cidrs=_prefixes("--external-ip-cidr", args.external_ip_cidr),
        service_ranges=_prefixes("--service-cidr", args.service_cidrs),
    )


def _prefixes(flag: str, texts: Iterable[str]) -> tuple[Prefix, ...]:
    out = []
    for text in (part.strip() for given in texts for part in given.split(",")):
        try:
            out.append(parse_prefix(text))
        except ValueError as e:
            raise InputError(flag, needed="a CIDR such as 10.0.1.0/24", got=repr(text)) from e
    return tuple(out)


def _check_node(found: Manifests, name: str) -> None:
    """Say what is not known of the node.

    Raises:
        NoAnswerError: there are nodes, and this is none of them.
    """
    if name in found.nodes:
        if not found.nodes[name].addresses:
            remark(f"node {name} has no addresses in its status: no NodePort is served")
        return
    if found.nodes and name not in found.node_names:
        known = ", ".join(found.node_names[:20])
        raise NoAnswerError(f"no node {name}", got=f"nodes: {known}")
    remark(f"no Node object {name}: planned for a node without addresses and zone")


def _remark_services(found: Manifests) -> None:
    """Name the Services that a cluster would give an address first."""
    for key, service in sorted(found.services.items()):
        if not service.cluster_ips and skipped(service) == NO_ADDRESS:
            remark(
                f"Service {key} has no clusterIP, which the API server would choose: not planned"
            )


def _named(
    found: Manifests, plans: Iterable[ServicePlan], text: str, namespace: str | None
) -> ServicePlan:
    """The plan of the Service that NAME names.

    Raises:
        InputError: it is given in two namespaces.
        NoAnswerError: there is no such Service.
    """
    name = re.sub("(^|/)(svc|service)/", r"\1", text, count=1)  # svc/NAME, NS/svc/NAME
    given, slash, rest = name.partition("/")
    if slash and namespace and given != namespace:
        raise InputError(f"NAME {text}", needed=f"a Service of -n {namespace}", got=given)
    key = ObjectKey(given, rest) if slash else ObjectKey(namespace or "default", name)
    plan = next((p for p in plans if p.service == key), None)
    if plan is not None:
        return plan
    others = sorted(k.namespace for k in found.services if k.name == key.name)
    hint = f"there is one in {', '.join(others[:5])}" if others else ""
    raise NoAnswerError(f"no service {key}", got=hint)


# -- text ---------------------------------------------------------------------------------------


def _text(plans: Sequence[ServicePlan], node: str, live: Live | None) -> str:
    rows = [row for plan in plans for row in plan.rows]
    actions = Counter(row.action for row in rows)
    counted = ", ".join(f"{actions[a]} {a}" for a in Action if actions[a])
    what = f"{plural(len(rows), 'address', 'addresses')} of {plural(len(plans), 'Service')}"
    lines = [f"{what} on node {node}{f': {counted}' if counted else ''}"]
    lines += table([cells for row in rows for cells in _cells(row, live)])
    for plan in plans:
        notes = [f"  refused: {r.reason}: {r.message}" for r in plan.refused]
        notes += [
            f"  unused: {f'{u.port_name} ' if u.port_name else ''}{format_address(u.address)}: {u.why}"
            for u in plan.unused
        ]
        if plan.health_port:
            count = plural(plan.local_ready, "ready endpoint")
            notes.append(f"  health: port {plan.health_port}, {count} on this node")
        if plan.skipped:
            notes.append(f"  not served: {plan.skipped}")
        if notes:
            lines += [f"{plan.service}", *notes]
    return "\n".join(lines)


def _cells(row: ServiceRow, live: Live | None) -> Iterable[list[str]]:
    host = format_address(row.address)
    dialled = f"{f'[{host}]' if ':' in host else host}:{row.port}/{row.protocol}"
    how = row.scheduler
    if row.affinity_s:
        how += f", affinity {row.affinity_s} s"
    if row.tunnel:
        how += ", direct return"
    if row.source_ranges:
        how += f", only from {' '.join(map(str, row.source_ranges))}"
    head = [str(row.service), row.port_name or "-", row.kind.value, dialled, row.action.value, how]
    yield [*head, _backends(row, row.backends, live) or "no endpoint"]
    if row.local_client_backends != row.backends:
        inside = _backends(row, row.local_client_backends, live) or "no endpoint"
        yield ["", "", "", "  from pods and this node", "", "", inside]


def _backends(row: ServiceRow, backends: Iterable[Backend], live: Live | None) -> str:
    return ", ".join(_shown(row, b, live) for b in backends)


def _shown(row: ServiceRow, backend: Backend, live: Live | None) -> str:
    host = format_address(backend.address)
    text = f"{f'[{host}]' if ':' in host else host}:{backend.port}"
    notes = []
    if backend.weight == 0:
        notes.append("drains")
    elif backend.weight > 1:
        notes.append(f"weight {backend.weight}")
    notes += [f"{k} {v}" for k, v in (live(row, backend) if live else {}).items()]
    return f"{text} ({', '.join(notes)})" if notes else text
