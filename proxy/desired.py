"""All that the kernel must have for all Services, and what changes of it when some Services do.

A thing (a server, an address, a member of a set) that several Services claim is there once: it is as the
first of them wants it, by namespace and name, and goes with the last. A change costs what the changed
Services have, never a pass over all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from netpol.model.ids import ObjectKey, SetName
from netpol.model.ipvs import ServerId
from netpol.model.ruleset import Member
from proxy.lower import KernelPart, Server

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

#: A member of a set, with the set.
Place = tuple[SetName, Member]


class Claims(Generic[K, V]):
    """Who claims what: for each thing, the claims in the order of the Services' names."""

    def __init__(self) -> None:
        self._claims: dict[K, tuple[tuple[ObjectKey, V], ...]] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def __iter__(self) -> Iterator[K]:
        return iter(self._claims)

    def __contains__(self, thing: object) -> bool:
        return thing in self._claims

    def claimed(self, thing: K) -> bool:
        """Whether anybody wants it."""
        return thing in self._claims

    def value(self, thing: K) -> V:
        """As what it is wanted. Raises KeyError where nobody wants it."""
        return self._claims[thing][0][1]

    def get(self, thing: K) -> V | None:
        """As what it is wanted, or None."""
        found = self._claims.get(thing)
        return None if found is None else found[0][1]

    def services(self, thing: K) -> tuple[ObjectKey, ...]:
        """Who wants it."""
        return tuple(service for service, _ in self._claims.get(thing, ()))

    def items(self) -> Iterator[tuple[K, V]]:
        """Everything that is wanted."""
        return ((thing, claims[0][1]) for thing, claims in self._claims.items())

    def put(self, service: ObjectKey, thing: K, value: V) -> None:
        """A Service wants a thing, as this."""
        rest = [c for c in self._claims.get(thing, ()) if c[0] != service]
        rest.append((service, value))
        self._claims[thing] = tuple(sorted(rest, key=lambda c: c[0]))

    def drop(self, service: ObjectKey, thing: K) -> None:
        """A Service does not want a thing any more."""
        rest = tuple(c for c in self._claims.get(thing, ()) if c[0] != service)
        if rest:
            self._claims[thing] = rest
        else:
            self._claims.pop(thing, None)


@dataclass(slots=True)
class Change:
    """What is wanted otherwise than before; None is "not at all".

    Attributes:
        servers: before and after.
        add: members that are new, or have another mark.
    """

    servers: dict[ServerId, tuple[Server | None, Server | None]] = field(default_factory=dict)
    vips_add: list[bytes] = field(default_factory=list)
    vips_remove: list[bytes] = field(default_factory=list)
    add: dict[SetName, dict[Member, int | None]] = field(default_factory=dict)
    delete: dict[SetName, list[Member]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing is wanted otherwise."""
        return not (self.servers or self.vips_add or self.vips_remove or self.add or self.delete)


class Desired:
    """What all Services want together."""

    def __init__(self) -> None:
        self.parts: dict[ObjectKey, KernelPart] = {}
        self.servers: Claims[ServerId, Server] = Claims()
        self.vips: Claims[bytes, None] = Claims()
        self.entries: Claims[Place, int | None] = Claims()

    def change(self, parts: Mapping[ObjectKey, KernelPart | None]) -> Change:
        """Take over what some Services want now; None is a Service that is gone."""
        change = Change()
        servers = _Before(self.servers)
        vips = _Before(self.vips)
        entries = _Before(self.entries)
        for service, part in parts.items():
            old = self.parts.get(service, _NOTHING)
            new = part or _NOTHING
            if part is None:
                self.parts.pop(service, None)
            else:
                self.parts[service] = part
            if old == new:
                continue
            servers.take(service, _servers(old), _servers(new))
            vips.take(service, dict.fromkeys(old.vips), dict.fromkeys(new.vips))
            entries.take(service, _entries(old), _entries(new))
        for server in servers.touched:
            before, after = servers.before(server), self.servers.get(server)
            if before != after:
                change.servers[server] = (before, after)
        change.vips_add = [v for v in vips.touched if not vips.was(v) and self.vips.claimed(v)]
        change.vips_remove = [v for v in vips.touched if vips.was(v) and not self.vips.claimed(v)]
        for place in entries.touched:
            name, member = place
            if not self.entries.claimed(place):
                if entries.was(place):
                    change.delete.setdefault(name, []).append(member)
            elif not entries.was(place) or entries.before(place) != self.entries.value(place):
                change.add.setdefault(name, {})[member] = self.entries.value(place)
        return change


_NOTHING = KernelPart()


def _servers(part: KernelPart) -> dict[ServerId, Server]:
    return {server.virtual.id: server for server in part.servers}


def _entries(part: KernelPart) -> dict[Place, int | None]:
    return {(entry.name, entry.member): entry.mark for entry in part.entries}


class _Before(Generic[K, V]):
    """How things were wanted before the change that is being made."""

    def __init__(self, claims: Claims[K, V]) -> None:
        self._claims = claims
        self._before: dict[K, tuple[bool, V | None]] = {}

    @property
    def touched(self) -> Iterable[K]:
        return self._before

    def was(self, thing: K) -> bool:
        return self._before[thing][0]

    def before(self, thing: K) -> V | None:
        return self._before[thing][1]

    def take(self, service: ObjectKey, old: Mapping[K, V], new: Mapping[K, V]) -> None:
        for thing in old.keys() - new.keys():
            self._touch(thing)
            self._claims.drop(service, thing)
        for thing, value in new.items():
            if thing not in old or old[thing] != value:
                self._touch(thing)
                self._claims.put(service, thing, value)

    def _touch(self, thing: K) -> None:
        if thing not in self._before:
            self._before[thing] = (self._claims.claimed(thing), self._claims.get(thing))
