"""Names and identities: object keys, directions, protocols, names of chains and sets."""

from __future__ import annotations

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
    """Layer-4 protocols; the first three are those that a NetworkPolicy can name."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"
    ICMP = "ICMP"
    ICMPV6 = "ICMPv6"


#: The protocols with ports (core/v1 Protocol).
PORT_PROTOCOLS = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)

#: IANA protocol numbers, as in the IP header.
PROTOCOL_NUMBERS: dict[Protocol, int] = {
    Protocol.TCP: 6,
    Protocol.UDP: 17,
    Protocol.SCTP: 132,
    Protocol.ICMP: 1,
    Protocol.ICMPV6: 58,
}

PORT_MIN = 1
PORT_MAX = 65535

ChainName = NewType("ChainName", str)
SetName = NewType("SetName", str)
