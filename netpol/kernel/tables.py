"""The TableDriver of a real kernel through iptables-restore and iptables-save, in either variant.

One transaction is one run of the tool and one atomic change of one table. The text of it, and the
reading of what is there, are `table_text`'s.

Differences between the variants that show here (iptables 1.8.9): nft has no lock and retries by
itself; its table comes into being with the first write, while for legacy already looking at it
creates it, so that looking asks the kernel first which tables exist. nft says "does not exist" of a
chain with the number of a later line; legacy gives no reason for what the kernel refuses at COMMIT.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from netpol.kernel.drivers import TableDump, TableError, TableTransaction, Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.nft_generation import generation
from netpol.kernel.table_text import (
    Counters,
    parse_counters,
    parse_save,
    transaction_text,
    without_others,
)
from netpol.lib.errors import KernelMissingError, NetpolError, NoAnswerError
from netpol.model.ids import POLICY, ChainName, Owner
from netpol.model.net import Family

__all__ = ["RestoreTables", "transaction_text"]

T = TypeVar("T")

#: How long to wait for another program that holds the xtables lock (legacy).
LOCK_WAIT_S = 5
#: A run that takes longer hangs: the largest measured load (50,000 rules, nft) takes 2 s.
RUN_TIMEOUT_S = 60.0
#: The exit status for a lock that was not had, and of nft for what the kernel refused.
RC_RESOURCE = 4

_TOOLS = {Family.V4: "iptables", Family.V6: "ip6tables"}
_NAMES_FILES = {Family.V4: "ip_tables_names", Family.V6: "ip6_tables_names"}
_LINE = re.compile(r"\bline:? (\d+)")
_MISSING = re.compile(
    r"Chain '([^']+)' does not exist|Set (\S+) doesn't exist|load target `([^']+)'"
)
#: What iptables-save prints before the rules that says nothing of them: the date, counters of hooks.
_VOLATILE = re.compile(r"^#.*$| \[\d+:\d+\]$", re.MULTILINE)
_RETRYABLE = (
    "holding the xtables lock",
    "Can't lock",
    "Resource temporarily unavailable",
    "Device or resource busy",
    "Interrupted system call",
)


class RestoreTables:
    """iptables-restore and -save of one variant.

    Args:
        variant: whose tools to run.
        netns: the network namespace (name or path) to run them in; None is the caller's.
        lock_file: the xtables lock; None leaves $XTABLES_LOCKFILE or the tool's default.
        lock_wait_s: how long to wait for another holder of it (legacy).
        owner: whose chains and jumps this driver sees and touches.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        netns: str | None = None,
        lock_file: str | None = None,
        lock_wait_s: int = LOCK_WAIT_S,
        owner: Owner = POLICY,
    ) -> None:
        self.variant = variant
        self.owner = owner
        self._netns = netns
        self._wait = ["--wait", str(lock_wait_s)]
        self._fingerprints: dict[tuple[str, Family], tuple[int, str]] = {}
        self._environment = dict(os.environ) | {"LC_ALL": "C"}
        if lock_file is not None:
            self._environment["XTABLES_LOCKFILE"] = lock_file

    def dump(self, table: str, family: Family) -> TableDump:
        """See TableDriver."""
        return parse_save(self.save_text(table, family), self.owner)

    def fingerprint(self, table: str, family: Family) -> str:
        """See TableDriver. Where nf_tables has made no transaction since, the last answer holds."""
        number = self.generation()
        known = self._fingerprints.get((table, family))
        if known is not None and number is not None and known[0] == number:
            return known[1]
        # The number was read before the text: at worst the text is newer, and is read once more.
        found = self._fingerprint(table, family)
        if number is not None:
            self._fingerprints[table, family] = number, found
        return found

    def generation(self) -> int | None:
        """See TableDriver. Legacy tables are not counted."""
        return self._in_netns(generation) if self.variant is Variant.NFT else None

    def _fingerprint(self, table: str, family: Family) -> str:
        # Chains of rooms that are excluded are no change: each would cost the owner a dump. What else
        # other rooms and programs do in the table is one, which a dump then finds to be none of ours.
        saved = without_others(self.save_text(table, family), self.owner)
        chains, mark, rules = saved.partition("\n-A ")
        text = _VOLATILE.sub("", chains) + mark + rules.rpartition("\nCOMMIT")[0]
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def counters(self, table: str, family: Family) -> dict[ChainName, Counters]:
        """See TableDriver."""
        return parse_counters(self.save_text(table, family, counters=True), self.owner)

    def apply(self, tx: TableTransaction) -> None:
        """See TableDriver."""
        text = transaction_text(tx, self.owner)
        done = self._run(tx.family, "restore", ["--noflush", *self._wait], stdin=text)
        if done.returncode != 0:
            raise refusal(tx, text=text, code=done.returncode, stderr=done.stderr)

    def check(self, tx: TableTransaction) -> None:
        """Have the tool read a transaction without committing it; raises TableError."""
        text = transaction_text(tx, self.owner)
        args = ["--noflush", "--test", *self._wait]
        done = self._run(tx.family, "restore", args, stdin=text)
        if done.returncode != 0:
            raise refusal(tx, text=text, code=done.returncode, stderr=done.stderr)

    def save_text(self, table: str, family: Family, *, counters: bool = False) -> str:
        """What iptables-save prints of one table; "" where there is none of this variant."""
        if self.variant is Variant.LEGACY and table not in self._legacy_tables(family):
            return ""
        args = ["--table", table, *(["--counters"] if counters else [])]
        done = self._run(family, "save", args)
        if done.returncode != 0 or "is incompatible" in done.stdout:
            # nft says "Table `mangle' is incompatible, use 'nft' tool." of foreign native rules.
            raise TableError(
                f"reading table {table} (IPv{family}, {self.variant})",
                retryable=done.returncode == RC_RESOURCE,
                got=_one_line(done.stderr or done.stdout),
            )
        return done.stdout

    def _legacy_tables(self, family: Family) -> set[str]:
        def read() -> set[str]:
            return legacy_tables(family)

        return self._in_netns(read)

    def _run(
        self, family: Family, what: str, args: list[str], *, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        tool = f"{_TOOLS[family]}-{self.variant}-{what}"

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [tool, *args],
                input=stdin,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="surrogateescape",
                check=False,
                env=self._environment,
                timeout=RUN_TIMEOUT_S,
            )

        try:
            return self._in_netns(run)
        except FileNotFoundError as e:
            raise KernelMissingError(f"running {tool}", needed="the iptables package") from e
        except subprocess.TimeoutExpired as e:
            raise TableError(
                f"{tool} did not end within {RUN_TIMEOUT_S:.0f} s", retryable=True
            ) from e

    def _in_netns(self, fn: Callable[[], T]) -> T:
        return fn() if self._netns is None else in_netns(self._netns, fn)


