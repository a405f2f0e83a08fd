"""Services with their endpoints, as API objects and as what IPVS is told; always the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from netpol.model.ids import Protocol
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    IpvsOp,
    RealConfig,
    RealServer,
    ServerId,
    VirtualServer,
)
from netpol.model.net import Family, format_address

Json = dict[str, Any]

NODE = "node1"
NODE_ADDRESS = "172.18.0.2"
PORT, TARGET = 80, 8080


def vip(n: int) -> bytes:
    """The ClusterIP of a Service."""
    return (0x0A600000 + 1 + n).to_bytes(4, "big")


def backend(n: int) -> bytes:
    """The address of an endpoint, by a number over all Services; they come again after 2^20."""
    return (0x0AF00000 + 1 + n % (1 << 20)).to_bytes(4, "big")


def ipvs_ops(services: int, endpoints: int) -> list[IpvsOp]:
    """What makes the table."""
    ops: list[IpvsOp] = []
    config = RealConfig(1)
    for n in range(services):
        id_ = ServerId(Family.V4, Protocol.TCP, vip(n), PORT)
        ops.append(AddServer(VirtualServer(id_)))
        ops += [
            AddReal(id_, RealServer(backend(n * endpoints + e), TARGET), config)
            for e in range(endpoints)
        ]
    return ops


def ipvsadm_text(services: int, endpoints: int) -> str:
    """The same for ipvsadm --restore."""
    lines = []
    for n in range(services):
        at = f"{format_address(vip(n))}:{PORT}"
        lines.append(f"-A -t {at} -s rr\n")
        for e in range(endpoints):
            to = f"{format_address(backend(n * endpoints + e))}:{TARGET}"
            lines.append(f"-a -t {at} -r {to} -m -w 1\n")
    return "".join(lines)


def service_json(n: int) -> bytes:
    """The Service."""
    address = format_address(vip(n))
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": f"ns{n % 50}", "name": f"s{n}", "uid": f"u{n}"},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": address,
                "clusterIPs": [address],
                "ipFamilies": ["IPv4"],
                "ports": [{"name": "web", "protocol": "TCP", "port": PORT, "targetPort": TARGET}],
            },
        }
    ).encode()


def slice_json(n: int, endpoints: int, *, without: int = -1) -> bytes:
    """Its one EndpointSlice, with or without one of its endpoints."""
    return json.dumps(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": f"ns{n % 50}",
                "name": f"s{n}-x",
                "labels": {"kubernetes.io/service-name": f"s{n}"},
            },
            "addressType": "IPv4",
            "ports": [{"name": "web", "protocol": "TCP", "port": TARGET}],
            "endpoints": list(_endpoints(n, endpoints, without)),
        }
    ).encode()


def _endpoints(n: int, endpoints: int, without: int) -> Iterator[Json]:
    for e in range(endpoints):
        if e != without:
            yield {
                "addresses": [format_address(backend(n * endpoints + e))],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": NODE if e == 0 else f"node{2 + e}",
            }
