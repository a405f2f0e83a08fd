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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from netpol.kernel.netns import in_netns
from netpol.lab import spaces
from netpol.lab.plan import LabPlan, NodePlan, netns_prefix
from netpol.lib.errors import KernelMissingError

#: Addresses are usable at once: duplicate detection would cost two seconds an address, for nothing.
NO_DAD = {
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/dad_transmits": "0",
}

# Spoofed sources must meet the agent's own check, not hide behind the kernel's.
_NO_RP_FILTER = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
}

_FORWARDING = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
}

_NODE_SYSCTLS = {
    **NO_DAD,
    **_NO_RP_FILTER,
    **_FORWARDING,
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/bridge/bridge-nf-call-ip6tables": "1",
}

_SWITCH_SYSCTLS = {
    **NO_DAD,
    **_NO_RP_FILTER,
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
    wanted = _sysctls(plan)
    fresh = set(wanted) - set(spaces.names(netns_prefix(plan.name)))
    spaces.create(wanted)
    for space, values in wanted.items():
        in_netns(space, functools.partial(spaces.write_sysctls, values))
    if plan.switch_netns in fresh:
        spaces.ip_batch(_switch_lines(plan), netns=plan.switch_netns)
    wires = [wire for wire in _wires(plan) if wire.netns in fresh]
    spaces.ip_batch(
        f"link add {w.port} netns {plan.switch_netns} type veth peer name {w.link} netns {w.netns}"
        for w in wires
    )
    spaces.ip_batch((line for w in wires for line in _port_lines(w)), netns=plan.switch_netns)
    batches = {node.netns: _node_lines(plan, node) for node in plan.nodes}
    if plan.router:
        batches[plan.router_netns] = _router_lines(plan)
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        made = [space for space in batches if space in fresh]
        list(pool.map(lambda space: spaces.ip_batch(batches[space], netns=space), made))
    if not plan.bgp:
        for space in fresh:
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


def _sysctls(plan: LabPlan) -> dict[str, dict[str, str]]:
    """Return every namespace that there must be, the switch first, with what is set in it."""
    switch = _SWITCH_SYSCTLS | (_FORWARDING if plan.subnets > 1 else {})
    router = {plan.router_netns: _SWITCH_SYSCTLS | _FORWARDING} if plan.router else {}
    return {
        plan.switch_netns: switch,
        **{node.netns: _NODE_SYSCTLS for node in plan.nodes},
        **router,
    }


class _Wire(NamedTuple):
    """A link from a namespace to a port of the switch, in a segment."""

    netns: str
    link: str
    port: str
    segment: int


def _wires(plan: LabPlan) -> Iterator[_Wire]:
    for node in plan.nodes:
        yield _Wire(node.netns, "eth0", f"n{node.index}", node.segment)
    for segment in range(plan.subnets if plan.router else 0):
        yield _Wire(plan.router_netns, f"eth{segment}", f"r{segment}", segment)


def _switch_lines(plan: LabPlan) -> list[str]:
    lines = ["link set lo up"]
    for segment in range(plan.subnets):
        bridge = _bridge(segment)
        lines += [
            f"link add {bridge} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            f"link set {bridge} up",
            *_address_lines(plan, plan.gateways(segment), bridge),
        ]
    return lines


def _port_lines(wire: _Wire) -> list[str]:
    return [
        f"link set {wire.port} addrgenmode none",
        f"link set {wire.port} master {_bridge(wire.segment)} up",
    ]


def _node_lines(plan: LabPlan, node: NodePlan) -> list[str]:
    gateways = plan.gateways(node.segment)
    return [
        "link set lo up",
        "link set eth0 up",
        *_address_lines(plan, node.addresses, "eth0"),
        *(f"route add default via {gateway} dev eth0" for gateway in gateways),
    ]


def _router_lines(plan: LabPlan) -> list[str]:
    lines = ["link set lo up"]
    for segment in range(plan.subnets):
        link = f"eth{segment}"
        lines.append(f"link set {link} up")
        lines += _address_lines(plan, plan.router_addresses(segment), link)
    return lines


def _route_lines(plan: LabPlan, space: str) -> list[str]:
    device = _bridge(0) if space == plan.switch_netns else "eth0"
    return [
        f"route add {cidr} via {address} dev {device}"
        for node in plan.nodes
        if node.netns != space
        for cidr, address in zip(node.pod_cidrs, node.addresses, strict=True)
    ]


def _address_lines(plan: LabPlan, addresses: tuple[str, ...], link: str) -> list[str]:
    return [
        f"addr add {address}/{length} dev {link}{' nodad' if ':' in address else ''}"
        for address, length in zip(addresses, plan.prefix_lengths, strict=True)
    ]


def _bridge(segment: int) -> str:
    return f"br{segment}"
