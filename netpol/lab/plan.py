"""What a lab is, as values: its names, addresses and files, all derived from a name and a few choices.

Nodes are spread over segments that the switch joins; a router outside has a leg in every one.

Pure: nothing is created here. Because every name follows from the lab's name, `lab down` finds what a
killed supervisor left behind without its memory. A lab's name has no dash, so that the namespaces of one
lab can never look like those of another.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol.lib.errors import InputError
from netpol.lib.naming import digest

#: Where the state of all labs lives: a tmpfs, since namespaces do not survive a boot either.
STATE_ROOT = Path("/run/netpol-lab")
DEFAULT_NAME = "lab"
DEFAULT_CNI_BIN_DIR = Path("/usr/lib/cni")
#: Pods sit behind this bridge on every node; the conflist names it and the agent reads it there.
POD_BRIDGE = "kube-bridge"
#: One byte of the podCIDR numbers the node; more than this on one machine is a typing error.
NODES_MAX = 50
#: The API server's port inside the lab's network.
API_PORT = 6443

_NAME = re.compile(r"[a-z][a-z0-9]{0,19}")  # 20: unix socket paths end at 107 bytes
#: The first segment of nodes; the next one's third byte (fourth group) is one more.
_NODE_NET4 = ipaddress.IPv4Network("172.30.0.0/24")
_NODE_NET6 = ipaddress.IPv6Network("fd00:172:30::/64")
_SWITCH_HOST, _ROUTER_HOST = 1, 2
_FIRST_NODE_HOST = 10  # node1 is .11; below that are the switch and room for outsiders
_CLUSTER_NET4 = ipaddress.IPv4Network("10.244.0.0/16")
#: What the router outside is called where a node's name is asked for.
ROUTER = "router"
#: Its AS: private (RFC 6996), and another one than the cluster's.
ROUTER_ASN = 64600


@dataclass(frozen=True, slots=True)
class NodePlan:
    """A node: addresses as text, v4 first; `segment` numbers the one that it is in, from 0."""

    name: str
    index: int
    segment: int
    netns: str
    addresses: tuple[str, ...]
    prefix_lengths: tuple[int, ...]
    pod_cidrs: tuple[str, ...]
    state_dir: Path

    @property
    def cni_conf_dir(self) -> Path:
        """The node's own `etc/cni/net.d`."""
        return self.state_dir / "etc/cni/net.d"

    @property
    def admin_socket(self) -> Path:
        """The admin socket of the node's agent."""
        return self.state_dir / "agent.sock"

    @property
    def xtables_lockfile(self) -> Path:
        """The node's own xtables lock: the usual file is shared by all namespaces."""
        return self.state_dir / "xtables.lock"

    @property
    def run_dir(self) -> Path:
        """Where the node's agent keeps what must not outlive a boot, and BIRD its files."""
        return self.state_dir / "run"

    @property
    def peers_file(self) -> Path:
        """What names the router outside to the node's agent."""
        return self.state_dir / "peers.yaml"


