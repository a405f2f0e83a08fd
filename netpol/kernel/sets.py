"""The SetDriver of a real kernel: ipset over netlink, on one pyroute2 IPSet socket.

pyroute2 opens the socket and does what happens once a set (create, destroy); members go through the
same socket as pre-encoded frames, and listings are walked by `set_wire`, because pyroute2's message
classes take seconds for 50,000 members.

The socket lives in a thread of its own, started by the constructor: pyroute2 keeps a socket and an
event loop per calling thread, and refuses calls inside a running loop. With the worker, the driver
stays in the network namespace of the thread that made it, and may be called from anywhere. A socket
stays in its namespace too, so that plain changes of members are sent by the calling thread itself.
"""

from __future__ import annotations

import errno
import select
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, assert_never

from pyroute2 import IPSet
from pyroute2.netlink.exceptions import IPSetError, NetlinkError

from netpol.kernel import netlink, set_wire
from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    EmptySet,
    SetDump,
    SetError,
    SetOp,
    SetTransaction,
)
from netpol.kernel.set_text import (
    DEFAULT_MARK_MASK,
    check_name,
    check_owner,
    hashsize_for,
    maxelem_for,
    member_text,
    restore_text,
)
from netpol.kernel.set_wire import RawSet
from netpol.lib.errors import KernelError, KernelMissingError, NetpolError, NoAnswerError
from netpol.model.ids import POLICY, Owner, SetName
from netpol.model.ruleset import Member, SetKind, SetSpec

__all__ = ["NetlinkSets", "restore_text"]

T = TypeVar("T")

#: No answer from the kernel within this time is a defect, not load: requests are synchronous.
ANSWER_TIMEOUT_S = 10.0
#: A listing's datagrams are at most 32 KB, an error echoes its request (64 KB).
RECEIVE_BYTES = 1 << 18
#: pyroute2 numbers its requests below this.
FIRST_SEQ = 1 << 20

#: linux/netfilter/ipset/ip_set.h, enum ipset_errno, and each type's own from 4352.
_REASONS = {
    errno.ENOENT: "no such set",
    errno.EEXIST: "a set of this name and another type exists",
    errno.EPERM: "not permitted",
    errno.ENOMEM: "out of memory",
    4097: "protocol error, or a member of another family or type",
    4098: "the kernel lacks this set type",
    4099: "the kernel's limit of sets is reached",
    4100: "the set is in use",
    4104: "invalid prefix length (0 cannot be stored)",
    4108: "the set is referenced",
    4352: "the set is full",
}
_KINDS = {str(kind): kind for kind in SetKind}


def reason(code: int) -> str:
    """Say an ipset error number in words."""
    return _REASONS.get(code) or (
        f"error {code}" if code >= 4096 else errno.errorcode.get(code, f"error {code}")
    )


