"""What one Service needs on one node: its rows, from the Service, its EndpointSlices and the Node. Pure.

Owns what is dialled (addresses, ports, who may) and what a row is made of. Which endpoints stand behind a
port is `endpoints`; which addresses may not be taken `addresses`; what a Service asks for `annotations`.
Services are planned one by one: of two that want the same the Tracker (`changes`) decides.

The reference is kube-proxy 1.34 (iptables and nftables modes). A Service has rows in a family only if it
has a ClusterIP of that family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from netpol.model.ids import Protocol
from netpol.model.net import Family, Prefix, family_of, format_address, prefixes_of
from netpol.model.objects import EndpointSlice, Node, Service, ServicePort
from netpol.model.pools import AddressRange
from proxy import endpoints
from proxy.addresses import Forbidden, Refusal
from proxy.annotations import Wishes
from proxy.annotations import read as read_annotations
from proxy.endpoints import Candidate, Choice
from proxy.rows import (
    Action,
    Backend,
    Kind,
    Reason,
    Refused,
    RowKey,
    ServicePlan,
    ServiceRow,
    Unused,
)

#: Order of rows, and of two rows of one Service at one address the later one stays: a load balancer's,
#: which may be narrowed to some sources.
_ORDER = {kind: i for i, kind in enumerate(Kind)}

#: Why a Service is skipped that has not got an address yet.
NO_ADDRESS = "it has no ClusterIP"

#: Says of a pod's address why a tunnel must not lead there; "" where that is not known (yet), None for
#: nothing that speaks against it.
Hidden = Callable[[bytes], str | None]

_OUTSIDE = (Kind.EXTERNAL_IP, Kind.LOAD_BALANCER)
_NAMES = {Kind.EXTERNAL_IP: "external IP", Kind.LOAD_BALANCER: "load balancer address"}


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """What holds for all Services.

    Attributes:
        scheduler: where a Service names none.
        nodeport_cidrs: the node's addresses that NodePorts are served on; empty for all.
        external_cidrs: where external and load balancers' addresses must lie; empty for anywhere.
        balancer_pools: from where addresses are given to load balancers; these may always be served.
        no_direct_return: why this node makes no tunnels; then packets return by it.
        node_addresses: those of this machine, besides those in the Node's status.
        service_ranges, pod_ranges, api_servers, gateways, bgp_peers: what no Service may take.
    """

    scheduler: str = "rr"
    nodeport_cidrs: tuple[Prefix, ...] = ()
    external_cidrs: tuple[Prefix, ...] = ()
    balancer_pools: tuple[AddressRange, ...] = ()
    no_direct_return: str = ""
    node_addresses: tuple[bytes, ...] = ()
    service_ranges: tuple[Prefix, ...] = ()
    pod_ranges: tuple[Prefix, ...] = ()
    api_servers: tuple[bytes, ...] = ()
    gateways: tuple[bytes, ...] = ()
    bgp_peers: tuple[bytes, ...] = ()

    def forbid(self, forbidden: Forbidden) -> None:
        """Enter what no Service may take."""
        for block in self.service_ranges:
            forbidden.add(block, "a Service range")
        for block in self.pod_ranges:
            forbidden.add(block, "a pod's address" if block.is_host else "a pod range")
        for addresses, owner in (
            (self.node_addresses, "an address of this node"),
            (self.api_servers, "the API server's address"),
            (self.gateways, "a gateway's address"),
            (self.bgp_peers, "a BGP peer's address"),
        ):
            for address in addresses:
                forbidden.add_host(address, owner)


def forbid_node(forbidden: Forbidden, node: Node) -> None:
    """Enter what is a node's."""
    for address in node.addresses:
        forbidden.add_host(address, f"an address of node {node.name}")
    for block in node.pod_cidrs:
        forbidden.add(block, f"the pod range of node {node.name}")


def skipped(service: Service) -> str | None:
    """Why a Service is none of this proxy's business, or None."""
    if service.type == "ExternalName":
        return "it is a name in DNS (ExternalName)"
    if service.headless:
        return "it is headless"
    if service.foreign:
        return "it is labelled for another proxy"
    if not service.cluster_ips:
        return NO_ADDRESS
    return None


def plan_service(
    service: Service,
    slices: Iterable[EndpointSlice],
    node: Node,
    options: ProxyOptions,
    *,
    refusal: Refusal | None = None,
    hidden: Hidden = lambda _: None,
    explain: bool = True,
) -> ServicePlan:
    """Plan one Service on one node.

    Args:
        service: the Service.
        slices: its EndpointSlices.
        node: this node.
        options: what holds for all Services.
        refusal: says why an external address is refused; without it, by options and node alone.
        hidden: says why a tunnel must not lead to a pod.
        explain: whether to say of endpoints why they are not used.
    """
    why = skipped(service)
    if why is not None:
        return ServicePlan(service.key, service.uid, skipped=why)
    if refusal is None:
        forbidden = Forbidden()
        options.forbid(forbidden)
        forbid_node(forbidden, node)
        refusal = forbidden.why
    planner = _Planner(service, slices, node, options, refusal, hidden=hidden, explain=explain)
    return planner.plan()


