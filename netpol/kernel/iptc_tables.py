"""The TableDriver of hosts with legacy tables, in process, on python-iptables.

For small edits (no program is started) and for reading chains and counters. A transaction is its text,
line by line, on one libiptc handle, and one commit, so that it is as atomic as a restore. Bulk loads,
what python-iptables cannot build, and a dump that holds foreign rules go through iptables-legacy-*.

python-iptables 1.2.0 has traps, each dealt with here:

- it takes no xtables lock, so that a commit can undo another writer's change: the lock is held from
  refresh to commit;
- `Target.reset` and `Match.reset` leave the C side a pointer to memory that Python has freed (NFLOG
  prefixes write there): the buffer is kept;
- asking a Target whether its name is a chain opens, and so creates, all five tables: `_OneTableRule`;
- `append_rule` and `parameters` have libxtables print into a pipe put in the place of the process's
  file descriptor 1: entries are appended as bytes and read by `xt_decode`;
- tables are singletons of the process and their handles belong to a network namespace: every call opens
  the handle anew, in the driver's own thread, and closes it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from netpol.kernel.drivers import TableDump, TableError, TableTransaction, Variant
from netpol.kernel.iptc_build import CannotBuildError, build_rule, library
from netpol.kernel.rule_parse import split_words
from netpol.kernel.table_text import Counters, hook_states, transaction_text
from netpol.kernel.tables import LOCK_WAIT_S, RestoreTables, legacy_tables
from netpol.kernel.xt_decode import decode_rule
from netpol.lib.errors import KernelMissingError, NoAnswerError
from netpol.model.ids import ChainName, SetName
from netpol.model.net import Family
from netpol.model.ruleset import Hook, Jump, Rule

T = TypeVar("T")

#: Building a rule takes 0.1 ms, starting iptables-legacy-restore 2 ms: above this it is faster.
IN_PROCESS_RULES_MAX = 20
#: XT_LOCK_NAME of iptables.
DEFAULT_LOCK_FILE = "/run/xtables.lock"
_LOCK_POLL_S = 0.02
#: SO_IP_SET, IP_SET_OP_GET_BYINDEX and the protocol version that goes with it.
_SO_IP_SET, _GET_BY_INDEX, _SET_PROTOCOL = 83, 7, 6

#: libxtables and the singletons are the process's: one driver at a time.
_process = threading.RLock()


class IptcTables:
    """Legacy tables in the network namespace of the thread that constructs this.

    Args:
        fallback: does what this driver does not: RestoreTables of the legacy variant, for the same
            namespace, lock and owner.
        lock_file: the xtables lock; None takes $XTABLES_LOCKFILE or iptables' own.
        lock_wait_s: how long to wait for another holder of it.
        in_process_rules_max: transactions with more rules than this go through the fallback.

    Raises:
        KernelMissingError: python-iptables or its libraries are not there.
    """

    variant = Variant.LEGACY

    def __init__(
        self,
        fallback: RestoreTables,
        *,
        lock_file: str | None = None,
        lock_wait_s: int = LOCK_WAIT_S,
        in_process_rules_max: int = IN_PROCESS_RULES_MAX,
    ) -> None:
        self._fallback = fallback
        self._owner = fallback.owner
        self._rules_max = in_process_rules_max
        self._lock_wait_s = lock_wait_s
        self._lock_file = lock_file
        #: How many transactions and dumps the fallback did.
        self.delegated = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netpol-iptc")
        try:
            self._run(library)
        except BaseException:
            self._worker.shutdown()
            raise

    def dump(self, table: str, family: Family) -> TableDump:
        """See TableDriver."""
        found = self._run(lambda: self._dump(table, family))
        if found is not None:
            return found
        self.delegated += 1
        return self._fallback.dump(table, family)

    def fingerprint(self, table: str, family: Family) -> str:
        """See TableDriver; by the tool, whose text costs this process nothing to make."""
        return self._fallback.fingerprint(table, family)

    def generation(self) -> int | None:
        """See TableDriver."""
        return self._fallback.generation()

    def counters(self, table: str, family: Family) -> dict[ChainName, Counters]:
        """See TableDriver."""
        return self._run(lambda: self._counters(table, family))

    def apply(self, tx: TableTransaction) -> None:
        """See TableDriver."""
        lines = transaction_text(tx, self._owner).splitlines()
        if sum(len(rules) for rules in tx.replace.values()) > self._rules_max:
            self.delegated += 1
            self._fallback.apply(tx)
            return
        try:
            self._run(lambda: self._apply(tx, lines))
        except CannotBuildError:
            self.delegated += 1
            self._fallback.apply(tx)

    def close(self) -> None:
        """End the driver's thread."""
        self._worker.shutdown()

    def _run(self, work: Callable[[], T]) -> T:
        def locked() -> T:
            with _process:
                return work()

        return self._worker.submit(locked).result()

    # Below this line everything runs in the worker, one driver of the process at a time.

    def _dump(self, table: str, family: Family) -> TableDump | None:
        if table not in legacy_tables(family):
            return TableDump()
        chains: dict[ChainName, tuple[Rule, ...]] = {}
        jumps: dict[Hook, list[ChainName | None]] = {}
        known = {str(hook): hook for hook in Hook}
        names = cache(set_name)
        with _handle(table, family) as handle:
            for name in _chain_names(handle):
                own = self._owner.owns(name)
                if not own and name not in known:
                    continue
                rules = [
                    decode_rule(entry, family=family, target=target, set_names=names)
                    for entry, target in _entries(handle, name)
                ]
                if not own:
                    jumps[known[name]] = [_plain_jump(rule) for rule in rules]
                elif any(rule is None for rule in rules):
                    return None
                else:
                    chains[ChainName(name)] = tuple(rule for rule in rules if rule is not None)
        return TableDump(chains, hook_states(jumps, self._owner))

    def _counters(self, table: str, family: Family) -> dict[ChainName, Counters]:
        if table not in legacy_tables(family):
            return {}
        with _handle(table, family) as handle:
            return {
                ChainName(name): tuple(_rule_counters(handle, name))
                for name in _chain_names(handle)
                if self._owner.owns(name)
            }

    def _apply(self, tx: TableTransaction, lines: list[str]) -> None:
        with self._xtables_lock(), _handle(tx.table, tx.family) as handle:
            for number, line in enumerate(lines, 1):
                try:
                    _apply_line(handle, tx.family, line)
                except library().errors as e:
                    raise _refused(tx, number, line, str(e)) from e
            try:
                handle.commit()
            except library().errors as e:
                raise _refused(tx, len(lines), "COMMIT", str(e)) from e

    @contextmanager
    def _xtables_lock(self) -> Iterator[None]:
        path = self._lock_file or os.environ.get("XTABLES_LOCKFILE", DEFAULT_LOCK_FILE)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except PermissionError as e:
            raise NoAnswerError(f"opening {path}", needed="root") from e
        try:
            deadline = time.monotonic() + self._lock_wait_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as e:
                    if time.monotonic() > deadline:
                        raise TableError(
                            f"another program has held {path} for {self._lock_wait_s} s",
                            retryable=True,
                        ) from e
                    time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(fd)


