"""The sockets of a probe: reading every kind of answer, and the witnesses at the destinations.

Owns all open sockets of a run; `probesource` makes those that ask. A witness is a raw socket in a
destination's namespace that answers this run's UDP datagrams and SCTP INITs (known by a token), whether
or not a server sits on the port: the kernel limits its own ICMP errors to a few a second, and knows no
SCTP. Of TCP it sees the SYNs. A reset or an ICMP error is the destination's own only if the packet has
arrived there: a firewall that rejects answers in the destination's name. The sockets that ask get ICMP
errors with type and sender, so a refusal on the way is told apart.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from netpol.lab import icmperr, netsock, sctp
from netpol.model.flow import Verdict
from netpol.model.ids import Protocol
from netpol.model.net import Family

_UDP_HEADER = struct.Struct("!HHHH")
_PORTS = struct.Struct("!HH")
_WITNESS_ANSWER = b"netpol-probe-seen"
#: struct linger: on, 0 s: close with a reset, so that no TIME_WAIT keeps the port.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
#: Errors of sending that say something about the machine, not about policy.
FAULTS = frozenset(
    {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENOBUFS, errno.EMFILE}
)
_READS = 4096


@dataclass(slots=True, eq=False)
class Shot:
    """One packet's question: may `source` reach `address` on this port. `verdict` None: no answer yet."""

    source: int
    address: bytes
    text: str
    protocol: Protocol
    port: int
    destinations: list[int] = field(default_factory=list)
    sent_at: float = 0.0
    verdict: Verdict | None = None


@dataclass(slots=True, eq=False)
class TcpFlight:
    """A connection being tried, from source port `sport`."""

    sock: socket.socket
    shot: Shot
    sport: int


@dataclass(slots=True, eq=False)
class Datagrams:
    """A UDP socket of one source in one round: its port and whom it asked."""

    sock: socket.socket
    sport: int
    asked: dict[tuple[str, int], Shot] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Witness:
    """A raw socket at a destination, and what of this run it saw: source and destination ports."""

    sock: socket.socket
    protocol: Protocol
    family: Family
    seen: set[tuple[int, int]] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class SctpAsker:
    """A raw SCTP socket of one source in one round: its port and whom it asked."""

    sock: socket.socket
    sport: int
    asked: dict[tuple[str, int], Shot] = field(default_factory=dict)


_Wire = TcpFlight | Datagrams | _Witness | SctpAsker


