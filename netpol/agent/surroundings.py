"""What the proxy must know of its node and of the network around: for plans, for rules, for health ports.

From settings, from what the machine tells of itself, and from the Node object as far as there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from netpol.config import Settings
from netpol.model.ids import SetName
from netpol.model.net import FAMILIES, Family, Prefix, family_of, format_address, parse_prefix
from netpol.model.objects import Node
from netpol.model.pools import parse_range
from netpol.model.ruleset import Members
from proxy import names, rules
from proxy.plan import ProxyOptions
from proxy.work import Static


class NodeView(Protocol):
    """What must be known of the node itself."""

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """Its own addresses, those of Services left out."""
        ...

    def pod_ranges(self) -> tuple[Prefix, ...]:
        """Ranges of its pods, as far as it tells itself."""
        ...


class Surroundings:
    """One node's, as they are now.

    Args:
        node: the node's object in the API, or None.
        no_direct_return: why there are no tunnels into pods, or "".
    """

    def __init__(
        self,
        settings: Settings,
        facts: NodeView,
        node: Callable[[], Node | None],
        *,
        no_direct_return: str,
    ) -> None:
        self._settings, self._facts, self._node = settings, facts, node
        self._no_direct_return = no_direct_return
        self._rulesets = rules.rulesets(rules.RuleOptions(settings.service_mask))
        self._forbidden: dict[str, tuple[bytes, ...]] = {
            "api_servers": (),
            "gateways": (),
            "bgp_peers": (),
        }

    def forbid(self, **given: Iterable[bytes] | None) -> bool:
        """Learn of API servers, gateways or BGP peers, which no Service may take; whether of new ones."""
        found = {name: tuple(sorted(some)) for name, some in given.items() if some is not None}
        if found.items() <= self._forbidden.items():
            return False
        self._forbidden |= found
        return True

    @property
    def forbidden(self) -> frozenset[bytes]:
        """All of these."""
        return frozenset(a for found in self._forbidden.values() for a in found)

    def pod_ranges(self) -> tuple[Prefix, ...]:
        """Where this node's pods have their addresses from."""
        known, node = self._facts.pod_ranges(), self._node()
        return known or (node.pod_cidrs if node is not None else ())

    def options(self) -> ProxyOptions:
        """What plans depend on beside objects of the API."""
        s = self._settings
        return ProxyOptions(
            scheduler=s.ipvs_scheduler,
            nodeport_cidrs=_prefixes(s.nodeport_addresses),
            external_cidrs=_prefixes(s.external_ip_cidr),
            no_direct_return=self._no_direct_return,
            balancer_pools=tuple(parse_range(p) for p in s.loadbalancer_pools),
            node_addresses=self._facts.addresses,
            service_ranges=_prefixes(s.service_ranges),
            pod_ranges=self.pod_ranges(),
            **self._forbidden,
        )

    def static(self) -> Static:
        """What the kernel must have whatever the Services are."""
        ranges, node, own = self.pod_ranges(), self._node(), self._facts.addresses
        listed = node.addresses if node is not None else ()
        sources: dict[Family, bytes] = {}
        for family in FAMILIES:
            # What the cluster knows the node by comes first, if it stands on the machine.
            choice = [a for a in listed if a in own] or [
                a for a in own if not any(r.contains(a) for r in ranges)
            ]
            found = next((a for a in choice if family_of(a) is family), None)
            if found is not None:
                sources[family] = found
        members: dict[SetName, Members] = {
            names.POD[f].name: {r: None for r in ranges if r.family is f} for f in FAMILIES
        }
        return Static(rulesets=self._rulesets, members=members, sources=sources)

    def health_hosts(self) -> tuple[str, ...]:
        """Health ports are served on the addresses that NodePorts are; () is all."""
        cidrs = _prefixes(self._settings.nodeport_addresses)
        if not cidrs:
            return ()
        own = [a for a in self._facts.addresses if any(c.contains(a) for c in cidrs)]
        return tuple(map(format_address, own)) or ("127.0.0.1",)


def _prefixes(texts: Iterable[str]) -> tuple[Prefix, ...]:
    return tuple(parse_prefix(t) for t in texts)