@contextmanager
def _handle(table: str, family: Family) -> Iterator[Any]:
    """A fresh handle on a table in this thread's namespace; what is not committed is forgotten."""
    lib = library()
    kind = lib.tables[family]
    try:
        handle = kind(table, autocommit=False)
        handle.refresh()
    except lib.errors as e:
        text = str(e)
        if "Permission denied" in text or "you must be root" in text:
            raise NoAnswerError(f"opening table {table}", needed="root", got=text) from e
        raise KernelMissingError(f"table {table} (IPv{family}, legacy)", got=text) from e
    try:
        yield handle
    finally:
        handle.close()


def _apply_line(handle: Any, family: Family, line: str) -> None:
    """Do one line of a transaction's text."""
    if line.startswith(":"):
        name = line[1:].split(" ", 1)[0]
        if handle.is_chain(name):
            handle.flush_entries(name)
        else:
            handle.create_chain(name)
        return
    words = split_words(line)
    match words:
        case ["-A", chain, *rest]:
            handle.append_entry(chain, build_rule(handle, family, rest).rule)
        case ["-I", chain, place, *rest]:
            handle.insert_entry(chain, build_rule(handle, family, rest).rule, int(place) - 1)
        case ["-D", chain, *rest]:
            rule = build_rule(handle, family, rest)
            blob = rule.rule  # also computes the offsets that the mask needs
            handle.delete_entry(chain, blob, rule.mask)
        case ["-X", chain]:
            handle.delete_chain(chain)
        case ["COMMIT"]:
            return  # the caller's, so that its error is told from a line's
        case _ if not line.startswith("*"):
            raise CannotBuildError(line)


def _refused(tx: TableTransaction, number: int, line: str, said: str) -> TableError:
    return TableError(
        f"table {tx.table} (IPv{tx.family}) refused a transaction at line {number} ({line})",
        retryable="Resource temporarily unavailable" in said,
        line=number,
        got=said,
    )


def _chain_names(handle: Any) -> list[str]:
    return [chain.name for chain in handle.chains]


def _raw_entries(handle: Any, chain: str) -> Iterator[Any]:
    entry = handle.first_rule(chain)
    while entry:
        yield entry
        entry = handle.next_rule(entry)


def _entries(handle: Any, chain: str) -> Iterator[tuple[bytes, str]]:
    """Each rule of a chain: its bytes, and the name of its target."""
    for entry in _raw_entries(handle, chain):
        target = handle.get_target(entry) or b""
        raw = ctypes.string_at(ctypes.addressof(entry), entry.next_offset)
        yield raw, target.decode()


def _rule_counters(handle: Any, chain: str) -> Iterator[tuple[int, int]]:
    for entry in _raw_entries(handle, chain):
        yield entry.counters.pcnt, entry.counters.bcnt


def _plain_jump(rule: Rule | None) -> ChainName | None:
    if rule is not None and isinstance(rule.action, Jump) and rule == Rule(rule.action):
        return rule.action.chain
    return None


_libc = ctypes.CDLL(None, use_errno=True)


def set_name(index: int) -> SetName:
    """Ask the kernel for the name of a set by its index (linux/netfilter/ipset/ip_set.h)."""
    # struct ip_set_req_get_set: op, version, then a union of the index and the name.
    request = ctypes.create_string_buffer(40)
    ctypes.memmove(request, _GET_BY_INDEX.to_bytes(4, "little"), 4)
    ctypes.memmove(ctypes.addressof(request) + 4, _SET_PROTOCOL.to_bytes(4, "little"), 4)
    ctypes.memmove(ctypes.addressof(request) + 8, index.to_bytes(2, "little"), 2)
    size = ctypes.c_uint32(len(request))
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        failed = _libc.getsockopt(
            sock.fileno(), socket.SOL_IP, _SO_IP_SET, request, ctypes.byref(size)
        )
    name = request.raw[8:].split(b"\0", 1)[0].decode()
    if failed or not name:
        raise TableError(f"no set has index {index}", retryable=True)
    return SetName(name)
