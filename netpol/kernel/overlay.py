"""The links that carry pods' packets between subnets: VXLAN with its forwarding table, IPIP tunnels.

Nothing is learnt from packets: every remote's MAC follows from its name, so that forwarding entries and
neighbours are written beforehand and for good. Owns the links whose names it is given, their entries and
nothing else; who is a remote is the caller's. rtnetlink through pyroute2, in the calling thread's namespace.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute, NetlinkError

from netpol.kernel.routes import KernelRoute, bird_routes
from netpol.lib.errors import KernelError
from netpol.model.net import Family, family_of, format_address

#: linux/neighbour.h
_NUD_PERMANENT = 0x80
#: linux/if_addr.h: IFA_F_NODAD
_NODAD = 0x02
#: linux/ip6_tunnel.h: IP6_TNL_F_IGN_ENCAP_LIMIT
_IGN_ENCAP_LIMIT = 0x01
#: Addresses of IPv6 with their links, in hexadecimal; of the calling thread's namespace.
_IF_INET6 = Path("/proc/thread-self/net/if_inet6")
#: How long BIRD may take to lead its routes elsewhere after it said that it is reconfigured.
_UNUSED_S = 2.0
_POLL_S = 0.05
#: What an encapsulation puts before the packet: outer IP, UDP, VXLAN and inner Ethernet headers.
VXLAN_BYTES = {Family.V4: 50, Family.V6: 70}
IPIP_BYTES = {Family.V4: 20, Family.V6: 40}


class Vxlan(NamedTuple):
    """A VXLAN link: its network, its UDP port, and this node's end."""

    name: str
    vni: int
    port: int
    local: bytes
    mac: bytes
    mtu: int


class Ipip(NamedTuple):
    """A tunnel: to one end; or of many, without a remote, that of IPv6 only to take packets from."""

    name: str
    local: bytes
    mtu: int
    remote: bytes = b""


class Remote(NamedTuple):
    """Another node behind the VXLAN: where its packets go, and the next hops that mean it."""

    mac: bytes
    underlay: bytes
    next_hops: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class OverlayState:
    """All links that should be there."""

    vxlan: Vxlan | None = None
    remotes: frozenset[Remote] = frozenset()
    tunnels: frozenset[Ipip] = frozenset()


def apply_overlay(
    want: OverlayState, *, prefixes: tuple[str, ...], prune: bool, route: IPRoute | None = None
) -> list[str]:
    """Make links and entries; with `prune`, also remove those that are not wanted.

    Whoever uses a remote comes between the two: entries are there before a route needs them, and go when
    none does any more.

    Args:
        want: what should be there.
        prefixes: names of links that are ours start so; only those are ever removed.
        prune: whether to remove what is not wanted.
        route: a socket to use; one of its own without it.

    Returns:
        What was changed, in words.

    Raises:
        KernelError: the kernel refuses something.
    """
    if route is None:
        with IPRoute() as own:
            return apply_overlay(want, prefixes=prefixes, prune=prune, route=own)
    try:
        return _Overlay(route, prefixes).apply(want, prune=prune)
    except NetlinkError as e:
        raise KernelError("overlay", got=f"{e.args[1] if len(e.args) > 1 else e}") from e
    except OSError as e:
        raise KernelError("overlay", got=e.strerror or str(e)) from e


