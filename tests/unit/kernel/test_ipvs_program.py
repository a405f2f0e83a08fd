"""The program that tells what IPVS takes: well formed, and right about packets as they are on the wire."""

from __future__ import annotations

import struct

import pytest

from netpol.kernel.ipvs_program import ipvs_takes_program
from netpol.model.net import FAMILIES, Family

#: XT_BPF_MAX_NUM_INSTR.
STEPS_MAX = 64
PKTTYPE = 0xFFFFF004


def takes(family: Family, packet: bytes, pkttype: int = 0) -> bool:
    """Run the program; a load beyond the packet refuses it, as in the kernel."""
    count, *texts = ipvs_takes_program(family).split(",")
    steps = [tuple(map(int, text.split())) for text in texts]
    assert len(steps) == int(count) <= STEPS_MAX
    a = x = at = 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x06:
            return k != 0
        if code == 0x15:
            at += yes if a == k else no
        elif code == 0xB1:
            x = (packet[k] & 15) * 4
        elif k == PKTTYPE:
            a = pkttype
        else:
            size = {0x30: 1, 0x28: 2, 0x50: 1, 0x48: 2}[code]
            start = k + (x if code & 0x40 else 0)
            if start + size > len(packet):
                return False
            a = int.from_bytes(packet[start : start + size], "big")


def packet(
    family: Family, protocol: int, body: bytes, *, sport: int = 4000, options: bytes = b""
) -> bytes:
    ports = struct.pack("!HH", sport, 80)
    if family is Family.V4:
        words = 5 + len(options) // 4
        head = struct.pack("!BBHHHBBH", 0x40 | words, 0, 0, 0, 0, 64, protocol, 0) + bytes(8)
        return head + options + ports + body
    return struct.pack("!IHBB", 6 << 28, 0, protocol, 64) + bytes(32) + ports + body


SYN, ACK = bytes(8) + b"\x50\x02" + bytes(6), bytes(8) + b"\x50\x10" + bytes(6)
UDP = bytes(4)


def sctp(chunk: int) -> bytes:
    return bytes(8) + bytes([chunk, 0, 0, 20])


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_are_taken(family: Family) -> None:
    for protocol, body in ((6, SYN), (6, ACK), (17, UDP), (132, sctp(1))):
        assert takes(family, packet(family, protocol, body))


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_to_others_or_everybody_are_not(family: Family) -> None:
    for protocol, body in ((6, SYN), (17, UDP), (132, sctp(1))):
        for pkttype in (1, 2, 3, 4):
            assert not takes(family, packet(family, protocol, body), pkttype)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_port_of_ftp_data_is_not(family: Family) -> None:
    for protocol, body in ((6, SYN), (17, UDP), (132, sctp(1))):
        assert not takes(family, packet(family, protocol, body, sport=20))
        assert takes(family, packet(family, protocol, body, sport=20 << 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_sctp_only_init_is(family: Family) -> None:
    assert [c for c in range(256) if takes(family, packet(family, 132, sctp(c)))] == [1]


def test_options_of_ipv4_are_passed_over() -> None:
    options = bytes([1, 1, 1, 1]) * 3
    for protocol, body, sport, wanted in (
        (17, UDP, 4000, True),
        (17, UDP, 20, False),
        (132, sctp(1), 4000, True),
        (132, sctp(4), 4000, False),
    ):
        made = packet(Family.V4, protocol, body, sport=sport, options=options)
        assert takes(Family.V4, made) is wanted


def test_extension_headers_of_ipv6_are_not_looked_through() -> None:
    for header in (0, 43, 44, 60):
        assert not takes(Family.V6, packet(Family.V6, header, SYN))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packet_that_ends_early_is_not_taken(family: Family) -> None:
    whole = packet(family, 132, sctp(1))
    base = 20 if family is Family.V4 else 40
    assert not takes(family, whole[:base])
    assert not takes(family, whole[: base + 12])
