"""What the proxy part shows: what is wrong, its room of the status, its metrics, Services in the kernel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client.core import Metric

from netpol.admin.health import counter, gauge
from netpol.k8s.events import Complaint, Subject
from netpol.lib.errors import NoAnswerError
from netpol.model.ids import ObjectKey
from netpol.model.net import format_address
from proxy.lbcontroller import describe_faults
from proxy.rows import ServicePlan
from proxy.status import Live

if TYPE_CHECKING:
    from netpol.agent.proxy import ProxyPart


def fault(part: ProxyPart) -> str | None:
    """See Part."""
    status = part.room.status
    if status.error:
        return status.error
    if status.applied_at_s is None:
        return ""
    for key, why in part.room.errors.items():
        more = len(part.room.errors) - 1
        others = f" (and {more} more)" if more else ""
        return f"Service {key}: {'; '.join(why)}{others}"
    return None


def errors(part: ProxyPart) -> list[str]:
    """See Part."""
    status = part.room.status
    out = [f"proxy: {status.error}"] if status.error else []
    out += [f"proxy: {fault}" for fault in status.faults]
    for key, why in sorted(part.room.errors.items()):
        what = f"Service {key}" if key.name else "what no Service wants any more"
        out += [f"{what}: {reason}" for reason in why]
    if part.direct is not None:
        out += [f"proxy: {part.direct.error}"] if part.direct.error else []
        out += [f"Service {k}: {why}" for k, v in part.direct.faults.items() for why in v]
    return out + [f"Service {key}: {why}" for key, why in sorted(part.ports.faults.items())]


def complaints(part: ProxyPart) -> Iterator[Complaint]:
    """See Part."""

    def about(key: ObjectKey, uid: str = "") -> Subject:
        return Subject("v1", "Service", key, uid or part.uid_of(key))

    for key, plan in sorted(part.refused.items()):
        for refused in plan.refused:
            subject = about(key, plan.uid)
            yield Complaint(subject, refused.reason, refused.message, of_node=False)
    for key, why in sorted(part.room.errors.items()):
        if key.name:
            text = f"not served as written on node {part.node}: {'; '.join(why)}"
            yield Complaint(about(key), "NotApplied", text)
    for key, why in sorted(part.direct.faults.items() if part.direct else ()):
        text = f"on node {part.node}: {'; '.join(why)}"
        yield Complaint(about(key), "DirectReturn", text)
    for key, fault_ in sorted(part.ports.faults.items()):
        yield Complaint(about(key), "HealthPort", f"on node {part.node}: {fault_}")
    for key, faults in sorted(part.balancer.faults.items() if part.balancer else ()):
        for refused in faults:
            yield Complaint(about(key), refused.reason, refused.message, of_node=False)


def document(part: ProxyPart) -> dict[str, Any]:
    """The proxy's room in the status document."""
    status, balancer = part.room.status, part.balancer
    latency_s = status.latency_s
    out: dict[str, Any] = {
        "services": status.services,
        "servers": status.servers,
        "addresses": status.vips,
        "draining": status.draining,
        "last_apply_ms": None if latency_s is None else round(latency_s * 1000, 2),
        "applies": status.applies,
        "reconciles": status.reconciles,
        "operations": status.operations,
        "drifts": status.drifts,
        "last_drift": status.drift,
        "failures": status.failures,
        "health_ports": len(part.ports.listening),
        "healthy": part.health.healthy(),
        "foreign_servers": len(status.foreign),
        "errors": [status.error] if status.error else [],
        "refused_services": {
            str(k): [f"{r.reason}: {r.message}" for r in p.refused]
            for k, p in sorted(part.refused.items())
        },
    }
    if balancer is not None:
        out["load_balancer"] = {
            "leading": balancer.elector.leading,
            "leader": balancer.elector.holder,
            "written": balancer.writes,
            "waiting": describe_faults(balancer.faults),
            "last_error": balancer.elector.last_error,
        }
    return out


def metrics(part: ProxyPart) -> Iterable[Metric]:
    """The proxy's metrics."""
    status, balancer = part.room.status, part.balancer
    yield gauge("proxy_generation", "Changes of plans of Services", part.room.generation)
    applied = status.applied_generation
    yield gauge("proxy_applied_generation", "Those that are in the kernel", applied)
    yield gauge("proxy_services", "Services that are served", status.services)
    yield gauge("proxy_servers", "Virtual servers in IPVS that are ours", status.servers)
    yield gauge("proxy_addresses", "Addresses of Services on this node", status.vips)
    yield gauge("proxy_draining", "Real servers that take no new connections", status.draining)
    yield gauge("proxy_healthy", "1 when no change waits for too long", part.health.healthy())
    yield gauge("proxy_errors", "Services that the kernel refuses a part of", len(status.errors))
    yield gauge("proxy_refused", "Services with an address that is not served", len(part.refused))
    yield gauge("proxy_foreign", "Virtual servers that are somebody else's", len(status.foreign))
    yield counter("proxy_applies", "Plans applied to the kernel", status.applies)
    yield counter("proxy_apply_failures", "Applies that failed and were repeated", status.failures)
    yield counter("proxy_operations", "Operations on IPVS", status.operations)
    yield counter("proxy_drifts", "Times the kernel was found changed by others", status.drifts)
    leading = balancer is not None and balancer.elector.leading
    yield gauge("proxy_balancer_leading", "1 while this agent gives addresses", leading)
    written = balancer.writes if balancer is not None else 0
    yield counter("proxy_balancer_writes", "Statuses of Services written", written)


async def services(part: ProxyPart, args: dict[str, Any]) -> AsyncIterator[Any]:
    """Answer `services`: first the node, then each Service with its plan and what the kernel has.

    With {"service": "ns/name"} that one, and why its endpoints are not used.
    """
    wanted = str(args.get("service", ""))
    if not part.in_sync:
        raise NoAnswerError("services", needed="caches in sync")
    named: ServicePlan | None = None
    if wanted:
        namespace, _, name = wanted.partition("/")
        named = part.tracker.explained(ObjectKey(namespace, name))
        if named is None:
            raise NoAnswerError(f"no service {wanted}")
    yield {"node": part.node, "in_sync": part.standing().in_sync}
    plans = [named] if named is not None else [p for _, p in sorted(part.tracker.plans.items())]
    for plan in plans:
        live = await part.room.live(plan.service)
        yield {
            "plan": msgspec.to_builtins(plan),
            "live": None if live is None else describe_live(live),
        }


def describe_live(live: Live) -> dict[str, Any]:
    """What the kernel has of a Service: servers that are wanted, with their real servers."""
    servers = []
    for id_ in live.wanted:
        state = live.states.get(id_)
        draining: Mapping[Any, float] = live.draining.get(id_, {})
        servers.append(
            {
                "address": format_address(id_.address) if id_.address else "",
                "port": id_.port,
                "protocol": id_.protocol.value if id_.protocol else "",
                "fwmark": id_.fwmark,
                "present": state is not None,
                "reals": [
                    {
                        "address": format_address(real.address),
                        "port": real.port,
                        "weight": found.config.weight,
                        "active": found.active,
                        "inactive": found.inactive,
                        "draining_s": round(draining[real], 1) if real in draining else None,
                    }
                    for real, found in sorted((state.reals if state else {}).items())
                ],
            }
        )
    return {"servers": servers, "errors": list(live.errors)}
