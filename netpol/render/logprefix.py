"""The NFLOG prefix: written by the rules, read by the audit log. One grammar, both ways.

KNP|D|I|CLASS   denied by ingress isolation of the class (E: egress)
KNP|H|I         an address of this node's pod range that no known pod has (E: as source)
KNP|S           source check: a packet from a pod interface with a source that is no local pod's
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from netpol.model.ids import Direction

_TAG = "KNP"
_LETTER = {Direction.INGRESS: "I", Direction.EGRESS: "E"}
_DIRECTION = {v: k for k, v in _LETTER.items()}


class DropReason(StrEnum):
    """Which kind of rule dropped a packet."""

    DENIED = "denied"
    HELD = "held"
    SPOOFED = "spoofed"


_REASON_LETTER = {DropReason.DENIED: "D", DropReason.HELD: "H", DropReason.SPOOFED: "S"}
_REASON = {v: k for k, v in _REASON_LETTER.items()}


class LogPrefix(NamedTuple):
    """A decoded prefix; `class_id` is "" unless denied, `direction` None for the source check."""

    reason: DropReason
    direction: Direction | None = None
    class_id: str = ""


def encode(prefix: LogPrefix) -> str:
    """Write a prefix (at most 63 characters)."""
    parts = [_TAG, _REASON_LETTER[prefix.reason]]
    if prefix.direction is not None:
        parts.append(_LETTER[prefix.direction])
    if prefix.class_id:
        parts.append(prefix.class_id)
    return "|".join(parts)


def decode(text: str) -> LogPrefix | None:
    """Read a prefix; None when it is not one of ours."""
    parts = text.split("|")
    if parts[0] != _TAG or len(parts) not in (2, 3, 4) or parts[1] not in _REASON:
        return None
    reason = _REASON[parts[1]]
    if (reason is DropReason.SPOOFED) != (len(parts) == 2):
        return None
    if (reason is DropReason.DENIED) != (len(parts) == 4):
        return None
    if reason is DropReason.SPOOFED:
        return LogPrefix(reason)
    if parts[2] not in _DIRECTION or (len(parts) == 4 and not parts[3]):
        return None
    return LogPrefix(reason, _DIRECTION[parts[2]], parts[3] if len(parts) == 4 else "")
