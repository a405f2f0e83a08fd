"""What a lab is, as values: its names, addresses and files, all derived from a name and a few choices.

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
_NODE_NET4 = ipaddress.IPv4Network("172.30.0.0/24")
_NODE_NET6 = ipaddress.IPv6Network("fd00:172:30::/64")
_FIRST_NODE_HOST = 10  # node1 is .11; below that are the switch and room for outsiders
_CLUSTER_NET4 = ipaddress.IPv4Network("10.244.0.0/16")


@dataclass(frozen=True, slots=True)
class NodePlan:
    """A node: addresses as text, v4 first; `prefixes` are those of the nodes' common network."""

    name: str
    index: int
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
    """

    name: str = DEFAULT_NAME
    node_count: int = 2
    dual_stack: bool = True
    iptables: str = ""
    agent: bool = True
    restart_agents: bool = True
    proxy: bool = False
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
        return (str(_NODE_NET4[1]), str(_NODE_NET6[1]))[: 2 if self.dual_stack else 1]

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
        host = _FIRST_NODE_HOST + index
        name = f"node{index}"
        pods4 = ipaddress.IPv4Network((int(_CLUSTER_NET4[0]) + (index << 8), 24))
        return NodePlan(
            name=name,
            index=index,
            netns=f"{netns_prefix(self.name)}{name}",
            addresses=(str(_NODE_NET4[host]), str(_NODE_NET6[host]))[:families],
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
            "cni_bin_dir": str(self.cni_bin_dir),
            "state_root": str(self.state_root),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LabPlan:
        """Return the plan that was written by `as_json`."""
        paths = {name: Path(data[name]) for name in ("cni_bin_dir", "state_root")}
        return cls(**(data | paths))


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
