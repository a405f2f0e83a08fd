"""Batches on the real kernel, in rtnetlink: refusals, order, answers that are lost."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest

from netpol.kernel.netlink import nla
from netpol.kernel.netlink_batch import BATCH_REQUESTS, BatchSocket, RefusedError, Request
from netpol.kernel.netns import in_netns
from netpol.lib.errors import KernelError

pytestmark = pytest.mark.kernel

NEWADDR, DELADDR, GETADDR, GETLINK = 20, 21, 22, 18
CREATE, EXCL, DUMP = 0x400, 0x200, 0x300
LO = 1


@pytest.fixture
def sock(space: str) -> Iterator[socket.socket]:
    def open_socket() -> socket.socket:
        found = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        found.bind((0, 0))
        return found

    with in_netns(space, open_socket) as found:
        yield found


def request(kind: int, n: int, flags: int = 0) -> Request:
    """Add or delete an address of loopback."""
    head = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, LO)
    return Request(kind, flags, head + nla(2, bytes([10, 9, n // 256, n % 256])))


def addresses(batch: BatchSocket) -> int:
    body = struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0)
    return len(list(batch.get(Request(GETADDR, DUMP, body)))) - 1  # 127.0.0.1


@pytest.mark.parametrize("count", [0, 1, BATCH_REQUESTS, 2 * BATCH_REQUESTS + 1])
def test_refusals_are_told_by_their_place(sock: socket.socket, count: int) -> None:
    batch = BatchSocket(sock, "addresses")
    assert batch.run(request(NEWADDR, n, CREATE | EXCL) for n in range(count)) == []
    assert addresses(batch) == count
    # Every third is there already.
    numbers = [n if n % 3 == 0 else n + 1000 for n in range(count)]
    refused = batch.run(request(NEWADDR, n, CREATE | EXCL) for n in numbers)
    assert refused == [(at, errno.EEXIST) for at in range(0, count, 3)]


def test_all_refused(sock: socket.socket) -> None:
    batch = BatchSocket(sock, "addresses")
    refused = batch.run(request(DELADDR, n) for n in range(1000))
    assert refused == [(n, errno.EADDRNOTAVAIL) for n in range(1000)]


def test_answers_that_are_lost_are_an_error_and_the_next_batch_is_right(
    sock: socket.socket,
) -> None:
    batch = BatchSocket(sock, "addresses")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    with pytest.raises(KernelError, match="answers were lost"):
        batch.run(request(DELADDR, n) for n in range(BATCH_REQUESTS))
    assert batch.run([request(NEWADDR, 1, CREATE | EXCL)]) == []
    assert batch.run([request(NEWADDR, 1, CREATE | EXCL)]) == [(0, errno.EEXIST)]


def test_a_refused_question(sock: socket.socket) -> None:
    batch = BatchSocket(sock, "links")
    name = nla(3, b"nonesuch\0")
    with pytest.raises(RefusedError) as caught:
        batch.get(Request(GETLINK, 0, bytes(16) + name))
    assert caught.value.code == errno.ENODEV


def test_numbers_begin_anew_before_they_end(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netpol.kernel.netlink_batch.SEQ_MAX", (1 << 20) + 3)
    batch = BatchSocket(sock, "addresses")
    for n in range(5):
        assert batch.run([request(NEWADDR, n, CREATE | EXCL), request(DELADDR, 99)]) == [
            (1, errno.EADDRNOTAVAIL)
        ]
    assert addresses(batch) == 5