class NetlinkSets:
    """ipset in the network namespace of the thread that constructs this.

    Args:
        mark_mask: the mark field; the mask that members' marks are stored with.
        owner: whose sets this driver sees and touches.

    Raises:
        KernelMissingError: the kernel has no ipset.
        NoAnswerError: not root.
    """

    def __init__(self, *, mark_mask: int = DEFAULT_MARK_MASK, owner: Owner = POLICY) -> None:
        self._mark_mask = mark_mask
        self._owner = owner
        self._seq = FIRST_SEQ
        self._closed = False
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netpol-ipset")
        try:
            self._ipset = self._run(_open)
            # Asked in the worker: in another thread it would be another socket, of another namespace.
            self._socket = self._run(lambda: self._ipset.asyncore.socket)
        except BaseException:
            self._worker.shutdown()
            raise

    def dump(self, names: Sequence[SetName] | None = None) -> dict[SetName, SetDump]:
        """See SetDriver. A mark stored with another mask, or a nomatch flag, reads as FOREIGN_MARK."""
        return self._run(lambda: self._dump(names))

    def headers(self) -> dict[SetName, int]:
        """See SetDriver."""
        return {SetName(raw.name): raw.elements for raw in self._run(self._headers).values()}

    def apply(self, tx: SetTransaction) -> None:
        """See SetDriver."""
        if all(isinstance(op, AddMembers | DeleteMembers | EmptySet) for op in tx.ops):
            # Own frames alone: any thread may send them, and a pod that joins waits for no other.
            with self._lock:
                self._apply(tx)
            return
        self._run(lambda: self._apply(tx))

    def close(self) -> None:
        """See SetDriver. May be called twice."""
        if not self._closed:
            self._run(self._ipset.close)
            self._closed = True
            self._worker.shutdown()

    def _run(self, work: Callable[[], T]) -> T:
        def alone() -> T:
            with self._lock:
                return work()

        return self._worker.submit(alone).result()

    # Below this line everything runs in the worker, or in the caller's thread where no call of pyroute2
    # is made, always with the lock.

    def _apply(self, tx: SetTransaction) -> None:
        for op in tx.ops:
            self._apply_one(op)

    def _apply_one(self, op: SetOp) -> None:
        check_owner(op, self._owner)
        if isinstance(op, CreateSet):
            self._create(op)
        elif isinstance(op, AddMembers):
            self._bulk(set_wire.CMD_ADD, op.spec, op.members.items())
        elif isinstance(op, DeleteMembers):
            self._bulk(set_wire.CMD_DEL, op.spec, ((member, None) for member in op.members))
        elif isinstance(op, EmptySet):
            self._empty(op.spec.name)
        elif isinstance(op, DestroySet):
            self._destroy(op.name)
        else:
            assert_never(op)

    def _create(self, op: CreateSet) -> None:
        spec = op.spec
        check_name(spec.name)
        try:
            self._ipset.create(
                spec.name,
                stype=str(spec.kind),
                family=set_wire.address_family(spec.family),
                exclusive=True,
                maxelem=maxelem_for(op.size),
                hashsize=hashsize_for(op.size),
                skbinfo=spec.marks,
            )
        except (IPSetError, NetlinkError) as e:
            what = f"creating {_describe(spec)}"
            if e.code != errno.EEXIST:
                raise _error(what, name=spec.name, code=e.code) from e
            # Told apart here: left to itself the kernel takes a set of the other family for equal, and
            # an equal one with another ceiling for another.
            raw = next(iter(self._list(spec.name, headers_only=True)), None)
            if raw is None or not _is(raw, spec):
                got = "" if raw is None else f": {_describe_raw(raw)} exists"
                raise SetError(what + got, name=spec.name, code=e.code) from e

    def _empty(self, name: SetName) -> None:
        self._send(set_wire.flush_message(name, seq=self._next_seq()))
        code, _ = self._acknowledgement()
        if code:
            raise _error(f"emptying set {name}", name=name, code=code)

    def _destroy(self, name: SetName) -> None:
        try:
            self._ipset.destroy(name)
        except (IPSetError, NetlinkError) as e:
            if e.code != errno.ENOENT:
                raise _error(f"destroying set {name}", name=name, code=e.code) from e

    def _bulk(
        self, command: int, spec: SetSpec, members: Iterable[tuple[Member, int | None]]
    ) -> None:
        verb = "adding to" if command == set_wire.CMD_ADD else "deleting from"
        # One frame at a time: the kernel works inside send(), so that a frame more per send gains
        # nothing, and nothing after the refused member is applied.
        for payload, held in set_wire.frames(members, mark_mask=self._mark_mask):
            self._send(
                set_wire.bulk_message(
                    command, name=spec.name, payload=payload, seq=self._next_seq()
                )
            )
            code, line = self._acknowledgement()
            if code == 0:
                continue
            member = held[line - 1] if 1 <= line <= len(held) else None
            tail = "" if member is None else f" at member {member_text(member)}"
            raise _error(f"{verb} set {spec.name}{tail}", name=spec.name, code=code, member=member)

    def _headers(self) -> dict[str, RawSet]:
        return {
            raw.name: raw
            for raw in self._list(None, headers_only=True)
            if self._owner.owns(raw.name)
        }

    def _dump(self, names: Sequence[SetName] | None) -> dict[SetName, SetDump]:
        # Set by set: a host's other sets (kube-proxy's, fail2ban's) may be large.
        wanted = sorted(self._headers()) if names is None else names
        dumps: dict[SetName, SetDump] = {}
        for name in wanted:
            for raw in self._list(name, headers_only=False):
                dumps[SetName(raw.name)] = _dump_of(raw)
        return dumps

    def _list(self, name: str | None, *, headers_only: bool) -> Iterable[RawSet]:
        """List one set (nothing where it is absent) or all."""
        seq = self._next_seq()
        self._send(set_wire.list_message(name, headers_only=headers_only, seq=seq))
        sets: dict[str, RawSet] = {}
        for message in self._answers(seq):
            if message.type in (netlink.NLMSG_DONE, netlink.NLMSG_ERROR):
                code = netlink.error_code(message.payload)
                if code not in (0, errno.ENOENT):
                    raise _error("listing sets", name=SetName(name or ""), code=code)
                break
            set_wire.decode_list(
                message.payload[netlink.NFGEN_SIZE :], sets, mark_mask=self._mark_mask
            )
        return sets.values()

    def _acknowledgement(self) -> tuple[int, int]:
        """Wait for the answer to the last request: (error number or 0, refused line or 0)."""
        for message in self._answers(self._seq):
            if message.type == netlink.NLMSG_ERROR:
                code = netlink.error_code(message.payload)
                if code == 0:
                    return 0, 0
                return code, set_wire.refused_line(netlink.echoed_attributes(message.payload))
        raise KernelError("ipset", needed="an acknowledgement", got="end of messages")

    def _answers(self, seq: int) -> Iterator[netlink.Message]:
        """The messages of the answer to a request; those of older ones are passed over."""
        sock = self._socket
        ready = select.poll()  # select(2) refuses descriptors over 1023
        ready.register(sock, select.POLLIN)
        while True:
            if not ready.poll(ANSWER_TIMEOUT_S * 1000):
                raise KernelError("ipset", needed=f"an answer within {ANSWER_TIMEOUT_S:.0f} s")
            for message in netlink.messages(sock.recv(RECEIVE_BYTES)):
                if message.seq == seq:
                    yield message

    def _send(self, frame: bytes) -> None:
        # Between pyroute2's own calls its loop does not run, so that nobody else reads the socket.
        self._socket.send(frame)

    def _next_seq(self) -> int:
        self._seq = self._seq + 1 if self._seq < 0xFFFFFFF0 else FIRST_SEQ
        return self._seq


