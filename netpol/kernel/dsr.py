"""Where tunnels of direct server return end: a link in the pod's namespace that has the Service's address.

Namespaces are found by the pod's address under a folder, where container runtimes pin them.
Owns the links of its two names in all of these, the addresses on them and what pods' links and the host's
need for answers that have the Service's address. Blocking; who wants which end is the caller's.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute, NetlinkError

from netpol.kernel.kept_sysctls import KeptSysctls, restore_sysctls
from netpol.kernel.links import own_addresses
from netpol.kernel.modules import load_module
from netpol.kernel.netns import in_netns
from netpol.kernel.sysctl import keep_sysctl, read_sysctl
from netpol.lib.errors import KernelError, NetpolError
from netpol.model.net import FAMILIES, Family, family_of, format_address, parse_address

#: The links that are ours in pods.
LINKS = {Family.V4: "knp-dsr", Family.V6: "knp-dsr6"}
#: Where the host's settings before are kept, in the run folder.
SYSCTLS_FILE = "direct-sysctls.json"
_MODULES = {Family.V4: "ipip", Family.V6: "ip6_tunnel"}
#: linux/if_addr.h: IFA_F_NODAD
_NODAD = 0x02
#: linux/ip6_tunnel.h: IP6_TNL_F_IGN_ENCAP_LIMIT
_IGN_ENCAP_LIMIT = 0x01
_OWN_NAMESPACE = Path("/proc/thread-self/ns/net")

#: The addresses of Services that should be in a pod, by the pod's own address.
Ends = Mapping[bytes, frozenset[bytes]]


class PodLink(NamedTuple):
    """Where packets of a pod come in on this host; `port` is one of a bridge."""

    name: str
    port: bool


@dataclass(frozen=True, slots=True)
class Made:
    """What became of the ends, by the pods' addresses: where their answers come in, and what failed."""

    links: Mapping[bytes, PodLink] = field(default_factory=dict)
    faults: Mapping[bytes, str] = field(default_factory=dict)


class _Space(NamedTuple):
    """A namespace as it was seen: its addresses, and whether a link of ours is there."""

    path: str
    addresses: frozenset[bytes]
    ours: bool


class PodTunnels:
    """All ends on this node.

    Args:
        netns_dir: where namespaces of pods are pinned.
        sysctls_file: where the host's settings before are kept.
    """

    def __init__(self, netns_dir: Path, sysctls_file: Path) -> None:
        self._dir, self._sysctls_file = netns_dir, sysctls_file
        # Whose the links are: nodes on one machine (a lab) see each other's pods.
        self._alias = f"netpol of {_OWN_NAMESPACE.stat().st_ino}"
        #: By inode, which a namespace keeps for its life.
        self._spaces: dict[int, _Space] = {}

    def apply(self, wanted: Ends) -> Made:
        """Have these ends and no other ones."""
        links: dict[bytes, PodLink] = {}
        faults: dict[bytes, str] = {}
        for family in {family_of(pod) for pod in wanted}:
            load_module(_MODULES[family])
        self._look(wanted.keys())
        for inode, space in list(self._spaces.items()):
            need = {pod: wanted[pod] for pod in wanted.keys() & space.addresses}
            if not need and not space.ours:
                continue
            try:
                peers = in_netns(space.path, lambda need=need: _fit(need, self._alias))  # type: ignore[misc]
                self._spaces[inode] = space._replace(ours=bool(need))
                links |= {pod: _host_link(*peer) for pod, peer in peers.items()}
            except (NetpolError, NetlinkError, OSError) as e:
                faults |= dict.fromkeys(need, str(e))
                del self._spaces[inode]  # it may be gone, or another one
        for pod in wanted.keys() - links.keys() - faults.keys():
            faults[pod] = f"no network namespace under {self._dir} has this address"
        fault = self._let_in(links)
        if fault:
            faults |= dict.fromkeys((p for p in links if family_of(p) is Family.V4), fault)
        return Made(links, faults)

    def _look(self, wanted: Any) -> None:
        """Look into namespaces that are new, and into all if an address is nowhere yet."""
        there = dict(_namespaces(self._dir))
        self._spaces = {i: s for i, s in self._spaces.items() if i in there}
        known = {a for s in self._spaces.values() for a in s.addresses}
        again = not wanted <= known
        for inode, path in there.items():
            space = self._spaces.get(inode)
            if space is not None and (not again or space.addresses & wanted):
                continue
            try:
                addresses, ours = in_netns(path, lambda: _see(self._alias))
            except NetpolError:
                continue  # it ended meanwhile, or never was one
            self._spaces[inode] = _Space(path, addresses, ours)

    def _let_in(self, links: Mapping[bytes, PodLink]) -> str:
        """Have the host take packets whose source is an address of its own, as Services' are (IPv4)."""
        names = {_interface(link) for pod, link in links.items() if family_of(pod) is Family.V4}
        if not links:
            restore_sysctls(self._sysctls_file)
            return ""
        wanted = {f"net/ipv4/conf/{name}/accept_local": "1" for name in names}
        for name in names:
            # The higher of both counts: 2 (loose) beats 1, which would want a route back to the pod.
            key = f"net/ipv4/conf/{name}/rp_filter"
            if "1" in (read_sysctl(key), read_sysctl("net/ipv4/conf/all/rp_filter")):
                wanted[key] = "2"
        return "; ".join(KeptSysctls(wanted, self._sysctls_file).keep())


