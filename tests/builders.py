"""Makers of Kubernetes manifests for tests, as plain JSON values.

Owns the short forms in which tests write worlds: `pod("a/web", ip="10.244.1.2", app="web")`. It knows
nothing of netpol, so that the oracle, the engine and a real API server read the same objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Json = dict[str, Any]
World = dict[str, list[Json]]

#: The kinds of a world, in the order in which an API server should be given them.
KINDS = ("nodes", "namespaces", "pods", "policies")


def _meta(ref: str, labels: Mapping[str, str] | None, **more: Any) -> Json:
    namespace, _, name = ref.rpartition("/")
    meta: Json = {"name": name}
    if namespace:
        meta["namespace"] = namespace
    meta["uid"] = more.pop("uid", None) or f"uid-{ref}"
    if labels:
        meta["labels"] = dict(labels)
    meta.update({k: v for k, v in more.items() if v is not None})
    return meta


def namespace(name: str, **labels: str) -> Json:
    """A Namespace as the API server returns it: with its name among its labels."""
    meta = _meta(name, {"kubernetes.io/metadata.name": name, **labels})
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": meta}


def node(name: str, *addresses: str, cidrs: Iterable[str] = ()) -> Json:
    """A Node with InternalIP addresses and podCIDRs."""
    cidrs = list(cidrs)
    status: Json = {"addresses": [{"type": "Hostname", "address": name}]}
    status["addresses"] += [{"type": "InternalIP", "address": a} for a in addresses]
    spec: Json = {"podCIDR": cidrs[0], "podCIDRs": cidrs} if cidrs else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": _meta(name, None),
        "spec": spec,
        "status": status,
    }


def container_port(text: str) -> Json:
    """`NAME=NUMBER/PROTOCOL`, `NUMBER/PROTOCOL` or `NUMBER` to a containerPort."""
    name, _, rest = text.rpartition("=")
    number, _, protocol = rest.partition("/")
    port: Json = {"containerPort": int(number)}
    if name:
        port["name"] = name
    if protocol:
        port["protocol"] = protocol
    return port


def pod(
    ref: str,
    *,
    ip: str | Iterable[str] = (),
    node: str = "n1",
    ports: Iterable[str] = (),
    sidecar_ports: Iterable[str] = (),
    init_ports: Iterable[str] = (),
    phase: str = "Running",
    host_network: bool = False,
    created: str = "2026-01-01T00:00:00Z",
    uid: str = "",
    terminating: bool = False,
    labels: Mapping[str, str] | None = None,
    **more_labels: str,
) -> Json:
    """A Pod; ports as for `container_port`, two containers when there is more than one port."""
    ips = [ip] if isinstance(ip, str) else list(ip)
    spec: Json = {"containers": [{"name": "main", "image": "probe"}]}
    for index, text in enumerate(ports):
        if index:
            spec["containers"].append({"name": f"c{index}", "image": "probe"})
        spec["containers"][index]["ports"] = [container_port(text)]
    inits: list[Json] = []
    for index, text in enumerate(sidecar_ports):
        inits.append({"name": f"sidecar{index}", "image": "probe", "restartPolicy": "Always"})
        inits[-1]["ports"] = [container_port(text)]
    for index, text in enumerate(init_ports):
        inits.append({"name": f"init{index}", "image": "probe", "ports": [container_port(text)]})
    if inits:
        spec["initContainers"] = inits
    if node:
        spec["nodeName"] = node
    if host_network:
        spec["hostNetwork"] = True
    status: Json = {"phase": phase}
    if ips:
        status |= {"podIP": ips[0], "podIPs": [{"ip": a} for a in ips]}
    meta = _meta(
        ref,
        {**(labels or {}), **more_labels},
        uid=uid,
        creationTimestamp=created,
        deletionTimestamp="2026-01-02T00:00:00Z" if terminating else None,
    )
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": status}


def selector(*expressions: Json, labels: Mapping[str, str] | None = None, **more: str) -> Json:
    """A LabelSelector of matchLabels and matchExpressions."""
    out: Json = {}
    if labels or more:
        out["matchLabels"] = {**(labels or {}), **more}
    if expressions:
        out["matchExpressions"] = list(expressions)
    return out


def term(key: str, operator: str, *values: str) -> Json:
    """One entry of matchExpressions; no `values` key without values."""
    out: Json = {"key": key, "operator": operator}
    if values:
        out["values"] = list(values)
    return out


def pods(*expressions: Json, namespaces: Json | None = None, **labels: str) -> Json:
    """A peer with a podSelector, and a namespaceSelector if given."""
    out: Json = {"podSelector": selector(*expressions, labels=labels)}
    if namespaces is not None:
        out["namespaceSelector"] = namespaces
    return out


def namespaces(*expressions: Json, **labels: str) -> Json:
    """A peer with only a namespaceSelector."""
    return {"namespaceSelector": selector(*expressions, labels=labels)}


def block(cidr: str, *excepts: str) -> Json:
    """A peer with an ipBlock."""
    out: Json = {"cidr": cidr}
    if excepts:
        out["except"] = list(excepts)
    return {"ipBlock": out}


def port(text: str) -> Json:
    """A NetworkPolicyPort: `80`, `80/UDP`, `/UDP`, `web/TCP`, `8000-8100/TCP`."""
    value, _, protocol = text.partition("/")
    out: Json = {}
    if protocol:
        out["protocol"] = protocol
    first, dash, last = value.partition("-")
    if first.isdigit():
        out["port"] = int(first)
        if dash:
            out["endPort"] = int(last)
    elif value:
        out["port"] = value
    return out


def ingress(*peers: Json, ports: Iterable[str | Json] | None = None) -> Json:
    """One ingress rule; no peers and no ports mean what the API says they mean: any."""
    out: Json = {}
    if peers:
        out["from"] = list(peers)
    if ports is not None:
        out["ports"] = [port(p) if isinstance(p, str) else p for p in ports]
    return out


def egress(*peers: Json, ports: Iterable[str | Json] | None = None) -> Json:
    """One egress rule."""
    rule = ingress(*peers, ports=ports)
    if "from" in rule:
        rule["to"] = rule.pop("from")
    return rule


def policy(
    ref: str,
    subject: Json | None = None,
    *,
    ingress: list[Json] | None = None,
    egress: list[Json] | None = None,
    types: Iterable[str] | None = None,
) -> Json:
    """A NetworkPolicy; `subject` is its podSelector (None: `{}`), absent lists stay absent."""
    spec: Json = {"podSelector": {} if subject is None else subject}
    if ingress is not None:
        spec["ingress"] = ingress
    if egress is not None:
        spec["egress"] = egress
    if types is not None:
        spec["policyTypes"] = list(types)
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(ref, None),
        "spec": spec,
    }


def world(*objects: Json) -> World:
    """Sort objects into the lists of a world."""
    lists = {"Node": "nodes", "Namespace": "namespaces", "Pod": "pods", "NetworkPolicy": "policies"}
    out: World = {kind: [] for kind in KINDS}
    for thing in objects:
        out[lists[thing["kind"]]].append(thing)
    return out


def reference(thing: Json) -> str:
    """`namespace/name`, or `name`."""
    meta = thing["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if "namespace" in meta else str(meta["name"])


def replace(base: World, *objects: Json, without: Iterable[str] = ()) -> World:
    """A world with objects put in place of their namesakes, and those named in `without` gone.

    `without` takes `pod/NS/NAME`, `networkpolicy/NS/NAME`, `namespace/NAME`, `node/NAME`.
    """
    gone = set(without)
    new = {(o["kind"], reference(o)) for o in objects}
    kept = [
        o
        for kind in KINDS
        for o in base[kind]
        if (o["kind"], reference(o)) not in new
        and f"{o['kind'].lower()}/{reference(o)}" not in gone
    ]
    return world(*kept, *objects)
