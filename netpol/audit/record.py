"""One line of the audit log: its fields, and how it becomes JSON. docs/audit.md describes the schema.

Pure. Fields are only ever added; their order in a line is the order here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

from netpol.model.ids import PROTOCOL_NUMBERS


class PartyRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One end: address, port and what the cluster knew about it; unknown texts are ""."""

    ip: str
    port: int | None = None
    kind: str
    namespace: str = ""
    pod: str = ""
    uid: str = ""
    name: str = ""


class TermRecord(msgspec.Struct, frozen=True, gc=False):
    """A term of a rule that did not match, and why."""

    term: str
    reason: str


class RuleRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The rule that came nearest to allowing the packet; `number` counts from 0 as in the manifest."""

    policy: str
    direction: str
    number: int
    failed: tuple[TermRecord, ...]


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One line: one or more equal drops of a window."""

    ts: str
    verdict: str = "deny"
    direction: str | None
    reason: str
    node: str
    src: PartyRecord
    dst: PartyRecord
    proto: str
    icmp_type: int | None = None
    icmp_code: int | None = None
    interface_in: str = msgspec.field(name="in", default="")
    interface_out: str = msgspec.field(name="out", default="")
    policies: tuple[str, ...] = ()
    rule: RuleRecord | None = None
    class_id: str = msgspec.field(name="class", default="")
    generation: int
    count: int
    suppressed: int = 0
    lost: int = 0
    note: str = ""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)
_PROTOCOL_NAMES = {number: str(p) for p, number in PROTOCOL_NUMBERS.items()}


def encode_line(record: Record) -> bytes:
    """Write a record as one line of JSON with its newline."""
    return _encoder.encode(record) + b"\n"


def decode_line(line: bytes | str) -> Record:
    """Read a line back.

    Raises:
        msgspec.DecodeError: not a record.
    """
    return _decoder.decode(line)


def as_dict(record: Record) -> dict[str, Any]:
    """The same document as plain values, for whoever embeds it in an answer of its own."""
    out: dict[str, Any] = msgspec.to_builtins(record)
    return out


def protocol_name(number: int) -> str:
    """TCP, UDP, SCTP, ICMP, ICMPv6, or the IANA number as text."""
    return _PROTOCOL_NAMES.get(number) or str(number)


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def format_time(timestamp_us: int) -> str:
    """Microseconds since the epoch as RFC 3339 in UTC, always with six digits."""
    seconds, fraction = divmod(timestamp_us, 1_000_000)
    return f"{_second(seconds)}.{fraction:06d}Z"