def _namespaces(folder: Path) -> Iterator[tuple[int, str]]:
    own = _OWN_NAMESPACE.stat().st_ino
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        try:
            inode = entry.stat().st_ino
        except OSError:
            continue
        if inode != own:
            yield inode, str(entry)


def _see(alias: str) -> tuple[frozenset[bytes], bool]:
    ours = False
    if any(name in LINKS.values() for _, name in socket.if_nameindex()):
        with IPRoute() as route:
            found = [index for name in LINKS.values() for index in route.link_lookup(ifname=name)]
            ours = any(
                _attribute(route.link("get", index=i)[0], "IFLA_IFALIAS") == alias for i in found
            )
    return frozenset(own_addresses()), ours


# -- inside a pod -------------------------------------------------------------------------------


def _fit(need: Ends, alias: str) -> dict[bytes, tuple[int, int]]:
    """Make the links of this namespace right; for each pod's address its link and that one's peer."""
    out: dict[bytes, tuple[int, int]] = {}
    with IPRoute() as route:
        for family in FAMILIES:
            pods = sorted(pod for pod in need if family_of(pod) is family)
            if len(pods) > 1:
                raise KernelError("two pods' addresses in one namespace", got=str(len(pods)))
            for pod in pods:
                # Before the address is there: nobody may learn of it.
                out[pod] = index, _ = _pod_link(route, pod)
                if family is Family.V4:
                    name = _attribute(route.link("get", index=index)[0], "IFLA_IFNAME")
                    _set(f"net/ipv4/conf/{name}/arp_ignore", "1")
                    _set(f"net/ipv4/conf/{name}/arp_announce", "2")
            end = _End(LINKS[family], pods[0] if pods else None, family, alias)
            _fit_link(route, end, need)
    return out


class _End(NamedTuple):
    """A link as it should be; no pod where it should not."""

    name: str
    pod: bytes | None
    family: Family
    alias: str


def _fit_link(route: IPRoute, end: _End, need: Ends) -> None:
    name, pod, family, _ = end
    found = route.link_lookup(ifname=name)
    index = found[0] if found else None
    if index is not None and not _is_end(route, index, end):
        route.link("del", index=index)
        index = None
    if pod is None:
        return
    if index is None:
        index = _make(route, end, pod)
    have = {
        a for a, length, at in _addresses(route, family) if at == index and length == family.bits
    }
    for vip in sorted(need[pod] - have):
        flags = {"flags": _NODAD} if family is Family.V6 else {}
        try:
            route.addr(
                "add", index=index, address=format_address(vip), prefixlen=family.bits, **flags
            )
        except NetlinkError as e:
            if e.code != errno.EEXIST:
                raise
    for vip in sorted(have - need[pod]):
        route.addr("del", index=index, address=format_address(vip), prefixlen=family.bits)


