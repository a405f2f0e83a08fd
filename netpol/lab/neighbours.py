"""The kernel's neighbour table, which all network namespaces of a machine share, and its limit.

Every pair of pods on one bridge costs two entries, and an entry cannot be evicted in its first five
seconds: beyond net.ipv4.neigh.default.gc_thresh3 packets are lost without an error that TCP could see.
Owns the removal of learned entries from one namespace and the count of overflows; changes no setting.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

#: linux/netlink.h and linux/rtnetlink.h
_NLMSG = struct.Struct("=IHHII")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_RTM_DELNEIGH, _RTM_GETNEIGH = 29, 30
#: struct ndmsg: family, pad, pad, interface, state, flags, type.
_NDMSG = struct.Struct("=BBHiHBB")
_NDA_DST = 1
#: linux/neighbour.h: entries that nobody learned, which stay.
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80

#: Entries that a run may have in use: well below the default limit of 1024, which is not ours alone.
BUDGET = 600

#: Statistics exist in the first network namespace only; init is there.
_STATISTICS = (Path("/proc/1/net/stat/arp_cache"), Path("/proc/1/net/stat/ndisc_cache"))


def overflows() -> int | None:
    """How often the tables were full since boot; None where that cannot be read."""
    total = 0
    for path in _STATISTICS:
        try:
            lines = path.read_text(encoding="ascii").splitlines()
            column = lines[0].split().index("table_fulls")
            total += sum(int(line.split()[column], 16) for line in lines[1:])
        except (OSError, ValueError, IndexError):
            return None
    return total


def forget_learned() -> int:
    """Remove the learned entries of the namespace that the thread is in; returns how many.

    They are learned again with the next packet.

    Raises:
        OSError: not allowed.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(2)
        sock.bind((0, 0))
        entries = list(_learned(sock))
        for start in range(0, len(entries), 64):
            chunk = entries[start : start + 64]
            # No acknowledgement is asked for: an entry that is gone by now is what we want.
            sock.send(
                b"".join(
                    _NLMSG.pack(_NLMSG.size + len(e), _RTM_DELNEIGH, _NLM_F_REQUEST, 2, 0) + e
                    for e in chunk
                )
            )
        return len(entries)


def _learned(sock: socket.socket) -> Iterator[bytes]:
    """Dump the table; yields the body of the message that deletes each learned entry."""
    ask = _NDMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0)
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    sock.send(_NLMSG.pack(_NLMSG.size + len(ask), _RTM_GETNEIGH, flags, 1, 0) + ask)
    while True:
        data = sock.recv(1 << 16)
        at = 0
        while at + _NLMSG.size <= len(data):
            length, kind, _, _, _ = _NLMSG.unpack_from(data, at)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", data, at + _NLMSG.size)[0]
                raise OSError(code, os.strerror(code))
            if (body := _deletion(data[at + _NLMSG.size : at + length])) is not None:
                yield body
            at += length + 3 & ~3


def _deletion(entry: bytes) -> bytes | None:
    family, _, _, interface, state, _, _ = _NDMSG.unpack_from(entry)
    if state & (_NUD_NOARP | _NUD_PERMANENT) or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    at = _NDMSG.size
    while at + 4 <= len(entry):
        length, kind = struct.unpack_from("=HH", entry, at)
        if kind == _NDA_DST:
            return _NDMSG.pack(family, 0, 0, interface, 0, 0, 0) + entry[at : at + length]
        at += max(length + 3 & ~3, 4)
    return None