class _Overlay:
    def __init__(self, route: IPRoute, prefixes: tuple[str, ...]) -> None:
        self._route, self._prefixes = route, prefixes
        self._done: list[str] = []

    def apply(self, want: OverlayState, *, prune: bool) -> list[str]:
        links = self._links()
        if want.vxlan is not None:
            index = self._vxlan(want.vxlan, links.get(want.vxlan.name), want.remotes)
            self._remotes(index, want.remotes, prune=prune)
        for tunnel in sorted(want.tunnels):
            self._tunnel(tunnel, links.get(tunnel.name))
        if prune:
            keep = {t.name for t in want.tunnels} | ({want.vxlan.name} if want.vxlan else set())
            stale = [link for name, link in links.items() if name not in keep]
            indexes = {link["index"] for link in stale}
            if stale:
                _wait_while(lambda r: r.link in indexes)
            for link in stale:
                self._delete(link)
        return self._done

    def _links(self) -> dict[str, Any]:
        found = {str(link.get("IFLA_IFNAME")): link for link in self._route.get_links()}
        return {name: link for name, link in found.items() if name.startswith(self._prefixes)}

    def _delete(self, link: Any) -> None:
        self._route.link("del", index=link["index"])
        self._done.append(f"removed link {link.get('IFLA_IFNAME')}")

    def _make(self, name: str, *, kind: str, **attributes: Any) -> Any:
        try:
            self._route.link("add", ifname=name, kind=kind, **attributes)
        except NetlinkError as e:
            got = {
                errno.EOPNOTSUPP: "a kernel without it",
                errno.EEXIST: "another link with the same ends",
            }.get(e.code, os.strerror(e.code))
            raise KernelError(f"link {name}", needed=f"a link of kind {kind}", got=got) from e
        self._done.append(f"made link {name}")
        (made,) = self._route.link("get", ifname=name)
        return made

    # -- vxlan ------------------------------------------------------------------------------

    def _vxlan(self, want: Vxlan, have: Any | None, remotes: Collection[Remote]) -> int:
        if have is not None and not _is_vxlan(have, want):
            self._delete(have)
            have = None
        if have is None:
            v6 = family_of(want.local) is Family.V6
            local = {"vxlan_local6" if v6 else "vxlan_local": format_address(want.local)}
            have = self._make(
                want.name,
                kind="vxlan",
                vxlan_id=want.vni,
                vxlan_port=want.port,
                vxlan_learning=0,
                address=_mac(want.mac),
                mtu=want.mtu,
                **local,
            )
        index = int(have["index"])
        # A link that goes down loses it.
        if any(family_of(n) is Family.V6 for r in remotes for n in r.next_hops):
            self._link_local(index, want.mac)
        elif not remotes:  # it only takes packets so far, and shall be able to send at once
            with contextlib.suppress(NetlinkError, OSError):  # a node without IPv6
                self._link_local(index, want.mac)
        if have.get("IFLA_MTU") != want.mtu:
            self._route.link("set", index=index, mtu=want.mtu)
            self._done.append(f"{want.name}: mtu {want.mtu}")
        if have.get("IFLA_OPERSTATE") != "UNKNOWN" or not have["flags"] & 1:
            self._route.link("set", index=index, state="up")
        return index

    def _link_local(self, index: int, mac: bytes) -> None:
        """Give the link its address before the kernel does, which would look for its double.

        Until that is over BIRD does not know the address, and has no way to the next hops beyond the link.
        """
        eui64 = bytes((mac[0] ^ 2, *mac[1:3], 0xFF, 0xFE, *mac[3:]))
        packed = bytes((0xFE, 0x80)) + bytes(6) + eui64
        there = (line.split() for line in _IF_INET6.read_text(encoding="ascii").splitlines())
        if any(words[0] == packed.hex() and int(words[1], 16) == index for words in there):
            return
        address = format_address(packed)
        self._route.addr("add", index=index, address=address, prefixlen=64, flags=_NODAD)
        self._done.append(f"address {address}")

    def _remotes(self, index: int, remotes: Iterable[Remote], *, prune: bool) -> None:
        forwarding = {(_mac(r.mac), format_address(r.underlay)) for r in remotes}
        neighbours = {(format_address(n), _mac(r.mac)) for r in remotes for n in r.next_hops}
        have_forwarding, have_neighbours = self._forwarding(index), self._neighbours(index)
        stale = have_forwarding - forwarding
        for mac, dst in sorted(forwarding - have_forwarding):
            # One address a MAC: a node that changed its address has its old entry replaced now.
            for old in sorted(o for m, o in stale if m == mac):
                self._route.fdb("del", ifindex=index, lladdr=mac, dst=old)
            self._route.fdb("append", ifindex=index, lladdr=mac, dst=dst)
            self._done.append(f"forwarding {mac} to {dst}")
        for address, mac in sorted(neighbours - have_neighbours):
            self._neigh("replace", index, address=address, mac=mac)
            self._done.append(f"neighbour {address} is {mac}")
        if not prune:
            return
        wanted = {address for address, _ in neighbours}
        gone = {ipaddress.ip_address(a).packed for a, _ in have_neighbours if a not in wanted}
        if gone:
            _wait_while(lambda r: r.link == index and not gone.isdisjoint(r.gateways))
        for mac, dst in sorted(self._forwarding(index) - forwarding):
            self._route.fdb("del", ifindex=index, lladdr=mac, dst=dst)
            self._done.append(f"no forwarding {mac} to {dst}")
        for address, mac in sorted(have_neighbours):
            if address not in wanted:
                self._neigh("del", index, address=address, mac=mac)
                self._done.append(f"no neighbour {address}")

    def _neigh(self, command: str, index: int, *, address: str, mac: str) -> None:
        more = {} if command == "del" else {"lladdr": mac, "state": _NUD_PERMANENT}
        self._route.neigh(command, ifindex=index, dst=address, **more)

    def _forwarding(self, index: int) -> set[tuple[str, str]]:
        out = set()
        for entry in self._route.fdb("dump", ifindex=index):
            mac, dst = entry.get("NDA_LLADDR"), entry.get("NDA_DST")
            if entry["ifindex"] == index and mac and dst and mac != "00:00:00:00:00:00":
                out.add((mac, str(ipaddress.ip_address(dst))))
        return out

    def _neighbours(self, index: int) -> set[tuple[str, str]]:
        out = set()
        for family in (socket.AF_INET, socket.AF_INET6):
            for entry in self._route.get_neighbours(family=family, ifindex=index):
                mac, dst = entry.get("NDA_LLADDR"), entry.get("NDA_DST")
                if mac and dst and entry["ifindex"] == index and entry["state"] == _NUD_PERMANENT:
                    out.add((str(ipaddress.ip_address(dst)), mac))
        return out

    # -- tunnels ----------------------------------------------------------------------------

    def _tunnel(self, want: Ipip, have: Any | None) -> None:
        if have is not None and not _is_tunnel(have, want):
            self._delete(have)
            have = None
        if have is None:
            new = self._make(want.name, **_tunnel_attributes(want))
            self._route.link("set", index=int(new["index"]), mtu=want.mtu, state="up")
            return
        index = int(have["index"])
        if have.get("IFLA_MTU") != want.mtu:
            self._route.link("set", index=index, mtu=want.mtu)
            self._done.append(f"{want.name}: mtu {want.mtu}")
        if not have["flags"] & 1:
            self._route.link("set", index=index, state="up")
            self._done.append(f"{want.name}: up")