def _make(route: IPRoute, end: _End, pod: bytes) -> int:
    name, local = end.name, format_address(pod)
    if end.family is Family.V4:
        attributes: dict[str, Any] = {"kind": "ipip", "ipip_local": local, "ipip_proto": 4}
    else:
        attributes = {
            "kind": "ip6tnl",
            "ip6tnl_local": local,
            "ip6tnl_remote": "::",
            "ip6tnl_proto": 41,
            "ip6tnl_flags": _IGN_ENCAP_LIMIT,
            "ip6tnl_encap_limit": 0,
        }
    try:
        route.link("add", ifname=name, **attributes)
    except NetlinkError as e:
        got = "a kernel without it" if e.code == errno.EOPNOTSUPP else os.strerror(e.code)
        raise KernelError(
            f"link {name} in the pod", needed=f"a link of kind {attributes['kind']}", got=got
        ) from e
    index = int(route.link_lookup(ifname=name)[0])
    if end.family is Family.V4:
        # Clients are behind another link than the one that their packets come out of.
        _set(f"net/ipv4/conf/{name}/rp_filter", "2")
    route.link("set", index=index, state="up", ifalias=end.alias)
    return index


def _is_end(route: IPRoute, index: int, end: _End) -> bool:
    link = route.link("get", index=index)[0]
    info = _attribute(link, "IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    if data is None or not link["flags"] & 1 or _attribute(link, "IFLA_IFALIAS") != end.alias:
        return False
    local = data.get_attr("IFLA_IPIP_LOCAL" if end.family is Family.V4 else "IFLA_IP6TNL_LOCAL")
    return local is not None and parse_address(local) == end.pod


def _pod_link(route: IPRoute, pod: bytes) -> tuple[int, int]:
    for address, _, index in _addresses(route, family_of(pod)):
        if address == pod:
            link = route.link("get", index=index)[0]
            info = _attribute(link, "IFLA_LINKINFO")
            kind = info.get_attr("IFLA_INFO_KIND") if info else ""
            peer = _attribute(link, "IFLA_LINK")
            if kind != "veth" or not peer:
                raise KernelError("the pod's link", needed="veth", got=kind or "none")
            return index, int(peer)
    raise KernelError("the pod's namespace", needed=format_address(pod), got="it has it no more")


def _addresses(route: IPRoute, family: Family) -> Iterator[tuple[bytes, int, int]]:
    af = socket.AF_INET if family is Family.V4 else socket.AF_INET6
    for found in route.get_addr(family=af):
        text = _attribute(found, "IFA_LOCAL") or _attribute(found, "IFA_ADDRESS")
        if text:
            yield parse_address(text), int(found["prefixlen"]), int(found["index"])


def _attribute(message: Any, name: str) -> Any:
    return message.get_attr(name)


def _set(key: str, value: str) -> None:
    fault = keep_sysctl(key, value)
    if fault is not None:
        raise KernelError(fault)


# -- on the host --------------------------------------------------------------------------------


def _host_link(inner: int, peer: int) -> PodLink:
    """The host's end of a pod's link.

    Raises:
        KernelError: it is not on this host.
    """
    with IPRoute() as route:
        found = route.link("get", index=peer)
        if not found or _attribute(found[0], "IFLA_LINK") != inner:
            raise KernelError("the other end of the pod's link", needed="one on this host")
        info = _attribute(found[0], "IFLA_LINKINFO")
        port = bool(info) and info.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge"
        return PodLink(str(_attribute(found[0], "IFLA_IFNAME")), port)


def _interface(link: PodLink) -> str:
    """The interface that routing sees: the bridge of a port."""
    if not link.port:
        return link.name
    with IPRoute() as route:
        master = _attribute(route.link("get", ifname=link.name)[0], "IFLA_MASTER")
        return str(_attribute(route.link("get", index=master)[0], "IFLA_IFNAME"))


def lacking() -> str:
    """Why this kernel has no such links for IPv4, or "". Makes one, so for a namespace of its own."""
    load_module(_MODULES[Family.V4])
    pod = parse_address("192.0.2.1")
    try:
        with IPRoute() as route:
            _make(route, _End(LINKS[Family.V4], pod, Family.V4, "probe"), pod)
    except (NetpolError, NetlinkError) as e:
        return str(e)
    return ""
