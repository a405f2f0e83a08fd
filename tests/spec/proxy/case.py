"""The form of the table of Services: a claim, a Service with its endpoints, and what clients meet.

Cases are data without any of netpol, so that the plan, the command line and real packets can all be held
against the same table. The node that is asked about is `here` in zone `z1`; `there` is in z2.

Endpoints are named by letters: `a` has the addresses 10.1.0.1 and fd01::1, `b` 10.1.0.2 and so on. What
clients meet is a text: the letters of the endpoints that take new connections ("a b"), with "/" before
those that drain ("a/b"), or `reject`, `drop`, or `-` where nothing is served at that address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.builders import Json

HERE, THERE = "here", "there"

#: Addresses that are used throughout.
VIP4, VIP6 = "10.96.0.10", "fd96::10"
NODE4, NODE4_OUTSIDE, NODE6 = "192.0.2.1", "198.51.100.1", "2001:db8::1"
OUTSIDE4, OUTSIDE6 = "203.0.113.7", "2001:db8:7::7"
BALANCER4, BALANCER6 = "203.0.113.50", "2001:db8:7::50"

#: Shorts for rows: the kind and the family.
ROWS = {
    "cluster": ("ClusterIP", VIP4),
    "cluster6": ("ClusterIP", VIP6),
    "node": ("NodePort", NODE4),
    "node outside": ("NodePort", NODE4_OUTSIDE),
    "node6": ("NodePort", NODE6),
    "external": ("ExternalIP", OUTSIDE4),
    "external6": ("ExternalIP", OUTSIDE6),
    "balancer": ("LoadBalancer", BALANCER4),
    "balancer6": ("LoadBalancer", BALANCER6),
}


@dataclass(frozen=True)
class Case:
    """One claim.

    Attributes:
        claim: a sentence.
        service: the Service.
        slices: its EndpointSlices.
        outside: what a client outside of the cluster meets, by the shorts of rows.
        inside: what pods of this node and the node meet, where that differs.
        rows: fields of rows that matter, by the shorts; compared with the document of the row.
        port: which port is asked about, by its name.
        refused: words of the refusals, in order.
        plan: fields of the plan that matter.
        options: fields of ProxyOptions that are not the default, as texts.
        node: the Node, where it is not the usual one.
    """

    claim: str
    service: Json
    slices: list[Json] = field(default_factory=list)
    outside: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    port: str = ""
    refused: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    node: Json | None = None


def address(letter: str, family: int = 4) -> str:
    """The address of an endpoint."""
    number = ord(letter) - ord("a") + 1
    return f"10.1.0.{number}" if family == 4 else f"fd01::{number:x}"


def here(*addresses: str, zone: str = "z1", cidrs: tuple[str, ...] = ("10.1.0.0/24",)) -> Json:
    """The Node that is asked about."""
    listed = [{"type": "Hostname", "address": HERE}]
    listed += [{"type": "InternalIP", "address": a} for a in addresses or (NODE4, NODE6)]
    if not addresses:
        listed.append({"type": "ExternalIP", "address": NODE4_OUTSIDE})
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": HERE, "labels": labels},
        "spec": {"podCIDRs": list(cidrs)},
        "status": {"addresses": listed},
    }


def port(
    number: int = 80,
    *,
    name: str = "",
    protocol: str | None = None,
    node: int = 0,
    target: Any = 8080,
) -> Json:
    """A port of a Service."""
    made: Json = {"port": number, "targetPort": target}
    if name:
        made["name"] = name
    if protocol:
        made["protocol"] = protocol
    if node:
        made["nodePort"] = node
    return made


def service(
    *ports: Json,
    type: str = "ClusterIP",  # noqa: A002 - as the API calls it
    ips: tuple[str, ...] = (VIP4,),
    external: tuple[str, ...] = (),
    ingress: tuple[Json, ...] = (),
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    **spec: Any,
) -> Json:
    """A Service `ns/web`; node ports are given to all types that have them."""
    has_node_port = type in ("NodePort", "LoadBalancer")
    listed = list(ports) or [port(node=30080 if has_node_port else 0)]
    body: Json = {"type": type, "ports": listed, **spec}
    if ips:
        body |= {"clusterIP": ips[0], "clusterIPs": list(ips)}
    if external:
        body["externalIPs"] = list(external)
    meta: Json = {"namespace": "ns", "name": "web", "uid": "u1"}
    if annotations:
        meta["annotations"] = dict(annotations)
    if labels:
        meta["labels"] = dict(labels)
    made: Json = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": body}
    if ingress:
        made["status"] = {"loadBalancer": {"ingress": list(ingress)}}
    return made


def endpoint(
    letter: str,
    node: str | None = HERE,
    *,
    ready: bool | None = True,
    serving: bool | None = None,
    terminating: bool | None = None,
    zones: tuple[str, ...] = (),
    nodes: tuple[str, ...] = (),
    family: int = 4,
    pod: str = "",
) -> Json:
    """An endpoint; conditions that are None are not written."""
    given = {"ready": ready, "serving": serving, "terminating": terminating}
    made: Json = {
        "addresses": [address(letter, family)],
        "conditions": {k: v for k, v in given.items() if v is not None},
    }
    if node is not None:
        made["nodeName"] = node
    if zones or nodes:
        made["hints"] = {
            "forZones": [{"name": z} for z in zones],
            "forNodes": [{"name": n} for n in nodes],
        }
    if pod:
        made["targetRef"] = {"kind": "Pod", "namespace": "ns", "name": pod}
    return made


def piece(
    *endpoints: Json,
    name: str = "web-1",
    kind: str = "IPv4",
    ports: list[Json] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    of: str = "web",
) -> Json:
    """An EndpointSlice of `ns/web`."""
    meta: Json = {
        "namespace": "ns",
        "name": name,
        "labels": {"kubernetes.io/service-name": of, **(labels or {})},
    }
    if annotations:
        meta["annotations"] = dict(annotations)
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": meta,
        "addressType": kind,
        "ports": ports if ports is not None else [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": list(endpoints),
    }


def ready(letters: str, node: str | None = HERE, **more: Any) -> list[Json]:
    """Several ready endpoints on one node."""
    return [endpoint(letter, node, **more) for letter in letters]


def going(
    letters: str, node: str | None = HERE, *, serving: bool | None = True, **more: Any
) -> list[Json]:
    """Several endpoints that terminate."""
    return [
        endpoint(letter, node, ready=False, serving=serving, terminating=True, **more)
        for letter in letters
    ]


def broken(letters: str, node: str | None = HERE, **more: Any) -> list[Json]:
    """Several endpoints that are not ready."""
    return [endpoint(letter, node, ready=False, serving=False, **more) for letter in letters]
