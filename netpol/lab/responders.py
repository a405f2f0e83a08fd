"""The servers of one pod's port: TCP, UDP and SCTP, on sockets that somebody else made.

Each answers with a fixed text (the pod's name) and tells a callback whom it answered. They live on the
running loop, take no thread and no task, and own the sockets that they were given. What a pod declares,
namespaces and logs are `podserver`'s business.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Callable, Container
from typing import NamedTuple

import structlog

from netpol.lab import netsock, sctp

_log = structlog.get_logger(__name__)

#: Called with the peer's address and port after every answer.
Answered = Callable[[str, int], None]

#: How long a TCP client may stay silent before it is answered unasked.
PEEK_S = 0.05
#: How long a client that began an HTTP request may take to finish it.
REQUEST_S = 5.0
#: How long we read on after our answer so that the close is a FIN, not a reset.
LINGER_S = 2.0
#: A request head longer than this is answered as it is.
REQUEST_BYTES = 16384
#: Pause of accepting when the process is out of files.
FULL_S = 0.1
#: Datagrams or connections taken per wake-up, so that no socket starves the loop.
BATCH = 64

_METHODS = tuple(
    f"{m} ".encode()
    for m in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE")
)


class Peer(NamedTuple):
    """Who sent something."""

    address: str
    port: int


def peer_of(sockaddr: tuple[str, int] | tuple[str, int, int, int]) -> Peer:
    """Address and port of a socket address; IPv4 on a dual-stack socket is written as IPv4."""
    address = sockaddr[0]
    if address.startswith("::ffff:") and "." in address:
        address = address[7:]
    return Peer(address, sockaddr[1])


def looks_like_http(data: bytes) -> bool:
    """Whether the first bytes are, or may become, an HTTP request."""
    return bool(data) and any(data.startswith(m) or m.startswith(data) for m in _METHODS)


def http_answer(text: bytes, *, head_only: bool) -> bytes:
    """A minimal HTTP/1.1 answer that closes the connection."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(text)
    )
    return head if head_only else head + text


class _Connection:
    """One accepted connection: a short wait for a request, one answer, a polite close."""

    __slots__ = ("_answered", "_data", "_done", "_loop", "_owner", "_peer", "_sock", "_timer")

    def __init__(self, owner: TcpServer, sock: socket.socket, peer: Peer) -> None:
        self._owner, self._sock, self._peer = owner, sock, peer
        self._data = b""
        self._answered = self._done = False
        self._loop = owner.loop
        self._timer = self._loop.call_later(PEEK_S, self._answer)
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # reset by a scan or a probe: nobody waits for an answer
            self.close()
            return
        if self._answered:
            if not data:
                self.close()
        elif not data:
            self._answer()
        else:
            self._data += data
            self._request()

    def _request(self) -> None:
        whole = b"\r\n\r\n" in self._data or b"\n\n" in self._data
        if whole or len(self._data) > REQUEST_BYTES or not looks_like_http(self._data):
            self._answer()
        else:
            self._timer.cancel()
            self._timer = self._loop.call_later(REQUEST_S, self._answer)

    def _answer(self) -> None:
        if self._answered:
            return
        self._answered = True
        self._timer.cancel()
        text = self._owner.text
        if looks_like_http(self._data):
            text = http_answer(text, head_only=self._data.startswith(b"HEAD "))
        try:
            # Far below the smallest send buffer, so it is taken whole.
            self._sock.send(text, socket.MSG_NOSIGNAL)
            self._owner.answered(*self._peer)
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:  # a client that only knocked (nc -z) is gone by now
            self.close()
            return
        self._timer = self._loop.call_later(LINGER_S, self.close)

    def close(self) -> None:
        """Let go of the socket; harmless when done already."""
        if self._done:
            return
        self._done = True
        self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._owner.forget(self)