class _Planner:
    """Plans one Service."""

    def __init__(
        self,
        service: Service,
        slices: Iterable[EndpointSlice],
        node: Node,
        options: ProxyOptions,
        refusal: Refusal,
        *,
        hidden: Hidden,
        explain: bool,
    ) -> None:
        self._service, self._node, self._options, self._explain = service, node, options, explain
        self._refusal, self._hidden = refusal, hidden
        self._slices = endpoints.usable(slices)
        self._wishes: Wishes = read_annotations(service.annotations, options.scheduler)
        self._refused: list[Refused] = list(self._wishes.refused)
        local = self._wishes.local
        self._internal_local = service.internal_local or local
        # The API has an external policy only where there is an outside.
        outside = service.type in ("NodePort", "LoadBalancer") or bool(service.external_ips)
        self._external_local = (service.external_local or local) and outside
        self._rows: dict[RowKey, ServiceRow] = {}
        self._unused: dict[Unused, None] = {}

    def plan(self) -> ServicePlan:
        """The whole plan."""
        service = self._service
        cluster_ips = endpoints.families(service.cluster_ips)
        addresses = {
            family: list(self._addresses(family, ip)) for family, ip in cluster_ips.items()
        }
        for family in cluster_ips:
            for port in service.ports:
                self._port(port, family, addresses[family])
        rows = sorted(self._rows.values(), key=_row_order)
        health_port = 0
        if service.type == "LoadBalancer" and self._external_local:
            health_port = service.health_port
        return ServicePlan(
            service=service.key,
            uid=service.uid,
            rows=tuple(rows),
            unused=tuple(self._unused),
            refused=tuple(dict.fromkeys(self._refused)),
            health_port=health_port,
            local_ready=self._local_ready(cluster_ips) if self._external_local else 0,
            policy_local=self._external_local,
        )

    def _local_ready(self, families: Iterable[Family]) -> int:
        """kube-proxy counts each family by itself; a pod with both is one."""
        return max(
            len(endpoints.local_ready(self._slices, family=f, node=self._node.name))
            for f in families
        )

    # -- what is dialled ------------------------------------------------------------------------

    def _addresses(self, family: Family, cluster_ip: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The addresses of a family, those that are refused left out."""
        yield Kind.CLUSTER_IP, cluster_ip
        for address in self._node.addresses:
            if family_of(address) is family and self._serves_node_ports(address):
                yield Kind.NODE_PORT, address
        for kind, wanted in (
            (Kind.EXTERNAL_IP, self._service.external_ips),
            (Kind.LOAD_BALANCER, self._balancer_addresses()),
        ):
            for address in wanted:
                if family_of(address) is family:
                    why = self._why_refused(kind, address)
                    if why is None:
                        yield kind, address
                    else:
                        text = f"{_NAMES[kind]} {format_address(address)} is not served: {why}"
                        self._refused.append(Refused(Reason.ADDRESS_REFUSED, text))

    def _serves_node_ports(self, address: bytes) -> bool:
        cidrs = self._options.nodeport_cidrs
        return not cidrs or any(c.contains(address) for c in cidrs)

    def _balancer_addresses(self) -> tuple[bytes, ...]:
        if self._wishes.skip_balancer_addresses:
            return ()
        found = (i.address for i in self._service.ingress if i.address and not i.proxied)
        return tuple(dict.fromkeys(found))

    def _why_refused(self, kind: Kind, address: bytes) -> str | None:
        if address in self._service.cluster_ips:
            return "it is a ClusterIP of the Service itself"
        why = self._refusal(address)
        if why is not None:
            return why
        options = self._options
        given = kind is Kind.LOAD_BALANCER and any(
            pool.contains(address) for pool in options.balancer_pools
        )
        cidrs = options.external_cidrs
        if cidrs and not given and not any(c.contains(address) for c in cidrs):
            return "it lies outside of the ranges for external addresses (--external-ip-cidr)"
        return None

    # -- rows -----------------------------------------------------------------------------------

    def _port(
        self, port: ServicePort, family: Family, addresses: Sequence[tuple[Kind, bytes]]
    ) -> None:
        """The rows of one port in one family."""
        found = endpoints.candidates(
            self._slices,
            port_name=port.name,
            protocol=port.protocol,
            family=family,
            node=self._node.name,
            weights=self._wishes.weights,
        )
        drains = port.protocol is Protocol.TCP
        choice = endpoints.choose(found, node=self._node, drains=drains)
        scheduler = self._wishes.scheduler_for(weighted=any(c.weight > 1 for c in found))
        for kind, address in addresses:
            if kind is Kind.NODE_PORT and not port.node_port:
                continue
            row = self._row(kind, address, port, choice=choice, scheduler=scheduler)
            if row is not None and kind in _OUTSIDE and self._tunnel(row, found):
                ends = tuple(dict.fromkeys(c.address for c in found if self._ends_here(c)))
                row = replace(row, tunnel=True, ends=ends)
            if row is not None:
                self._add(row)
        if self._explain:
            self._explain_port(port, family, found, addresses)

    def _row(
        self, kind: Kind, address: bytes, port: ServicePort, *, choice: Choice, scheduler: str
    ) -> ServiceRow | None:
        ranges: tuple[Prefix, ...] = ()
        if kind is Kind.LOAD_BALANCER:
            ranges = tuple(prefixes_of(self._service.source_ranges, family_of(address)))
            if not ranges and self._service.source_ranges_unread:
                text = (
                    f"{_NAMES[kind]} {format_address(address)} is not served: "
                    "spec.loadBalancerSourceRanges cannot be read"
                )
                self._refused.append(Refused(Reason.SOURCE_RANGES_INVALID, text))
                return None
        if kind is Kind.CLUSTER_IP:
            backends, local_clients, action = _policy(choice, local=self._internal_local)
            local_clients = backends
        else:
            backends, local_clients, action = _policy(choice, local=self._external_local)
        number = port.node_port if kind is Kind.NODE_PORT else port.port
        return ServiceRow(
            service=self._service.key,
            port_name=port.name,
            kind=kind,
            address=address,
            port=number,
            protocol=port.protocol,
            scheduler=scheduler,
            scheduler_flags=self._wishes.flags,
            affinity_s=self._service.affinity_s,
            source_ranges=ranges,
            backends=backends,
            local_client_backends=local_clients,
            action=action,
        )

    def _tunnel(self, row: ServiceRow, found: Sequence[Candidate]) -> bool:
        """Whether packets go in a tunnel.

        All endpoints are asked, not only those that this node uses: all nodes must come to one answer,
        since the tunnel of one ends on another.
        """
        if not self._wishes.tunnel:
            return False
        why = self._options.no_direct_return or next(
            filter(None, (self._no_tunnel(row, c) for c in found)), ""
        )
        if why:
            what = f"direct server return of {_dialled(row.key)}"
            text = f"{what}: {why}; packets return by the node that the client reached"
            self._refused.append(Refused(Reason.DIRECT_RETURN_REFUSED, text))
        return not why

    def _no_tunnel(self, row: ServiceRow, one: Candidate) -> str | None:
        shown = format_address(one.address)
        if one.port != row.port:
            # Packets keep the port that was dialled.
            return f"endpoint {shown} listens on {one.port}, and a tunnel cannot change the port"
        if not one.node:
            return f"endpoint {shown} is no pod"
        return self._hidden(one.address)

    def _ends_here(self, one: Candidate) -> bool:
        return one.local and self._hidden(one.address) is None

    def _add(self, row: ServiceRow) -> None:
        """Take a row in; the same address can be given twice, as external and as load balancer's."""
        key = row.key
        other = self._rows.get(key)
        if other is not None and other.port_name != row.port_name:
            text = (
                f"port {row.port_name or row.port} at {_dialled(key)} is not served: "
                f"port {other.port_name or other.port} of the Service has it"
            )
            self._refused.append(Refused(Reason.ADDRESS_IN_USE, text))
            return
        self._rows[key] = row

    def _explain_port(
        self,
        port: ServicePort,
        family: Family,
        found: Sequence[Candidate],
        addresses: Sequence[tuple[Kind, bytes]],
    ) -> None:
        local_policies = []
        if self._internal_local:
            local_policies.append("internalTrafficPolicy")
        if self._external_local and any(kind is not Kind.CLUSTER_IP for kind, _ in addresses):
            local_policies.append("externalTrafficPolicy")
        for one in endpoints.unused(
            found, node=self._node, port_name=port.name, local_policies=local_policies
        ):
            self._unused[one] = None
        for one in endpoints.mismatched(
            self._slices, port_name=port.name, protocol=port.protocol, family=family
        ):
            self._unused[one] = None


def _policy(
    choice: Choice, *, local: bool
) -> tuple[tuple[Backend, ...], tuple[Backend, ...], Action]:
    """Backends for clients from outside, for those of this node, and what the former meet."""
    backends = choice.local if local else choice.cluster
    serves = choice.local_serves if local else choice.cluster_serves
    silent = Action.DROP if choice.exists else Action.REJECT
    return backends, choice.cluster, Action.FORWARD if serves else silent


def _row_order(row: ServiceRow) -> tuple[int, int, bytes, int, str]:
    return _ORDER[row.kind], len(row.address), row.address, row.port, row.protocol


def _dialled(key: RowKey) -> str:
    host = format_address(key.address)
    return f"{f'[{host}]' if ':' in host else host}:{key.port}/{key.protocol}"