def _open() -> IPSet:
    try:
        return IPSet()
    except PermissionError as e:
        raise NoAnswerError("opening ipset", needed="root") from e
    except (NetlinkError, OSError) as e:
        code = e.code if isinstance(e, NetlinkError) else e.errno
        if code in (errno.EPERM, errno.EACCES):
            raise NoAnswerError("opening ipset", needed="root") from e
        raise KernelMissingError(
            "opening ipset", needed="a kernel with ip_set", got=reason(code or 0)
        ) from e


def _error(what: str, *, name: SetName, code: int, member: Member | None = None) -> NetpolError:
    if code in (errno.EPERM, errno.EACCES):
        return NoAnswerError(what, needed="root")
    if code == 4098:
        return KernelMissingError(what, needed="this set type", got=reason(code))
    return SetError(f"{what}: {reason(code)}", name=name, code=code, member=member)


def _is(raw: RawSet, spec: SetSpec) -> bool:
    return (
        raw.type_name == spec.kind
        and raw.family is spec.family
        and raw.marks == spec.marks
        and not raw.strange
    )


def _dump_of(raw: RawSet) -> SetDump:
    kind = _KINDS.get(raw.type_name)
    name = SetName(raw.name)
    if kind is None or raw.family is None or raw.strange:
        raise SetError(
            f"set {raw.name} is not one of ours: {_describe_raw(raw)}",
            name=name,
            code=errno.EEXIST,
            needed="a set that netpol made, or none under this name",
        )
    spec = SetSpec(name, kind, raw.family, raw.marks)
    return SetDump(spec, raw.members, raw.references)


def _describe(spec: SetSpec) -> str:
    return f"set {spec.name} ({spec.kind}, IPv{spec.family}{', marks' if spec.marks else ''})"


def _describe_raw(raw: RawSet) -> str:
    family = "" if raw.family is None else f", IPv{raw.family}"
    extras = ", timeout or netmask" if raw.strange else ""
    return f"a set of type {raw.type_name}{family}{', marks' if raw.marks else ''}{extras}"
