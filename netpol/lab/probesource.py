"""The asking side of a probe: one source's packets of one round, TCP, UDP and SCTP, both families.

Owns source ports and the making of sockets in the namespace that the thread is in; answers are read by
`probewire`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from netpol.lab import netsock, sctp
from netpol.lab.probewire import FAULTS, Datagrams, SctpAsker, Shot, TcpFlight, Wires
from netpol.model.ids import Protocol
from netpol.model.net import Family, family_of

#: What ICMP errors about earlier packets turn into (net/ipv4/icmp.c, net/ipv6/icmp.c).
_OF_EARLIER = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EACCES,
        errno.EPROTO,
        errno.ENOPROTOOPT,
    }
)
_SEND_TRIES = 8
_BIND_TRIES = 20


class Source:
    """Sends one round's packets of one source, from the namespace that the thread is in.

    Each protocol and family uses one source port for the round, new every time.
    """

    def __init__(
        self, *, wires: Wires, addresses: dict[Family, bytes], take_port: Callable[[], int]
    ) -> None:
        self._wires, self._addresses, self._take_port = wires, addresses, take_port
        self._tcp_ports: dict[Family, int] = {}
        self._udp: dict[Family, Datagrams] = {}
        self._sctp: dict[Family, SctpAsker] = {}

    def send(self, shot: Shot, now: float) -> None:
        """Send one packet; what the machine refuses is noted and counts as silence."""
        shot.sent_at = now
        self._wires.packets += 1
        family = family_of(shot.address)
        try:
            match shot.protocol:
                case Protocol.UDP:
                    self._send_udp(shot, family)
                case Protocol.SCTP:
                    self._send_sctp(shot, family)
                case _:
                    self._send_tcp(shot, family)
        except OSError as e:
            if e.errno in FAULTS:
                self._wires.faults.add((shot.source, shot.text, e.errno or 0))

    def _send_tcp(self, shot: Shot, family: Family) -> None:
        sock = socket.socket(netsock.ip_family(family), socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            netsock.ask_errors(sock)
            sport = self._bind(sock, family, self._tcp_ports.get(family))
            self._tcp_ports[family] = sport
            code = sock.connect_ex((shot.text, shot.port))
        except OSError:
            sock.close()
            raise
        flight = TcpFlight(sock, shot, sport)
        if code == errno.EINPROGRESS:
            self._wires.add(flight, select.EPOLLOUT)
        else:
            for _ in self._wires.tcp_done(flight, code):
                continue  # answered within the call: nothing is waiting for it

    def _send_udp(self, shot: Shot, family: Family) -> None:
        wire = self._udp.get(family)
        if wire is None:
            sock = socket.socket(netsock.ip_family(family), socket.SOCK_DGRAM)
            sock.setblocking(False)
            netsock.big_buffer(sock)
            netsock.ask_errors(sock)
            wire = self._udp[family] = Datagrams(sock, self._bind(sock, family, None))
            self._wires.add(wire, select.EPOLLIN)
        wire.asked[shot.text, shot.port] = shot
        _send_past_errors(wire.sock, self._wires.token, (shot.text, shot.port))

    def _send_sctp(self, shot: Shot, family: Family) -> None:
        wire = self._sctp.get(family)
        if wire is None:
            sock = netsock.raw_sctp(family)
            netsock.ask_errors(sock)
            if (own := self._addresses.get(family)) is not None:
                sock.bind((socket.inet_ntop(netsock.ip_family(family), own), 0))
            wire = self._sctp[family] = SctpAsker(sock, self._take_port())
            self._wires.add(wire, select.EPOLLIN)
        wire.asked[shot.text, shot.port] = shot
        init = sctp.build_init(sport=wire.sport, dport=shot.port, initiate_tag=self._wires.tag)
        _send_past_errors(wire.sock, init, (shot.text, 0))

    def _bind(self, sock: socket.socket, family: Family, port: int | None) -> int:
        """Bind to the source's own address and to `port`, or to a new one if that is None or taken."""
        own = self._addresses.get(family)
        host = socket.inet_ntop(netsock.ip_family(family), own) if own is not None else ""
        for _ in range(_BIND_TRIES):
            port = port if port is not None else self._take_port()
            try:
                sock.bind((host, port))
            except OSError as e:
                if e.errno != errno.EADDRINUSE:
                    raise
                port = None
            else:
                return port
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _send_past_errors(sock: socket.socket, data: bytes, target: tuple[str, int]) -> None:
    """Send; an ICMP error about an earlier packet fails the next call once, and is not ours.

    The error stays in the queue, where the reader finds it. One that stays is ours.

    Raises:
        OSError: the packet cannot be sent.
    """
    for _ in range(_SEND_TRIES):
        try:
            sock.sendto(data, target)
        except OSError as e:
            if e.errno not in _OF_EARLIER:
                raise
        else:
            return
    sock.sendto(data, target)
