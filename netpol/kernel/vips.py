"""The VipDriver of a real kernel: a dummy link, the addresses on it and their local routes, by rtnetlink.

pyroute2 makes and removes the link; addresses and routes are bytes of our own in batches, since its
messages take milliseconds each. The kernel's own local route of an address has the address itself as its
source; ours has an address of the node, and two things follow from that: the kernel does not remove it
with the address, and it does remove it when the source leaves the node (see `misrouted`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netpol.kernel.modules import load_module
from netpol.kernel.netlink import NLM_F_DUMP, NLM_F_EXCL, Message, attributes, nla
from netpol.kernel.netlink_batch import BatchSocket, RefusedError, Request
from netpol.kernel.sysctl import keep_sysctl
from netpol.lib.errors import KernelError, KernelMissingError, NoAnswerError
from netpol.model.net import FAMILIES, Family, family_of

#: The link that is ours: what stands on it is ours too.
LINK = "knp-ipvs0"

# linux/rtnetlink.h, linux/if_addr.h, linux/if_link.h, linux/netlink.h
_GETLINK = 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NLM_F_REPLACE, _NLM_F_CREATE = 0x100, 0x400
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02
_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 6, 7
_RT_TABLE_LOCAL, _RTN_LOCAL, _SCOPE_HOST = 255, 2, 254
_PROTO_KERNEL, _PROTO_STATIC = 2, 4
#: Behind the kernel's own local route of IPv6, whose metric is 0 and which goes once ours is there.
_METRIC6 = 1024
_IFLA_IFNAME = 3
_IFF_UP = 0x1

#: How long the kernel's routes are waited for: its work queue takes a moment on an idle machine.
ROUTE_POLL_S, ROUTE_WAIT_S = 0.001, 1.0

_IFADDR = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_IFINFO = struct.Struct("=BBHiII")
_AF: dict[Family, int] = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


class _Step(NamedTuple):
    """One request for an address, and the refusals that mean that there was nothing to do."""

    address: bytes
    request: Request
    fine: tuple[int, ...]
    #: Whether what it removes may come only now, when the address is new.
    awaited: bool = False


class DummyVips:
    """A dummy link in the network namespace of the thread that constructs this.

    Raises:
        NoAnswerError: not root.
    """

    def __init__(self, link: str = LINK) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._closed = False
        #: Addresses that were added without a source: the kernel's route of each is there, or will be.
        self._unrouted: set[bytes] = set()
        # pyroute2 refuses a thread that runs an event loop, and has a socket for each thread: the worker
        # stays in this namespace.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netpol-vips")
        self._worker.submit(int).result()  # a thread begins where its maker is: now
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._batch = BatchSocket(self._socket, f"addresses on {link}")
        self._batch.strict()

    def dump(self) -> frozenset[bytes] | None:
        """See VipDriver. Addresses that are no host prefix, or link-local, are nobody's of ours."""
        with self._lock:
            index = self._find()[0]
            return None if index is None else frozenset(self._addresses(index))

    def misrouted(self, sources: Mapping[Family, bytes]) -> frozenset[bytes]:
        """See VipDriver."""
        with self._lock:
            index = self._find()[0]
            if index is None:
                return frozenset()
            there = self._addresses(index)
            routed: set[bytes] = set()
            for family, source in sources.items():
                if any(family_of(address) is family for address in there):
                    first: dict[bytes, bytes] = {}
                    for address, at in self._routes(index, family):
                        first.setdefault(address, at)  # listed in the order in which they count
                    routed |= {address for address, at in first.items() if at == source}
            return frozenset(a for a in there if family_of(a) in sources and a not in routed)

    def apply(
        self,
        *,
        add: Sequence[bytes],
        remove: Sequence[bytes],
        sources: Mapping[Family, bytes] | None = None,
    ) -> tuple[tuple[bytes, int], ...]:
        """See VipDriver.

        Raises:
            KernelMissingError: the kernel has no dummy links.
            KernelError: the link cannot be made.
        """
        with self._lock:
            index, up = self._find()
            if add and not up:
                # Up, or the addresses of IPv6 are not local.
                index = self._make(exists=index is not None)
            if index is None:
                return ()
            if any(family_of(address) is Family.V6 for address in add):
                self._worker.submit(self._allow_ipv6).result()
            steps = [
                step
                for address in dict.fromkeys(add)
                for step in _adding(index, address, (sources or {}).get(family_of(address)))
            ]
            for address in remove:
                steps += _removing(index, address)
            refused = [(steps[at], code) for at, code in self._run(steps)]
            self._retire_kernel_routes(steps, dict(refused))
            routed = {step.address for step in steps if step.awaited}
            added = {step.address for step in steps if step.request.kind == _NEWADDR}
            self._unrouted = (self._unrouted | added) - routed - set(remove)
        told: dict[bytes, int] = {}
        for step, code in refused:
            if code not in step.fine:
                told.setdefault(step.address, code)
        return tuple(told.items())

    def remove_link(self) -> None:
        """See VipDriver."""
        with self._lock:
            index = self._find()[0]
            if index is not None:
                self._in_worker(
                    lambda route: route.link("del", index=index), f"removing {self._link}"
                )

    def close(self) -> None:
        """See VipDriver. May be called twice."""
        if not self._closed:
            self._closed = True
            with self._lock:
                self._worker.shutdown()
                self._socket.close()

    # Below this line everything runs with the lock.

    def _run(self, steps: Sequence[_Step]) -> list[tuple[int, int]]:
        return self._batch.run(step.request for step in steps)

    def _retire_kernel_routes(self, steps: Sequence[_Step], refused: Mapping[_Step, int]) -> None:
        """Remove the kernel's routes of new IPv6 addresses, which it makes a moment after the address."""
        new = {s.address for s in steps if s.request.kind == _NEWADDR and s not in refused}
        new |= self._unrouted
        late = [step for step, code in refused.items() if step.awaited and step.address in new]
        wait_s = ROUTE_POLL_S
        end_s = time.monotonic() + ROUTE_WAIT_S
        while late and time.monotonic() < end_s:
            time.sleep(wait_s)
            wait_s *= 2
            late = [late[at] for at, code in self._run(late) if code == errno.ESRCH]
        # What is later still is told by `misrouted`.

    def _find(self) -> tuple[int | None, bool]:
        """The link's index, and whether it is up."""
        name = nla(_IFLA_IFNAME, self._link.encode() + b"\0")
        try:
            for message in self._batch.get(Request(_GETLINK, 0, bytes(_IFINFO.size) + name)):
                _family, _pad, _type, index, flags, _change = _IFINFO.unpack_from(message.payload)
                return index, bool(flags & _IFF_UP)
        except RefusedError as e:
            if e.code != errno.ENODEV:
                raise
        return None, False

    def _make(self, *, exists: bool) -> int:
        if not exists:
            self._create()
        index = self._find()[0]
        if index is None:
            raise KernelError(f"making {self._link}", got="it is gone again")
        self._in_worker(
            lambda route: route.link("set", index=index, state="up"), f"setting {self._link} up"
        )
        return index

    def _create(self) -> None:
        def create(route: IPRoute) -> None:
            route.link("add", ifname=self._link, kind="dummy")

        try:
            self._in_worker(create, f"making {self._link}")
        except KernelMissingError:
            # The kernel asks for the module itself where it can start modprobe.
            load_module("dummy")
            self._in_worker(create, f"making {self._link}")

    def _allow_ipv6(self) -> None:
        """Turn IPv6 on where new links have it off; runs in the worker, for its namespace."""
        keep_sysctl(f"net/ipv6/conf/{self._link}/disable_ipv6", "0")

    def _in_worker(self, work: Callable[[IPRoute], object], what: str) -> None:
        def body() -> None:
            with IPRoute() as route:
                work(route)

        try:
            self._worker.submit(body).result()
        except NetlinkError as e:
            if e.code in (errno.EPERM, errno.EACCES):
                raise NoAnswerError(what, needed="root") from e
            if e.code == errno.EOPNOTSUPP:
                raise KernelMissingError(what, needed="a kernel with dummy links") from e
            if e.code not in (errno.EEXIST, errno.ENODEV):  # somebody else was there first
                raise KernelError(what, got=os.strerror(e.code)) from e

    def _addresses(self, index: int) -> set[bytes]:
        found: set[bytes] = set()
        for family in FAMILIES:
            body = _IFADDR.pack(_AF[family], 0, 0, 0, index)
            for message in self._dump(Request(_GETADDR, NLM_F_DUMP, body)):
                _af, length, _flags, _scope, at = _IFADDR.unpack_from(message.payload)
                told = dict(attributes(message.payload[_IFADDR.size :]))
                address = told.get(_IFA_LOCAL) or told.get(_IFA_ADDRESS)
                if at != index or address is None or length != family.bits:
                    continue  # at: an old kernel filters nothing; length: fe80::/64 of the link
                found.add(bytes(address))
        return found

    def _routes(self, index: int, family: Family) -> Iterator[tuple[bytes, bytes]]:
        """Local routes through the link: each address, and its source (itself where none is named)."""
        rtmsg = _RTMSG.pack(_AF[family], 0, 0, 0, _RT_TABLE_LOCAL, 0, 0, _RTN_LOCAL, 0)
        oif = nla(_RTA_OIF, struct.pack("=I", index))
        for message in self._dump(Request(_GETROUTE, NLM_F_DUMP, rtmsg + oif)):
            _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(message.payload)
            told = dict(attributes(message.payload[_RTMSG.size :]))
            if (length, table, kind) != (family.bits, _RT_TABLE_LOCAL, _RTN_LOCAL):
                continue
            out = told.get(_RTA_OIF)
            if out is None or struct.unpack_from("=I", out)[0] != index or _RTA_DST not in told:
                continue
            yield bytes(told[_RTA_DST]), bytes(told.get(_RTA_PREFSRC, told[_RTA_DST]))

    def _dump(self, request: Request) -> Iterator[Message]:
        try:
            return self._batch.get(request)
        except RefusedError as e:
            # The link went, or the kernel has no such family.
            if e.code in (errno.ENODEV, errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                return iter(())
            raise


def _adding(index: int, address: bytes, source: bytes | None) -> Iterator[_Step]:
    family = family_of(address)
    yield _Step(
        address,
        Request(_NEWADDR, _NLM_F_CREATE | NLM_F_EXCL, _address(index, address)),
        (errno.EEXIST,),
    )
    if source is None:
        return
    route = _route(index, address, protocol=_PROTO_STATIC) + nla(_RTA_PREFSRC, source)
    if family is Family.V6:
        route += nla(_RTA_PRIORITY, struct.pack("=I", _METRIC6))
    # IPv4: in place of the kernel's.
    yield _Step(address, Request(_NEWROUTE, _NLM_F_CREATE | _NLM_F_REPLACE, route), ())
    if family is Family.V6:
        kernels = _route(index, address, protocol=_PROTO_KERNEL)
        yield _Step(address, Request(_DELROUTE, 0, kernels), (errno.ESRCH,), awaited=True)


def _removing(index: int, address: bytes) -> Iterator[_Step]:
    yield _Step(
        address, Request(_DELADDR, 0, _address(index, address)), (errno.EADDRNOTAVAIL, errno.ENODEV)
    )
    # Of any protocol: a route that stays would keep the address local.
    yield _Step(
        address,
        Request(_DELROUTE, 0, _route(index, address, protocol=0)),
        (errno.ESRCH, errno.ENODEV),
    )


def _address(index: int, address: bytes) -> bytes:
    family = family_of(address)
    flags = 0 if family is Family.V4 else _IFA_F_NODAD
    head = _IFADDR.pack(_AF[family], family.bits, flags, 0, index)
    return head + nla(_IFA_LOCAL, address) + nla(_IFA_ADDRESS, address)


def _route(index: int, address: bytes, *, protocol: int) -> bytes:
    family = family_of(address)
    # Zero for any would be the universe to IPv4, where a local route never is.
    scope = _SCOPE_HOST if family is Family.V4 else 0
    head = _RTMSG.pack(
        *(_AF[family], family.bits, 0, 0, _RT_TABLE_LOCAL, protocol, scope, _RTN_LOCAL, 0)
    )
    return head + nla(_RTA_DST, address) + nla(_RTA_OIF, struct.pack("=I", index))