@dataclass(frozen=True, slots=True)
class LabPlan:
    """A lab.

    Attributes:
        node_count: how many nodes.
        dual_stack: whether nodes and pods have IPv6 addresses too.
        iptables: "nft", "legacy" or "" for what the machine uses.
        agent: whether an agent runs on every node.
        restart_agents: whether an agent that ended is started again.
        proxy: whether the agents serve Services, too.
        routes: "bgp" where the agents connect pods of all nodes, "static" where the lab does.
        subnets: how many segments the nodes are spread over.
        router: "frr" for a BGP router outside the cluster, "" for none.
        agent_args: further arguments of every agent.
    """

    name: str = DEFAULT_NAME
    node_count: int = 2
    dual_stack: bool = True
    iptables: str = ""
    agent: bool = True
    restart_agents: bool = True
    proxy: bool = False
    routes: str = "static"
    subnets: int = 1
    router: str = ""
    agent_args: tuple[str, ...] = ()
    cni_bin_dir: Path = DEFAULT_CNI_BIN_DIR
    state_root: Path = STATE_ROOT

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 1 <= self.node_count <= NODES_MAX:
            raise InputError(
                "--nodes", needed=f"a number from 1 to {NODES_MAX}", got=str(self.node_count)
            )
        if self.iptables not in ("", "nft", "legacy"):
            raise InputError("--iptables", needed="nft or legacy", got=self.iptables)
        self._check_routes()

    def _check_routes(self) -> None:
        if self.routes not in ("bgp", "static"):
            raise InputError("--routes", needed="bgp or static", got=self.routes)
        if self.router not in ("", "frr"):
            raise InputError("--router", needed="frr", got=self.router)
        if not 1 <= self.subnets <= self.node_count:
            needed = f"a number from 1 to that of nodes ({self.node_count})"
            raise InputError("--subnets", needed=needed, got=str(self.subnets))
        if self.bgp and not self.agent:
            raise InputError("--routes bgp", needed="agents, which speak it", got="--no-agent")
        for flag, given in (("--subnets", self.subnets > 1), ("--router", bool(self.router))):
            if given and not self.bgp:
                raise InputError(flag, needed="--routes bgp", got="static routes")

    @property
    def bgp(self) -> bool:
        """Whether the agents connect pods of all nodes, instead of the lab."""
        return self.routes == "bgp"

    @property
    def state_dir(self) -> Path:
        """Where everything of this lab is that is a file."""
        return self.state_root / self.name

    @property
    def switch_netns(self) -> str:
        """The namespace of the wire between the nodes, where the API server listens too."""
        return f"{netns_prefix(self.name)}net"

    @property
    def switch_addresses(self) -> tuple[str, ...]:
        """The switch's own addresses: an outsider to every node and pod."""
        return self.gateways(0)

    @property
    def router_netns(self) -> str:
        """The namespace of the router outside, where there is one."""
        return f"{netns_prefix(self.name)}{ROUTER}"

    @property
    def router_dir(self) -> Path:
        """Where the router's files are."""
        return self.state_dir / ROUTER

    def gateways(self, segment: int) -> tuple[str, ...]:
        """Return the switch's addresses in a segment."""
        return self._addresses(segment, _SWITCH_HOST)

    def router_addresses(self, segment: int) -> tuple[str, ...]:
        """Return the addresses that the router outside has in a segment."""
        return self._addresses(segment, _ROUTER_HOST)

    def segment_cidrs(self, segment: int) -> tuple[str, ...]:
        """Return a segment's subnets."""
        found = zip(self._addresses(segment, 0), self.prefix_lengths, strict=True)
        return tuple(f"{address}/{length}" for address, length in found)

    def _addresses(self, segment: int, host: int) -> tuple[str, ...]:
        four = _NODE_NET4[host] + segment * _NODE_NET4.num_addresses
        six = _NODE_NET6[host] + segment * _NODE_NET6.num_addresses
        return (str(four), str(six))[: 2 if self.dual_stack else 1]

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        """Prefix lengths of the nodes' network, per family."""
        return (_NODE_NET4.prefixlen, _NODE_NET6.prefixlen)[: 2 if self.dual_stack else 1]

    @property
    def nodes(self) -> tuple[NodePlan, ...]:
        """The nodes, node1 first."""
        return tuple(self._node(index) for index in range(1, self.node_count + 1))

    @property
    def service_cidrs(self) -> tuple[str, ...]:
        """Where cluster IPs come from."""
        return ("10.96.0.0/16", "fd00:10:96::/112")[: 2 if self.dual_stack else 1]

    def _node(self, index: int) -> NodePlan:
        families = 2 if self.dual_stack else 1
        segment = (index - 1) % self.subnets
        name = f"node{index}"
        pods4 = ipaddress.IPv4Network((int(_CLUSTER_NET4[0]) + (index << 8), 24))
        return NodePlan(
            name=name,
            index=index,
            segment=segment,
            netns=f"{netns_prefix(self.name)}{name}",
            addresses=self._addresses(segment, _FIRST_NODE_HOST + index),
            prefix_lengths=self.prefix_lengths,
            pod_cidrs=(str(pods4), f"fd00:10:244:{index:x}::/64")[:families],
            state_dir=self.state_dir / name,
        )

    def node(self, name: str) -> NodePlan | None:
        """Return the node of that name."""
        return next((node for node in self.nodes if node.name == name), None)

    def pod_netns(self, *, namespace: str, name: str, uid: str) -> str:
        """Return the name of a pod's namespace; another pod of the same name gets another one."""
        return f"{netns_prefix(self.name)}pod-{digest(namespace, name, uid, chars=12)}"

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            "name": self.name,
            "node_count": self.node_count,
            "dual_stack": self.dual_stack,
            "iptables": self.iptables,
            "agent": self.agent,
            "restart_agents": self.restart_agents,
            "proxy": self.proxy,
            "routes": self.routes,
            "subnets": self.subnets,
            "router": self.router,
            "agent_args": list(self.agent_args),
            "cni_bin_dir": str(self.cni_bin_dir),
            "state_root": str(self.state_root),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LabPlan:
        """Return the plan that was written by `as_json`."""
        paths = {name: Path(data[name]) for name in ("cni_bin_dir", "state_root")}
        return cls(**(data | paths | {"agent_args": tuple(data["agent_args"])}))


def check_name(name: str) -> None:
    """Refuse a lab name that could not be part of the names of namespaces and files.

    Raises:
        InputError: It is no such name.
    """
    if not _NAME.fullmatch(name):
        needed = "a lower-case letter, then up to 19 lower-case letters and digits"
        raise InputError("lab name", needed=needed, got=repr(name))


def netns_prefix(name: str) -> str:
    """Return what the names of all namespaces of a lab begin with."""
    return f"knp-{name}-"
