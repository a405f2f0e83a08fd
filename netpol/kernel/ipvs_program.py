"""Classic BPF that tells the packets that IPVS takes from those that it leaves to the node.

What the kernel's IPVS demands of a packet to one of its services, beside the address and port
(net/netfilter/ipvs, ip_vs_in and ip_vs_schedule, Linux 4.19 to 6.18):

- it was sent to this machine alone on its link: a frame to everybody is not looked at;
- its source port is not 20: no connection is begun for FTP data;
- SCTP: only INIT begins an association, whatever else is left to the node, which answers it. (TCP too
  knows but SYN. The node answers all else with a reset, and conntrack drops an entry whose only answer
  that is; so those pass here, and a client of a connection that IPVS forgot hears of it at once.)

IPv6 packets with extension headers are not taken for IPVS's, which errs on the side of the judgement.
"""

from __future__ import annotations

from netpol.model.net import Family

#: linux/filter.h: SKF_AD_OFF + SKF_AD_PKTTYPE, as an unsigned number.
_PKTTYPE = 0xFFFFF004
_PACKET_HOST = 0
_FTP_DATA = 20
_TCP, _UDP, _SCTP = 6, 17, 132
#: Behind the common header of SCTP (RFC 9260 section 3) stands the type of the first chunk.
_CHUNK_AT, _INIT = 12, 1

# linux/bpf_common.h: class, size and mode in one number.
_LDB, _LDH, _LDB_X, _LDH_X, _LDX_HEADER, _JEQ, _RET = 0x30, 0x28, 0x50, 0x48, 0xB1, 0x15, 0x06
_IPV6_HEADER = 40


def ipvs_takes_program(family: Family) -> str:
    """The program, as xt_bpf takes it (`COUNT,CODE JT JF K,...`); JT and JF count from the next step."""
    if family is Family.V4:
        steps = [
            (_LDB, 0, 0, _PKTTYPE),
            (_JEQ, 0, 8, _PACKET_HOST),
            (_LDX_HEADER, 0, 0, 0),
            (_LDH_X, 0, 0, 0),
            (_JEQ, 5, 0, _FTP_DATA),
            (_LDB, 0, 0, 9),
            (_JEQ, 0, 2, _SCTP),
            (_LDB_X, 0, 0, _CHUNK_AT),
            (_JEQ, 0, 1, _INIT),
        ]
    else:
        steps = [
            (_LDB, 0, 0, _PKTTYPE),
            (_JEQ, 0, 9, _PACKET_HOST),
            (_LDH, 0, 0, _IPV6_HEADER),
            (_JEQ, 7, 0, _FTP_DATA),
            (_LDB, 0, 0, 6),
            (_JEQ, 4, 0, _TCP),
            (_JEQ, 3, 0, _UDP),
            (_JEQ, 0, 3, _SCTP),
            (_LDB, 0, 0, _IPV6_HEADER + _CHUNK_AT),
            (_JEQ, 0, 1, _INIT),
        ]
    steps += [(_RET, 0, 0, 65535), (_RET, 0, 0, 0)]
    return ",".join([str(len(steps)), *(" ".join(map(str, step)) for step in steps)])
