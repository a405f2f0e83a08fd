"""Settings of the agent: from flags, environment and a YAML file, checked all at once.

A flag beats the environment (`NETPOL_` and the flag's name), which beats the file (`--config`, keys as
the flags, with - or _). Every fault of all three is reported together, before anything starts.
"""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from netpol.lib.errors import InputError
from netpol.model.net import Prefix, parse_prefix
from netpol.render.options import DEFAULT_FIELD_MASK, DEFAULT_NFLOG_GROUP, field_mask_fault

#: An interface name as the kernel and iptables take it (IFNAMSIZ - 1), + as a wildcard at its end.
_INTERFACE = re.compile(r"(?!\+$)[A-Za-z0-9_.@:-]{0,14}[A-Za-z0-9_.@:+-]")
#: nf_log groups are 16 bits.
_GROUP_MAX = 65535


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; a field's help text is its documentation."""

    node: str = _setting("", "name of this node (default: the host name)")
    policy: bool = _setting(True, "enforce NetworkPolicy")
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
        "0.0.0.0:9461", "ADDRESS:PORT of /healthz, /readyz and /metrics; '' for none"
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
    pod_ranges: tuple[str, ...] = _setting(
        (), "pod ranges of this node (default: from the CNI conflist)"
    )
    pod_interfaces: tuple[str, ...] = _setting(
        (), "interfaces behind which pods are, + as wildcard (default: the conflist's bridge)"
    )
    cni_conf_dir: str = _setting("/etc/cni/net.d", "where the CNI conflist is")
    cni_bin_dir: str = _setting("/opt/cni/bin", "where the CNI plugins are (for routes)")
    log_format: str = _setting("auto", "the agent's own log: json, console or auto")

    @property
    def field_mask(self) -> int:
        """The mark field as a number."""
        return int(self.mark_mask, 0)

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
    if name == "mark_mask" and isinstance(value, int):
        return f"{value:#x}"
    return str(value)


def check(settings: Settings) -> list[str]:
    """Every fault of a set of settings, in words."""
    out: list[str] = []
    choices = {
        "iptables": ("auto", "nft", "legacy"),
        "hold_unknown_pods": ("auto", "on", "off"),
        "log_format": ("auto", "json", "console"),
    }
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            out.append(f"--{name.replace('_', '-')}: needed {', '.join(allowed)}, got {value!r}")
    try:
        fault = field_mask_fault(settings.field_mask)
    except ValueError:
        fault = "needed a number such as 0xfff00000"
    if fault:
        out.append(f"--mark-mask: {fault}, got {settings.mark_mask}")
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
    if not settings.policy:
        out.append("--no-policy: policy is the only room of this version")
    if settings.api_server and settings.kubeconfig:
        out.append("--api-server and --kubeconfig: needed one of them, got both")
    for name in ("kubeconfig", "ca_file", "token_file"):
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            out.append(f"--{name.replace('_', '-')}: no such file: {path}")
    if settings.health_addr:
        host, colon, port = settings.health_addr.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) <= 65535:
            out.append(f"--health-addr: needed ADDRESS:PORT, got {settings.health_addr!r}")
    return out
