"""Settings of the agent: from flags, environment and a YAML file, checked all at once.

A flag beats the environment (`NETPOL_` and the flag's name), which beats the file (`--config`, keys as
the flags, with - or _). Every fault of all three is reported together, before anything starts.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from netpol.lib.errors import InputError
from netpol.model.net import Prefix, parse_address, parse_prefix
from netpol.model.pools import parse_range
from netpol.render.options import (
    DEFAULT_FIELD_MASK,
    DEFAULT_NFLOG_GROUP,
    DenyWith,
    field_mask_fault,
)

#: An interface name as the kernel and iptables take it (IFNAMSIZ - 1), + as a wildcard at its end.
_INTERFACE = re.compile(r"(?!\+$)[A-Za-z0-9_.@:-]{0,14}[A-Za-z0-9_.@:+-]")
#: Bits that nobody is known to use: CNI's portmap has 0x2000, kube-proxy 0x4000 and 0x8000, policy the
#: upper twelve. IPVS compares the whole mark, so that every number stands for one mark.
DEFAULT_SERVICE_MARK_MASK = 0x1FFF
#: Schedulers of IPVS that do without settings of their own.
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh")
#: The kernel's limit of a timeout (MAX_TIMEOUT_SECS in ip_vs_ctl.c: INT_MAX / HZ at 1,000 Hz).
_TIMEOUT_MAX_S = 2_147_483
#: A loadBalancerClass is a label's key: an optional DNS subdomain, then a name.
_LABEL_KEY = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
)
#: nf_log groups are 16 bits.
_GROUP_MAX = 65535


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; a field's help text is its documentation."""

    node: str = _setting("", "name of this node (default: the host name)")
    policy: bool = _setting(True, "enforce NetworkPolicy")
    proxy: bool = _setting(False, "serve Services with IPVS, instead of kube-proxy")
    routes: bool = _setting(
        False, "connect pods of all nodes by routes that BGP tells (needs BIRD)"
    )
    kubeconfig: str = _setting("", "kubeconfig file (default: the pod's service account)")
    api_server: str = _setting("", "URL of the API server, instead of the one in the kubeconfig")
    token_file: str = _setting(
        "", "file with the bearer token for --api-server, read again when it changes"
    )
    ca_file: str = _setting("", "CA certificates for --api-server")
    admin_socket: str = _setting("/run/netpol/agent.sock", "unix socket for netpol-ctl")
    state_dir: str = _setting(
        "/var/lib/netpol", "where the agent keeps what it must know after a restart"
    )
    health_addr: str = _setting(
        "0.0.0.0:9461",
        "ADDRESS:PORT of /healthz, /readyz and /metrics; 0.0.0.0 is both families; '' for none",
    )
    iptables: str = _setting("auto", "variant of iptables: auto, nft or legacy")
    xtables_lockfile: str = _setting(
        "", "lock shared with other iptables programs (default: /run/xtables.lock)"
    )
    mark_mask: str = _setting(
        f"{DEFAULT_FIELD_MASK:#x}", "contiguous bits of the packet mark that are ours"
    )
    nflog_group: int = _setting(DEFAULT_NFLOG_GROUP, "NFLOG group for denied packets")
    log_per_second: int = _setting(10, "denied packets of one class of pods logged per second")
    log_burst: int = _setting(50, "denied packets of one class that may exceed the rate at once")
    audit_log: str = _setting("-", "file for the log of denied packets, - for stdout, '' for none")
    hold_unknown_pods: str = _setting(
        "auto",
        "deny unknown addresses of the pod ranges: auto (where host-local assigns them), on, off",
    )
    deny_with: str = _setting(
        "drop", "what a denied packet meets: drop (silence), reject (a reset or an ICMP error)"
    )
    pod_ranges: tuple[str, ...] = _setting(
        (), "pod ranges of this node (default: from the CNI conflist)"
    )
    pod_interfaces: tuple[str, ...] = _setting(
        (), "interfaces behind which pods are, + as wildcard (default: the conflist's bridge)"
    )
    cni_conf_dir: str = _setting("/etc/cni/net.d", "where the CNI conflist is")
    bgp_asn: int = _setting(64512, "AS number of the cluster")
    bgp_mesh: bool = _setting(True, "every node peers with every other")
    bgp_peers_file: str = _setting("", "YAML list of routers that all nodes peer with")
    bird_external: bool = _setting(
        False, "BIRD runs in a container of its own (netpol-bird), which the agent only talks to"
    )
    bgp_port: int = _setting(179, "TCP port of BGP, on all nodes")
    bgp_hold_time: int = _setting(90, "seconds of silence after which a session between nodes ends")
    bgp_keepalive_time: int = _setting(
        0, "seconds between signs of life of a session between nodes; 0: a third of the hold time"
    )
    bgp_graceful_restart: bool = _setting(True, "nodes keep routes while a node's BIRD restarts")
    cluster_cidr: tuple[str, ...] = _setting(
        (), "ranges that podCIDRs of nodes must lie in (default: anywhere)"
    )
    node_subnets: tuple[str, ...] = _setting(
        (), "L2 segments of nodes (default: the subnet of the node's own link)"
    )
    overlay: str = _setting(
        "cross-subnet",
        "when pods' packets between nodes are tunnelled: never, cross-subnet, always",
    )
    encapsulation: str = _setting("vxlan", "how: vxlan or ipip")
    overlay_accept: tuple[str, ...] = _setting(
        (), "encapsulations taken from nodes besides one's own, while a cluster changes over"
    )
    advertise_pod_cidr: bool = _setting(True, "tell routers outside the node's podCIDRs")
    advertise_cluster_ip: bool = _setting(False, "tell routers outside the ClusterIPs")
    advertise_external_ip: bool = _setting(
        False, "tell routers outside Services' external addresses"
    )
    advertise_load_balancer_ip: bool = _setting(
        False, "tell routers outside Services' load balancer addresses"
    )
    masquerade: bool = _setting(
        True, "with --routes: what pods send out of the cluster has the node's address"
    )
    masquerade_exclude: tuple[str, ...] = _setting(
        (), "destinations outside that see the pod's own address"
    )
    write_cni: bool = _setting(True, "with --routes: keep the podCIDRs in the CNI conflist")
    log_format: str = _setting("auto", "the agent's own log: json, console or auto")
    run_dir: str = _setting(
        "/run/netpol", "where the proxy notes what in the kernel is its own, until the next boot"
    )
    service_ranges: tuple[str, ...] = _setting((), "ranges that ClusterIPs are taken from")
    nodeport_addresses: tuple[str, ...] = _setting(
        (), "ranges of the node's addresses that NodePorts are served on (default: all)"
    )
    external_ip_cidr: tuple[str, ...] = _setting(
        (), "ranges that external addresses of Services must lie in (default: anywhere)"
    )
    service_mark_mask: str = _setting(
        f"{DEFAULT_SERVICE_MARK_MASK:#x}", "contiguous bits of the packet mark for the proxy"
    )
    ipvs_scheduler: str = _setting("rr", f"scheduler of IPVS: {', '.join(SCHEDULERS)}")
    ipvs_tcp_timeout: int = _setting(
        0, "seconds until an idle TCP connection is forgotten; 0 leaves the kernel's"
    )
    ipvs_tcp_fin_timeout: int = _setting(0, "seconds after a FIN; 0 leaves the kernel's")
    ipvs_udp_timeout: int = _setting(0, "seconds after a UDP packet; 0 leaves the kernel's")
    drain_seconds: int = _setting(
        30, "how long TCP connections to an endpoint that left may go on, at most"
    )
    proxy_health_addr: str = _setting(
        "0.0.0.0:10256", "ADDRESS:PORT of the proxy's /healthz and /livez; '' for none"
    )
    netns_dir: str = _setting(
        "/run/netns", "where network namespaces of pods are found, for direct server return"
    )
    loadbalancer_pools: tuple[str, ...] = _setting(
        (), "CIDRs or FIRST-LAST ranges to give to LoadBalancer Services"
    )
    loadbalancer_class: str = _setting(
        "netpol.io/loadbalancer", "loadBalancerClass of the Services that get addresses"
    )
    loadbalancer_default_class: bool = _setting(
        False, "give addresses also to Services without a loadBalancerClass"
    )

    @property
    def field_mask(self) -> int:
        """The mark field as a number."""
        return int(self.mark_mask, 0)

    @property
    def service_mask(self) -> int:
        """The proxy's mark field as a number."""
        return int(self.service_mark_mask, 0)

    @property
    def ranges(self) -> tuple[Prefix, ...]:
        """The given pod ranges."""
        return tuple(parse_prefix(r) for r in self.pod_ranges)


