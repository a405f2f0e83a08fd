"""Names and identities: object keys, directions, protocols, names of chains and sets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType


class ObjectKey(NamedTuple):
    """Namespace and name of an object; namespace is "" for cluster-scoped kinds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Direction(StrEnum):
    """The side of a connection that a policy judges, seen from its subject."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Protocol(StrEnum):
    """Protocols of the IP header; the first three are those that a NetworkPolicy can name.

    IPIP and IPV6 are packets in packets (RFC 2003, RFC 2473).
    """

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"
    ICMP = "ICMP"
    ICMPV6 = "ICMPv6"
    IPIP = "IPIP"
    IPV6 = "IPv6"


#: The protocols with ports (core/v1 Protocol).
PORT_PROTOCOLS = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)

#: IANA protocol numbers, as in the IP header.
PROTOCOL_NUMBERS: dict[Protocol, int] = {
    Protocol.TCP: 6,
    Protocol.UDP: 17,
    Protocol.SCTP: 132,
    Protocol.ICMP: 1,
    Protocol.ICMPV6: 58,
    Protocol.IPIP: 4,
    Protocol.IPV6: 41,
}

PORT_MIN = 1
PORT_MAX = 65535

ChainName = NewType("ChainName", str)
SetName = NewType("SetName", str)

#: Everything that is ours starts with this.
OWN_PREFIX = "KNP-"


@dataclass(frozen=True, slots=True)
class Owner:
    """A room of ours, by the names of its chains and sets: it sees and touches no others.

    Attributes:
        prefix: what its names start with.
        excluding: longer prefixes, of rooms that have names under `prefix` of their own.
        behind: whose jumps come first where both are in one hook.
    """

    prefix: str
    excluding: tuple[str, ...] = ()
    behind: tuple[Owner, ...] = ()

    def owns(self, name: str) -> bool:
        """Whether a chain or set is this room's."""
        return name.startswith(self.prefix) and not name.startswith(self.excluding)

    def yields_to(self, name: str) -> bool:
        """Whether a chain is of a room whose jumps come first."""
        return any(owner.owns(name) for owner in self.behind)


_SERVICES, _ROUTES = f"{OWN_PREFIX}SVC-", f"{OWN_PREFIX}RT-"
#: Its verdicts come first everywhere.
POLICY = Owner(OWN_PREFIX, excluding=(_SERVICES, _ROUTES))
SERVICES = Owner(_SERVICES, behind=(POLICY,))
ROUTES = Owner(_ROUTES, behind=(POLICY, SERVICES))
#: All rooms at once, for who removes everything.
EVERYBODY = Owner(OWN_PREFIX)
