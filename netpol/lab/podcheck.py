"""The self-check of a pod's servers: ask each from inside the namespace, by both families.

Owns the asking side only. What it cannot reach because a family is missing there is no fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import Executor

from netpol.lab import netsock, sctp
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES, Family

_LOOPBACK = {Family.V4: "127.0.0.1", Family.V6: "::1"}


async def check_servers(
    *,
    netns: str,
    ports: Sequence[tuple[Protocol, int]],
    text: bytes,
    maker: Executor,
    timeout_s: float,
) -> list[str]:
    """Ask all ports at once; returns one line per wrong or missing answer.

    Args:
        netns: the pod's namespace.
        ports: what should answer.
        text: what TCP and UDP should say.
        maker: runs the making of sockets, on a thread that may change its namespace.
        timeout_s: how long one port may take.
    """
    made = await asyncio.get_running_loop().run_in_executor(maker, _askers, netns, ports)
    faults = await asyncio.gather(
        *(
            _ask_one(sock, family=family, port=port, text=text, timeout_s=timeout_s)
            for family, port, sock in made
        )
    )
    return [f for f in faults if f]


def _askers(
    netns: str, ports: Sequence[tuple[Protocol, int]]
) -> list[tuple[Family, tuple[Protocol, int], socket.socket]]:
    out = []
    with netsock.entered(netns):
        for family in FAMILIES:
            if not _has_loopback(family):
                continue
            for port in ports:
                if port[0] is Protocol.SCTP:
                    sock = netsock.raw_sctp(family)
                else:
                    kind = socket.SOCK_STREAM if port[0] is Protocol.TCP else socket.SOCK_DGRAM
                    sock = socket.socket(netsock.ip_family(family), kind)
                    sock.setblocking(False)
                out.append((family, port, sock))
    return out


def _has_loopback(family: Family) -> bool:
    """Whether the namespace we are in can use a family at all; without IPv4 the check must fail."""
    if family is Family.V4:
        return True
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind((_LOOPBACK[family], 0))
        return True
    return False


async def _ask_one(
    sock: socket.socket,
    *,
    family: Family,
    port: tuple[Protocol, int],
    text: bytes,
    timeout_s: float,
) -> str | None:
    label = f"{port[1]}/{port[0]} on {_LOOPBACK[family]}"
    with contextlib.closing(sock):
        try:
            async with asyncio.timeout(timeout_s):
                if port[0] is Protocol.SCTP:
                    return await _ask_sctp(sock, address=_LOOPBACK[family], port=port[1])
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, (_LOOPBACK[family], port[1]))
                if port[0] is Protocol.UDP:
                    await loop.sock_sendall(sock, b"check\n")
                got = await loop.sock_recv(sock, 65536)
        except TimeoutError:
            return f"{label}: no answer in {timeout_s:g} s"
        except OSError as e:
            return f"{label}: {os.strerror(e.errno) if e.errno else e}"
    return None if got == text else f"{label}: needed {text!r}, got {got!r}"


async def _ask_sctp(sock: socket.socket, *, address: str, port: int) -> str | None:
    """Send an INIT over loopback, where the raw socket also sees what it sent itself."""
    loop = asyncio.get_running_loop()
    tag = secrets.randbelow(2**32 - 1) + 1
    sport = 1024 + secrets.randbelow(60000)
    sock.sendto(sctp.build_init(sport=sport, dport=port, initiate_tag=tag), (address, 0))
    while True:
        data = await loop.sock_recv(sock, 65536)
        if sock.family is socket.AF_INET:
            data = (sctp.strip_ipv4(data) or (b"", b"", b""))[2]
        try:
            packet = sctp.parse(data)
        except ValueError:
            continue
        if packet.tag == tag and packet.dport == sport:
            if packet.chunk == sctp.ChunkType.INIT_ACK:
                return None
            return f"{port}/SCTP on {address}: needed INIT ACK, got chunk type {packet.chunk}"
