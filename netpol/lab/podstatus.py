"""The status objects that the lab's kubelet writes for Pods and Nodes. Pure: JSON values in, out.

Owns their shape alone; when they are written is the kubelet's business.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from netpol.lab.cni import PortMapping
from netpol.lab.plan import NodePlan
from netpol.model.ids import Protocol
from netpol.model.objects import ContainerPort

Obj = dict[str, Any]

#: What `kubectl get nodes` shows as the kubelet's version; the API server speaks 1.34's objects.
KUBELET_VERSION = "v1.34.0-netpol-lab"

#: Where a real API server finds the kubelets.
KUBELET_PORT = 10250


def running(pod: Obj, *, addresses: Sequence[str], host_addresses: Sequence[str], now: str) -> Obj:
    """Return the status of a pod whose containers run and are ready."""
    spec = pod["spec"]
    old = pod.get("status") or {}
    status = _based_on(old, now) | {
        "phase": "Running",
        "conditions": _conditions(old, now, ready=True),
        "hostIP": host_addresses[0],
        "hostIPs": [{"ip": address} for address in host_addresses],
        "podIP": addresses[0],
        "podIPs": [{"ip": address} for address in addresses],
        "containerStatuses": [_container(c, now) for c in spec.get("containers") or ()],
    }
    inits = spec.get("initContainers") or ()
    if inits:
        status["initContainerStatuses"] = [
            _container(c, now) if c.get("restartPolicy") == "Always" else _finished(c, now)
            for c in inits
        ]
    status.pop("reason", None)
    status.pop("message", None)
    return status


def waiting(pod: Obj, *, reason: str, message: str, now: str) -> Obj:
    """Return the status of a pod that could not be started yet, with the reason why."""
    old = pod.get("status") or {}
    states = [
        {
            "name": c["name"],
            "image": c.get("image", ""),
            "imageID": "",
            "ready": False,
            "started": False,
            "restartCount": 0,
            "state": {"waiting": {"reason": reason, "message": message}},
        }
        for c in pod["spec"].get("containers") or ()
    ]
    return _based_on(old, now) | {
        "phase": "Pending",
        "conditions": _conditions(old, now, ready=False),
        "containerStatuses": states,
    }


def _based_on(old: Obj, now: str) -> Obj:
    kept = {name: value for name, value in old.items() if name in ("qosClass", "startTime")}
    return {"startTime": now} | kept


def _conditions(old: Obj, now: str, *, ready: bool) -> list[Obj]:
    """Return the four conditions, each with the time of its last change."""
    before = {c["type"]: c for c in old.get("conditions") or ()}
    wanted = {
        "PodScheduled": True,
        "Initialized": ready,
        "ContainersReady": ready,
        "Ready": ready,
    }
    conditions = []
    for name, value in wanted.items():
        text = "True" if value else "False"
        since = now
        if name in before and before[name].get("status") == text:
            since = before[name].get("lastTransitionTime") or now
        conditions.append(
            {"type": name, "status": text, "lastProbeTime": None, "lastTransitionTime": since}
        )
    return conditions


def _container(container: Obj, now: str) -> Obj:
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "containerID": f"netpol-lab://{container['name']}",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": now}},
        "lastState": {},
    }


def _finished(container: Obj, now: str) -> Obj:
    done = {"exitCode": 0, "reason": "Completed", "startedAt": now, "finishedAt": now}
    return _container(container, now) | {"started": False, "state": {"terminated": done}}


def container_ports(pod: Obj) -> tuple[ContainerPort, ...]:
    """Return the ports that the containers and restartable init containers declare."""
    spec = pod["spec"]
    sidecars = [c for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always"]
    return tuple(
        ContainerPort(
            port.get("name") or "",
            Protocol(port.get("protocol") or "TCP"),
            int(port["containerPort"]),
        )
        for container in [*(spec.get("containers") or ()), *sidecars]
        for port in container.get("ports") or ()
    )


def port_mappings(pod: Obj) -> tuple[PortMapping, ...]:
    """Return the hostPorts of a pod."""
    return tuple(
        PortMapping(
            host_port=int(port["hostPort"]),
            container_port=int(port["containerPort"]),
            protocol=port.get("protocol") or "TCP",
            host_ip=port.get("hostIP") or "",
        )
        for container in pod["spec"].get("containers") or ()
        for port in container.get("ports") or ()
        if port.get("hostPort")
    )


def node_object(node: NodePlan, *, now: str) -> Obj:
    """Return a Node that is ready, with its status."""
    addresses = [{"type": "InternalIP", "address": address} for address in node.addresses]
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": "KubeletReady",
        "message": "the lab's kubelet runs",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    resources = {"cpu": "2", "memory": "4Gi", "pods": "250"}
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": machine,
            },
        },
        "spec": {"podCIDR": node.pod_cidrs[0], "podCIDRs": list(node.pod_cidrs)},
        "status": {
            "addresses": [*addresses, {"type": "Hostname", "address": node.name}],
            "capacity": resources,
            "allocatable": resources,
            "conditions": [condition],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET_PORT}},
            "nodeInfo": {
                "architecture": machine,
                "operatingSystem": "linux",
                "osImage": "netpol lab (a network namespace)",
                "kernelVersion": platform.release(),
                "kubeletVersion": KUBELET_VERSION,
                "kubeProxyVersion": "",
                "containerRuntimeVersion": "netpol-lab://1",
                "machineID": "",
                "systemUUID": "",
                "bootID": "",
            },
        },
    }


def lease_object(node: NodePlan, *, now_micro: str) -> Obj:
    """Return the heartbeat that `kubectl describe node` shows."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": node.name, "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": node.name, "leaseDurationSeconds": 40, "renewTime": now_micro},
    }
