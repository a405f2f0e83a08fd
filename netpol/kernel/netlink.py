"""Bytes of nfnetlink: attributes and messages packed and walked with `struct`.

This exists beside pyroute2's message classes for bulk only: packing and decoding 50,000 set members
through those takes seconds, through these tens of milliseconds. No sockets here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

# linux/netlink.h
NLM_F_REQUEST = 0x1
NLM_F_MULTI = 0x2
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000
NLA_TYPE_MASK = 0x3FFF
#: nla_len is 16 bits wide, so this is the most that one attribute can hold.
NLA_PAYLOAD_MAX = 0xFFFF - 4

_HEADER = struct.Struct("=IHHII")
_NFGEN = struct.Struct("=BBH")
_NLA = struct.Struct("=HH")
_ERROR = struct.Struct("=i")

#: struct nlmsghdr and struct nfgenmsg, after which the attributes of a message start.
HEADER_SIZE = _HEADER.size
NFGEN_SIZE = _NFGEN.size


class Message(NamedTuple):
    """One netlink message: its type, flags and sequence number, and where its payload lies."""

    type: int
    flags: int
    seq: int
    payload: memoryview


def nla(kind: int, payload: bytes) -> bytes:
    """Pack one attribute, padded to four bytes."""
    return _NLA.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def message(kind: int, flags: int, seq: int, attributes: bytes, family: int = 0) -> bytes:
    """Pack one nfnetlink message (kind is subsystem << 8 | command)."""
    size = HEADER_SIZE + NFGEN_SIZE + len(attributes)
    return _HEADER.pack(size, kind, flags, seq, 0) + _NFGEN.pack(family, 0, 0) + attributes


def messages(datagram: bytes | memoryview) -> Iterator[Message]:
    """Walk the messages of one datagram."""
    view = memoryview(datagram)
    at = 0
    while at + HEADER_SIZE <= len(view):
        size, kind, flags, seq, _pid = _HEADER.unpack_from(view, at)
        if size < HEADER_SIZE:
            return
        yield Message(kind, flags, seq, view[at + HEADER_SIZE : at + size])
        at += (size + 3) & ~3


def attributes(payload: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Walk attributes: (type without its flags, value)."""
    at, end = 0, len(payload)
    while at + 4 <= end:
        size, kind = _NLA.unpack_from(payload, at)
        if size < 4:
            return
        yield kind & NLA_TYPE_MASK, payload[at + 4 : at + size]
        at += (size + 3) & ~3


def error_code(payload: memoryview) -> int:
    """The positive error number of an NLMSG_ERROR (or of a DONE); 0 is an acknowledgement."""
    if len(payload) < _ERROR.size:
        return 0
    code: int = _ERROR.unpack_from(payload)[0]
    return -code


def echoed_attributes(payload: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The attributes of the request that an NLMSG_ERROR carries back."""
    return attributes(payload[_ERROR.size + HEADER_SIZE + NFGEN_SIZE :])
