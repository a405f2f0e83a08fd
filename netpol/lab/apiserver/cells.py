"""The cells of a table row, per kind, and ages in the short form of kubectl.

Owns texts for people. Everything but an age is a function of the object.
"""

from datetime import UTC, datetime
from typing import Any

from netpol.lab.apiserver.errors import Obj

_UNSET = "<none>"
_UNKNOWN = "<unknown>"
_ENDPOINTS_SHOWN = 3


def age(stamp: Any, now: datetime | None = None) -> str:
    """Return how long ago a time stamp was, in the short form of kubectl."""
    if not isinstance(stamp, str) or not stamp:
        return _UNKNOWN
    try:
        at = datetime.fromisoformat(stamp)
    except ValueError:
        return _UNKNOWN
    seconds = int(((now or datetime.now(tz=UTC)) - at).total_seconds())
    return duration(max(seconds, 0))


def duration(seconds: int) -> str:
    """Return a duration with one or two units, coarser the longer it is."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m" + (f"{seconds % 60}s" if seconds % 60 else "")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h" + (f"{minutes % 60}m" if minutes % 60 else "")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d" + (f"{hours % 24}h" if hours % 24 else "")
    if days < 730:
        return f"{days}d"
    return f"{days // 365}y"


def created(obj: Obj) -> str:
    """Return the age of an object."""
    return age(obj["metadata"].get("creationTimestamp"))


def name(obj: Obj) -> str:
    """Return the name of an object."""
    return str(obj["metadata"].get("name", ""))


def selector_text(selector: Any) -> str:
    """Return a label selector in one line."""
    if not isinstance(selector, dict):
        return _UNSET
    labels = selector.get("matchLabels") or {}
    parts = [f"{key}={value}" for key, value in sorted(labels.items())]
    for term in selector.get("matchExpressions") or ():
        key, operator = term.get("key"), term.get("operator")
        values = ",".join(term.get("values") or ())
        text = {"Exists": f"{key}", "DoesNotExist": f"!{key}"}.get(operator)
        parts.append(text or f"{key} {str(operator).lower()} ({values})")
    return ",".join(parts) or _UNSET


def _labels_text(labels: Any) -> str:
    pairs = sorted(labels.items()) if isinstance(labels, dict) else ()
    return ",".join(f"{key}={value}" for key, value in pairs) or _UNSET


def pod(obj: Obj) -> list[Any]:
    """Return the cells of a Pod."""
    spec, status, meta = obj.get("spec") or {}, obj.get("status") or {}, obj["metadata"]
    states = status.get("containerStatuses") or []
    ready = sum(1 for state in states if state.get("ready"))
    restarts = sum(int(state.get("restartCount") or 0) for state in states)
    text = status.get("reason") or status.get("phase") or "Unknown"
    for state in states:
        where = state.get("state") or {}
        held = where.get("waiting") or where.get("terminated") or {}
        text = held.get("reason") or text
    if meta.get("deletionTimestamp"):
        text = "Terminating"
    addresses = status.get("podIPs") or [{"ip": status.get("podIP")}]
    return [
        name(obj),
        f"{ready}/{len(spec.get('containers') or ())}",
        text,
        str(restarts),
        created(obj),
        (addresses[0].get("ip") if addresses else None) or _UNSET,
        spec.get("nodeName") or _UNSET,
        status.get("nominatedNodeName") or _UNSET,
        _UNSET,
    ]


def service(obj: Obj) -> list[Any]:
    """Return the cells of a Service."""
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    kind = spec.get("type") or "ClusterIP"
    given = list(spec.get("externalIPs") or ())
    if kind == "LoadBalancer":
        ingress = (status.get("loadBalancer") or {}).get("ingress") or ()
        given = [one.get("ip") or one.get("hostname") for one in ingress] + given
        external = ",".join(given) or "<pending>"
    elif kind == "ExternalName":
        external = spec.get("externalName") or _UNSET
    else:
        external = ",".join(given) or _UNSET
    ports = []
    for port in spec.get("ports") or ():
        node = f":{port['nodePort']}" if port.get("nodePort") else ""
        ports.append(f"{port.get('port')}{node}/{port.get('protocol')}")
    return [
        name(obj),
        kind,
        spec.get("clusterIP") or _UNSET,
        external,
        ",".join(ports) or _UNSET,
        created(obj),
        _labels_text(spec.get("selector")),
    ]


def node(obj: Obj) -> list[Any]:
    """Return the cells of a Node."""
    spec, status, meta = obj.get("spec") or {}, obj.get("status") or {}, obj["metadata"]
    ready = "Unknown"
    for condition in status.get("conditions") or ():
        if condition.get("type") == "Ready":
            ready = "Ready" if condition.get("status") == "True" else "NotReady"
    if spec.get("unschedulable"):
        ready += ",SchedulingDisabled"
    marks = [key for key in meta.get("labels") or {} if key.startswith("node-role.kubernetes.io/")]
    roles = sorted(mark.partition("/")[2] for mark in marks)
    # Of two addresses of one type (two families) the first is shown.
    addresses = reversed(status.get("addresses") or ())
    found = {one.get("type"): one.get("address") for one in addresses}
    info = status.get("nodeInfo") or {}
    return [
        name(obj),
        ready,
        ",".join(roles) or _UNSET,
        created(obj),
        info.get("kubeletVersion") or "",
        found.get("InternalIP") or _UNSET,
        found.get("ExternalIP") or _UNSET,
        info.get("osImage") or _UNKNOWN,
        info.get("kernelVersion") or _UNKNOWN,
        info.get("containerRuntimeVersion") or _UNKNOWN,
    ]


def endpoint_slice(obj: Obj) -> list[Any]:
    """Return the cells of an EndpointSlice."""
    ports = [str(port.get("port", "*")) for port in obj.get("ports") or ()]
    found = [ip for one in obj.get("endpoints") or () for ip in one.get("addresses") or ()]
    text = ",".join(found[:_ENDPOINTS_SHOWN])
    if len(found) > _ENDPOINTS_SHOWN:
        text += f" + {len(found) - _ENDPOINTS_SHOWN} more..."
    kind = obj.get("addressType") or _UNSET
    return [name(obj), kind, ",".join(ports) or "<unset>", text or "<unset>", created(obj)]


def event(obj: Obj) -> list[Any]:
    """Return the cells of an Event."""
    about = obj.get("involvedObject") or obj.get("regarding") or {}
    source = obj.get("source") or obj.get("deprecatedSource") or {}
    names = [source.get("component") or obj.get("reportingComponent"), source.get("host")]
    created = obj["metadata"].get("creationTimestamp")
    first = obj.get("firstTimestamp") or obj.get("eventTime") or created
    last = obj.get("lastTimestamp") or (obj.get("series") or {}).get("lastObservedTime") or first
    return [
        age(last),
        obj.get("type") or "",
        obj.get("reason") or "",
        f"{str(about.get('kind') or '').lower()}/{about.get('name') or ''}",
        about.get("fieldPath") or "",
        ", ".join(name for name in names if name),
        str(obj.get("message") or obj.get("note") or "").strip(),
        age(first),
        obj.get("count") or obj.get("deprecatedCount") or 1,
        name(obj),
    ]


def daemon_set(obj: Obj) -> list[Any]:
    """Return the cells of a DaemonSet."""
    status = obj.get("status") or {}
    spec = obj.get("spec") or {}
    pod = (spec.get("template") or {}).get("spec") or {}
    counts = (
        "desiredNumberScheduled",
        "currentNumberScheduled",
        "numberReady",
        "updatedNumberScheduled",
        "numberAvailable",
    )
    return [
        name(obj),
        *(int(status.get(name) or 0) for name in counts),
        _labels_text(pod.get("nodeSelector")),
        created(obj),
        *_workload_tail(spec, pod),
    ]


def deployment(obj: Obj) -> list[Any]:
    """Return the cells of a Deployment."""
    status, spec = obj.get("status") or {}, obj.get("spec") or {}
    pod = (spec.get("template") or {}).get("spec") or {}
    return [
        name(obj),
        f"{status.get('readyReplicas') or 0}/{spec.get('replicas') or 0}",
        int(status.get("updatedReplicas") or 0),
        int(status.get("availableReplicas") or 0),
        created(obj),
        *_workload_tail(spec, pod),
    ]


def _workload_tail(spec: Obj, pod: Obj) -> list[str]:
    containers = pod.get("containers") or ()
    return [
        ",".join(str(one.get("name")) for one in containers),
        ",".join(str(one.get("image")) for one in containers),
        selector_text(spec.get("selector")),
    ]


def role_binding(obj: Obj) -> list[Any]:
    """Return the cells of a RoleBinding or ClusterRoleBinding."""
    role = obj.get("roleRef") or {}
    return [name(obj), f"{role.get('kind')}/{role.get('name')}", created(obj)]
