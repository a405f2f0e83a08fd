"""Reading logged packets: literal samples, every cut, and bytes that nobody meant."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.audit import packet
from netpol.audit.packet import Packet, PacketError, parse

A4, B4 = bytes([10, 1, 0, 5]), bytes([10, 1, 1, 6])
A6, B6 = socket.inet_pton(10, "fd00::5"), socket.inet_pton(10, "fd00:1::6")
PORTS = struct.pack("!HH", 40000, 443)


def v4(protocol, rest, *, options=b"", fragment=0):
    first = 0x45 + len(options) // 4
    head = struct.pack("!BBHHHBBH", first, 0, 20 + len(rest), 1, fragment, 64, protocol, 0)
    return head + A4 + B4 + options + rest


def v6(protocol, rest):
    return struct.pack("!IHBB", 6 << 28, len(rest), protocol, 64) + A6 + B6 + rest


TCP4 = Packet(A4, B4, 6, 40000, 443)
TCP6 = Packet(A6, B6, 6, 40000, 443)


def hop(following, length=0):
    return bytes([following, length]) + bytes(6 + 8 * length)


def fragment(following, offset):
    return struct.pack("!BBHI", following, 0, offset << 3 | 1, 7)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(v4(6, PORTS), TCP4, id="tcp"),
        pytest.param(v4(17, PORTS), TCP4._replace(protocol=17), id="udp"),
        pytest.param(v4(132, PORTS), TCP4._replace(protocol=132), id="sctp"),
        pytest.param(v4(6, PORTS, options=b"\x01" * 8), TCP4, id="v4 options"),
        pytest.param(v4(6, PORTS, options=b"\x01" * 40), TCP4, id="v4 all options"),
        pytest.param(v4(6, PORTS, fragment=0x2000), TCP4, id="first fragment has ports"),
        pytest.param(
            v4(6, PORTS, fragment=0x2001),
            Packet(A4, B4, 6, fault=packet.LATER_FRAGMENT),
            id="later fragment",
        ),
        pytest.param(
            v4(1, b"\x08\x00"), Packet(A4, B4, 1, icmp_type=8, icmp_code=0), id="icmp echo"
        ),
        pytest.param(v4(47, b""), Packet(A4, B4, 47), id="gre"),
        pytest.param(v4(6, b"\0\0\0"), Packet(A4, B4, 6, fault=packet.SHORT_TRANSPORT), id="cut"),
        pytest.param(v6(6, PORTS), TCP6, id="v6 tcp"),
        pytest.param(
            v6(58, b"\x80\x00"), Packet(A6, B6, 58, icmp_type=128, icmp_code=0), id="icmpv6 echo"
        ),
        pytest.param(v6(0, hop(6) + PORTS), TCP6, id="hop-by-hop"),
        pytest.param(v6(0, hop(43) + hop(60, 2) + hop(6, 1) + PORTS), TCP6, id="three headers"),
        pytest.param(v6(44, fragment(6, 0) + PORTS), TCP6, id="v6 first fragment"),
        pytest.param(
            v6(44, fragment(6, 185) + PORTS),
            Packet(A6, B6, 6, fault=packet.LATER_FRAGMENT),
            id="v6 later fragment",
        ),
        pytest.param(v6(51, bytes([6, 4]) + bytes(22) + PORTS), TCP6, id="authentication header"),
        pytest.param(v6(59, b""), Packet(A6, B6, 59), id="no next header"),
        pytest.param(v6(50, bytes(20)), Packet(A6, B6, 50), id="esp hides its ports"),
        pytest.param(
            v6(0, b"\x06"), Packet(A6, B6, 0, fault=packet.SHORT_EXTENSIONS), id="cut extensions"
        ),
        pytest.param(
            v6(0, bytes([6, 9]) + bytes(6)),
            Packet(A6, B6, 6, fault=packet.SHORT_TRANSPORT),
            id="extension beyond the copy",
        ),
    ],
)
def test_a_sample_is_read(data, expected):
    assert parse(data) == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty packet"),
        (v4(6, PORTS)[:19], "short IPv4 header: 19 of 20"),
        (v6(6, PORTS)[:39], "short IPv6 header: 39 of 40"),
        (b"\x44" + bytes(30), "IPv4 header length 16"),
        (b"\x75" + bytes(60), "IP version 7"),
    ],
)
def test_a_packet_without_addresses_is_an_error_by_name(data, words):
    with pytest.raises(PacketError, match=words):
        parse(data)


def test_an_endless_chain_of_extensions_ends():
    assert "extension headers" in parse(v6(0, hop(0) * 40)).fault


@given(
    st.sampled_from([6, 17, 132]),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.lists(st.tuples(st.sampled_from([0, 43, 60, 135]), st.integers(0, 3)), max_size=5),
)
def test_ports_are_found_behind_any_extensions(protocol, sport, dport, chain):
    rest, following = struct.pack("!HH", sport, dport), protocol
    for kind, length in reversed(chain):
        rest, following = hop(following, length) + rest, kind
    assert parse(v6(following, rest)) == Packet(A6, B6, protocol, sport, dport)
    assert parse(v4(protocol, struct.pack("!HH", sport, dport)))[2:5] == (protocol, sport, dport)


@given(st.binary(max_size=160), st.sampled_from([None, 4, 6]))
def test_any_bytes_are_a_packet_or_the_one_error(data, version):
    if version and data:
        data = bytes([version << 4 | data[0] & 15]) + data[1:]
    try:
        got = parse(data)
    except PacketError:
        assert len(data) < 40 or data[0] >> 4 not in (4, 6) or data[0] < 0x45
        return
    assert len(got.src) == len(got.dst) == (4 if data[0] >> 4 == 4 else 16)
    assert (got.sport is None) == (got.dport is None)


@given(st.integers(0, 200))
def test_every_cut_of_a_good_packet_keeps_its_addresses(size):
    whole = v6(0, hop(44) + fragment(6, 0) + PORTS)
    if size < 40:
        with pytest.raises(PacketError):
            parse(whole[:size])
    else:
        got = parse(whole[:size])
        assert got[:2] == (A6, B6)
        assert bool(got.fault) == (size < len(whole))
