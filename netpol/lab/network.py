"""The wire of the lab: a switch namespace with a bridge for every segment, node namespaces on them.

Owns links, addresses, routes and sysctls of the switch, the nodes and the router outside; pods are the CNI
plugins' business. The switch forwards between segments, knows no pod route, and its addresses play the
outside world. Where agents do not speak BGP the lab itself routes: every node knows every other node's
podCIDRs, and so does the switch.

All of it is inside namespaces; nothing of the machine's own network is touched, except that the module
br_netfilter is loaded, without which no policy sees bridged packets (law 10 of the dataplane).
"""

from __future__ import annotations

import concurrent.futures
import functools
import subprocess
from pathlib import Path

from netpol.kernel.netns import in_netns
from netpol.lab import spaces
from netpol.lab.plan import LabPlan, NodePlan, netns_prefix
from netpol.lib.errors import KernelMissingError

_FORWARDING = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}

#: Addresses are usable at once: duplicate detection would cost two seconds an address, for nothing.
NO_DAD = {
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/dad_transmits": "0",
}

_NODE_SYSCTLS = (
    NO_DAD
    | _FORWARDING
    | {
    # Spoofed sources must meet the agent's own check, not hide behind the kernel's.
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/bridge/bridge-nf-call-ip6tables": "1",
}

_SWITCH_SYSCTLS = NO_DAD | {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    # The switch is a wire: nothing may filter or track there.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
}


def up(plan: LabPlan) -> None:
    """Make the switch and the nodes; what stands already is left as it is.

    Raises:
        KernelError: The kernel or `ip` refused something.
    """
    _load_br_netfilter()
    wanted = [plan.switch_netns, *(node.netns for node in plan.nodes)]
    fresh = set(wanted) - set(spaces.names(netns_prefix(plan.name)))
    spaces.create(wanted)
    for space in wanted:
        sysctls = _SWITCH_SYSCTLS if space == plan.switch_netns else _NODE_SYSCTLS
        in_netns(space, functools.partial(spaces.write_sysctls, sysctls))
    wires = [
        f"link add n{node.index} netns {plan.switch_netns} type veth peer name eth0 netns {node.netns}"
        for node in plan.nodes
        if node.netns in fresh
    ]
    if plan.switch_netns in fresh:
        spaces.ip_batch(_switch_lines(plan), netns=plan.switch_netns)
    spaces.ip_batch(wires)
    ports = [line for node in plan.nodes for line in _port_lines(node) if node.netns in fresh]
    spaces.ip_batch(ports, netns=plan.switch_netns)
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        made = [node for node in plan.nodes if node.netns in fresh]
        list(
            pool.map(lambda node: spaces.ip_batch(_node_lines(plan, node), netns=node.netns), made)
        )
    for space in wanted:
        if space in fresh:
            spaces.ip_batch(_route_lines(plan, space), netns=space)


def down(name: str) -> list[str]:
    """Remove every namespace of a lab, with whatever runs in it; return the names removed."""
    found = spaces.names(netns_prefix(name))
    if found:
        spaces.kill_inside(found)
        spaces.remove(found)
    return found


def _load_br_netfilter() -> None:
    if Path("/proc/sys/net/bridge/bridge-nf-call-iptables").exists():
        return
    try:
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True, check=False)
    except FileNotFoundError as missing:
        raise KernelMissingError("modprobe", needed="the program modprobe (kmod)") from missing
    if not Path("/proc/sys/net/bridge/bridge-nf-call-iptables").exists():
        raise KernelMissingError(
            "this kernel shows bridged packets to no rule", needed="the module br_netfilter"
        )


def _switch_lines(plan: LabPlan) -> list[str]:
    lines = [
        "link set lo up",
        f"link add {_SWITCH_BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set {_SWITCH_BRIDGE} up",
    ]
    for address, length in zip(plan.switch_addresses, plan.prefix_lengths, strict=True):
        lines.append(f"addr add {address}/{length} dev {_SWITCH_BRIDGE}{_nodad(address)}")
    return lines


def _port_lines(node: NodePlan) -> list[str]:
    port = f"n{node.index}"
    return [f"link set {port} addrgenmode none", f"link set {port} master {_SWITCH_BRIDGE} up"]


def _node_lines(plan: LabPlan, node: NodePlan) -> list[str]:
    lines = ["link set lo up", "link set eth0 up"]
    for address, length in zip(node.addresses, node.prefix_lengths, strict=True):
        lines.append(f"addr add {address}/{length} dev eth0{_nodad(address)}")
    lines += [f"route add default via {gateway} dev eth0" for gateway in plan.switch_addresses]
    return lines


def _route_lines(plan: LabPlan, space: str) -> list[str]:
    device = _SWITCH_BRIDGE if space == plan.switch_netns else "eth0"
    return [
        f"route add {cidr} via {address} dev {device}"
        for node in plan.nodes
        if node.netns != space
        for cidr, address in zip(node.pod_cidrs, node.addresses, strict=True)
    ]


def _nodad(address: str) -> str:
    return " nodad" if ":" in address else ""
