"""The number that nf_tables counts its transactions with: one look tells that nothing has changed.

Every program's transactions in the namespace count, so a new number says only that a look is due.
"""

from __future__ import annotations

import socket
import struct

from netpol.kernel import netlink

#: linux/netlink.h; the socket module does not name it everywhere.
_NETLINK_NETFILTER = 12
#: linux/netfilter/nf_tables.h: subsystem 10, NFT_MSG_NEWGEN, NFT_MSG_GETGEN, NFTA_GEN_ID
_NEWGEN, _GETGEN, _GEN_ID = 10 << 8 | 15, 10 << 8 | 16, 1
_ANSWER_BYTES = 4096
_TIMEOUT_S = 1.0
_U32 = struct.Struct(">I")


def generation() -> int | None:
    """The present number in the calling thread's namespace; None where it cannot be told."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
            sock.settimeout(_TIMEOUT_S)
            sock.send(netlink.message(_GETGEN, netlink.NLM_F_REQUEST, 1, b""))
            answer = sock.recv(_ANSWER_BYTES)
    except OSError:  # no nf_tables, not root: then there is no short cut
        return None
    for message in netlink.messages(answer):
        if message.type == _NEWGEN:
            for kind, value in netlink.attributes(message.payload[netlink.NFGEN_SIZE :]):
                if kind == _GEN_ID and len(value) == _U32.size:
                    number: int = _U32.unpack(value)[0]
                    return number
    return None