class Wires:
    """All open sockets of a run behind one epoll."""

    def __init__(self, epoll: select.epoll) -> None:
        self.epoll = epoll
        self.token = b"netpol-probe" + secrets.token_bytes(8)
        self.tag = secrets.randbelow(2**32 - 1) + 1
        self.packets = 0
        self.faults: set[tuple[int, str, int]] = set()
        self._wires: dict[int, _Wire] = {}
        self._witnesses: dict[tuple[Protocol, bytes], _Witness] = {}

    def add(self, wire: _Wire, events: int) -> None:
        """Watch a socket."""
        fd = wire.sock.fileno()
        self._wires[fd] = wire
        self.epoll.register(fd, events)

    def add_witness(self, protocol: Protocol, family: Family, addresses: Sequence[bytes]) -> None:
        """Open a witness in the namespace that the thread is in, which has these addresses.

        Raises:
            OSError: not allowed, or the family is missing.
        """
        match protocol:
            case Protocol.TCP:
                sock = netsock.raw_syn(family)
            case Protocol.SCTP:
                sock = netsock.raw_sctp(family)
            case _:
                sock = netsock.raw_udp(family)
        witness = _Witness(sock, protocol, family)
        self.add(witness, select.EPOLLIN)
        self._witnesses |= {(protocol, address): witness for address in addresses}

    def read(self, fd: int) -> Iterator[Shot]:
        """Read all that a socket has; yields the questions that it answered."""
        wire = self._wires.get(fd)
        match wire:
            case TcpFlight():
                yield from self._read_tcp(wire)
            case Datagrams():
                yield from self._read_udp(wire)
            case SctpAsker():
                yield from self._read_sctp(wire)
            case _Witness():
                self._testify(wire)
            case None:
                return

    def _read_tcp(self, flight: TcpFlight) -> Iterator[Shot]:
        code = flight.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        yield from self.tcp_done(flight, code)

    def tcp_done(self, flight: TcpFlight, code: int) -> Iterator[Shot]:
        """Judge a finished attempt by its errno and let go of it."""
        shot = flight.shot
        error = _next_error(flight.sock) if code else None
        verdict: Verdict | None
        if code == 0:
            verdict = Verdict.ALLOW
        elif code == errno.ECONNREFUSED and error is None:
            verdict = Verdict.ALLOW if self._arrived(shot, flight.sport) else Verdict.DENY
        elif error is not None:
            verdict = icmperr.judge(error[0], protocol=shot.protocol, destination=shot.address)
        else:
            verdict = None
            if code in FAULTS:
                self.faults.add((shot.source, shot.text, code))
        self.drop(flight)
        if verdict is not None and shot.verdict is None:
            shot.verdict = verdict
            yield shot

    def _arrived(self, shot: Shot, sport: int) -> bool:
        """Whether a packet has reached its destination, as far as we know; asked when it was refused.

        The witness gets it before the destination's stack answers, so reading now finds it.
        """
        witness = self._witnesses.get((shot.protocol, shot.address))
        if witness is None:
            return True  # nobody is there to ask: the answer is believed
        self._testify(witness)
        return (sport, shot.port) in witness.seen

    def _blame(self, error: icmperr.IcmpError, shot: Shot | None, sport: int) -> Iterator[Shot]:
        """Judge a question by an ICMP error about it."""
        if shot is None or shot.verdict is not None:
            return
        verdict = icmperr.judge(error, protocol=shot.protocol, destination=shot.address)
        if verdict is Verdict.ALLOW and not self._arrived(shot, sport):
            verdict = Verdict.DENY
        if verdict is not None:
            shot.verdict = verdict
            yield shot

    def _read_udp(self, wire: Datagrams) -> Iterator[Shot]:
        for _ in range(_READS):
            try:
                _, address = wire.sock.recvfrom(512)
            except BlockingIOError:
                break
            except OSError:
                continue  # the pending error of an ICMP message; its details are in the error queue
            shot = wire.asked.get((address[0], address[1]))
            if shot is not None and shot.verdict is None:
                shot.verdict = Verdict.ALLOW
                yield shot
        while (error := _next_error(wire.sock)) is not None:
            icmp, _, target = error
            yield from self._blame(icmp, wire.asked.get(target), wire.sport)

    def _read_sctp(self, wire: SctpAsker) -> Iterator[Shot]:
        v4 = wire.sock.family is socket.AF_INET
        for _ in range(_READS):
            try:
                data, address = wire.sock.recvfrom(512)
            except BlockingIOError:
                break
            except OSError:
                continue
            if v4:
                data = (sctp.strip_ipv4(data) or (b"", b"", b""))[2]
            if (sctp.ports_of(data) or (0, 0))[1] != wire.sport:
                continue
            try:
                packet = sctp.parse(data)
            except ValueError:
                continue
            if packet.tag != self.tag:
                continue
            shot = wire.asked.get((address[0], packet.sport))
            if shot is not None and shot.verdict is None:
                shot.verdict = Verdict.ALLOW
                yield shot
        while (error := _next_error(wire.sock)) is not None:
            icmp, quoted, target = error
            ports = sctp.ports_of(quoted)
            if ports is not None and ports[0] == wire.sport:
                yield from self._blame(icmp, wire.asked.get((target[0], ports[1])), wire.sport)

    def _testify(self, wire: _Witness) -> None:
        """Answer this run's packets that arrived here."""
        for _ in range(_READS):
            try:
                data, control, _, address = wire.sock.recvmsg(512, 128)
            except BlockingIOError:
                return
            except OSError:
                continue
            if wire.protocol is Protocol.TCP:
                header = (data[0] & 0xF) * 4 if wire.family is Family.V4 else 0
                wire.seen.add(_PORTS.unpack_from(data, header))
                continue
            if wire.family is Family.V4:
                data = (sctp.strip_ipv4(data) or (b"", b"", b""))[2]
            reply = (
                self._sctp_reply(data) if wire.protocol is Protocol.SCTP else self._udp_reply(data)
            )
            if reply is None:
                continue
            wire.seen.add(_PORTS.unpack_from(data))
            target = (address[0], 0) if len(address) == 2 else (address[0], 0, *address[2:])
            # A lost answer is a silent one: the question is asked again.
            with contextlib.suppress(OSError):
                wire.sock.sendmsg([reply], netsock.reply_control(control), 0, target)

    def _udp_reply(self, data: bytes) -> bytes | None:
        if len(data) < _UDP_HEADER.size or data[_UDP_HEADER.size :] != self.token:
            return None
        sport, dport, _, _ = _UDP_HEADER.unpack_from(data)
        length = _UDP_HEADER.size + len(_WITNESS_ANSWER)
        # Checksum 0 is "none" in IPv4 (RFC 768); the kernel fills in the one of IPv6.
        return _UDP_HEADER.pack(dport, sport, length, 0) + _WITNESS_ANSWER

    def _sctp_reply(self, data: bytes) -> bytes | None:
        # The tag is compared before the checksum is computed: most packets here are not questions.
        if data[16:20] != self.tag.to_bytes(4, "big") or len(data) < sctp.HEADER_BYTES:
            return None
        try:
            packet = sctp.parse(data)
        except ValueError:
            return None
        return sctp.answer(packet, open_ports=(), initiate_tag=1)

    def drop(self, wire: _Wire) -> None:
        """Stop watching and close; a connection is reset."""
        fd = wire.sock.fileno()
        if self._wires.pop(fd, None) is not None:
            self.epoll.unregister(fd)
        if isinstance(wire, TcpFlight):
            with contextlib.suppress(OSError):
                wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        wire.sock.close()

    def end_window(self) -> None:
        """Close what asked; witnesses stay."""
        for wire in tuple(self._wires.values()):
            if not isinstance(wire, _Witness):
                self.drop(wire)

    def close(self) -> None:
        """Close everything."""
        for wire in tuple(self._wires.values()):
            self.drop(wire)
        self.epoll.close()


def _next_error(
    sock: socket.socket,
) -> tuple[icmperr.IcmpError, bytes, tuple[str, int]] | None:
    """The next ICMP error of a socket: itself, what it quotes, and where the packet had gone to."""
    while True:
        try:
            quoted, control, _, target = sock.recvmsg(512, 512, socket.MSG_ERRQUEUE)
        except OSError:
            return None
        error = icmperr.read_icmp_error(control)
        if error is not None and target is not None:
            return error, quoted, (target[0], target[1])
        if error is not None:
            return error, quoted, ("", 0)
