"""ipsets out of `ipset restore` text, with the kernel's way of looking members up.

Owns the few set types that netpol uses and refuses everything else, as it refuses what the kernel
would: a prefix of length 0, a member twice, a member of the other family, too long a name.
"""

from __future__ import annotations

import ipaddress
import shlex
from dataclasses import dataclass, field

from tests.walker.packet import Address, Packet, WalkError

#: IPSET_MAXNAMELEN - 1.
NAME_MAX = 31
KINDS = {"hash:ip": 1, "hash:net": 1, "hash:ip,port": 2, "hash:net,net": 2}
PORT_PROTOCOLS = ("tcp", "udp", "sctp")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Mark = tuple[int, int]


def number(text: str) -> int:
    """Read decimal or 0x numbers."""
    return int(text, 0)


def masked_value(text: str) -> Mark:
    """Read VALUE or VALUE/MASK."""
    value, slash, mask = text.partition("/")
    return number(value), number(mask) if slash else 0xFFFFFFFF


@dataclass
class IpSet:
    """One set; members are keyed as the lookup needs them."""

    name: str
    kind: str
    version: int
    marks: bool
    members: dict[tuple[object, ...], Mark | None] = field(default_factory=dict)
    lengths: set[tuple[int, ...]] = field(default_factory=set)
    maxelem: int = 65536

    def _network(self, text: str) -> Network:
        network = ipaddress.ip_network(text)
        if network.version != self.version:
            raise WalkError(f"{self.name}: {text} is of the other family")
        if network.prefixlen == 0:
            raise WalkError(f"{self.name}: the kernel refuses {text}")
        return network

    def _parse(self, text: str) -> tuple[object, ...]:
        if self.kind == "hash:ip":
            network = self._network(text)
            if network.prefixlen != network.max_prefixlen:
                raise WalkError(f"{self.name}: {text} is no single address")
            return (int(network.network_address),)
        if self.kind == "hash:ip,port":
            address, _, rest = text.partition(",")
            protocol, _, port = rest.partition(":")
            if protocol not in PORT_PROTOCOLS:
                raise WalkError(f"{self.name}: protocol of {text}")
            return (int(self._network(address).network_address), protocol, int(port))
        key: list[object] = []
        for part in text.split(","):
            network = self._network(part)
            key += [network.prefixlen, int(network.network_address)]
        if len(key) != 2 * KINDS[self.kind]:
            raise WalkError(f"{self.name}: {text} has the wrong number of parts")
        return tuple(key)

    def add(self, text: str, mark: Mark | None, *, exist: bool) -> None:
        """Put a member in; the same one again is an error without -exist."""
        key = self._parse(text)
        if mark is not None and not self.marks:
            raise WalkError(f"{self.name}: skbmark without skbinfo")
        if key in self.members and not exist:
            raise WalkError(f"{self.name}: {text} is already there")
        self.members[key] = mark
        if len(self.members) > self.maxelem:
            raise WalkError(f"{self.name}: over maxelem {self.maxelem}")
        if self.kind.startswith("hash:net"):
            self.lengths.add(tuple(int(str(x)) for x in key[::2]))

    def delete(self, text: str) -> None:
        """Take a member out; the lengths stay, which costs lookups only."""
        self.members.pop(self._parse(text), None)

    def lookup(self, packet: Packet, sides: tuple[str, ...]) -> tuple[bool, Mark | None]:
        """Find the packet's member: the longest prefixes first, as the kernel does."""
        if len(sides) != KINDS[self.kind]:
            raise WalkError(f"{self.name}: {','.join(sides)} for {self.kind}")
        if packet.version != self.version:
            raise WalkError(f"{self.name}: asked by a packet of the other family")
        key: tuple[object, ...]
        if self.kind == "hash:ip":
            key = (int(packet.side(sides[0])),)
        elif self.kind == "hash:ip,port":
            if sides[1] != "dst":
                raise WalkError(f"{self.name}: only destination ports are known here")
            if packet.protocol not in PORT_PROTOCOLS or packet.dport is None:
                return False, None
            key = (int(packet.side(sides[0])), packet.protocol, packet.dport)
        else:
            addresses = [packet.side(s) for s in sides]
            for lengths in sorted(self.lengths, reverse=True):
                key = tuple(
                    part
                    for length, address in zip(lengths, addresses, strict=True)
                    for part in (length, prefix_of(address, length))
                )
                if key in self.members:
                    return True, self.members[key]
            return False, None
        return (True, self.members[key]) if key in self.members else (False, None)


def prefix_of(address: Address, length: int) -> int:
    """The network number of an address, in place."""
    shift = address.max_prefixlen - length
    return int(address) >> shift << shift


def parse_sets(text: str) -> dict[str, IpSet]:
    """Read `ipset restore` text (create, add, del, destroy) into sets.

    Raises:
        WalkError: a form that is not known here, or that the kernel would refuse.
    """
    sets: dict[str, IpSet] = {}
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words == ["COMMIT"]:
            continue
        command, name, *rest = words
        exist = "-exist" in rest or "-exist" in words
        rest = [w for w in rest if w not in ("-exist", "-!")]
        if command == "create":
            new = _create(name, rest)
            old = sets.setdefault(name, new)
            if old is not new and (not exist or (old.kind, old.version) != (new.kind, new.version)):
                raise WalkError(f"{name}: created twice")
            continue
        if name not in sets:
            raise WalkError(f"{line}: no such set")
        if command == "add":
            member, *options = rest
            mark = None
            while options:
                option, *options = options
                if option != "skbmark" or not options:
                    raise WalkError(f"{line}: {option} is not known")
                mark = masked_value(options.pop(0))
            sets[name].add(member, mark, exist=exist)
        elif command == "del":
            sets[name].delete(rest[0])
        elif command == "destroy":
            del sets[name]
        else:
            raise WalkError(f"{line}: {command} is not known")
    return sets


def _create(name: str, rest: list[str]) -> IpSet:
    kind, *options = rest
    if kind not in KINDS:
        raise WalkError(f"{name}: type {kind} is not known")
    if len(name) > NAME_MAX:
        raise WalkError(f"{name}: longer than {NAME_MAX}")
    made = IpSet(name, kind, 4, marks=False)
    while options:
        option, *options = options
        if option == "skbinfo":
            made.marks = True
        elif option in ("family", "hashsize", "maxelem", "bucketsize", "initval"):
            value, *options = options
            if option == "family":
                made.version = {"inet": 4, "inet6": 6}[value]
            elif option == "maxelem":
                made.maxelem = int(value)
        else:
            raise WalkError(f"{name}: option {option} is not known")
    return made
