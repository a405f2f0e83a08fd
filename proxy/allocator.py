"""Which address each LoadBalancer Service gets: a function of the pools and of what is held already.

Pure and without memory: what is held stands in the Services' statuses, so that a new leader comes to the
same answer as the old one. Who asks and who writes is `proxy.lbcontroller`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from netpol.model.ids import ObjectKey
from netpol.model.net import Family, family_of, format_address
from netpol.model.pools import AddressRange
from proxy.rows import Refused


@dataclass(frozen=True, slots=True)
class Claim:
    """A Service that shall have addresses.

    Attributes:
        created: the older of two Services wins; then the key decides.
        families: of each it gets one address.
        requested: addresses that it asks for; of a family without one, any is given.
        held: what it has, by its status.
        unreadable: requested texts that are no address.
    """

    key: ObjectKey
    created: str = ""
    families: tuple[Family, ...] = (Family.V4,)
    requested: tuple[bytes, ...] = ()
    held: tuple[bytes, ...] = ()
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grant:
    """What a claim gets, in the order of its families, and what it does not get and why."""

    addresses: tuple[bytes, ...] = ()
    faults: tuple[Refused, ...] = ()


#: An address to those that use it without claiming it: externalIPs, statuses of other controllers.
Reserved = Mapping[bytes, Collection[ObjectKey]]


def settle(
    claims: Iterable[Claim],
    *,
    pools: Sequence[AddressRange],
    reserved: Reserved,
    machines: Collection[bytes] = (),
) -> dict[ObjectKey, Grant]:
    """Give every claim its addresses; no address goes to two of them.

    In this order: what is held stays held (of two holders the older's), also outside the pools and whoever
    else names it; then requests; then any free address, the lowest of the first pool that has one.

    Args:
        claims: all of them, in any order.
        pools: where addresses come from.
        reserved: addresses that Services use without claiming them.
        machines: addresses of nodes and routers, which no Service can have, also where a pool holds them.
    """
    round_ = _Round(claims, pools, reserved, frozenset(machines))
    round_.adopt()
    round_.honour_requests()
    round_.fill_up()
    return round_.grants()


class _Round:
    """One settling."""

    def __init__(
        self,
        claims: Iterable[Claim],
        pools: Sequence[AddressRange],
        reserved: Reserved,
        machines: frozenset[bytes],
    ) -> None:
        self._claims = sorted(claims, key=lambda c: (c.created, c.key))
        self._pools, self._reserved, self._machines = pools, reserved, machines
        self._owner: dict[bytes, ObjectKey] = {}
        self._has: dict[ObjectKey, list[bytes]] = {c.key: [] for c in self._claims}
        self._faults: dict[ObjectKey, list[Refused]] = {c.key: [] for c in self._claims}
        self._free = {f: self._free_addresses(f) for f in Family}

    def adopt(self) -> None:
        """Leave everybody what they hold."""
        for claim in self._claims:
            for address in claim.held:
                if family_of(address) in claim.families and address not in self._owner:
                    self._take(claim, address)

    def honour_requests(self) -> None:
        """Give what is asked for by name, where it is free."""
        for claim in self._claims:
            for text in claim.unreadable:
                self._refuse(claim, "InvalidAddress", f"{text!r} is no IP address")
            for address in dict.fromkeys(claim.requested):
                why = self._why_not(claim, address)
                if why is not None:
                    self._faults[claim.key].append(why)
                    continue
                mine = self._has[claim.key]
                asked = [a for a in claim.requested if len(a) == len(address)]
                for other in [a for a in mine if len(a) == len(address) and a not in asked]:
                    mine.remove(other)
                    del self._owner[other]
                if address not in mine:
                    self._take(claim, address)
        # What was given up in favour of a request is free for the rest.
        self._free = {f: self._free_addresses(f) for f in Family}

    def _why_not(self, claim: Claim, address: bytes) -> Refused | None:
        text = format_address(address)
        if family_of(address) not in claim.families:
            return Refused(
                "InvalidAddress", f"{text} is not of an IP family that the Service has (ipFamilies)"
            )
        owner = self._owner.get(address)
        if owner == claim.key:
            return None
        if not any(pool.contains(address) for pool in self._pools):
            return Refused("AddressOutsidePools", f"{text} is in no pool of --loadbalancer-pools")
        if address in self._machines:
            return Refused("AddressTaken", f"{text} is a node's, a router's or the API server's")
        if owner is None:
            owner = next(iter(self._others(claim.key, address)), None)
        if owner is not None:
            return Refused("AddressTaken", f"{text} is in use by Service {owner}")
        return None

    def fill_up(self) -> None:
        """Give a free address of each family that has none and asked for none."""
        for claim in self._claims:
            mine = self._has[claim.key]
            lacking = [
                f
                for f in claim.families
                if all(family_of(a) is not f for a in (*mine, *claim.requested))
            ]
            if claim.unreadable:
                continue  # it wants a certain address; any other one would be a surprise
            without_pool = []
            for family in lacking:
                address = next(self._free[family], None)
                if address is not None:
                    self._take(claim, address)
                elif any(p.family is family for p in self._pools):
                    self._refuse(claim, "PoolExhausted", f"no IPv{family} address is free")
                else:
                    without_pool.append(family)
            # A cluster of two families may well balance only one from outside.
            if without_pool and not self._has[claim.key]:
                names = " and ".join(f"IPv{f}" for f in without_pool)
                self._refuse(claim, "PoolExhausted", f"--loadbalancer-pools has no {names} address")

    def grants(self) -> dict[ObjectKey, Grant]:
        """The outcome."""
        out = {}
        for claim in self._claims:
            order = list(claim.families)
            addresses = sorted(self._has[claim.key], key=lambda a: order.index(family_of(a)))
            out[claim.key] = Grant(tuple(addresses), tuple(self._faults[claim.key]))
        return out

    def _free_addresses(self, family: Family) -> Iterator[bytes]:
        for pool in self._pools:
            if pool.family is not family:
                continue
            first = int.from_bytes(pool.first, "big")
            for number in range(first, first + pool.size):
                address = number.to_bytes(len(pool.first), "big")
                taken = address in self._owner or address in self._machines
                if not taken and not self._reserved.get(address):
                    yield address

    def _others(self, key: ObjectKey, address: bytes) -> list[ObjectKey]:
        return sorted(k for k in self._reserved.get(address, ()) if k != key)

    def _take(self, claim: Claim, address: bytes) -> None:
        self._owner[address] = claim.key
        self._has[claim.key].append(address)

    def _refuse(self, claim: Claim, reason: str, message: str) -> None:
        self._faults[claim.key].append(Refused(reason, message))
