"""The machines inside the guest: the guest itself is the node, pods and an outsider are namespaces.

Pods are on a real bridge, which is where br_netfilter and IPVS meet; everybody has both families.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from netpol.kernel import netns

BRIDGE, UPLINK = "kube-bridge", "eth0"
PODS = {"client": 10, "backend": 20, "other": 30, "newcomer": 40}
OUTSIDER = "outsider"


def v4(host: int) -> str:
    """A pod's address."""
    return f"10.244.1.{host}"


def v6(host: int) -> str:
    """A pod's IPv6 address."""
    return f"fd00:10:244:1::{host}"


NODE4, NODE6 = "172.18.0.2", "fd00:172:18::2"
VIP4, VIP6 = "10.96.0.10", "fd00:10:96::10"
#: Services that stay as they are: another pod, the node itself, one that comes and goes.
VIP4_OTHER, VIP4_NODE, VIP4_LATE = "10.96.0.11", "10.96.0.12", "10.96.0.13"


def build() -> None:
    """Make namespaces, links, addresses; turn on what a node has on."""
    for space in (*PODS, OUTSIDER):
        netns.create(space)
    lines = [
        f"link add {BRIDGE} type bridge",
        f"link set {BRIDGE} up",
        f"addr add {v4(1)}/24 dev {BRIDGE}",
        f"addr add {v6(1)}/64 dev {BRIDGE} nodad",
        f"link add {UPLINK} type veth peer name up0 netns {OUTSIDER}",
        f"link set {UPLINK} up",
        f"addr add {NODE4}/24 dev {UPLINK}",
        f"addr add {NODE6}/64 dev {UPLINK} nodad",
        # As a proxy does: the addresses of Services, on a device that is down.
        "link add kube-ipvs0 type dummy",
    ]
    vips = (VIP4, VIP4_OTHER, VIP4_NODE, VIP4_LATE)
    lines += [f"addr add {vip}/32 dev kube-ipvs0" for vip in vips]
    # An IPv6 address is local only on a device that is up.
    lines.append(f"addr add {VIP6}/128 dev lo nodad")
    for name in PODS:
        port = f"veth-{name[:8]}"
        lines += [
            f"link add {port} type veth peer name eth0 netns {name}",
            f"link set {port} master {BRIDGE} up",
            # As the CNI plugin's hairpinMode: a pod that reaches itself comes out where it went in.
            f"link set {port} type bridge_slave hairpin on",
        ]
    _batch(lines)
    for name, host in PODS.items():
        _batch(
            [
                "link set eth0 up",
                f"addr add {v4(host)}/24 dev eth0",
                f"addr add {v6(host)}/64 dev eth0 nodad",
                f"route add default via {v4(1)}",
                f"route add default via {v6(1)}",
            ],
            name,
        )
    _batch(
        [
            "link set up0 up",
            "addr add 172.18.0.9/24 dev up0",
            "addr add fd00:172:18::9/64 dev up0 nodad",
            f"route add default via {NODE4}",
        ],
        OUTSIDER,
    )
    _batch(["link set lo up"])
    for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        (Path("/proc/sys/net") / key).write_text("1")


def _batch(lines: list[str], space: str | None = None) -> None:
    """Run many ip commands as one process."""
    where = ["-n", space] if space else []
    done = subprocess.run(
        ["ip", *where, "-batch", "-"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (space, done.stderr)
