"""Which links and entries the overlay of a plan needs: pure. Making them is `netpol.kernel.overlay`."""

from __future__ import annotations

from netpol.kernel.overlay import (
    IPIP_BYTES,
    VXLAN_BYTES,
    Ipip,
    OverlayState,
    Remote,
    Vxlan,
)
from netpol.model.net import Family, family_of
from routes.bird.render import IPIP_LINK, VXLAN_LINK, tunnel6_link
from routes.options import VXLAN_PORT, Encapsulation
from routes.plan import RoutePlan, Tunnel, tunnel_link_local, vxlan_mac

#: Names of all links of the overlay start so.
LINK_PREFIXES = ("knp-vxlan", "knp-ipip", "knp-t6-")
VNI = 4096


def overlay_of(plan: RoutePlan, *, underlay_mtu: int) -> OverlayState:
    """What must be there for the plan's tunnels.

    Args:
        plan: its tunnels.
        underlay_mtu: bytes that the link to the other nodes takes.
    """
    if not plan.tunnels or not plan.addresses:
        return OverlayState()
    if plan.options.encapsulation is Encapsulation.IPIP:
        return _ipip(plan, underlay_mtu)
    local = plan.addresses.get(Family.V4) or plan.addresses[Family.V6]
    family = family_of(local)
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
    link = Vxlan(
        VXLAN_LINK,
        VNI,
        VXLAN_PORT,
        local,
        vxlan_mac(plan.node),
        underlay_mtu - VXLAN_BYTES[family],
    )
    return OverlayState(link, frozenset(remotes))


def _ipip(plan: RoutePlan, underlay_mtu: int) -> OverlayState:
    tunnels = set()
    four, six = plan.addresses.get(Family.V4), plan.addresses.get(Family.V6)
    for tunnel in plan.tunnels:
        family = family_of(tunnel.address)
        mtu = underlay_mtu - IPIP_BYTES[family]
        if family is Family.V4 and four is not None:
            tunnels.add(Ipip(IPIP_LINK, four, mtu))
        elif family is Family.V6 and six is not None:
            tunnels.add(Ipip(tunnel6_link(tunnel.address), six, mtu, tunnel.address))
    return OverlayState(tunnels=frozenset(tunnels))
