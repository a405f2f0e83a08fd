"""Reads packets that NFLOG rules send to a group (nfnetlink_log), and counts exactly what it missed.

Owns the socket, its configuration and the decoding of messages; what a packet means is `audit`'s business.
A group has one reader. The kernel numbers the messages of a group, so a gap is the number of
packets lost, to the packet; the end of a burst shows its loss with the next packet only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import structlog

from netpol.kernel.netlink import (
    HEADER_SIZE,
    NFGEN_SIZE,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    error_code,
    messages,
    nla,
)
from netpol.lib.errors import KernelError, KernelMissingError, NoAnswerError

_log = structlog.get_logger(__name__)

#: linux/netlink.h; the socket module does not name it everywhere.
_NETLINK_NETFILTER = 12
#: linux/netfilter/nfnetlink.h: subsystem ULOG, messages PACKET and CONFIG of it.
_PACKET = 4 << 8
_CONFIG = 4 << 8 | 1
#: linux/netfilter/nfnetlink_log.h, NFULA_CFG_*
_CFG_CMD, _CFG_MODE, _CFG_NLBUFSIZ, _CFG_TIMEOUT, _CFG_QTHRESH, _CFG_FLAGS = range(1, 7)
_CMD_BIND = 1
_COPY_PACKET = 2
_FLAG_SEQ = 1
#: The same, NFULA_*
_A_HEADER, _A_MARK, _A_TIMESTAMP, _A_IN, _A_OUT, _A_PHYSIN, _A_PHYSOUT = range(1, 8)
_A_PAYLOAD, _A_PREFIX, _A_SEQ = 9, 10, 12
#: SO_RCVBUFFORCE (asm-generic/socket.h): beyond net.core.rmem_max, for CAP_NET_ADMIN.
_SO_RCVBUFFORCE = 33

#: Bytes of a packet that are enough for IPv6 with some extension headers and the ports behind them.
COPY_BYTES = 128
#: A burst of 300,000 packets fits (measured); the kernel charges only what is used.
RCVBUF_BYTES = 64 << 20
#: The kernel collects messages up to this size, or number, or age before it wakes us.
_NLBUF_BYTES = 1 << 16
_QTHRESH = 64
_TIMEOUT_CENTISECONDS = 10

#: Packets that wait for the reader's user; more are dropped and counted.
QUEUE_PACKETS = 65536
#: Packets handed over at a time, and datagrams read per wake-up, so that the loop is not held up.
BATCH_PACKETS = 128
_READS = 8

_NFGENMSG = struct.Struct("!BBH")
_NLMSGHDR = struct.Struct("=IHHII")
_NLA = struct.Struct("=HH")
_U32 = struct.Struct("!I")
_PACKET_HDR = struct.Struct("!HB")
_TIMESTAMP = struct.Struct("!QQ")


class NflogMessage(NamedTuple):
    """One logged packet.

    Attributes:
        family: address family of the rule's table.
        hw_protocol: EtherType, 0 if not given.
        hook: number of the netfilter hook.
        prefix: the rule's --nflog-prefix.
        payload: the packet from its network header on, cut to the copy range.
        mark: the packet's mark.
        timestamp_us: microseconds since the epoch; None if the packet carried no time (as on OUTPUT).
        indev: interface index it came in by, 0 for none; outdev, physindev and physoutdev likewise.
        seq: number of the message within its group, from 0; -1 if the kernel gave none.
    """

    family: int
    hw_protocol: int
    hook: int
    prefix: str
    payload: bytes
    mark: int = 0
    timestamp_us: int | None = None
    indev: int = 0
    outdev: int = 0
    physindev: int = 0
    physoutdev: int = 0
    seq: int = -1


@dataclass(slots=True)
class NflogStats:
    """What a reader has seen and missed.

    Attributes:
        received: packets decoded.
        lost: packets that the kernel could not deliver: gaps in their numbers.
        overruns: how often the kernel said that the socket's buffer was full (a burst is one or more).
        dropped: packets decoded but not queued, because the reader's user was too slow.
        malformed: messages that were not a packet of NFLOG.
    """

    received: int = 0
    lost: int = 0
    overruns: int = 0
    dropped: int = 0
    malformed: int = 0

    @property
    def missed(self) -> int:
        """Packets that were logged but reach nobody."""
        return self.lost + self.dropped


def decode(data: bytes, start: int, end: int) -> NflogMessage | None:
    """Decode the message whose netlink header ends at `start`; None if it has no packet header."""
    family = data[start]
    hw_protocol = hook = mark = indev = outdev = physindev = physoutdev = 0
    seq = -1
    prefix, payload = "", b""
    timestamp_us: int | None = None
    complete = False
    at = start + NFGEN_SIZE
    u32 = _U32.unpack_from
    while at + 4 <= end:
        size, kind = _NLA.unpack_from(data, at)
        stop = at + size
        if size < 4 or stop > end:
            return None
        if kind == _A_PAYLOAD:
            payload = data[at + 4 : stop]
        elif kind == _A_PREFIX:
            prefix = data[at + 4 : stop].rstrip(b"\0").decode("utf-8", "replace")
        elif kind == _A_HEADER:
            if size < 7:
                return None
            hw_protocol, hook = _PACKET_HDR.unpack_from(data, at + 4)
            complete = True
        elif kind == _A_TIMESTAMP:
            if size < 20:
                return None
            seconds, microseconds = _TIMESTAMP.unpack_from(data, at + 4)
            timestamp_us = seconds * 1_000_000 + microseconds
        elif size == 8:
            value = u32(data, at + 4)[0]
            if kind == _A_SEQ:
                seq = value
            elif kind == _A_IN:
                indev = value
            elif kind == _A_OUT:
                outdev = value
            elif kind == _A_MARK:
                mark = value
            elif kind == _A_PHYSIN:
                physindev = value
            elif kind == _A_PHYSOUT:
                physoutdev = value
        at = stop + 3 & ~3
    if not complete:
        return None
    return NflogMessage(
        family,
        hw_protocol,
        hook,
        prefix,
        payload,
        mark,
        timestamp_us,
        indev,
        outdev,
        physindev,
        physoutdev,
        seq,
    )


class NflogReader:
    """The reader of one group in the namespace that the calling thread is in.

    Args:
        group: number of the group, as in --nflog-group.
        copy_bytes: how much of every packet is wanted.
        rcvbuf_bytes: size of the socket's buffer.
        queue_packets: how many packets may wait for `batches`.

    Raises:
        NoAnswerError: not root.
        KernelError: somebody else reads this group.
        KernelMissingError: the kernel has no nfnetlink_log.
    """

    def __init__(
        self,
        group: int,
        *,
        copy_bytes: int = COPY_BYTES,
        rcvbuf_bytes: int = RCVBUF_BYTES,
        queue_packets: int = QUEUE_PACKETS,
    ) -> None:
        self.group = group
        self.stats = NflogStats()
        self._next_seq = 0  # the kernel counts from 0 for every new reader
        self._queue: deque[NflogMessage] = deque()
        self._queue_packets = queue_packets
        self._wake = asyncio.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sock = _open(group)
        try:
            self._configure(copy_bytes, rcvbuf_bytes)
        except BaseException:
            self._sock.close()
            raise

    def _configure(self, copy_bytes: int, rcvbuf_bytes: int) -> None:
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, rcvbuf_bytes)
        except PermissionError:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf_bytes)
        for kind, value in (
            (_CFG_CMD, bytes([_CMD_BIND])),
            (_CFG_MODE, struct.pack("!IBB", copy_bytes, _COPY_PACKET, 0)),
            (_CFG_NLBUFSIZ, _U32.pack(_NLBUF_BYTES)),
            (_CFG_QTHRESH, _U32.pack(_QTHRESH)),
            (_CFG_TIMEOUT, _U32.pack(_TIMEOUT_CENTISECONDS)),
            (_CFG_FLAGS, struct.pack("!H", _FLAG_SEQ)),
        ):
            code = self._ask(kind, value)
            if code:
                raise _refused(self.group, kind, code)
        self._sock.setblocking(False)

    def _ask(self, kind: int, value: bytes) -> int:
        """Send one setting and wait for its acknowledgement; returns the error number.

        Packets may come in before it: those count as received ones do.
        """
        body = _NFGENMSG.pack(socket.AF_UNSPEC, 0, self.group) + nla(kind, value)
        size = HEADER_SIZE + len(body)
        self._sock.settimeout(5)
        self._sock.send(_NLMSGHDR.pack(size, _CONFIG, NLM_F_REQUEST | NLM_F_ACK, kind, 0) + body)
        while True:
            try:
                data = self._sock.recv(1 << 17)
            except TimeoutError:
                return errno.ETIMEDOUT
            for message in messages(data):
                if message.type == NLMSG_ERROR and message.seq == kind:
                    return error_code(message.payload)
            self._take(data)

    def start(self) -> None:
        """Begin to read on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._sock, self._readable)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def _readable(self) -> None:
        for _ in range(_READS):
            try:
                data = self._sock.recv(1 << 17)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    _log.exception("nflog_reader_ends", group=self.group)
                    self.close()
                    return
                self.stats.overruns += 1
                continue
            self._take(data)

    def _take(self, data: bytes) -> None:
        """Decode a datagram's messages into the queue."""
        at, end = 0, len(data)
        stats, queue = self.stats, self._queue
        while at + HEADER_SIZE <= end:
            size, kind, _, _, _ = _NLMSGHDR.unpack_from(data, at)
            if size < HEADER_SIZE + NFGEN_SIZE or at + size > end:
                break
            if kind == _PACKET:
                message = decode(data, at + HEADER_SIZE, at + size)
                if message is None:
                    stats.malformed += 1
                else:
                    stats.received += 1
                    if message.seq >= 0:
                        stats.lost += message.seq - self._next_seq & 0xFFFFFFFF
                        self._next_seq = message.seq + 1 & 0xFFFFFFFF
                    if len(queue) < self._queue_packets:
                        queue.append(message)
                    else:
                        stats.dropped += 1
            at += size + 3 & ~3
        if queue:
            self._wake.set()

    async def batches(self) -> AsyncIterator[list[NflogMessage]]:
        """Yield what has come, a batch at a time, until the reader is closed; one user only.

        The loop turns between two batches however many packets wait.
        """
        queue = self._queue
        while True:
            if not queue:
                if self._closed:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            yield [queue.popleft() for _ in range(min(len(queue), BATCH_PACKETS))]
            await asyncio.sleep(0)

    def close(self) -> None:
        """Leave the group; what is queued can still be taken. Harmless when done already."""
        if self._closed:
            return
        self._closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._sock)
        self._sock.close()
        self._wake.set()