def parser() -> argparse.ArgumentParser:
    """The command line of netpol-agent."""
    p = argparse.ArgumentParser(
        prog="netpol-agent",
        description="The network agent of a Kubernetes node. Every flag is also NETPOL_FLAG in the "
        "environment and a key of the --config file.",
    )
    p.add_argument("--config", metavar="FILE", help="YAML file with settings")
    p.add_argument("--version", action="store_true", help="print the version and exit")
    for f in fields(Settings):
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, bool):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(f.default, tuple):
            p.add_argument(
                flag, action="append", default=None, metavar="VALUE", help=f"{text} (may repeat)"
            )
        else:
            p.add_argument(flag, default=None, metavar="VALUE", help=text)
    return p


def load(
    flags: argparse.Namespace,
    environment: Mapping[str, str],
    *,
    host_name: str | None = None,
) -> Settings:
    """Join all sources and check everything.

    Raises:
        InputError: with every fault, one after the other.
    """
    faults: list[str] = []
    given: dict[str, Any] = {}
    known = {f.name: f for f in fields(Settings)}
    sources = [
        _from_file(flags.config or environment.get("NETPOL_CONFIG", ""), faults),
        {k: environment[e] for k in known if (e := f"NETPOL_{k.upper()}") in environment},
        {k: v for k in known if (v := getattr(flags, k, None)) is not None},
    ]
    for where, source in zip(("file", "environment", "flags"), sources, strict=True):
        for name, value in source.items():
            if name not in known:
                faults.append(f"{where}: no setting is named {name}")
                continue
            read = _read(name, known[name].default, value, faults)
            if read is not None:
                given[name] = read
    settings = Settings(**given)
    if not settings.node:
        settings = Settings(**{**given, "node": host_name or socket.gethostname()})
    faults += check(settings)
    if faults:
        raise InputError("settings: " + "; ".join(faults))
    return settings


