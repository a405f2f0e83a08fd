"""Single packets and connections between namespaces, also such as no honest program sends."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
from collections.abc import Iterator

from netpol.kernel import netns
from netpol.kernel.netns import in_netns

#: linux/in.h, linux/in6.h: bind to an address that is not ours.
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
#: A forbidden packet is dropped, so silence is all there is to see.
SILENCE_S = 0.5

_ports = itertools.count(20000)


def run(space: str, *command: str) -> str:
    """Run a program in a namespace."""
    words = ["ip", "netns", "exec", space, *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def listening(space: str, address: str, port: int) -> Iterator[None]:
    """The kernel of a namespace takes connections; nobody answers them."""
    with netns.open_socket(space, _family(address)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(128)
        yield


def connects(space: str, address: str, port: int, *, device: str = "") -> bool:
    """Whether a new connection from a namespace comes about."""

    def work() -> bool:
        with socket.socket(_family(address)) as client:
            client.settimeout(SILENCE_S)
            target = socket.getaddrinfo(f"{address}%{device}" if device else address, port)[0][4]
            try:
                client.connect(target)
            except (TimeoutError, ConnectionRefusedError, OSError):
                return False
            return True

    return in_netns(space, work)


def reaches(space: str, to_space: str, address: str, *, source: str = "", device: str = "") -> bool:
    """Whether a datagram arrives; `source` is whom it claims to be from."""
    port = next(_ports)
    family = _family(address)
    v6 = family is socket.AF_INET6

    def send() -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            if source:
                if v6:
                    client.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
                else:
                    client.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
                where = f"{source}%{device}" if device and source.startswith("fe80") else source
                client.bind(socket.getaddrinfo(where, 0, type=socket.SOCK_DGRAM)[0][4])
            where = f"{address}%{device}" if device and address.startswith("fe80") else address
            target = socket.getaddrinfo(where, port, type=socket.SOCK_DGRAM)[0][4]
            client.sendto(b"hello", target)

    with netns.open_socket(to_space, family, socket.SOCK_DGRAM) as server:
        server.bind(("::" if v6 else "0.0.0.0", port))
        server.settimeout(SILENCE_S)
        in_netns(space, send)
        try:
            text, peer = server.recvfrom(64)
        except TimeoutError:
            return False
        assert text == b"hello"
        assert not source or peer[0].split("%")[0] == source, "the packet says who it was not"
        return True


def link_local(space: str, device: str = "eth0") -> str:
    """The fe80:: address of an interface."""
    for line in run(space, "ip", "-6", "-o", "addr", "show", "dev", device).splitlines():
        words = line.split()
        if words[3].startswith("fe80"):
            return words[3].split("/")[0]
    raise AssertionError(f"{device} has no link-local address")
