"""Many netlink requests in few system calls, and which of them the kernel refused.

Only the last request of a batch asks for an acknowledgement: refusals come without being asked for, and
the kernel works through what is sent in one call before the call returns, so that the last answer says
that all others are known. Knows no subsystem: those make the bytes of their requests. A socket is used
by one thread at a time; callers hold a lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from netpol.kernel.netlink import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Message,
    error_code,
    messages,
)
from netpol.lib.errors import KernelError, NoAnswerError

#: Requests of one send(). More gains nothing, and each may be refused with an answer of its own, all of
#: which must find room in the receive buffer.
BATCH_REQUESTS = 200
#: The same for questions, whose answers each take a page or two of the receive buffer.
FIND_REQUESTS = 40
#: Bytes of one send(); the smallest send buffer that kernels are set up with is twice this.
BATCH_BYTES = 100_000
#: The kernel works inside send(), so that answers are there at once, or were lost without a word.
ANSWER_TIMEOUT_S = 3.0
RECEIVE_BYTES = 1 << 18
#: Wanted of the kernel; root gets it, others what net.core.rmem_max allows.
RECEIVE_BUFFER_BYTES = 1 << 22
#: pyroute2, whose sockets may be used here, numbers its requests below this.
FIRST_SEQ = 1 << 20
SEQ_MAX = 0xFFFFFFF0
#: A listing that something changed under is asked for again this often at most.
DUMP_TRIES = 3
NLM_F_DUMP_INTR = 0x10

_HEADER = struct.Struct("=IHHII")
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 12
#: asm-generic/socket.h; the socket module has no name for it.
_SO_RCVBUFFORCE = 33


class Request(NamedTuple):
    """A message without its header: type, flags beside NLM_F_REQUEST, and all behind the header."""

    kind: int
    flags: int
    body: bytes


class RefusedError(KernelError):
    """The kernel refused one request; `code` is its errno."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what, got=os.strerror(code))
        self.code = code


class BatchSocket:
    """Sends requests over a netlink socket and reads what comes back to them.

    Args:
        sock: bound, of any subsystem; it stays the caller's to close.
        what: what is spoken to, for messages of errors.
    """

    def __init__(self, sock: socket.socket, what: str) -> None:
        self._socket, self._what = sock, what
        self._seq = FIRST_SEQ
        self._ready = select.poll()  # select(2) refuses descriptors over 1023
        self._ready.register(sock, select.POLLIN)
        # A refusal need not carry the whole request back; old kernels do it all the same.
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except OSError:  # not root of the first user namespace
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)

    def strict(self) -> bool:
        """Have dumps of rtnetlink filtered by the kernel; False where it cannot (before 4.20)."""
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        except OSError:
            return False
        return True

    def run(self, requests: Iterable[Request]) -> list[tuple[int, int]]:
        """Send all in order; returns (index, errno) of those that were refused, in order.

        A refusal stops no other request.

        Raises:
            KernelError: answers were lost, so that it is not known what was refused.
        """
        refused: list[tuple[int, int]] = []
        batch: list[Request] = []
        size = begin = 0
        for request in requests:
            if batch and (len(batch) >= BATCH_REQUESTS or size >= BATCH_BYTES):
                refused += [(begin + at, code) for at, code in self._send(batch)[0]]
                begin += len(batch)
                batch, size = [], 0
            batch.append(request)
            size += len(request.body)
        if batch:
            refused += [(begin + at, code) for at, code in self._send(batch)[0]]
        return refused

    def find(self, requests: Sequence[Request]) -> list[Message | int]:
        """Ask for single objects; each one's message, or the errno of why there is none.

        Raises:
            KernelError: answers were lost.
        """
        found: list[Message | int] = []
        for begin in range(0, len(requests), FIND_REQUESTS):
            batch = requests[begin : begin + FIND_REQUESTS]
            refused, replies = self._send(batch)
            codes = dict(refused)
            found += [replies.get(at) or codes.get(at, errno.ENOENT) for at in range(len(batch))]
        return found

    def get(self, request: Request) -> Iterator[Message]:
        """Send one request and return the messages of its answer, of which the kernel says the end.

        Raises:
            RefusedError: the kernel refused it.
            KernelError: it does not answer.
        """
        for _ in range(DUMP_TRIES):
            found, interrupted = self._get(request)
            if not interrupted:
                break
        return iter(found)

    def _get(self, request: Request) -> tuple[list[Message], bool]:
        seq = self._next_seqs(1)
        dump = request.flags & NLM_F_DUMP == NLM_F_DUMP
        flags = request.flags | NLM_F_REQUEST | (0 if dump else NLM_F_ACK)
        self._socket.send(_pack(request, flags, seq))
        found: list[Message] = []
        interrupted = False
        for message in self._answers():
            if message.seq != seq:
                continue
            interrupted |= bool(message.flags & NLM_F_DUMP_INTR)
            if message.type in (NLMSG_ERROR, NLMSG_DONE):
                code = error_code(message.payload)
                if code:
                    raise RefusedError(self._what, code)
                return found, interrupted
            found.append(message)
        raise AssertionError("answers end with an end")

    def _send(self, batch: Sequence[Request]) -> tuple[list[tuple[int, int]], dict[int, Message]]:
        """Send a batch; the places of what was refused, with errno, and the replies to the others."""
        first = self._next_seqs(len(batch))
        last = first + len(batch) - 1
        frames = [
            _pack(request, request.flags | NLM_F_REQUEST, seq)
            for seq, request in enumerate(batch[:-1], first)
        ]
        frames.append(_pack(batch[-1], batch[-1].flags | NLM_F_REQUEST | NLM_F_ACK, last))
        self._socket.send(b"".join(frames))
        refused: list[tuple[int, int]] = []
        replies: dict[int, Message] = {}
        for message in self._answers():
            if not first <= message.seq <= last:
                continue
            if message.type != NLMSG_ERROR:
                replies[message.seq - first] = message
                continue
            code = error_code(message.payload)
            if code == errno.EPERM:
                raise NoAnswerError(self._what, needed="root")
            if code:
                refused.append((message.seq - first, code))
            if message.seq == last:
                break
        return refused, replies

    def _answers(self) -> Iterator[Message]:
        while True:
            if not self._ready.poll(ANSWER_TIMEOUT_S * 1000):
                raise KernelError(
                    self._what, needed=f"an answer within {ANSWER_TIMEOUT_S:.0f} s", got="none"
                )
            try:
                datagram = self._socket.recv(RECEIVE_BYTES)
            except OSError as e:
                # ENOBUFS: answers did not fit. What was applied is known only by reading it again.
                self._drain()
                raise KernelError(self._what, got=f"answers were lost ({e.strerror})") from e
            yield from messages(datagram)

    def _drain(self) -> None:
        """Take what is left of answers: until then the kernel drops every new one."""
        while True:
            try:
                self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise

    def _next_seqs(self, count: int) -> int:
        if self._seq + count > SEQ_MAX:
            self._seq = FIRST_SEQ
        first = self._seq + 1
        self._seq += count
        return first


def _pack(request: Request, flags: int, seq: int) -> bytes:
    return _HEADER.pack(16 + len(request.body), request.kind, flags, seq, 0) + request.body
