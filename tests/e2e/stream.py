"""A stream of new flows between namespaces, and a count of those that came, and of those that did not.

A program of its own, so that it shares no lock with what it watches: `python stream.py` reads what to send
as JSON from a line of standard input, says "ready", sends until that closes, and prints what it found.

Of every pair, UDP datagrams from ports of their own are counted at the receiver, which knows by their text
whose they are; TCP connections must be there within less than a second, before the kernel would repeat a
lost SYN, and are seen by the acceptor, whatever the client thinks of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from netpol.kernel import netns

PORT = 7777
TICK_S = 0.004
#: A SYN is sent again after a second: what takes longer was lost once.
CONNECT_S = 0.9
#: Of each pair, one connection for so many datagrams.
UDP_FOR_TCP = 3
RECEIVE_BYTES = 1 << 24
#: asm-generic/socket.h; root may go beyond net.core.rmem_max.
SO_RCVBUFFORCE = 33
RESET = struct.pack("ii", 1, 0)


@dataclass
class Pair:
    """One sender and one receiver, and what became of their flows; times are of the wall clock."""

    name: str
    netns: str
    src: str
    dst: str
    sent: dict[int, float] = field(default_factory=dict)
    got: dict[int, float] = field(default_factory=dict)
    connected: int = 0
    accepted: list[float] = field(default_factory=list)
    unconnected: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        lost = [at for number, at in self.sent.items() if number not in self.got]
        return {
            "udp_sent": len(self.sent),
            "udp_got": sorted(self.got.values()),
            "udp_lost": sorted(lost),
            "tcp_connected": self.connected,
            "tcp_accepted": sorted(self.accepted),
            "tcp_lost": sorted(self.unconnected),
        }


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Servers:
    """A receiver and an acceptor for each destination."""

    def __init__(self, pairs: list[Pair], homes: dict[str, str]) -> None:
        self._pairs = pairs
        self._stop = threading.Event()
        self._threads = []
        for address, home in homes.items():
            udp = netns.open_socket(home, family_of(address), socket.SOCK_DGRAM)
            udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BYTES)
            tcp = netns.open_socket(home, family_of(address), socket.SOCK_STREAM)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for one in (udp, tcp):
                one.bind((address, PORT))
                one.settimeout(0.2)
            tcp.listen(4096)
            for work, one in ((self._receive, udp), (self._accept, tcp)):
                self._threads.append(threading.Thread(target=work, args=(one, address)))
        for thread in self._threads:
            thread.start()

    def _receive(self, server: socket.socket, address: str) -> None:
        while not self._stop.is_set():
            try:
                text = server.recv(64)
            except TimeoutError:
                continue
            index, number = map(int, text.split())
            self._pairs[index].got[number] = time.time()
        server.close()

    def _accept(self, server: socket.socket, address: str) -> None:
        whose = {p.src: p for p in self._pairs if p.dst == address}
        while not self._stop.is_set():
            try:
                taken, peer = server.accept()
            except TimeoutError:
                continue
            if peer[0] in whose:
                whose[peer[0]].accepted.append(time.time())
            taken.close()
        server.close()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Sender(threading.Thread):
    """Sends one pair's flows from inside its namespace."""

    def __init__(self, pair: Pair, index: int, stop: threading.Event) -> None:
        super().__init__()
        self._pair, self._index, self._stopping = pair, index, stop
        self._family = family_of(pair.dst)
        self._open: dict[int, tuple[socket.socket, float, float]] = {}
        self._poll = select.epoll()

    def run(self) -> None:
        netns.enter(self._pair.netns)
        number = 0
        while not self._stopping.is_set():
            due = time.monotonic() + TICK_S
            self._datagram(number)
            if number % UDP_FOR_TCP == 0:
                self._connect()
            self._look()
            number += 1
            time.sleep(max(0.0, due - time.monotonic()))
        deadline = time.monotonic() + CONNECT_S
        while self._open and time.monotonic() < deadline + 0.1:
            self._look()
            time.sleep(TICK_S)

    def _datagram(self, number: int) -> None:
        with socket.socket(self._family, socket.SOCK_DGRAM) as one:
            one.bind((self._pair.src, 0))
            self._pair.sent[number] = time.time()
            one.sendto(f"{self._index} {number}".encode(), (self._pair.dst, PORT))

    def _connect(self) -> None:
        one = socket.socket(self._family, socket.SOCK_STREAM)
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        one.bind((self._pair.src, 0))
        code = one.connect_ex((self._pair.dst, PORT))
        if code not in (0, errno.EINPROGRESS):
            self._pair.unconnected.append(time.time())
            one.close()
            return
        self._open[one.fileno()] = (one, time.monotonic() + CONNECT_S, time.time())
        self._poll.register(one, select.EPOLLOUT)

    def _look(self) -> None:
        for fd, _ in self._poll.poll(0):
            one, _, at = self._take(fd)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._pair.unconnected.append(at)
            else:
                self._pair.connected += 1
            one.close()
        now = time.monotonic()
        for fd in [fd for fd, (_, until, _) in self._open.items() if until < now]:
            one, _, at = self._take(fd)
            self._pair.unconnected.append(at)
            one.close()

    def _take(self, fd: int) -> tuple[socket.socket, float, float]:
        self._poll.unregister(fd)
        return self._open.pop(fd)


@contextlib.contextmanager
def streaming(pairs: list[Pair], homes: dict[str, str]) -> Iterator[None]:
    servers = Servers(pairs, homes)
    stop = threading.Event()
    senders = [Sender(pair, index, stop) for index, pair in enumerate(pairs)]
    for sender in senders:
        sender.start()
    try:
        yield
    finally:
        stop.set()
        for sender in senders:
            sender.join()
        time.sleep(0.3)  # the last datagrams are still on their way through receivers' buffers
        servers.stop()


def main() -> None:
    wanted = json.loads(sys.stdin.readline())
    pairs = [Pair(**pair) for pair in wanted["pairs"]]
    with streaming(pairs, wanted["homes"]):
        print("ready", flush=True)
        sys.stdin.read()
    json.dump({pair.name: pair.report() for pair in pairs}, sys.stdout)


if __name__ == "__main__":
    main()
