"""ICMP errors as evidence: from the destination itself they prove passage, from others refusal."""

import socket
import struct

import pytest

from netpol.lab.icmperr import IcmpError, judge, read_icmp_error
from netpol.lab.netsock import IP_RECVERR, IPV6_RECVERR
from netpol.model.flow import Verdict
from netpol.model.ids import Protocol
from netpol.model.net import Family

HERE4, ROUTER4 = bytes([10, 0, 0, 9]), bytes([10, 0, 0, 1])
HERE6, ROUTER6 = socket.inet_pton(10, "fd00::9"), socket.inet_pton(10, "fd00::1")
ALLOW, DENY = Verdict.ALLOW, Verdict.DENY


@pytest.mark.parametrize(
    ("protocol", "kind", "code", "sender", "verdict"),
    [
        (Protocol.UDP, 3, 3, HERE4, ALLOW),
        (Protocol.UDP, 3, 3, ROUTER4, DENY),
        (Protocol.SCTP, 3, 2, HERE4, ALLOW),
        (Protocol.SCTP, 3, 2, ROUTER4, DENY),
        (Protocol.TCP, 3, 3, HERE4, DENY),
        (Protocol.UDP, 3, 13, HERE4, DENY),
        (Protocol.TCP, 3, 1, ROUTER4, DENY),
        (Protocol.UDP, 3, 4, ROUTER4, None),
        (Protocol.UDP, 11, 0, ROUTER4, None),
        (Protocol.UDP, 1, 4, HERE6, ALLOW),
        (Protocol.UDP, 1, 4, ROUTER6, DENY),
        (Protocol.TCP, 1, 1, ROUTER6, DENY),
        (Protocol.SCTP, 4, 1, HERE6, ALLOW),
        (Protocol.SCTP, 4, 0, HERE6, DENY),
        (Protocol.UDP, 2, 0, ROUTER6, None),
    ],
)
def test_what_an_error_says(protocol, kind, code, sender, verdict):
    family = Family.V4 if len(sender) == 4 else Family.V6
    error = IcmpError(family, kind, code, sender)
    here = HERE4 if family is Family.V4 else HERE6
    assert judge(error, protocol=protocol, destination=here) == verdict


def extended(origin, kind, code):
    return struct.pack("=IBBBBII", 111, origin, kind, code, 0, 0, 0)


def test_error_queue_messages_are_read():
    v4 = extended(2, 3, 3) + struct.pack("=HH4s8x", socket.AF_INET, 0, ROUTER4)
    assert read_icmp_error([(socket.IPPROTO_IP, IP_RECVERR, v4)]) == (4, 3, 3, ROUTER4)
    v6 = extended(3, 1, 4) + struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, ROUTER6, 0)
    assert read_icmp_error([(socket.IPPROTO_IPV6, IPV6_RECVERR, v6)]) == (6, 1, 4, ROUTER6)


def test_local_errors_and_foreign_messages_are_none():
    local = extended(1, 0, 0) + bytes(16)
    assert read_icmp_error([(socket.IPPROTO_IP, IP_RECVERR, local)]) is None
    assert read_icmp_error([(socket.IPPROTO_IP, IP_RECVERR, b"short")]) is None
    assert read_icmp_error([(1, 2, b"")]) is None
