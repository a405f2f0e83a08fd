"""The servers of the lab's pods: on every declared port something that answers with the pod's name.

Owns which pod serves what, and what `kubectl logs` shows of it. All pods share the caller's loop; a pod
costs a few sockets, no thread and no process. Sockets are made inside the pod's namespace by one private
thread that goes there and comes back. Ports that a pod does not declare stay closed: TCP is reset, UDP
gets the kernel's ICMP error, SCTP (which the kernel need not know) an ABORT.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from netpol.lab import netsock
from netpol.lab.podcheck import check_servers
from netpol.lab.responders import Answered, SctpServer, TcpServer, UdpServer, is_loopback
from netpol.lib.errors import InputError, KernelError, NoAnswerError
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import FAMILIES

#: Lines that `log` keeps of a pod, and that a follower may lag behind.
LOG_LINES = 1000

#: Files that hundreds of pods and their clients may need; many systems start with 1,024.
WANTED_FILES = 65536

#: A port to serve: protocol and number.
Port = tuple[Protocol, int]

_NetnsId = tuple[int, int]


class _Sockets(NamedTuple):
    """What the namespace thread made for one pod, ready to be served."""

    ports: list[tuple[Protocol, int, socket.socket]]
    sctp: list[socket.socket]


@dataclass(slots=True)
class _SctpSite:
    """The SCTP answers of one namespace, which pods in the host's network share."""

    servers: list[SctpServer]
    open_ports: dict[int, Answered]
    users: int = 0


@dataclass(slots=True)
class _Pod:
    key: ObjectKey
    netns: str
    netns_id: _NetnsId
    text: bytes
    ports: tuple[Port, ...]
    servers: list[TcpServer | UdpServer] = field(default_factory=list)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    followers: set[asyncio.Queue[str | None]] = field(default_factory=set)
    checking: int = 0


def _utc_now() -> datetime:
    return datetime.now(UTC)


