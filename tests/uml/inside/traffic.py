"""Real connections inside the guest: servers that say who they are and whom they saw, and askers.

An answer is "NAME saw ADDRESS"; no answer is "".
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import struct
import threading
import time

from netpol.kernel.netns import in_netns
from tests.uml.inside.steps import Ask

#: Long enough for a connection in a slow guest, shorter than TCP's first repetition (1 s).
ANSWER_TIMEOUT_S = 0.8
SEGMENT_TIMEOUT_S = 0.2
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}


def _socket(space: str, address: str, kind: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    form = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM

    def make() -> socket.socket:
        return socket.socket(family, form | socket.SOCK_NONBLOCK, PROTOCOLS[kind])

    return in_netns(space, make) if space else make()


class Servers:
    """One thread that serves every listener."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def listen(
        self, name: str, space: str, port: int, protocol: str = "tcp", *, address: str = "::"
    ) -> None:
        """Serve a port of a namespace, in both families or at one address."""
        sock = _socket(space, "::", protocol)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address, port))
        if protocol != "udp":
            sock.listen(64)
        self._selector.register(sock, selectors.EVENT_READ, (name, protocol))

    def start(self) -> None:
        """Serve until the process ends."""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock, (name, protocol) = key.fileobj, key.data
                assert isinstance(sock, socket.socket)
                with contextlib.suppress(OSError):
                    if protocol != "udp":
                        peer, origin = sock.accept()
                        with peer:
                            peer.sendall(_words(name, origin[0]))
                    else:
                        _, origin = sock.recvfrom(64)
                        sock.sendto(_words(name, origin[0]), origin)


def _words(name: str, origin: str) -> bytes:
    return f"{name} saw {origin.removeprefix('::ffff:')}".encode()


def ask(questions: dict[str, Ask], *, sport: int = 0) -> dict[str, str]:
    """Ask all at once, from any source port or from one; each answer by the question's name."""
    answers = dict.fromkeys(questions, "")
    selector = selectors.DefaultSelector()
    for name, question in questions.items():
        sock = _socket(question.src, question.address, question.protocol)
        if sport:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", sport))
        with contextlib.suppress(BlockingIOError):
            sock.connect((question.address, question.port))
        if question.protocol == "udp":
            sock.send(b"who?")
        selector.register(sock, selectors.EVENT_READ, name)
    end_s = time.monotonic() + ANSWER_TIMEOUT_S
    while selector.get_map() and (left_s := end_s - time.monotonic()) > 0:
        for key, _ in selector.select(left_s):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            # A refused connection is readable too, and stays without an answer.
            with contextlib.suppress(OSError):
                answers[key.data] = sock.recv(256).decode()
            selector.unregister(sock)
            sock.close()
    for key in list(selector.get_map().values()):
        selector.unregister(key.fileobj)
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    return answers


class UdpFlow:
    """One UDP flow that is asked again and again: to conntrack and IPVS always the same one."""

    def __init__(self, question: Ask) -> None:
        self._socket = _socket(question.src, question.address, "udp")
        self._socket.connect((question.address, question.port))

    def ask(self) -> str:
        """Ask once more."""
        with contextlib.suppress(OSError):
            self._socket.send(b"who?")
        if not select.select([self._socket], [], [], ANSWER_TIMEOUT_S)[0]:
            return ""
        try:
            return self._socket.recv(256).decode()
        except OSError:
            return ""


SYN, RST, ACK = 0x02, 0x04, 0x10


class Segments:
    """TCP segments made by hand, as a pod with raw sockets can: one tuple, any flags."""

    def __init__(self, question: Ask, own: str, sport: int) -> None:
        def open_raw(proto: int) -> socket.socket:
            return socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, proto)

        self._mouth = in_netns(question.src, lambda: open_raw(socket.IPPROTO_RAW))
        self._ear = in_netns(question.src, lambda: open_raw(socket.IPPROTO_TCP))
        self._to, self._own = question, own
        self._sport = sport

    def say(self, flags: int, seq: int, ack: int = 0) -> list[int]:
        """Send one segment; the flags of what comes back to the tuple within a moment."""
        src, dst = socket.inet_aton(self._own), socket.inet_aton(self._to.address)
        ports = (self._sport, self._to.port)
        body = struct.pack("!HHIIBBHHH", *ports, seq, ack, 5 << 4, flags, 4096, 0, 0)
        pseudo = src + dst + struct.pack("!BBH", 0, 6, len(body))
        body = body[:16] + _checksum(pseudo + body) + body[18:]
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), seq & 0xFFFF, 0, 64, 6, 0)
        self._mouth.sendto(head + src + dst + body, (self._to.address, 0))
        heard = []
        end_s = time.monotonic() + SEGMENT_TIMEOUT_S
        while (left_s := end_s - time.monotonic()) > 0:
            if not select.select([self._ear], [], [], left_s)[0]:
                break
            data = self._ear.recv(2048)
            tcp = data[(data[0] & 15) * 4 :]
            if data[12:16] == dst and struct.unpack("!HH", tcp[:4]) == ports[::-1]:
                heard.append(tcp[13])
        return heard


def by_broadcast(question: Ask, own: str, sport: int) -> str:
    """Ask in a frame to everybody: the node's stack takes it, IPVS does not (it is no PACKET_HOST)."""
    ear = _socket(question.src, question.address, "udp")
    ear.bind(("", sport))
    src, dst = socket.inet_aton(own), socket.inet_aton(question.address)
    body = struct.pack("!HHHH", sport, question.port, 12, 0) + b"who?"
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, 0, 64, 17, 0)
    head = head[:10] + _checksum(head + src + dst)
    mouth = in_netns(
        question.src, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0x0008)
    )
    with mouth, ear:
        mouth.sendto(head + src + dst + body, ("eth0", 0x0800, 0, 0, b"\xff" * 6))
        if not select.select([ear], [], [], SEGMENT_TIMEOUT_S)[0]:
            return ""
        return ear.recv(256).decode()


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
