"""Which links and entries the overlay of a plan needs: pure. Making them is `netpol.kernel.overlay`."""

from __future__ import annotations

from collections.abc import Iterable

from netpol.kernel.overlay import (
    IPIP_BYTES,
    VXLAN_BYTES,
    Ipip,
    OverlayState,
    Remote,
    Vxlan,
)
from netpol.model.net import Family, family_of
from routes import guard
from routes.bird.render import IPIP_LINK, VXLAN_LINK, tunnel6_link
from routes.options import VXLAN_PORT, Encapsulation, OverlayMode
from routes.plan import RoutePlan, Tunnel, tunnel_link_local, vxlan_mac

#: Names of all links of the overlay start so.
LINK_PREFIXES = ("knp-vxlan", "knp-ipip", "knp-t6-")
VNI = 4096
#: Takes IPv6 in IPv6 from nodes that this one has no tunnel to.
IPIP6_END = "knp-t6-in"


def overlay_of(plan: RoutePlan, *, underlay_mtu: int) -> OverlayState:
    """What must be there for the plan's tunnels.

    Args:
        plan: its tunnels.
        underlay_mtu: bytes that the link to the other nodes takes.
    """
    if not plan.addresses:
        return OverlayState()
    taken = guard.taken(plan)
    own = plan.options.encapsulation
    vxlan = Encapsulation.VXLAN in taken
    tunnels: set[Ipip] = set()
    if Encapsulation.IPIP in taken:
        sends = plan.tunnels if own is Encapsulation.IPIP else ()
        tunnels = _ipip(plan, sends, underlay_mtu)
    if Encapsulation.IPIP in plan.options.accept:
        tunnels |= _ends(plan, underlay_mtu)
    return OverlayState(
        _vxlan(plan, underlay_mtu) if vxlan else None,
        _remotes(plan) if vxlan and own is Encapsulation.VXLAN else frozenset(),
        frozenset(tunnels),
    )


def _vxlan(plan: RoutePlan, underlay_mtu: int) -> Vxlan:
    local = _outer(plan)
    mtu = underlay_mtu - VXLAN_BYTES[family_of(local)]
    return Vxlan(VXLAN_LINK, VNI, VXLAN_PORT, local, vxlan_mac(plan.node), mtu)


def _outer(plan: RoutePlan) -> bytes:
    """The node's end of its VXLAN."""
    return plan.addresses.get(Family.V4) or plan.addresses[Family.V6]


def _remotes(plan: RoutePlan) -> frozenset[Remote]:
    family = family_of(_outer(plan))
    by_node: dict[str, list[Tunnel]] = {}
    for tunnel in plan.tunnels:
        by_node.setdefault(tunnel.node, []).append(tunnel)
    remotes = set()
    for tunnels in by_node.values():
        underlay = next((t.address for t in tunnels if family_of(t.address) is family), None)
        if underlay is None:
            continue  # no address of the family that the tunnel runs over: it stays unreachable
        hops = tuple(
            sorted(
                t.address if family_of(t.address) is Family.V4 else tunnel_link_local(t.mac)
                for t in tunnels
            )
        )
        remotes.add(Remote(tunnels[0].mac, underlay, hops))
    return frozenset(remotes)


def _ends(plan: RoutePlan, underlay_mtu: int) -> set[Ipip]:
    """Where IPIP is taken from whatever node: for IPv4 the link that sends, for IPv6 one of its own."""
    names = {Family.V4: IPIP_LINK, Family.V6: IPIP6_END}
    return {
        Ipip(names[family], address, underlay_mtu - IPIP_BYTES[family])
        for family, address in plan.addresses.items()
    }


def _ipip(plan: RoutePlan, sends: Iterable[Tunnel], underlay_mtu: int) -> set[Ipip]:
    tunnels = set()
    four, six = plan.addresses.get(Family.V4), plan.addresses.get(Family.V6)
    for tunnel in sends:
        family = family_of(tunnel.address)
        mtu = underlay_mtu - IPIP_BYTES[family]
        if family is Family.V4 and four is not None:
            tunnels.add(Ipip(IPIP_LINK, four, mtu))
        elif family is Family.V6 and six is not None:
            tunnels.add(Ipip(tunnel6_link(tunnel.address), six, mtu, tunnel.address))
    return tunnels


def pod_mtu(made: RoutePlan, underlay_mtu: int) -> int:
    """What pods may send: what the link takes, less what the overlay may put before it."""
    if made.options.overlay is OverlayMode.NEVER:
        return underlay_mtu
    family = Family.V4 if Family.V4 in made.addresses else Family.V6
    if made.options.encapsulation is Encapsulation.VXLAN:
        return underlay_mtu - VXLAN_BYTES[family]
    return underlay_mtu - max(IPIP_BYTES[f] for f in made.addresses)