def _wait_while(used: Callable[[KernelRoute], bool]) -> None:
    """Wait while a route of BIRD's needs what is to go, but not for ever: then it ends in no way."""
    deadline_s = time.monotonic() + _UNUSED_S
    while any(map(used, bird_routes())) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _tunnel_attributes(want: Ipip) -> dict[str, Any]:
    local = format_address(want.local)
    if family_of(want.local) is Family.V4:
        return {"kind": "ipip", "ipip_local": local, "ipip_proto": 4}
    return {
        "kind": "ip6tnl",
        "ip6tnl_local": local,
        "ip6tnl_remote": format_address(want.remote or bytes(16)),
        "ip6tnl_proto": 41,
        # Without the extra header the MTU is what it seems.
        "ip6tnl_flags": _IGN_ENCAP_LIMIT,
        "ip6tnl_encap_limit": 0,
    }


def _data(link: Any) -> Any:
    info = link.get("IFLA_LINKINFO")
    return info.get("IFLA_INFO_DATA") if info else None


def _kind(link: Any) -> str:
    info = link.get("IFLA_LINKINFO")
    return str(info.get("IFLA_INFO_KIND")) if info else ""


def _is_vxlan(link: Any, want: Vxlan) -> bool:
    data = _data(link)
    if _kind(link) != "vxlan" or data is None or link.get("IFLA_ADDRESS") != _mac(want.mac):
        return False
    v6 = family_of(want.local) is Family.V6
    local = data.get("IFLA_VXLAN_LOCAL6" if v6 else "IFLA_VXLAN_LOCAL")
    return (
        data.get("IFLA_VXLAN_ID") == want.vni
        and data.get("IFLA_VXLAN_PORT") == want.port
        and not data.get("IFLA_VXLAN_LEARNING")
        and local is not None
        and ipaddress.ip_address(local).packed == want.local
    )


def _is_tunnel(link: Any, want: Ipip) -> bool:
    data = _data(link)
    if data is None:
        return False
    if family_of(want.local) is Family.V4:
        ends = (data.get("IFLA_IPIP_LOCAL"), data.get("IFLA_IPIP_REMOTE") or "0.0.0.0")  # noqa: S104
        return _kind(link) == "ipip" and _packed(ends) == (want.local, bytes(4))
    ends = (data.get("IFLA_IP6TNL_LOCAL"), data.get("IFLA_IP6TNL_REMOTE"))
    return (
        _kind(link) == "ip6tnl"
        and _packed((ends[0], ends[1] or "::")) == (want.local, want.remote or bytes(16))
        and bool((data.get("IFLA_IP6TNL_FLAGS") or 0) & _IGN_ENCAP_LIMIT)
    )


def _packed(addresses: Iterable[str | None]) -> tuple[bytes, ...]:
    return tuple(ipaddress.ip_address(a).packed if a else b"" for a in addresses)


def _mac(mac: bytes) -> str:
    return ":".join(f"{b:02x}" for b in mac)