def interface_name(index: int) -> str:
    """The name of an interface index in this thread's namespace; "#INDEX" once it is gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"#{index}"


def _open(group: int) -> socket.socket:
    if not 0 <= group <= 0xFFFF:
        raise KernelError("an NFLOG group", needed="0-65535", got=str(group))
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    except OSError as e:
        raise KernelMissingError(
            "NFLOG", needed="nfnetlink in the kernel", got=os.strerror(e.errno or 0)
        ) from e
    try:
        sock.bind((0, 0))
    except OSError:
        sock.close()
        raise
    return sock


def _refused(group: int, kind: int, code: int) -> KernelError | NoAnswerError:
    """The error for a setting that the kernel did not take."""
    what = f"NFLOG group {group}"
    if code == errno.EPERM:
        owner = _owner(group)
        if owner is None:
            return NoAnswerError(f"reading {what}", needed="root (CAP_NET_ADMIN)")
        return KernelError(
            what, needed="a group that nobody reads", got=f"netlink port {owner} reads it"
        )
    if code in (errno.EINVAL, errno.ENOENT, errno.EPROTONOSUPPORT) and kind == _CFG_CMD:
        return KernelMissingError(what, needed="kernel module nfnetlink_log", got=os.strerror(code))
    return KernelError(f"{what}, setting {kind}", got=os.strerror(code))


def _owner(group: int) -> int | None:
    """The netlink port (mostly a pid) that reads a group in this thread's namespace."""
    with contextlib.suppress(OSError, ValueError):
        text = Path("/proc/thread-self/net/netfilter/nfnetlink_log").read_text(encoding="ascii")
        for line in text.splitlines():
            fields = line.split()
            if len(fields) > 1 and int(fields[0]) == group:
                return int(fields[1])
    return None
