"""ICMP errors as a socket's error queue reports them, and what they say about policy.

Owns the reading of `struct sock_extended_err` and the judgement: an error that the destination itself
sends proves that the packet reached it; any other comes from something that refused it on the way.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from netpol.lab.netsock import IP_RECVERR, IPV6_RECVERR
from netpol.model.flow import Verdict
from netpol.model.ids import Protocol
from netpol.model.net import Family

#: linux/errqueue.h: errno, origin, type, code, pad, info, data; the sender's sockaddr follows.
_EXTENDED = struct.Struct("=IBBBBII")
_ORIGIN_ICMP = 2
_ORIGIN_ICMP6 = 3

#: RFC 792: destination unreachable, and its codes protocol and port.
_V4_UNREACHABLE = 3
_V4_REACHED = frozenset({2, 3})
#: RFC 4443: destination unreachable with code port; parameter problem with code unknown next header.
_V6_UNREACHABLE, _V6_PORT = 1, 4
_V6_PARAMETER, _V6_NEXT_HEADER = 4, 1


class IcmpError(NamedTuple):
    """One ICMP error: type, code, who sent it (packed)."""

    family: Family
    type: int
    code: int
    sender: bytes


def read_icmp_error(ancillary: list[tuple[int, int, bytes]]) -> IcmpError | None:
    """The ICMP error in the control messages of a MSG_ERRQUEUE read; None if it is a local error."""
    for level, kind, data in ancillary:
        v4 = level == socket.IPPROTO_IP and kind == IP_RECVERR
        v6 = level == socket.IPPROTO_IPV6 and kind == IPV6_RECVERR
        if not (v4 or v6) or len(data) < _EXTENDED.size:
            continue
        _, origin, kind_, code, _, _, _ = _EXTENDED.unpack_from(data)
        if origin not in (_ORIGIN_ICMP, _ORIGIN_ICMP6):
            return None
        rest = data[_EXTENDED.size :]
        # sockaddr_in: family, port, address; sockaddr_in6: family, port, flow, address
        sender = rest[4:8] if origin == _ORIGIN_ICMP else rest[8:24]
        family = Family.V4 if origin == _ORIGIN_ICMP else Family.V6
        return IcmpError(family, kind_, code, sender)
    return None


def judge(error: IcmpError, *, protocol: Protocol, destination: bytes) -> Verdict | None:
    """What an error says about the packet that caused it; None if it says nothing (such as PMTU).

    A Linux host never answers TCP with a port unreachable of its own, so that one is a REJECT. For UDP
    a REJECT on the destination itself looks like a closed port and is allow here; whoever has a witness
    there knows better.
    """
    if error.family is Family.V4:
        if error.type != _V4_UNREACHABLE or error.code == 4:  # 4: fragmentation needed
            return None
        reached = error.code in _V4_REACHED
    elif error.type == _V6_UNREACHABLE:
        reached = error.code == _V6_PORT
    elif error.type == _V6_PARAMETER:
        reached = error.code == _V6_NEXT_HEADER
    else:
        return None
    if reached and protocol is not Protocol.TCP and error.sender == destination:
        return Verdict.ALLOW
    return Verdict.DENY