class TcpServer:
    """Answers connections: an HTTP request with a 200, anything else with the bare text."""

    def __init__(self, sock: socket.socket, *, text: bytes, answered: Answered) -> None:
        self.loop = asyncio.get_running_loop()
        self.text, self.answered = text, answered
        self._sock = sock
        self._connections: set[_Connection] = set()
        sock.listen(netsock.BACKLOG)
        self.loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        for _ in range(BATCH):
            try:
                conn, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as e:
                if self._sock.fileno() < 0:
                    return
                _log.warning("lab_accept_paused", error=str(e), pause_s=FULL_S)
                self.loop.remove_reader(self._sock)
                self.loop.call_later(FULL_S, self._resume)
                return
            conn.setblocking(False)
            self._connections.add(_Connection(self, conn, peer_of(address)))

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self.loop.add_reader(self._sock, self._accept)

    def forget(self, connection: _Connection) -> None:
        """A connection is over."""
        self._connections.discard(connection)

    def close(self) -> None:
        """Stop listening and drop what is open; harmless when done already."""
        if self._sock.fileno() < 0:
            return
        self.loop.remove_reader(self._sock)
        self._sock.close()
        for connection in tuple(self._connections):
            connection.close()


class UdpServer:
    """Answers every datagram from the address that it was sent to.

    A datagram that is itself an answer of some server is left alone: two servers would talk forever.
    """

    def __init__(
        self, sock: socket.socket, *, text: bytes, answered: Answered, answers: Container[bytes]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._text, self._answered, self._answers = text, answered, answers
        self._sock = sock
        netsock.big_buffer(sock)
        netsock.ask_destination(sock)
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                data, control, _, address = self._sock.recvmsg(65536, 128)
            except BlockingIOError:
                return
            except OSError as e:  # an ICMP error about an earlier answer
                _log.debug("lab_udp_error", error=str(e))
                continue
            if data in self._answers:
                continue
            try:
                self._sock.sendmsg([self._text], netsock.reply_control(control), 0, address)
            except OSError as e:
                _log.debug("lab_udp_answer_failed", peer=str(address), error=str(e))
                continue
            self._answered(*peer_of(address))

    def close(self) -> None:
        """Stop answering; harmless when done already."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()


class SctpServer:
    """Answers INITs to one namespace: INIT ACK on open ports, ABORT on all others."""

    def __init__(self, sock: socket.socket, *, answered: dict[int, Answered]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock, self._answered = sock, answered
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                data, control, _, address = self._sock.recvmsg(65536, 128)
            except BlockingIOError:
                return
            except OSError as e:
                _log.debug("lab_sctp_error", error=str(e))
                continue
            init = answer_init(
                self._sock, data, control=control, address=address, open_ports=self._answered
            )
            if init is not None and (callback := self._answered.get(init.dport)) is not None:
                callback(address[0], init.sport)

    def close(self) -> None:
        """Stop answering; harmless when done already."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()


def answer_init(
    sock: socket.socket,
    data: bytes,
    *,
    control: list[tuple[int, int, bytes]],
    address: tuple[str, int] | tuple[str, int, int, int],
    open_ports: Container[int],
) -> sctp.SctpPacket | None:
    """Answer a received datagram if it is an INIT; returns the INIT when an answer left."""
    if sock.family is socket.AF_INET:
        parts = sctp.strip_ipv4(data)
        if parts is None:
            return None
        data = parts[2]
    try:
        packet = sctp.parse(data)
    except ValueError:
        return None
    reply = sctp.answer(
        packet, open_ports=open_ports, initiate_tag=secrets.randbelow(2**32 - 1) + 1
    )
    if reply is None:
        return None
    target: tuple[str, int] | tuple[str, int, int, int] = (
        (address[0], 0) if len(address) == 2 else (address[0], 0, *address[2:])
    )
    try:
        sock.sendmsg([reply], netsock.reply_control(control), 0, target)
    except OSError as e:
        _log.debug("lab_sctp_answer_failed", peer=address[0], error=str(e))
        return None
    return packet


def is_loopback(address: str) -> bool:
    """Whether an address as text is a loopback address."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
