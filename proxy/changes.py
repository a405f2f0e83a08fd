"""From changes of objects to changes of plans: who must be planned anew, and who has an address. Pure.

The Tracker keeps what the informers told (Services, their slices, Nodes) and what it made of it. Of two
Services that want one address, protocol and port the older has it (creation time, then name; one without
a time is the youngest), and the younger is told so; when the older goes, the younger gets it.

A change of a Service or of its endpoints costs what that Service is large, however many others there are.
Only a change of this node, which is rare, looks at all Services to find those that depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from types import MappingProxyType

from netpol.model.ids import ObjectKey
from netpol.model.net import Prefix, format_address, host_prefix
from netpol.model.objects import EndpointSlice, Node, Service
from proxy.addresses import Forbidden
from proxy.annotations import wants_tunnel
from proxy.plan import Hidden, ProxyOptions, forbid_node, plan_service
from proxy.rows import Kind, Reason, Refused, RowKey, ServicePlan, ServiceRow

#: The Service of the API server: its endpoints are the servers' own addresses.
API_SERVICE = ObjectKey("default", "kubernetes")

#: The age of a Service: the older sorts first.
_Age = tuple[bool, str, ObjectKey]


class Tracker:
    """Follows the objects and says which plans have changed.

    Args:
        hidden: says why a tunnel must not lead to a pod; whoever it is tells when that changes.

    Attributes:
        planned: how many Services were planned so far, each time counted.
    """

    def __init__(
        self,
        node: str,
        options: ProxyOptions | None = None,
        *,
        hidden: Hidden = lambda _: None,
    ) -> None:
        self.planned = 0
        self._hidden = hidden
        self._direct: dict[ObjectKey, None] = {}  # Services that want direct server return
        self._name = node
        self._options = options or ProxyOptions()
        self._services: dict[ObjectKey, Service] = {}
        self._slices: dict[ObjectKey, tuple[EndpointSlice, ...]] = {}
        self._nodes: dict[str, Node] = {}
        self._dirty: dict[ObjectKey, None] = {}
        self._touched: dict[ObjectKey, None] = {}  # planned, or judged anew, since the last flush
        self._wanted: dict[ObjectKey, ServicePlan] = {}
        self._plans: dict[ObjectKey, ServicePlan] = {}
        self._owners: dict[RowKey, ObjectKey] = {}
        self._rivals: dict[RowKey, tuple[ObjectKey, ...]] = {}
        self._forbidden = Forbidden()
        self._options.forbid(self._forbidden)
        self._cluster_ips: dict[bytes, tuple[ObjectKey, ...]] = {}
        self._outside: dict[bytes, tuple[ObjectKey, ...]] = {}

    # -- what the informers say -----------------------------------------------------------------

    def service(self, before: Service | None, after: Service | None) -> None:
        """A Service came, changed or went."""
        if before == after:
            return
        some = after or before
        if some is None:
            return
        key = some.key
        known = self._services.get(key)
        if after is None:
            self._services.pop(key, None)
        else:
            self._services[key] = after
        self._dirty[key] = None
        if after is not None and wants_tunnel(after.annotations):
            self._direct[key] = None
        else:
            self._direct.pop(key, None)
        self._index(self._outside, key, _outside(known), _outside(after))
        ips, new_ips = _cluster_ips(known), _cluster_ips(after)
        self._index(self._cluster_ips, key, ips, new_ips)
        for address in set(ips) ^ set(new_ips):
            self._dirty.update(dict.fromkeys(self._outside.get(address, ())))

    def slice(self, before: EndpointSlice | None, after: EndpointSlice | None) -> None:
        """An EndpointSlice came, changed or went."""
        if before == after:
            return
        if before is not None and (after is None or after.service != before.service):
            self._put_slice(before, None)
        if after is not None:
            self._put_slice(after, after)

    def _put_slice(self, old: EndpointSlice, new: EndpointSlice | None) -> None:
        service = old.service
        known = self._slices.get(service, ())
        rest = tuple(s for s in known if s.key != old.key)
        if new is not None:
            rest = (*rest, new)
        if rest:
            self._slices[service] = rest
        else:
            self._slices.pop(service, None)
        self._dirty[service] = None
        if service == API_SERVICE:
            for address in _addresses(known):
                self._forbidden.remove(host_prefix(address), _API_OWNER)
            for address in _addresses(rest):
                self._forbidden.add_host(address, _API_OWNER)
            self._recheck(host_prefix(a) for a in _addresses(known) ^ _addresses(rest))

    def node(self, before: Node | None, after: Node | None) -> None:
        """A Node came, changed or went, this one or another."""
        some = after or before
        if some is None or before == after:
            return
        if after is None and some.name == self._name:
            return  # the machine is still there, and so are its addresses
        known = self._nodes.get(some.name)
        for node, enter in ((known, False), (after, True)):
            if node is not None:
                self._forbid_node(node, enter=enter)
        if after is None:
            self._nodes.pop(some.name, None)
        else:
            self._nodes[some.name] = after
        self._recheck(_blocks(known) ^ _blocks(after))
        if some.name == self._name:
            self._node_changed(known or Node(name=self._name), after or Node(name=self._name))

    def _forbid_node(self, node: Node, *, enter: bool) -> None:
        if enter:
            forbid_node(self._forbidden, node)
            return
        ours = Forbidden()
        forbid_node(ours, node)
        for block, owner in ours.entries():
            self._forbidden.remove(block, owner)

    def _node_changed(self, old: Node, new: Node) -> None:
        """Mark what depends on this node's addresses and zone."""
        moved, rezoned = old.addresses != new.addresses, old.zone != new.zone
        for key, service in self._services.items():
            if (moved and any(p.node_port for p in service.ports)) or (
                rezoned and any(e.for_zones for s in self._slices.get(key, ()) for e in s.endpoints)
            ):
                self._dirty[key] = None

    def set_options(self, options: ProxyOptions) -> None:
        """Plan with other options from now on: the Services that they matter to.

        Addresses of the machine change as pods come and go, so that this must not plan everything.
        """
        old, self._options = self._options, options
        if options == old:
            return
        before, after = Forbidden(), Forbidden()
        old.forbid(before)
        options.forbid(after)
        gone, new = set(before.entries()), set(after.entries())
        for block, owner in before.entries():
            self._forbidden.remove(block, owner)
        options.forbid(self._forbidden)
        self._recheck({block for block, _ in gone ^ new})
        if old.no_direct_return != options.no_direct_return:
            self.recheck_direct()
        narrowed = (old.external_cidrs, old.balancer_pools) != (
            options.external_cidrs,
            options.balancer_pools,
        )
        node_ports = old.nodeport_cidrs != options.nodeport_cidrs
        if old.scheduler != options.scheduler:
            self._dirty.update(dict.fromkeys(self._services))
        elif narrowed or node_ports:
            for key, service in self._services.items():
                if (narrowed and service.outside_addresses) or (
                    node_ports and any(p.node_port for p in service.ports)
                ):
                    self._dirty[key] = None

    @property
    def wants_direct(self) -> bool:
        """Whether a Service wants direct server return."""
        return bool(self._direct)

    def recheck_direct(self) -> None:
        """Where a tunnel may lead is to be asked anew."""
        self._dirty.update(self._direct)

    # -- what became of it ----------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether a flush has something to do."""
        return bool(self._dirty or self._touched)

    @property
    def plans(self) -> Mapping[ObjectKey, ServicePlan]:
        """All plans of the last flush, those of Services without anything to say left out; a live view."""
        return MappingProxyType(self._plans)

    def plan_some(self, count: int) -> bool:
        """Plan so many Services at most, for the next flush; whether others are left to be planned.

        So that whoever must not be held up for long can let others work in between, with changes too.
        """
        for key in list(islice(self._dirty, count)):
            del self._dirty[key]
            self._touched[key] = None
            self._plan(key, self._touched)
        return bool(self._dirty)

    def flush(self) -> dict[ObjectKey, ServicePlan | None]:
        """The plans that have changed since the last flush; None for a Service that needs nothing more."""
        self.plan_some(len(self._dirty))
        touched, self._touched = self._touched, {}
        changed: dict[ObjectKey, ServicePlan | None] = {}
        for key in touched:
            before, after = self._plans.get(key), self._settled(key)
            if before == after:
                continue
            changed[key] = after
            if after is None:
                del self._plans[key]
            else:
                self._plans[key] = after
        return changed

    def explained(self, key: ObjectKey) -> ServicePlan | None:
        """The plan of a Service with its unused endpoints; as of the last flush, where others matter."""
        if key not in self._services:
            return None
        return self._without_lost(self._plan_one(key, explain=True))

    # -- planning -------------------------------------------------------------------------------

    def _plan_one(self, key: ObjectKey, *, explain: bool) -> ServicePlan:
        node = self._nodes.get(self._name) or Node(name=self._name)
        return plan_service(
            self._services[key],
            self._slices.get(key, ()),
            node,
            self._options,
            refusal=self._refusal,
            hidden=self._no_end,
            explain=explain,
        )

    def _no_end(self, address: bytes) -> str | None:
        for node in self._nodes.values():
            if address in node.addresses:
                return f"endpoint {format_address(address)} is node {node.name} itself"
        return self._hidden(address)

    def _refusal(self, address: bytes) -> str | None:
        why = self._forbidden.why(address)
        if why is None and address in self._cluster_ips:
            why = f"it is the ClusterIP of {min(self._cluster_ips[address])}"
        return why

    def _plan(self, key: ObjectKey, touched: dict[ObjectKey, None]) -> None:
        """Plan a Service, and enter what it wants; adds those whose rows are judged anew."""
        old = self._wanted.pop(key, None)
        new: ServicePlan | None = None
        if key in self._services:
            self.planned += 1
            new = self._plan_one(key, explain=False)
            if not (new.rows or new.refused or new.health_port):
                new = None
        if new is not None:
            self._wanted[key] = new
        before = {row.key for row in old.rows} if old else set()
        after = {row.key for row in new.rows} if new else set()
        for dialled in before - after:
            self._leave(dialled, key, touched)
        for dialled in after:
            self._claim(dialled, key, touched)

    def _claim(self, dialled: RowKey, key: ObjectKey, touched: dict[ObjectKey, None]) -> None:
        owner = self._owners.get(dialled)
        if owner is None or (owner == key and dialled not in self._rivals):
            self._owners[dialled] = key
            return
        self._settle(dialled, {key, *self._rivals.get(dialled, (owner,))}, touched)

    def _leave(self, dialled: RowKey, key: ObjectKey, touched: dict[ObjectKey, None]) -> None:
        rivals = self._rivals.get(dialled)
        if rivals is None:
            del self._owners[dialled]
            return
        self._settle(dialled, {r for r in rivals if r != key}, touched)

    def _settle(
        self, dialled: RowKey, rivals: set[ObjectKey], touched: dict[ObjectKey, None]
    ) -> None:
        """Say whose it is of several that want it."""
        ordered = tuple(sorted(rivals, key=self._age))
        if ordered == self._rivals.get(dialled):
            return
        self._owners[dialled] = ordered[0]
        if len(ordered) > 1:
            self._rivals[dialled] = ordered
        else:
            del self._rivals[dialled]
        touched.update(dict.fromkeys(ordered))

    def _age(self, key: ObjectKey) -> _Age:
        service = self._services.get(key)
        created = service.created if service else ""
        return (not created, created, key)

    def _settled(self, key: ObjectKey) -> ServicePlan | None:
        wanted = self._wanted.get(key)
        return None if wanted is None else self._without_lost(wanted)

    def _without_lost(self, plan: ServicePlan) -> ServicePlan:
        """The plan without the rows that others have."""
        if not self._rivals:
            return plan
        key = plan.service
        lost = [r for r in plan.rows if self._owners.get(r.key, key) != key]
        if not lost:
            return plan
        return replace(
            plan,
            rows=tuple(r for r in plan.rows if r not in lost),
            refused=(*plan.refused, *(_in_use(r, self._owners[r.key]) for r in lost)),
        )

    # -- who depends on what --------------------------------------------------------------------

    def _index(
        self,
        index: dict[bytes, tuple[ObjectKey, ...]],
        key: ObjectKey,
        old: tuple[bytes, ...],
        new: tuple[bytes, ...],
    ) -> None:
        for address in set(old) - set(new):
            rest = tuple(k for k in index[address] if k != key)
            if rest:
                index[address] = rest
            else:
                del index[address]
        for address in set(new) - set(old):
            index[address] = (*index.get(address, ()), key)

    def _recheck(self, blocks: Iterable[Prefix]) -> None:
        """Mark the Services that want an outside address in one of these blocks."""
        for block in blocks:
            if block.is_host:
                self._dirty.update(dict.fromkeys(self._outside.get(block.address, ())))
            else:
                for address, keys in self._outside.items():
                    if block.contains(address):
                        self._dirty.update(dict.fromkeys(keys))


_API_OWNER = "the API server's address"


def _outside(service: Service | None) -> tuple[bytes, ...]:
    return tuple(dict.fromkeys(service.outside_addresses)) if service else ()


def _cluster_ips(service: Service | None) -> tuple[bytes, ...]:
    return service.cluster_ips if service else ()


def _addresses(slices: Iterable[EndpointSlice]) -> set[bytes]:
    return {a for s in slices for e in s.endpoints for a in e.addresses}


def _blocks(node: Node | None) -> set[Prefix]:
    return {*map(host_prefix, node.addresses), *node.pod_cidrs} if node else set()


def _in_use(row: ServiceRow, owner: ObjectKey) -> Refused:
    host = format_address(row.address)
    shown = f"{f'[{host}]' if ':' in host else host}:{row.port}/{row.protocol}"
    names = {Kind.NODE_PORT: "NodePort", Kind.CLUSTER_IP: "ClusterIP"}
    what = names.get(row.kind, "address")
    return Refused(
        Reason.ADDRESS_IN_USE,
        f"{what} {shown} is not served: it is Service {owner}'s, the older one",
    )
