"""Sockets for the lab's servers and probes, and the socket options that Python does not name.

Owns the making and the options of listening, datagram and raw sockets; knows no pods. A socket stays in
the namespace that it was made in, so one loop can serve those of many pods. Entering a namespace is
`netpol.kernel.netns`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator

from netpol.kernel.netns import enter, path_of
from netpol.lib.errors import KernelError
from netpol.model.net import Family

#: linux/in.h and linux/in6.h: options that the socket module does not name.
IP_PKTINFO = 8
IP_RECVERR = 11
IPV6_RECVERR = 25
#: asm-generic/socket.h; root may exceed net.core.rmem_max with it.
SO_RCVBUFFORCE = 33

#: The same: a classic BPF program that picks what a socket receives.
SO_ATTACH_FILTER = 26
#: linux/in6.h: let the kernel fill in the checksum at this offset of what a raw socket sends.
_IPV6_CHECKSUM = 7
_UDP_CHECKSUM_AT = 6

#: linux/filter.h, struct sock_filter: code, jump if true, jump if false, number.
_FILTER = struct.Struct("=HBBI")
_LDX_HEADER_LENGTH = 0xB1  # X = 4 * (byte & 0xf)
_LDX_NUMBER = 0x01
_LD_BYTE_X = 0x50
_AND_NUMBER = 0x54
_JUMP_EQUAL = 0x15
_RETURN = 0x06
#: RFC 9293: where the flags stand in the header, and two of them.
_TCP_FLAGS_AT, _SYN, _ACK = 13, 0x02, 0x10

#: Receive buffer of sockets that can get a burst of answers: a small datagram is charged under 1 kB.
RCVBUF_BYTES = 4 << 20
#: Queue of connections not yet accepted; the kernel cuts it to net.core.somaxconn.
BACKLOG = 4096


def netns_id(netns: str) -> tuple[int, int]:
    """What tells namespaces apart whatever path names them.

    Raises:
        KernelError: no such namespace.
    """
    path = path_of(netns)
    try:
        stat = path.stat()
    except OSError as e:
        raise KernelError("cannot look at a network namespace", needed=str(path), got=str(e)) from e
    return stat.st_dev, stat.st_ino


@contextlib.contextmanager
def entered(netns: str) -> Iterator[None]:
    """Be in a namespace for a while and come back; only on a thread made for that.

    A thread that stayed would keep a pod's namespace alive after the pod.
    """
    home = f"/proc/self/task/{threading.get_native_id()}/ns/net"
    fd = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(netns)
        try:
            yield
        finally:
            enter(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def raise_file_limit(wanted: int) -> int:
    """Let this process open more files, as far as the kernel allows; returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for target in ((wanted, max(hard, wanted)), (min(wanted, hard), hard)):
        if target[0] <= soft:
            break
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, target)
            return target[0]
    return soft


def ip_family(family: Family) -> socket.AddressFamily:
    """The socket family of an IP version."""
    return socket.AF_INET if family is Family.V4 else socket.AF_INET6


def big_buffer(sock: socket.socket, size_bytes: int = RCVBUF_BYTES) -> None:
    """Give a socket a large receive buffer, or the largest that we are allowed."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size_bytes)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)


def dual_stack(kind: socket.SocketKind, port: int) -> socket.socket:
    """A non-blocking socket bound to `port` on every address of both families (v4 alone without IPv6).

    Raises:
        OSError: the port is taken.
    """
    try:
        sock = socket.socket(socket.AF_INET6, kind)
    except OSError:  # a kernel started with ipv6.disable=1 refuses the family
        sock = socket.socket(socket.AF_INET, kind)
    try:
        sock.setblocking(False)
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", port))
        else:
            sock.bind(("0.0.0.0", port))  # noqa: S104  a pod's server listens on the pod's addresses
    except OSError:
        sock.close()
        raise
    return sock


def ask_destination(sock: socket.socket) -> None:
    """Have every received datagram say which of our addresses it was sent to."""
    if sock.family is socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def reply_control(
    ancillary: list[tuple[int, int, bytes]],
) -> list[tuple[int, int, bytes]]:
    """Turn the packet info of a received datagram into the one that sends from that same address."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            # struct in6_pktinfo: address, interface; the interface matters for link-local peers only
            return [
                (level, kind, data[:16] + (data[16:20] if data[:2] == b"\xfe\x80" else bytes(4)))
            ]
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            # struct in_pktinfo: interface, our address, the header's destination
            return [(level, kind, bytes(4) + data[4:8] + bytes(4))]
    return []


def raw_udp(family: Family) -> socket.socket:
    """A non-blocking raw UDP socket that says where datagrams were sent to.

    Raises:
        OSError: not root, or the family is missing.
    """
    sock = _raw(family, socket.IPPROTO_UDP)
    ask_destination(sock)
    if family is Family.V6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _UDP_CHECKSUM_AT)
    return sock


def raw_syn(family: Family) -> socket.socket:
    """A non-blocking raw TCP socket that gets the first packets of connections alone.

    Raises:
        OSError: not root, or the family is missing.
    """
    sock = _raw(family, socket.IPPROTO_TCP)
    program = b"".join(_FILTER.pack(*step) for step in _only_syn(family))
    code = ctypes.create_string_buffer(program)
    prog = struct.pack("@HP", len(program) // _FILTER.size, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, prog)
    return sock


def _only_syn(family: Family) -> tuple[tuple[int, int, int, int], ...]:
    """The classic BPF program: SYN without ACK. IPv4's raw sockets see the IP header, IPv6's do not."""
    start = (_LDX_HEADER_LENGTH, 0, 0, 0) if family is Family.V4 else (_LDX_NUMBER, 0, 0, 0)
    return (
        start,
        (_LD_BYTE_X, 0, 0, _TCP_FLAGS_AT),
        (_AND_NUMBER, 0, 0, _SYN | _ACK),
        (_JUMP_EQUAL, 0, 1, _SYN),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    )


def _raw(family: Family, protocol: int) -> socket.socket:
    sock = socket.socket(ip_family(family), socket.SOCK_RAW, protocol)
    sock.setblocking(False)
    big_buffer(sock)
    return sock


def raw_sctp(family: Family) -> socket.socket:
    """A non-blocking raw SCTP socket that says where datagrams were sent to.

    Raises:
        OSError: not root, or the family is missing.
    """
    sock = socket.socket(ip_family(family), socket.SOCK_RAW, socket.IPPROTO_SCTP)
    try:
        sock.setblocking(False)
        big_buffer(sock)
        ask_destination(sock)
    except OSError:
        sock.close()
        raise
    return sock


def ask_errors(sock: socket.socket) -> None:
    """Queue ICMP errors with their type and sender instead of a bare errno."""
    if sock.family is socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
