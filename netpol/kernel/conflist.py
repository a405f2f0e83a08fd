"""What a node's CNI configuration says about its pods: the interface they are behind, and their ranges.

Owns reading the file that the container runtime would take; never writes it. A file that cannot be read
or understood is an answer too: the facts it would give are missing, and `note` says why.
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol.model.net import Prefix, parse_prefix
from netpol.model.pools import AddressRange

#: libcni takes the first of these in order of name.
_SUFFIXES = (".conf", ".conflist", ".json")
#: Names that the kernel and iptables take (IFNAMSIZ - 1 characters).
_INTERFACE = re.compile(r"[A-Za-z0-9_.@:-]{1,15}")
#: Interface plugins whose packets do not pass this host's netfilter: no policy holds there.
UNPOLICED = frozenset({"macvlan", "ipvlan", "sriov", "ib-sriov-cni", "host-device", "vlan"})
#: The bridge plugin's default name.
_DEFAULT_BRIDGE = "cni0"


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """Facts about the pods' network.

    Attributes:
        interfaces: host interfaces behind which pods are.
        ranges: what host-local takes addresses from; () where another IPAM assigns them.
        note: what is not known and why, or "".
        known: whether a configuration was there and could be read.
        unpoliced: the interface plugin, where packets of its pods pass no rule of this host; else "".
    """

    interfaces: tuple[str, ...] = ()
    ranges: tuple[Prefix, ...] = ()
    note: str = ""
    known: bool = False
    unpoliced: str = ""


def first_file(conf_dir: Path) -> Path | None:
    """The file that container runtimes read, the first in order of name; None where there is none.

    Raises:
        OSError: the folder cannot be read.
    """
    return min((p for p in conf_dir.iterdir() if p.suffix in _SUFFIXES), default=None)


def read_pod_network(conf_dir: Path) -> PodNetwork:
    """Read the CNI configuration of a node."""
    try:
        file = first_file(conf_dir)
    except OSError as e:
        return PodNetwork(note=f"{conf_dir}: {e.strerror}")
    if file is None:
        return PodNetwork(note=f"{conf_dir}: no CNI configuration")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        return PodNetwork(note=f"{file}: {e}")
    plugins = data.get("plugins", [data]) if isinstance(data, dict) else None
    if not isinstance(plugins, list) or not plugins or not isinstance(plugins[0], dict):
        return PodNetwork(note=f"{file}: not a CNI configuration")
    return _facts(plugins[0], file)


def _facts(plugin: dict[str, Any], path: Path) -> PodNetwork:
    kind = plugin.get("type")
    notes = []
    interfaces: tuple[str, ...] = ()
    if kind == "bridge":
        name = str(plugin.get("bridge") or _DEFAULT_BRIDGE)
        if _INTERFACE.fullmatch(name):
            interfaces = (name,)
        else:
            notes.append(f"the bridge's name {name!r} is none: give --pod-interfaces")
    elif kind in UNPOLICED:
        notes.append(
            f"packets of pods of CNI plugin {kind} do not pass this host: policy cannot hold"
        )
    else:
        notes.append(f"pod interfaces of CNI plugin {kind} are not known: give --pod-interfaces")
    ranges: tuple[Prefix, ...] = ()
    ipam = plugin.get("ipam")
    ipam_kind = ipam.get("type") if isinstance(ipam, dict) else None
    if ipam_kind == "host-local" and isinstance(ipam, dict):
        try:
            ranges = tuple(_ranges(ipam))
        except (ValueError, TypeError, AttributeError) as e:
            notes.append(f"host-local ranges cannot be read: {e}")
    else:
        notes.append(f"addresses come from IPAM {ipam_kind}, so unknown pods are not held")
    note = f"{path.name}: {'; '.join(notes)}" if notes else ""
    unpoliced = str(kind) if kind in UNPOLICED else ""
    return PodNetwork(interfaces, ranges, note, known=True, unpoliced=unpoliced)


def _ranges(ipam: dict[str, Any]) -> list[Prefix]:
    out = [p for group in ipam.get("ranges", ()) for r in group for p in _range(r)]
    if ipam.get("subnet"):
        out += _range(ipam)
    return out


def _range(given: dict[str, Any]) -> list[Prefix]:
    """The part of a host-local range that this node takes addresses from, as prefixes."""
    subnet = parse_prefix(given["subnet"])
    if not subnet.length:
        raise ValueError(f"the range {subnet} is everything")
    if not given.get("rangeStart") and not given.get("rangeEnd"):
        return [subnet]
    net = ipaddress.ip_network(str(subnet))
    first = ipaddress.ip_address(given.get("rangeStart") or net[0])
    last = ipaddress.ip_address(given.get("rangeEnd") or net[-1])
    return list(AddressRange(first.packed, last.packed).blocks())
