"""The lab's SCTP packets: known checksums, round trips, and what broken bytes get."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.lab import sctp

PORTS = st.integers(1, 65535)
TAGS = st.integers(1, 2**32 - 1)


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720 appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_of_published_vectors(data, crc):
    assert sctp.crc32c(data) == crc


def test_an_init_has_the_layout_of_rfc_9260():
    packet = sctp.build_init(sport=0x1234, dport=0x5678, initiate_tag=0x0A0B0C0D)
    assert packet[:8] == bytes.fromhex("12345678 00000000")
    assert packet[12:16] == bytes.fromhex("01000014")
    assert packet[16:20] == bytes.fromhex("0a0b0c0d")
    assert len(packet) == 32
    assert struct.unpack("<I", packet[8:12])[0] == sctp.crc32c(packet[:8] + bytes(4) + packet[12:])


@given(PORTS, PORTS, TAGS, TAGS)
def test_an_open_port_answers_with_an_init_ack_to_the_peers_tag(sport, dport, tag, own):
    init = sctp.parse(sctp.build_init(sport=sport, dport=dport, initiate_tag=tag))
    assert init == (sport, dport, 0, sctp.ChunkType.INIT, tag)
    reply = sctp.answer(init, open_ports={dport}, initiate_tag=own)
    assert reply is not None
    assert sctp.parse(reply) == (dport, sport, tag, sctp.ChunkType.INIT_ACK, own)
    assert len(reply) % 4 == 0


@given(PORTS, PORTS, TAGS)
def test_a_closed_port_answers_with_an_abort_to_the_peers_tag(sport, dport, tag):
    init = sctp.parse(sctp.build_init(sport=sport, dport=dport, initiate_tag=tag))
    reply = sctp.answer(init, open_ports=(), initiate_tag=1)
    assert reply is not None
    assert sctp.parse(reply) == (dport, sport, tag, sctp.ChunkType.ABORT, 0)


def test_answers_are_not_answered():
    init = sctp.parse(sctp.build_init(sport=1, dport=2, initiate_tag=3))
    for reply in (sctp.build_abort(init), sctp.build_init_ack(init, initiate_tag=4)):
        assert sctp.answer(sctp.parse(reply), open_ports={1, 2}, initiate_tag=5) is None


@given(st.integers(0, 31), st.integers(0, 7))
def test_one_flipped_bit_is_refused(at, bit):
    packet = bytearray(sctp.build_init(sport=1000, dport=80, initiate_tag=77))
    packet[at] ^= 1 << bit
    with pytest.raises(ValueError, match="SCTP"):
        sctp.parse(bytes(packet))


@given(st.binary(max_size=64))
def test_any_bytes_parse_or_are_refused(data):
    try:
        packet = sctp.parse(data)
    except ValueError:
        return  # the one error that callers expect
    assert packet.sport == int.from_bytes(data[:2], "big")


def test_a_chunk_longer_than_its_packet_is_refused_by_name():
    body = sctp._HEADER.pack(1, 2, 0, 0) + sctp._CHUNK.pack(sctp.ChunkType.INIT, 0, 400)
    with pytest.raises(ValueError, match="claims 400 bytes"):
        sctp.parse(sctp._sealed(body))


def test_an_init_without_its_fixed_part_is_refused_by_name():
    body = sctp._HEADER.pack(1, 2, 0, 0) + sctp._CHUNK.pack(sctp.ChunkType.INIT, 0, 4)
    with pytest.raises(ValueError, match="INIT of 4 bytes"):
        sctp.parse(sctp._sealed(body))


def test_ipv4_headers_with_and_without_options_are_stripped():
    plain = bytes.fromhex("45000018000000004084 0000 0a000001 0a000002") + b"data"
    assert sctp.strip_ipv4(plain) == (b"\n\0\0\x01", b"\n\0\0\x02", b"data")
    options = b"\x46" + plain[1:20] + b"\x01\x01\x01\x00" + b"data"
    assert sctp.strip_ipv4(options) == (b"\n\0\0\x01", b"\n\0\0\x02", b"data")


@pytest.mark.parametrize("bad", [b"", b"\x45" * 19, b"\x60" + bytes(40), b"\x44" + bytes(30)])
def test_what_is_no_ipv4_datagram_is_none(bad):
    assert sctp.strip_ipv4(bad) is None


def test_ports_out_of_a_quoted_header():
    assert sctp.ports_of(sctp.build_init(sport=5, dport=6, initiate_tag=1)[:8]) == (5, 6)
    assert sctp.ports_of(b"abc") is None
