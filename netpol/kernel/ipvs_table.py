"""The IpvsDriver of a real kernel: generic netlink on one pyroute2 IPVS socket.

pyroute2 finds the family's number and opens the socket, in a thread of its own that the constructor
starts (it refuses a thread that runs an event loop); requests and answers are `ipvs_wire`'s bytes, in
batches. The socket stays in the network namespace of the thread that made the driver, which may be called
from any thread.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyroute2 import IPVS
from pyroute2.netlink.exceptions import NetlinkError

from netpol.kernel import ipvs_wire as wire
from netpol.kernel.drivers import Timeouts
from netpol.kernel.modules import load_module
from netpol.kernel.netlink_batch import BatchSocket, RefusedError
from netpol.lib.errors import KernelError, KernelMissingError, NoAnswerError
from netpol.model.ipvs import IpvsFailure, IpvsOp, RealServer, RealState, ServerId, ServerState

#: Of the thread that opens it; the open file stays with its network namespace.
PROC_FILE = Path("/proc/thread-self/net/ip_vs")
_PROC_READ_BYTES = 1 << 16
#: What an open file in /proc says once the module that made it is gone.
_STALE_FILE = frozenset({errno.EIO, errno.EINVAL})


class NetlinkIpvs:
    """IPVS in the network namespace of the thread that constructs this.

    Raises:
        KernelMissingError: the kernel has no IPVS, and no module of it could be loaded.
        NoAnswerError: not root.
    """

    def __init__(self) -> None:
        self._closed = False
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netpol-ipvs")
        try:
            self._take(self._worker.submit(_open).result())
        except BaseException:
            self._worker.shutdown()
            raise

    def dump(self) -> dict[ServerId, ServerState]:
        """See IpvsDriver. Servers of protocols that no Service has are not seen.

        Connections of persistence count as 0 here; `read` tells them. Where the module was loaded anew,
        IPVS has another number and another file: they are looked for again.
        """
        with self._lock:
            try:
                return self._dump()
            except RefusedError as e:
                if e.code != errno.ENOENT:
                    raise
            except OSError as e:
                if e.errno not in _STALE_FILE:
                    raise
            self._reopen()
            return self._dump()

    def _dump(self) -> dict[ServerId, ServerState]:
        servers = [
            server
            for message in self._batch.get(wire.list_servers(self._kind))
            if (server := wire.server_of(message)) is not None
        ]
        # Netlink tells settings, the file tells real servers: one request for each virtual server
        # would take longer than all that is done with them.
        told = dict(wire.reals_by_server(self._proc_lines()))
        states: dict[ServerId, ServerState] = {}
        for server in servers:
            reals = told.get(server.id)
            if reals is None:
                reals = self._reals(server.id)
            states[server.id] = ServerState(server, reals)
        return states

    def read(self, ids: Sequence[ServerId]) -> dict[ServerId, ServerState]:
        """See IpvsDriver."""
        states: dict[ServerId, ServerState] = {}
        with self._lock:
            answers = self._batch.find([wire.get_server(self._kind, id_) for id_ in ids])
            for id_, answer in zip(ids, answers, strict=True):
                if isinstance(answer, int):
                    if answer != errno.ESRCH:
                        raise KernelError(f"reading {id_}", got=os.strerror(answer))
                    continue
                server = wire.server_of(answer)
                if server is not None:
                    states[id_] = ServerState(server, self._reals(id_))
        return states

    def apply(self, ops: Sequence[IpvsOp]) -> tuple[IpvsFailure, ...]:
        """See IpvsDriver."""
        kind = self._kind
        with self._lock:
            refused = self._batch.run(wire.request_of(op, kind) for op in ops)
        return tuple(IpvsFailure(ops[at], code) for at, code in refused)

    def set_timeouts(self, *, tcp_s: int, tcp_fin_s: int, udp_s: int) -> None:
        """See IpvsDriver."""
        wanted = (tcp_s, tcp_fin_s, udp_s)
        with self._lock:
            refused = self._batch.run([wire.set_timeouts(self._kind, wanted)])
        for _, code in refused:
            raise KernelError(f"IPVS timeouts {wanted} s", got=os.strerror(code))

    def timeouts(self) -> Timeouts:
        """See IpvsDriver."""
        with self._lock:
            for message in self._batch.get(wire.get_timeouts(self._kind)):
                return Timeouts(*wire.timeouts_of(message))
        raise KernelError("IPVS", needed="its timeouts", got="none")

    def close(self) -> None:
        """See IpvsDriver. May be called twice."""
        if not self._closed:
            self._closed = True
            with self._lock:
                self._worker.submit(self._ipvs.close).result()
                self._worker.shutdown()
                os.close(self._proc)

    def _take(self, opened: tuple[IPVS, socket.socket, int]) -> None:
        self._ipvs, sock, self._proc = opened
        self._kind: int = self._ipvs.prid
        self._batch = BatchSocket(sock, "IPVS")

    def _reopen(self) -> None:
        """Take a new socket and file, in the worker, which stays in this namespace; the old ones go.

        Raises:
            KernelMissingError: IPVS is not there any more, and could not be loaded.
        """
        old, proc = self._ipvs, self._proc
        self._take(self._worker.submit(_open).result())
        os.close(proc)
        self._worker.submit(old.close).result()

    def _reals(self, id_: ServerId) -> dict[RealServer, RealState]:
        return dict(map(wire.real_of, self._batch.get(wire.list_reals(self._kind, id_))))

    def _proc_lines(self) -> list[bytes]:
        os.lseek(self._proc, 0, os.SEEK_SET)
        parts: list[bytes] = []
        while part := os.read(self._proc, _PROC_READ_BYTES):
            parts.append(part)
        return b"".join(parts).splitlines()


def _open() -> tuple[IPVS, socket.socket, int]:
    """The socket in pyroute2's hands, the same for ours, and the open file."""
    # Asked for before pyroute2 does, which complains in the log where there is none.
    if not PROC_FILE.exists():
        load_module("ip_vs")
    try:
        proc = os.open(PROC_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise KernelMissingError("opening IPVS", needed="a kernel with ip_vs", got="none") from e
    except PermissionError as e:
        raise NoAnswerError("opening IPVS", needed="root") from e
    try:
        ipvs = IPVS()
        return ipvs, ipvs.asyncore.socket, proc
    except (NetlinkError, OSError) as e:
        os.close(proc)
        code = e.code if isinstance(e, NetlinkError) else e.errno
        if code in (errno.EPERM, errno.EACCES):
            raise NoAnswerError("opening IPVS", needed="root") from e
        raise KernelMissingError(
            "opening IPVS", needed="a kernel with ip_vs", got=os.strerror(code or 0)
        ) from e
