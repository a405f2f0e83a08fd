import socket
import struct

from bench.wire import Frames, checksum, syn


def test_the_checksum_is_that_of_the_rfc():
    # The example of RFC 1071 section 3.
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF ^ 0xDDF2


def test_a_syn_has_valid_checksums():
    src, dst = socket.inet_aton("10.64.1.2"), socket.inet_aton("10.64.1.3")
    packet = syn(src, dst, 1024, 80)[14:]
    assert checksum(packet[:20]) == 0
    pseudo = src + dst + struct.pack("!BBH", 0, 6, 20)
    assert checksum(pseudo + packet[20:]) == 0
    assert struct.unpack_from("!HH", packet, 20) == (1024, 80)
    assert packet[33] == 0x02


def test_frames_are_sent_in_order_and_all_of_them():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        frames = Frames([bytes([n]) * (n + 1) for n in range(100)])
        frames.send(a)
        assert [b.recv(200) for _ in range(100)] == [bytes([n]) * (n + 1) for n in range(100)]
