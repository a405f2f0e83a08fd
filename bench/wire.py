"""Packets as fast as one core can send them: frames made beforehand, sent many at a time.

A router in a namespace of its own forwards from one veth pair to another. The receiving softirq runs
inside the sender's system call, so that the sender's time is the whole way of a packet through the
router. Every router has the same addresses, MAC addresses too: one set of frames serves all.
"""

from __future__ import annotations

import ctypes
import itertools
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from netpol.kernel import netns

SENDER_MAC, ROUTER_MAC = b"\x02\x00\x00\x00\x00\x01", b"\x02\x00\x00\x00\x00\x02"
OUT_MAC = b"\x02\x00\x00\x00\x00\x03"
#: UIO_MAXIOV: the most messages of one sendmmsg.
BATCH = 1024
ETH_IPV4 = 0x0800
IN_NAME, OUT_NAME = "cni0", "out0"

#: linux/if_packet.h; the socket module does not name them.
_SOL_PACKET, _PACKET_QDISC_BYPASS, _SO_RCVBUFFORCE = 263, 20, 33

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)
#: struct iovec, struct mmsghdr (x86-64 and arm64 alike).
_IOVEC = struct.Struct("=QQ")
_MMSGHDR = struct.Struct("=QIIQQQQIIII")


class Frames:
    """Frames in one buffer, with what sendmmsg wants to know of them."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self.count = len(frames)
        self._data = ctypes.create_string_buffer(b"".join(frames))
        base, vectors, at = ctypes.addressof(self._data), bytearray(), 0
        for frame in frames:
            vectors += _IOVEC.pack(base + at, len(frame))
            at += len(frame)
        self._vectors = ctypes.create_string_buffer(bytes(vectors))
        base = ctypes.addressof(self._vectors)
        headers = b"".join(
            _MMSGHDR.pack(0, 0, 0, base + n * _IOVEC.size, 1, 0, 0, 0, 0, 0, 0)
            for n in range(self.count)
        )
        self._headers = ctypes.create_string_buffer(headers)

    def send(self, sock: socket.socket) -> float:
        """Send all; returns seconds for each."""
        at, end = ctypes.addressof(self._headers), self.count
        fd, send, size = sock.fileno(), _libc.sendmmsg, _MMSGHDR.size
        done = 0
        begin = time.perf_counter()
        while done < end:
            sent = send(fd, ctypes.c_void_p(at + done * size), min(BATCH, end - done), 0)
            if sent <= 0:
                raise OSError(ctypes.get_errno(), "sendmmsg")
            done += sent
        return (time.perf_counter() - begin) / self.count

    def receive(self, sock: socket.socket) -> float:
        """Receive as many datagrams into the buffer; returns seconds for each.

        Raises:
            BlockingIOError: fewer have come.
        """
        at, fd, size, done = ctypes.addressof(self._headers), sock.fileno(), _MMSGHDR.size, 0
        begin = time.perf_counter()
        while done < self.count:
            got = _libc.recvmmsg(
                fd,
                ctypes.c_void_p(at + done * size),
                min(BATCH, self.count - done),
                socket.MSG_DONTWAIT,
                None,
            )
            if got <= 0:
                raise BlockingIOError(ctypes.get_errno(), f"{done} of {self.count} came")
            done += got
        return (time.perf_counter() - begin) / self.count


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def frame(protocol: int, src: bytes, dst: bytes, body: bytes) -> bytes:
    """An Ethernet frame with an IPv4 packet; `body` has its checksum."""
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0, src, dst
    )
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return ROUTER_MAC + SENDER_MAC + struct.pack("!H", ETH_IPV4) + head + body


def syn(src: bytes, dst: bytes, sport: int, dport: int) -> bytes:
    """The first packet of a TCP connection."""
    body = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 0x50, 0x02, 65535, 0, 0)
    pseudo = src + dst + struct.pack("!BBH", 0, 6, len(body))
    body = body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]
    return frame(6, src, dst, body)


class Router:
    """A namespace that forwards from `cni0` to `out0`, where a sink namespace swallows everything.

    Args:
        space: the router's namespace; that of the caller has the sending ends.
        sink: the receiving namespace.
        number: tells the sending ends apart.
        pods: the range that is routed on to the sink.
    """

    def __init__(self, space: str, sink: str, *, number: int, pods: str) -> None:
        self.space, self.sink, self._number, self._pods = space, sink, number, pods
        # Links of a namespace that was removed may live on for a moment: no name comes twice.
        self._sender, end = f"s{next(_numbers)}", f"e{number}"
        self._end = end
        _ip(
            f"link add {self._sender} type veth peer name {IN_NAME} netns {space}",
            f"link set {self._sender} address {_mac(SENDER_MAC)} up",
        )
        _ip(
            f"link set {IN_NAME} address {_mac(ROUTER_MAC)} up",
            f"link add {OUT_NAME} type veth peer name {end} netns {sink}",
            f"link set {OUT_NAME} address {_mac(OUT_MAC)} up",
            "addr add 192.0.2.1/24 dev cni0",
            "addr add 198.51.100.1/24 dev out0",
            f"neigh add 198.51.100.2 lladdr 02:00:00:00:01:{number:02x} dev {OUT_NAME}",
            f"neigh add 192.0.2.2 lladdr {_mac(SENDER_MAC)} dev {IN_NAME}",
            f"route add {pods} via 198.51.100.2",
            netns_name=space,
        )
        _ip(f"link set {end} address 02:00:00:00:01:{number:02x} up", netns_name=sink)
        for key, value in (
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            (f"ipv4/conf/{IN_NAME}/rp_filter", "0"),
            ("netfilter/nf_conntrack_max", "1000000"),
        ):
            _write_sysctl(space, key, value)
        self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._raw.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        self._raw.bind((self._sender, 0))
        self._conntrack = netns.open_socket(space, socket.AF_NETLINK, socket.SOCK_RAW, 12)

    def send(self, frames: Frames) -> float:
        """Seconds for a packet, all sent and forwarded."""
        return frames.send(self._raw)

    def connect(self, src: bytes, dst: bytes, port: int) -> tuple[socket.socket, socket.socket]:
        """A UDP connection between two pods as programs have it: (from src, at dst).

        The sockets stand in the caller's namespace and in the sink, bound to this router's links.
        """
        a, b, n = socket.inet_ntoa(src), socket.inet_ntoa(dst), self._number
        _ip(
            f"addr replace {a}/32 dev lo",
            f"neigh replace 192.0.2.1 lladdr {_mac(ROUTER_MAC)} dev {self._sender}",
            f"route add {self._pods} via 192.0.2.1 dev {self._sender} onlink metric {100 + n}",
        )
        _ip(
            f"addr replace {b}/32 dev lo",
            f"neigh replace 198.51.100.1 lladdr {_mac(OUT_MAC)} dev {self._end}",
            f"route add {self._pods} via 198.51.100.1 dev {self._end} onlink metric {100 + n}",
            netns_name=self.sink,
        )
        _ip(f"route add {a}/32 via 192.0.2.2 dev {IN_NAME}", netns_name=self.space)
        for space in (None, self.sink):
            for device in ("all", self._sender if space is None else self._end):
                _write_sysctl(space, f"ipv4/conf/{device}/rp_filter", "0")
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._sender.encode())
        near.bind((a, 0))
        near.connect((b, port))
        far = netns.open_socket(self.sink, socket.AF_INET, socket.SOCK_DGRAM)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._end.encode())
        far.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        far.bind((b, port))
        return near, far

    def forwarded(self) -> int:
        """Packets that left towards the sink."""
        return netns.in_netns(self.space, _read_forwarded)

    def forget(self) -> None:
        """Empty the connection table."""
        # IPCTNL_MSG_CT_DELETE without a tuple, NLM_F_REQUEST | NLM_F_ACK
        request = struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 5, 1, 0, 0, 0, 0)
        self._conntrack.send(request)
        error = struct.unpack_from("=i", self._conntrack.recv(4096), 16)[0]
        if error:
            raise OSError(-error, "flushing conntrack")

    def close(self) -> None:
        """Close the sockets; the links go with the namespaces."""
        self._raw.close()
        self._conntrack.close()


def _read_forwarded() -> int:
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    line = next(x for x in lines if x.strip().startswith(f"{OUT_NAME}:"))
    return int(line.split(":")[1].split()[9])


def _write_sysctl(space: str | None, key: str, value: str) -> None:
    def write() -> None:
        # /proc/sys/net is that of the opening thread's namespace.
        Path(f"/proc/sys/net/{key}").write_text(value)

    try:
        if space is None:
            write()
        else:
            netns.in_netns(space, write)
    except PermissionError:
        if key != "netfilter/nf_conntrack_max":  # it is the whole machine's
            raise


def _mac(raw: bytes) -> str:
    return raw.hex(":")


def _ip(*commands: str, netns_name: str = "") -> None:
    args = ["ip", *(["-n", netns_name] if netns_name else []), "-batch", "-"]
    subprocess.run(args, input="\n".join(commands), text=True, check=True)
