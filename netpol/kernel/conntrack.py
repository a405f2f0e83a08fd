"""The FlowDriver of a real kernel: ends flows of conntrack that were sent on to a backend.

For UDP and SCTP, whose flows live on while their client speaks, whoever is behind the backend's address.
Bytes of ctnetlink in batches: pyroute2 takes 0.4 ms to end a flow and 16 s to list 50,000, these 4 us and
0.1 s. Which backends are gone is the caller's to know.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from netpol.kernel.drivers import FlowMatch
from netpol.kernel.netlink import NFGEN_SIZE, NLA_F_NESTED, NLM_F_DUMP, Message, attributes, nla
from netpol.kernel.netlink_batch import BatchSocket, RefusedError, Request
from netpol.lib.errors import KernelError, KernelMissingError, NoAnswerError
from netpol.model.ids import PROTOCOL_NUMBERS
from netpol.model.net import FAMILIES, Family, family_of

# linux/netfilter/nfnetlink_conntrack.h
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_SRC = {Family.V4: 1, Family.V6: 3}
_DST = {Family.V4: 2, Family.V6: 4}
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_FILTER_ORIG_FLAGS, _FILTER_REPLY_FLAGS = 1, 2
_BY_SRC, _BY_PROTO = 1 << 0, 1 << 3

_AF: dict[Family, int] = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
#: Up to so many backends of a family the kernel is asked for each: it picks some of 50,000 flows in a
#: fifth of the time that all of them take to read.
FILTERED_BACKENDS = 4


class _Tuple(NamedTuple):
    """One direction of a flow; `protocol` by its number."""

    protocol: int
    src: bytes
    src_port: int
    dst: bytes
    dst_port: int


class NetlinkFlows:
    """Conntrack of the network namespace of the thread that constructs this.

    Raises:
        NoAnswerError: not root.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # 12: NETLINK_NETFILTER, which the socket module does not name.
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        self._socket.bind((0, 0))
        self._batch = BatchSocket(self._socket, "conntrack")
        self._filters = True

    def end(self, matches: Collection[FlowMatch]) -> int:
        """See FlowDriver.

        Raises:
            KernelMissingError: the kernel has no conntrack, or does not tell of it.
        """
        ended = 0
        with self._lock:
            for family in FAMILIES:
                wanted = {m for m in matches if family_of(m.backend) is family}
                if wanted:
                    ended += self._end(family, wanted)
        return ended

    def close(self) -> None:
        """See FlowDriver. May be called twice."""
        with self._lock:
            self._socket.close()

    def _end(self, family: Family, wanted: set[FlowMatch]) -> int:
        by_backend: dict[tuple[int, bytes], list[FlowMatch]] = defaultdict(list)
        for match in wanted:
            by_backend[PROTOCOL_NUMBERS[match.protocol], match.backend].append(match)
        # One listing may tell a flow twice, when its table grows meanwhile.
        deletions = {
            deletion
            for message in self._candidates(family, list(by_backend))
            if (deletion := _deletion(message, family, by_backend)) is not None
        }
        requests = [Request(_DELETE, 0, deletion) for deletion in deletions]
        refused = self._batch.run(requests)
        for _, code in refused:
            if code != errno.ENOENT:  # it ended by itself
                raise _error("ending flows", code)
        return len(requests) - len(refused)

    def _candidates(self, family: Family, backends: list[tuple[int, bytes]]) -> Iterator[Message]:
        """Flows among which all of the backends' are."""
        if self._filters and len(backends) <= FILTERED_BACKENDS:
            filters = {_filter(family, protocol, backend) for protocol, backend in backends}
            try:
                for filter_ in filters:
                    yield from self._batch.get(_listing(family, filter_))
            except RefusedError as e:
                if e.code not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise _error("listing flows", e.code) from e
                self._filters = False  # before 5.8
            else:
                return
        # Most flows are told to be others' without being taken apart.
        has_backend = re.compile(b"|".join({re.escape(backend) for _, backend in backends}))
        try:
            for message in self._batch.get(_listing(family, b"")):
                if has_backend.search(message.payload):
                    yield message
        except RefusedError as e:
            raise _error("listing flows", e.code) from e


def _error(what: str, code: int) -> KernelError | NoAnswerError:
    if code in (errno.EPERM, errno.EACCES):
        return NoAnswerError(what, needed="root")
    if code in (errno.EOPNOTSUPP, errno.EINVAL):
        return KernelMissingError(what, needed="a kernel with nf_conntrack_netlink")
    return KernelError(what, got=errno.errorcode.get(code, str(code)))


def _listing(family: Family, filter_: bytes) -> Request:
    return Request(_GET, NLM_F_DUMP, struct.pack("=BBH", _AF[family], 0, 0) + filter_)


def _filter(family: Family, protocol: int, backend: bytes) -> bytes:
    """Only flows by a protocol, whose replies come from an address."""
    reply, wanted = nla(_TUPLE_PROTO | NLA_F_NESTED, nla(_PROTO_NUM, bytes([protocol]))), _BY_PROTO
    if family is Family.V4:  # an address of IPv6 is accepted, and matches nothing (seen on 6.18)
        reply = nla(_TUPLE_IP | NLA_F_NESTED, nla(_SRC[family], backend)) + reply
        wanted |= _BY_SRC
    flags = nla(_FILTER_ORIG_FLAGS, struct.pack("=I", 0)) + nla(
        _FILTER_REPLY_FLAGS, struct.pack("=I", wanted)
    )
    return nla(_TUPLE_REPLY | NLA_F_NESTED, reply) + nla(_FILTER | NLA_F_NESTED, flags)


def _deletion(
    message: Message, family: Family, wanted: dict[tuple[int, bytes], list[FlowMatch]]
) -> bytes | None:
    """The body of the request that ends a flow, or None where nobody wants that."""
    found = dict(attributes(message.payload[NFGEN_SIZE:]))
    if _TUPLE_ORIG not in found or _TUPLE_REPLY not in found:
        return None
    reply = _tuple(found[_TUPLE_REPLY], family)
    matches = wanted.get((reply.protocol, reply.src))
    if matches is None or not _any(matches, _tuple(found[_TUPLE_ORIG], family), reply):
        return None
    out = struct.pack("=BBH", _AF[family], 0, 0)
    out += nla(_TUPLE_ORIG | NLA_F_NESTED, bytes(found[_TUPLE_ORIG]))
    # The number makes sure that it is this flow and none that came since; the zone that it is found.
    for kind in (_ID, _ZONE):
        if kind in found:
            out += nla(kind, bytes(found[kind]))
    return out


def _any(matches: Iterable[FlowMatch], dialled: _Tuple, reply: _Tuple) -> bool:
    return any(
        m.backend_port in (0, reply.src_port)
        and m.address in (b"", dialled.dst)
        and m.port in (0, dialled.dst_port)
        for m in matches
    )


def _tuple(value: memoryview, family: Family) -> _Tuple:
    parts = dict(attributes(value))
    ip, proto = (
        {kind: bytes(v) for kind, v in attributes(parts.get(at, memoryview(b"")))}
        for at in (_TUPLE_IP, _TUPLE_PROTO)
    )
    return _Tuple(
        proto.get(_PROTO_NUM, b"\0")[0],
        ip.get(_SRC[family], b""),
        int.from_bytes(proto.get(_PROTO_SRC_PORT, b""), "big"),
        ip.get(_DST[family], b""),
        int.from_bytes(proto.get(_PROTO_DST_PORT, b""), "big"),
    )
