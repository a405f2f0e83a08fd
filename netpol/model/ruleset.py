"""Desired and actual state of sets and chains, as values.

A rule is matches and one action out of closed unions; its text form exists only in `kernel.tables`.
The order of `matches` is the order of evaluation, and cheap ones stand first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from netpol.model.ids import ChainName, Protocol, SetName
from netpol.model.net import Family, Prefix

#: Longest chain name that both iptables variants take (XT_EXTENSION_MAXNAMELEN - 1).
CHAIN_NAME_MAX = 28
#: Longest set name (IPSET_MAXNAMELEN - 1).
SET_NAME_MAX = 31
#: Longest comment that xt_comment stores.
COMMENT_MAX = 255
#: Longest NFLOG prefix (xt_nflog_info.prefix is 64 bytes with its NUL).
LOG_PREFIX_MAX = 63


# -- sets ---------------------------------------------------------------------------------------


class SetKind(StrEnum):
    """The ipset types in use; the value is what `ipset create` takes."""

    HASH_IP = "hash:ip"
    HASH_NET = "hash:net"
    HASH_IP_PORT = "hash:ip,port"
    HASH_NET_NET = "hash:net,net"
    HASH_IP_PORT_NET = "hash:ip,port,net"


class AddressPort(NamedTuple):
    """A member of hash:ip,port."""

    address: bytes
    protocol: Protocol
    port: int


class NetPair(NamedTuple):
    """A member of hash:net,net."""

    first: Prefix
    second: Prefix


class AddressPortNet(NamedTuple):
    """A member of hash:ip,port,net."""

    address: bytes
    protocol: Protocol
    port: int
    net: Prefix


#: hash:ip holds packed addresses, hash:net prefixes (length at least 1: the kernel refuses /0).
Member = bytes | Prefix | AddressPort | NetPair | AddressPortNet


@dataclass(frozen=True, slots=True)
class SetSpec:
    """What a set is. With `marks` (ipset's skbinfo) every member carries a mark value."""

    name: SetName
    kind: SetKind
    family: Family
    marks: bool = False


#: Members of a set; the value is the mark (bits in place, inside the field) where the set has
#: marks, None elsewhere.
Members = Mapping[Member, int | None]


# -- rules --------------------------------------------------------------------------------------


class Hook(StrEnum):
    """The hooks of the mangle table (and filter's) that netpol uses."""

    FORWARD = "FORWARD"
    INPUT = "INPUT"
    OUTPUT = "OUTPUT"
    POSTROUTING = "POSTROUTING"
    PREROUTING = "PREROUTING"


class Side(StrEnum):
    """Which address of a packet."""

    SRC = "src"
    DST = "dst"


class IpProtocol(NamedTuple):
    """`-p`."""

    protocol: Protocol


class PortSpan(NamedTuple):
    """Ports first..last, inclusive."""

    first: int
    last: int


class DstPorts(NamedTuple):
    """Destination port in one of the spans. One span is `--dport`, several are multiport.

    At most 15 slots, where a span of two or more ports takes two (XT_MULTI_PORTS). The protocol
    match of the same rule stands before it and is `protocol`.
    """

    protocol: Protocol
    spans: tuple[PortSpan, ...]


class TcpFlags(NamedTuple):
    """`--tcp-flags LOOKED_AT SET`, upper-case names; the match of TCP stands before it."""

    looked_at: tuple[str, ...]
    present: tuple[str, ...]


class InInterface(NamedTuple):
    """`-i`; a trailing + is a wildcard."""

    name: str


class InPort(NamedTuple):
    """`-m physdev --physdev-in`: the port of a bridge that the packet came in by."""

    name: str


class NetMatch(NamedTuple):
    """`-s` or `-d`."""

    side: Side
    prefix: Prefix
    negate: bool = False


class CtState(NamedTuple):
    """`-m conntrack --ctstate`, upper-case names; with `replies` only packets that answer (`--ctdir`)."""

    states: tuple[str, ...]
    replies: bool = False


class IcmpType(NamedTuple):
    """`--icmp-type NUMBER`, of any code; the protocol match stands before it."""

    number: int


class Icmpv6Type(NamedTuple):
    """`--icmpv6-type NUMBER`; the protocol match stands before it."""

    number: int


class HopLimit(NamedTuple):
    """`-m hl --hl-eq`."""

    value: int


class SetMatch(NamedTuple):
    """`-m set --match-set NAME src|dst[,..]`: one side for each dimension of the set."""

    name: SetName
    sides: tuple[Side, ...]
    negate: bool = False


class MarkMatch(NamedTuple):
    """`-m mark --mark VALUE/MASK`."""

    value: int
    mask: int
    negate: bool = False


class ConnmarkMatch(NamedTuple):
    """`-m connmark --mark VALUE/MASK`."""

    value: int
    mask: int
    negate: bool = False


class AddrType(NamedTuple):
    """`-m addrtype --src-type|--dst-type KIND` (LOCAL, MULTICAST, BROADCAST)."""

    side: Side
    kind: str


class SameAddress(NamedTuple):
    """Source and destination are one address (`-m bpf`): a pod that reaches itself.

    Needs no set and no member per pod, and works where the kernel has no hash:net,net.
    """

    family: Family


class IpvsTakes(NamedTuple):
    """IPVS would take the packet, if its destination is a service (`-m bpf`)."""

    family: Family


class IpvsSends(NamedTuple):
    """`-m ipvs --ipvs`: the packet is one that IPVS sends on, to a backend or back."""


class Limit(NamedTuple):
    """`-m limit --limit N/sec --limit-burst B`."""

    per_second: int
    burst: int


Match = (
    IpProtocol
    | DstPorts
    | TcpFlags
    | InInterface
    | InPort
    | NetMatch
    | CtState
    | IcmpType
    | Icmpv6Type
    | HopLimit
    | SetMatch
    | MarkMatch
    | ConnmarkMatch
    | AddrType
    | SameAddress
    | IpvsTakes
    | IpvsSends
    | Limit
)


class Return(NamedTuple):
    """`-j RETURN`."""


class Drop(NamedTuple):
    """`-j DROP`."""


class Accept(NamedTuple):
    """`-j ACCEPT`: the packet leaves this table's hook, and meets the next table's."""


class Jump(NamedTuple):
    """`-j CHAIN`: comes back at the next rule."""

    chain: ChainName


class Goto(NamedTuple):
    """`-g CHAIN`: comes back where the current chain would have."""

    chain: ChainName


class SetMark(NamedTuple):
    """`-j MARK --set-xmark VALUE/MASK`: writes the bits of the mask only."""

    value: int
    mask: int


class MapMark(NamedTuple):
    """`-j SET --map-set NAME src|dst[,..] --map-mark`: the member's mark; without one, no change.

    `port_side` says which port, of a set of addresses and ports.
    """

    name: SetName
    side: Side
    port_side: Side | None = None


class Log(NamedTuple):
    """`-j NFLOG --nflog-group G --nflog-prefix P`."""

    group: int
    prefix: str


class Reject(NamedTuple):
    """`-j REJECT --reject-with WITH`: drops, and tells the sender. Only in filter."""

    with_: str


class Masquerade(NamedTuple):
    """`-j MASQUERADE --random-fully`: the source becomes this node. Only in nat's POSTROUTING.

    Ports are picked at random, since connections that begin at once would otherwise race for one.
    """


# NamedTuples of equal contents compare equal across classes; Rule compares the classes too.
Action = Return | Drop | Accept | Jump | Goto | SetMark | MapMark | Log | Reject | Masquerade


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a chain."""

    action: Action
    matches: tuple[Match, ...] = ()
    comment: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        return (
            type(self.action) is type(other.action)
            and self.action == other.action
            and self.comment == other.comment
            and self.matches == other.matches
            and [type(m) for m in self.matches] == [type(m) for m in other.matches]
        )

    def __hash__(self) -> int:
        return hash((type(self.action), self.action, self.matches, self.comment))


Chain = tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Ruleset:
    """All that netpol wants in one table of one family.

    Attributes:
        chains: our chains by name.
        hooks: for each hook, the chain that rule 1 of the hook jumps to.
    """

    chains: Mapping[ChainName, Chain] = field(default_factory=dict)
    hooks: Mapping[Hook, ChainName] = field(default_factory=dict)
