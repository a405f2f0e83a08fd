"""The node's CNI configuration with its podCIDRs in it: pure, from what stands there to what should.

Others' keys, plugins and ranges stay. What we put in is noted in the file itself, under a key that container
runtimes pass over, so that it can be taken out again when the podCIDRs change.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any

from netpol.lib.errors import InputError
from netpol.model.net import Prefix, parse_prefix

#: The file that kube-router's users have, and that is first in the folder by name.
FILE_NAME = "10-kuberouter.conflist"
#: Where we note what we put in.
NOTE = "netpol.io"
DEFAULT_BRIDGE = "kube-bridge"
#: The newest version of the CNI that the plugins of Debian 12 speak.
_CNI_VERSION = "0.4.0"
#: Interface plugins that take an `mtu`.
_WITH_MTU = frozenset({"bridge", "ptp", "macvlan", "ipvlan", "vlan"})


def parse(text: str, *, where: str) -> dict[str, Any]:
    """Read a conflist.

    Raises:
        InputError: it is none; what stands there is somebody's, so it is not overwritten.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(where, needed="a CNI configuration list", got=f"no JSON ({e})") from e
    plugins = data.get("plugins") if isinstance(data, dict) else None
    if (
        not isinstance(plugins, list)
        or not plugins
        or not all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in plugins)
    ):
        raise InputError(where, needed="a CNI configuration list", got="no list of plugins")
    return dict(data)


def fresh() -> dict[str, Any]:
    """A configuration for a node that has none: a bridge, addresses from its podCIDRs, host ports."""
    return {
        "cniVersion": _CNI_VERSION,
        "name": "netpol",
        "plugins": [
            {
                "type": "bridge",
                "bridge": DEFAULT_BRIDGE,
                "isGateway": True,
                "isDefaultGateway": True,
                "hairpinMode": True,
                "ipam": {"type": "host-local"},
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def inject(have: dict[str, Any] | None, pod_cidrs: Sequence[Prefix], *, mtu: int) -> dict[str, Any]:
    """The configuration with these podCIDRs.

    Only an interface plugin whose addresses host-local assigns gets ranges. A range that names a podCIDR
    and says more about it (a start, a gateway) stays as it is. In a file without our note, ranges that say
    nothing but a subnet are taken for a former podCIDR.

    Args:
        have: what stands there; None for nothing.
        pod_cidrs: of the node, in its order.
        mtu: bytes that pods may send; a smaller one that somebody set stays.
    """
    out = copy.deepcopy(have) if have is not None else fresh()
    note = out.get(NOTE)
    noted = note if isinstance(note, dict) else {}
    plugin = out["plugins"][0]
    ipam = plugin.get("ipam")
    if isinstance(ipam, dict) and ipam.get("type") == "host-local":
        former = _former(noted, ipam, marked=isinstance(note, dict))
        _set_ranges(ipam, pod_cidrs, former)
        noted = {**noted, "podCIDRs": [str(p) for p in pod_cidrs]}
    if plugin["type"] in _WITH_MTU:
        theirs = plugin.get("mtu")
        if not isinstance(theirs, int) or not 0 < theirs <= mtu or theirs == noted.get("mtu"):
            plugin["mtu"] = mtu
            noted = {**noted, "mtu": mtu}
    if noted:
        out[NOTE] = noted
    return out


def _former(noted: dict[str, Any], ipam: dict[str, Any], *, marked: bool) -> frozenset[Prefix]:
    """Subnets that a former run put in."""
    texts = noted.get("podCIDRs") if marked else [r.get("subnet") for r in _bare(ipam)]
    out = set()
    for text in texts if isinstance(texts, list) else ():
        try:
            out.add(parse_prefix(str(text)))
        except ValueError:
            continue  # no range of ours
    return frozenset(out)


def _bare(ipam: dict[str, Any]) -> Iterable[dict[str, Any]]:
    groups = ipam.get("ranges")
    for group in groups if isinstance(groups, list) else ():
        yield from (r for r in group if isinstance(r, dict) and set(r) == {"subnet"})


def _set_ranges(
    ipam: dict[str, Any], pod_cidrs: Sequence[Prefix], former: frozenset[Prefix]
) -> None:
    wanted = set(pod_cidrs)
    # The older form has one subnet beside the ranges; its other keys speak of that subnet.
    single = {k: ipam.pop(k) for k in _SINGLE if k in ipam}
    groups: list[list[dict[str, Any]]] = []
    if _subnet(single) in wanted or set(single) > {"subnet"}:
        groups.append([single])  # a podCIDR that is there already, or somebody's own range
    given = ipam.get("ranges")
    for group in given if isinstance(given, list) else ():
        kept = [
            r
            for r in group
            if isinstance(r, dict)
            and ((subnet := _subnet(r)) in wanted or subnet not in former or subnet is None)
        ]
        if kept:
            groups.append(kept)
    there = {_subnet(r) for group in groups for r in group}
    ipam["ranges"] = [*groups, *([{"subnet": str(p)}] for p in pod_cidrs if p not in there)]


#: Keys of host-local's older form, beside `ranges`.
_SINGLE = ("subnet", "rangeStart", "rangeEnd", "gateway")


def _subnet(entry: dict[str, Any]) -> Prefix | None:
    try:
        return parse_prefix(str(entry.get("subnet")))
    except ValueError:
        return None


def text_of(data: dict[str, Any]) -> str:
    """As it is written."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