class PodServers:
    """The servers of all pods that one supervisor runs.

    Args:
        now: the clock of log lines.
    """

    def __init__(self, *, now: Callable[[], datetime] = _utc_now) -> None:
        self._now = now
        self._pods: dict[ObjectKey, _Pod] = {}
        self._sctp: dict[_NetnsId, _SctpSite] = {}
        self._answers: Counter[bytes] = Counter()
        netsock.raise_file_limit(WANTED_FILES)
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="lab-netns")

    async def add(
        self, key: ObjectKey, netns: str, ports: Sequence[Port], answer: str | None = None
    ) -> None:
        """Serve a pod's ports; a pod that is served already is replaced and keeps its log.

        Args:
            key: the pod.
            netns: name or path of its namespace.
            ports: what its containers declare; repetitions count once.
            answer: what to say instead of the pod's name.

        Raises:
            InputError: a protocol that has no server.
            KernelError: no such namespace, or ports that are taken there; nothing is served then.
        """
        wanted = tuple(dict.fromkeys(ports))
        for protocol, number in wanted:
            if protocol not in (Protocol.TCP, Protocol.UDP, Protocol.SCTP):
                raise InputError(
                    f"pod {key} port {number}", needed="TCP, UDP or SCTP", got=str(protocol)
                )
        old = self._pods.get(key)
        await self.remove(key)
        netns_id = netsock.netns_id(netns)
        made = await asyncio.get_running_loop().run_in_executor(
            self._maker, _make_sockets, netns, wanted, netns_id not in self._sctp
        )
        text = (key.name if answer is None else answer).encode() + b"\n"
        pod = _Pod(key, netns, netns_id, text, wanted)
        if old is not None:
            pod.lines = old.lines
        self._pods[key] = pod
        self._answers[text] += 1
        self._serve(pod, made)

    def _serve(self, pod: _Pod, made: _Sockets) -> None:
        for protocol, number, sock in made.ports:
            answered = self._logger(pod, protocol, number)
            pod.servers.append(
                TcpServer(sock, text=pod.text, answered=answered)
                if protocol is Protocol.TCP
                else UdpServer(sock, text=pod.text, answered=answered, answers=self._answers)
            )
        site = self._sctp.get(pod.netns_id)
        if site is None:
            open_ports: dict[int, Answered] = {}
            site = _SctpSite([SctpServer(s, answered=open_ports) for s in made.sctp], open_ports)
            self._sctp[pod.netns_id] = site
        else:  # two pods of one namespace were added at the same time
            _close_all(made.sctp)
        site.users += 1
        for protocol, number in pod.ports:
            if protocol is Protocol.SCTP:
                site.open_ports[number] = self._logger(pod, protocol, number)

    def _logger(self, pod: _Pod, protocol: Protocol, number: int) -> Answered:
        def answered(address: str, port: int) -> None:
            if pod.checking and is_loopback(address):
                return
            where = f"[{address}]" if ":" in address else address
            stamp = self._now().isoformat(timespec="microseconds").replace("+00:00", "Z")
            line = f"{stamp} {protocol} {number} from {where}:{port} answered"
            pod.lines.append(line)
            for queue in pod.followers:
                _put(queue, line)

        return answered

    async def remove(self, key: ObjectKey) -> None:
        """Stop serving a pod and end its followers; harmless when it is not served."""
        pod = self._pods.pop(key, None)
        if pod is None:
            return
        for server in pod.servers:
            server.close()
        self._answers[pod.text] -= 1
        if self._answers[pod.text] <= 0:
            del self._answers[pod.text]
        site = self._sctp[pod.netns_id]
        for protocol, number in pod.ports:
            if protocol is Protocol.SCTP:
                site.open_ports.pop(number, None)
        site.users -= 1
        if site.users == 0:
            del self._sctp[pod.netns_id]
            for sctp_server in site.servers:
                sctp_server.close()
        for queue in pod.followers:
            _put(queue, None)

    async def close(self) -> None:
        """Stop serving everything."""
        for key in tuple(self._pods):
            await self.remove(key)
        self._maker.shutdown(wait=True)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._pods

    def log(self, key: ObjectKey) -> list[str]:
        """The last lines of a pod: "TIME TCP 80 from ADDRESS:PORT answered".

        Connections that were reset before the answer leave no line.

        Raises:
            NoAnswerError: the pod is not served.
        """
        return list(self._pod(key).lines)

    async def follow(self, key: ObjectKey, *, tail: int | None = None) -> AsyncIterator[str]:
        """Yield the lines held (the last `tail` of them) and then every new one until the pod goes.

        A follower that lags by more than `LOG_LINES` loses the oldest lines.

        Raises:
            NoAnswerError: the pod is not served.
        """
        pod = self._pod(key)
        queue: asyncio.Queue[str | None] = asyncio.Queue(LOG_LINES)
        held = list(pod.lines)
        pod.followers.add(queue)
        try:
            for line in held if tail is None else held[len(held) - min(tail, len(held)) :]:
                yield line
            while (new := await queue.get()) is not None:
                yield new
        finally:
            pod.followers.discard(queue)

    async def check(self, key: ObjectKey, *, timeout_s: float = 2.0) -> list[str]:
        """Ask every server of a pod from inside its namespace; returns what did not answer as it should.

        Raises:
            NoAnswerError: the pod is not served.
        """
        pod = self._pod(key)
        pod.checking += 1
        try:
            return await check_servers(
                netns=pod.netns,
                ports=pod.ports,
                text=pod.text,
                maker=self._maker,
                timeout_s=timeout_s,
            )
        finally:
            pod.checking -= 1

    def _pod(self, key: ObjectKey) -> _Pod:
        pod = self._pods.get(key)
        if pod is None:
            raise NoAnswerError(f"no servers run for pod {key}")
        return pod


def _put(queue: asyncio.Queue[str | None], line: str | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(line)


def _close_all(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _make_sockets(netns: str, ports: Sequence[Port], with_sctp: bool) -> _Sockets:  # noqa: FBT001  executor call
    """Make a pod's sockets inside its namespace: all of them or none."""
    made = _Sockets([], [])
    taken = []
    with netsock.entered(netns):
        for protocol, number in ports:
            if protocol is Protocol.SCTP:
                continue
            kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
            try:
                made.ports.append((protocol, number, netsock.dual_stack(kind, number)))
            except OSError as e:
                taken.append(f"{number}/{protocol} ({e.strerror})")
        for family in FAMILIES if with_sctp else ():
            try:
                made.sctp.append(netsock.raw_sctp(family))
            except OSError as e:
                if made.sctp:  # IPv4 is there; a kernel without IPv6 has no second one
                    continue
                taken.append(f"raw SCTP ({e.strerror})")
    if taken:
        _close_all([s for _, _, s in made.ports] + made.sctp)
        raise KernelError(f"cannot serve in {netns}", needed="free ports", got=", ".join(taken))
    return made
