"""What the API server refuses of a NetworkPolicy.

Owns the rules of `spec`; the cases are rows 23, 29, 32, 33, 45, 50, 61 to 63, 74 and 98 of the policy
semantics.
"""

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from netpol.lab.apiserver.causes import (
    not_allowed,
    port_name,
    port_number,
    protocol,
    required,
    selector,
    unsupported,
    wrong,
)
from netpol.lab.apiserver.errors import Cause, Obj

_TYPES = ("Ingress", "Egress")


def check(obj: Obj, old: Obj | None) -> list[Cause]:
    """Return what is wrong with a NetworkPolicy after defaults."""
    spec = obj["spec"]
    tolerated = _cidrs((old or {}).get("spec") or {})
    causes = selector("spec.podSelector", spec["podSelector"])
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for place, rule in enumerate(spec.get(direction) or ()):
            where = f"spec.{direction}[{place}]"
            for at, port in enumerate(rule.get("ports") or ()):
                causes += _port(f"{where}.ports[{at}]", port)
            for at, peer in enumerate(rule.get(peers) or ()):
                causes += _peer(f"{where}.{peers}[{at}]", peer, tolerated)
    types = spec["policyTypes"]
    if len(types) > len(_TYPES):
        causes.append(wrong("spec.policyTypes", types, "may not specify more than two"))
        return causes
    for at, one in enumerate(types):
        if one not in _TYPES:
            causes.append(unsupported(f"spec.policyTypes[{at}]", one, _TYPES))
    return causes


def _port(where: str, port: Obj) -> list[Cause]:
    causes = protocol(f"{where}.protocol", port.get("protocol"))
    number, end = port.get("port"), port.get("endPort")
    if number is None:
        if end is not None:
            why = "may not be given without `port`"
            causes.append(wrong(f"{where}.endPort", end, why))
        return causes
    if isinstance(number, str):
        causes += port_name(f"{where}.port", number)
        if end is not None:
            why = "may not be given with a `port` that is a name"
            causes.append(wrong(f"{where}.endPort", end, why))
        return causes
    causes += port_number(f"{where}.port", number)
    if end is not None and not causes:
        if end < number:
            why = "must be greater than or equal to `port`"
            causes.append(wrong(f"{where}.endPort", end, why))
        else:
            causes += port_number(f"{where}.endPort", end)
    return causes


def _peer(where: str, peer: Obj, tolerated: frozenset[str]) -> list[Cause]:
    causes: list[Cause] = []
    selectors = 0
    for name in ("podSelector", "namespaceSelector"):
        if peer.get(name) is not None:
            selectors += 1
            causes += selector(f"{where}.{name}", peer[name])
    block = peer.get("ipBlock")
    if block is not None:
        causes += _block(f"{where}.ipBlock", block, tolerated)
        if selectors:
            causes.append(not_allowed(where, "may not specify both ipBlock and another peer"))
    elif not selectors:
        causes.append(required(where, "must specify a peer"))
    return causes


def _block(where: str, block: Obj, tolerated: frozenset[str]) -> list[Cause]:
    text = block.get("cidr")
    if not text:
        return [required(f"{where}.cidr")]
    if text in tolerated:
        return []
    whole = _network(text)
    if isinstance(whole, str):
        return [wrong(f"{where}.cidr", text, whole)]
    causes = []
    for at, part_text in enumerate(block.get("except") or ()):
        field = f"{where}.except[{at}]"
        part = _network(part_text)
        if isinstance(part, str):
            if part_text not in tolerated:
                causes.append(wrong(field, part_text, part))
            continue
        inside = part.version == whole.version and part.network_address in whole
        if not inside or part.prefixlen <= whole.prefixlen:
            causes.append(wrong(field, part_text, "must be a strict subset of `cidr`"))
    return causes


def _network(text: Any) -> IPv4Network | IPv6Network | str:
    """Return the network of a CIDR, or what is wrong with it."""
    text = str(text)
    if "/" not in text or not text.rpartition("/")[2].isdecimal():
        return "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
    try:
        return _unmapped(ip_network(text))
    except ValueError as fault:
        if "has host bits set" in str(fault):
            return "must not have bits set beyond the prefix length"
        return "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"


def _unmapped(found: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network | str:
    mapped = found.version == 6 and found.network_address.ipv4_mapped is not None
    return "must not be an IPv4-mapped IPv6 address" if mapped else found


def _cidrs(spec: Obj) -> frozenset[str]:
    """Return every CIDR of a stored policy: what an older server took is not refused on update."""
    found = set()
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or ():
            for peer in rule.get(peers) or ():
                block = peer.get("ipBlock") or {}
                found.update([block.get("cidr"), *(block.get("except") or ())])
    return frozenset(found - {None})
