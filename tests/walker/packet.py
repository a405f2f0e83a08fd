"""What the walker knows of a packet, and the error for all that it does not know."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class WalkError(Exception):
    """Text that the walker does not know, that the kernel would refuse, or a broken law."""


@dataclass(frozen=True)
class Packet:
    """The first packet of a connection, unless `ctstate` says otherwise.

    Attributes:
        src: source address.
        dst: destination address.
        protocol: lower-case name as `-p` prints it: tcp, udp, sctp, icmp, ipv6-icmp.
        dport: destination port of tcp, udp and sctp.
        sport: source port.
        icmp_type: type of an ICMP or ICMPv6 message.
        hop_limit: TTL or hop limit.
        iif: name of the interface it came in by, "" in OUTPUT.
        oif: name of the interface it leaves by, "" in INPUT.
        ctstate: conntrack's state.
        mark: fwmark on arrival.
        connmark: mark of the connection.
        local: addresses of the machine that the packet is at.
        pkttype: to whom the frame was sent: 0 to this machine alone (PACKET_HOST), 1 to everybody.
        dnat: whether somebody has given it another destination.
        tcp_flags: of TCP.
        chunk: type of the first chunk of SCTP; 1 is INIT.
    """

    src: Address
    dst: Address
    protocol: str = "tcp"
    dport: int | None = None
    sport: int | None = 40000
    icmp_type: int | None = None
    hop_limit: int = 63
    iif: str = ""
    oif: str = ""
    ctstate: str = "NEW"
    mark: int = 0
    connmark: int = 0
    local: frozenset[Address] = frozenset()
    pkttype: int = 0
    chunk: int = 1
    dnat: bool = False
    tcp_flags: frozenset[str] = frozenset({"SYN"})

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.dst.version

    def side(self, name: str) -> Address:
        """The address of one side."""
        if name not in ("src", "dst"):
            raise WalkError(f"side {name}")
        return self.src if name == "src" else self.dst