def legacy_tables(family: Family) -> set[str]:
    """The legacy tables that exist in the calling thread's namespace; looking creates none."""
    path = Path("/proc/thread-self/net") / _NAMES_FILES[family]
    try:
        return set(path.read_text().split())
    except FileNotFoundError:  # ip_tables is not loaded
        return set()
    except PermissionError as e:
        raise NoAnswerError(f"reading {path.name}", needed="root") from e


def refusal(tx: TableTransaction, *, text: str, code: int, stderr: str) -> NetpolError:
    """Make an error of what iptables-restore said."""
    said = _one_line(stderr)
    if "Permission denied" in said or "you must be root" in said:
        return NoAnswerError(f"writing table {tx.table}", needed="root")
    if "Table does not exist" in said or "can't initialize" in said:
        return KernelMissingError(f"table {tx.table} (IPv{tx.family})", got=said)
    line = _refused_line(text, said)
    # A chain that is still referenced is "busy" for nft, and stays so until the reference goes.
    still_used = "CHAIN_DEL failed" in said or "CHAIN_USER_DEL failed" in said
    retryable = any(words in said for words in _RETRYABLE) and not still_used
    refused = text.splitlines()[line - 1] if line else ""
    at = f" at line {line} ({refused})" if line else ""
    return TableError(
        f"table {tx.table} (IPv{tx.family}) refused a transaction{at}",
        retryable=retryable,
        line=line,
        got=said or f"exit status {code}",
    )


def _refused_line(text: str, said: str) -> int:
    """The line that the tool means; where it names what is missing, the first that mentions it."""
    lines = text.splitlines()
    missing = _MISSING.search(said)
    if missing:
        name = next(group for group in missing.groups() if group)
        for number, line in enumerate(lines, 1):
            if name in line.split() and not line.startswith(":"):
                return number
    found = _LINE.search(said)
    number = int(found[1]) if found else 0
    return number if number <= len(lines) else 0


def _one_line(text: str) -> str:
    useful = [
        line.strip()
        for line in text.splitlines()
        if line.strip() and not line.startswith(("Try `", "# Warning"))
    ]
    return " ".join(useful) or os.strerror(errno.EINVAL)