def _from_file(path: str, faults: list[str]) -> dict[str, Any]:
    if not path:
        return {}
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        faults.append(f"{path}: {e.strerror}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        faults.append(f"{path}: not YAML: {' '.join(str(e).split())}")
        return {}
    if data is None:
        return {}
    if not isinstance(data, dict):
        faults.append(f"{path}: needed a mapping of settings, got {type(data).__name__}")
        return {}
    return {str(k).replace("-", "_"): v for k, v in data.items()}


def _read(name: str, default: Any, value: Any, faults: list[str]) -> Any:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        words = {"true": True, "1": True, "yes": True, "on": True}
        words |= {"false": False, "0": False, "no": False, "off": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        faults.append(f"{flag}: needed true or false, got {value!r}")
        return None
    if isinstance(default, int):
        try:
            return int(str(value), 0)
        except ValueError:
            faults.append(f"{flag}: needed a number, got {value!r}")
            return None
    if isinstance(default, tuple):
        items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        return tuple(x.strip() for item in items for x in str(item).split(",") if x.strip())
    if isinstance(value, bool) and name == "hold_unknown_pods":
        return "on" if value else "off"  # YAML reads a bare on or off as a boolean
    if isinstance(value, dict | list) or value is None:
        faults.append(f"{flag}: needed one value, got {value!r}")
        return None
    if name.endswith("mark_mask") and isinstance(value, int):
        return f"{value:#x}"
    return str(value)


def check(settings: Settings) -> list[str]:
    """Every fault of a set of settings, in words."""
    out: list[str] = []
    choices = {
        "iptables": ("auto", "nft", "legacy"),
        "hold_unknown_pods": ("auto", "on", "off"),
        "deny_with": tuple(DenyWith),
        "log_format": ("auto", "json", "console"),
    }
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            out.append(f"--{name.replace('_', '-')}: needed {', '.join(allowed)}, got {value!r}")
    out += _mask_faults("--mark-mask", settings.mark_mask)
    if not 0 < settings.nflog_group <= _GROUP_MAX:
        out.append(f"--nflog-group: needed 1..{_GROUP_MAX}, got {settings.nflog_group}")
    for name in ("log_per_second", "log_burst"):
        # xt_limit counts in ten-thousandths of a second.
        if not 0 < getattr(settings, name) <= 10_000:
            flag = name.replace("_", "-")
            out.append(f"--{flag}: needed 1..10000, got {getattr(settings, name)}")
    for text in settings.pod_ranges:
        try:
            prefix = parse_prefix(text)
            if not prefix.length:
                out.append(f"--pod-ranges: needed a range of this node, got {text}")
        except ValueError as e:
            out.append(f"--pod-ranges: {e}")
    out += [
        f"--pod-interfaces: needed an interface name, got {name!r}"
        for name in settings.pod_interfaces
        if not _INTERFACE.fullmatch(name)
    ]
    if settings.hold_unknown_pods == "on" and not settings.pod_ranges:
        out.append("--hold-unknown-pods on: needed --pod-ranges beside it, got none")
    if settings.api_server and not settings.api_server.startswith(("http://", "https://")):
        out.append(f"--api-server: needed http:// or https://, got {settings.api_server!r}")
    if not (settings.policy or settings.proxy or settings.routes):
        out.append("--no-policy: needed --proxy or --routes then, or there is nothing to do")
    if settings.proxy:
        out += _proxy_faults(settings)
    if settings.routes:
        out += _routes_faults(settings)
    if settings.api_server and settings.kubeconfig:
        out.append("--api-server and --kubeconfig: needed one of them, got both")
    for name in ("kubeconfig", "ca_file", "token_file"):
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            out.append(f"--{name.replace('_', '-')}: no such file: {path}")
    for name in ("health_addr", "proxy_health_addr"):
        value = getattr(settings, name)
        host, colon, port = value.rpartition(":")
        if value and not (colon and host and port.isdigit() and 0 < int(port) <= 65535):
            out.append(f"--{name.replace('_', '-')}: needed ADDRESS:PORT, got {value!r}")
    return out


def _mask_faults(flag: str, text: str) -> list[str]:
    try:
        fault = field_mask_fault(int(text, 0))
    except ValueError:
        fault = "needed a number such as 0xfff00000"
    return [f"{flag}: {fault}, got {text}"] if fault else []


def _proxy_faults(settings: Settings) -> list[str]:
    """What is wrong with the settings that matter with --proxy only."""
    out = _mask_faults("--service-mark-mask", settings.service_mark_mask)
    if not out and not _mask_faults("", settings.mark_mask):
        both = settings.service_mask & settings.field_mask
        if both:
            out.append(f"--service-mark-mask: {both:#x} is also in --mark-mask")
    if settings.ipvs_scheduler not in SCHEDULERS:
        needed = ", ".join(SCHEDULERS)
        out.append(f"--ipvs-scheduler: needed {needed}, got {settings.ipvs_scheduler!r}")
    for name in ("ipvs_tcp_timeout", "ipvs_tcp_fin_timeout", "ipvs_udp_timeout", "drain_seconds"):
        if not 0 <= getattr(settings, name) <= _TIMEOUT_MAX_S:
            flag = name.replace("_", "-")
            out.append(f"--{flag}: needed 0..{_TIMEOUT_MAX_S}, got {getattr(settings, name)}")
    parsers: dict[str, Callable[[str], object]] = {
        "service_ranges": parse_prefix,
        "nodeport_addresses": parse_prefix,
        "external_ip_cidr": parse_prefix,
        "loadbalancer_pools": parse_range,
    }
    unreadable = []
    for name, parse in parsers.items():
        for text in getattr(settings, name):
            try:
                parse(text)
            except ValueError as e:
                unreadable.append(f"--{name.replace('_', '-')}: {e}")
    out += unreadable
    host = urlsplit(settings.api_server).hostname or "" if settings.api_server else ""
    with contextlib.suppress(ValueError):  # a name, which is looked up when the agent connects
        url = settings.api_server
        fault = None if unreadable else service_address_fault(settings, url, [parse_address(host)])
        out += [fault] if fault else []
    if not _LABEL_KEY.fullmatch(settings.loadbalancer_class):
        out.append(
            "--loadbalancer-class: needed a name such as example.com/name, "
            f"got {settings.loadbalancer_class!r}"
        )
    if not settings.api_server and not settings.kubeconfig and not settings.service_ranges:
        out.append(
            "--proxy: needed --api-server or --kubeconfig with an address that is no Service's, or "
            "--service-ranges to tell"
        )
    return out


def _routes_faults(settings: Settings) -> list[str]:
    """What is wrong with the settings that matter with --routes only."""
    out = []
    for name, allowed in (
        ("overlay", ("never", "cross-subnet", "always")),
        ("encapsulation", ("vxlan", "ipip")),
    ):
        value = getattr(settings, name)
        if value not in allowed:
            out.append(f"--{name}: needed {', '.join(allowed)}, got {value!r}")
    out += [
        f"--overlay-accept: needed vxlan, ipip, got {given!r}"
        for given in settings.overlay_accept
        if given not in ("vxlan", "ipip")
    ]
    # RFC 7607 and RFC 7300 for the AS, RFC 4271 section 4.2 for the hold time.
    for name, low, high in (
        ("bgp_asn", 1, 4_294_967_294),
        ("bgp_port", 1, 65535),
        ("bgp_hold_time", 3, 65535),
        ("bgp_keepalive_time", 0, settings.bgp_hold_time),
    ):
        if not low <= getattr(settings, name) <= high:
            flag = name.replace("_", "-")
            out.append(f"--{flag}: needed {low}..{high}, got {getattr(settings, name)}")
    for name in ("cluster_cidr", "node_subnets", "masquerade_exclude", "service_ranges"):
        for text in getattr(settings, name):
            try:
                parse_prefix(text)
            except ValueError as e:
                out.append(f"--{name.replace('_', '-')}: {e}")
    path = settings.bgp_peers_file
    if path and not Path(path).is_file():
        out.append(f"--bgp-peers-file: no such file: {path}")
    return out


def service_address_fault(settings: Settings, url: str, addresses: Sequence[bytes]) -> str | None:
    """Why the proxy cannot reach the API server, or None: its address must be no Service's.

    A node whose only proxy is this one starts without any Service; it would wait for ever.
    """
    for text in settings.service_ranges:
        prefix = parse_prefix(text)
        for address in addresses:
            if len(address) == len(prefix.address) and prefix.contains(address):
                return (
                    f"the API server {url} has an address of the Service range {text}, which works "
                    "only once the proxy does; needed --api-server with an address of its own"
                )
    return None
