"""What the operator chose about the rules, and what the node is like: input of every renderer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from netpol.model.net import Prefix
from netpol.model.ruleset import AddressPort

#: Bits of the packet mark that carry a class number while a packet is judged. kube-proxy owns 0x4000
#: and 0x8000; these twelve are free on hosts that we know.
DEFAULT_FIELD_MASK = 0xFFF00000
DEFAULT_NFLOG_GROUP = 77

#: Class numbers with a meaning of their own.
NONE, UNKNOWN, OPEN, OVERFLOW = 0, 1, 2, 3
FIRST_CLASS = 4
#: What the field says of a packet that was judged and denied: no number leaves a tree but this one.
DENIED = UNKNOWN


class AnswerLink(NamedTuple):
    """Where a pod's answers with an address of a Service come in; `port` is one of a bridge."""

    address: bytes
    interface: str
    port: bool


class DenyWith(StrEnum):
    """What becomes of a packet that policy denies."""

    DROP = "drop"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """Settings that change rules.

    Attributes:
        field_mask: contiguous bits of the mark that are ours, at least three.
        nflog_group: group that denied packets are logged to; the audit reader binds it.
        log_per_second: logged packets of a class per second, at most; the rest is only dropped.
        log_burst: packets of a class that may exceed the rate at once.
        pod_interfaces: interfaces behind which pods are (a bridge, or a pattern such as cali+).
        hold_ranges: pod ranges of this node whose unknown addresses are denied until known.
        own_addresses: addresses of the node's own interfaces, which are never held.
        ipvs_services: what INPUT leaves to OUTPUT's judgement, since IPVS takes it and sends it on
            from there; None where the kernel has no IPVS.
        direct_ports, direct_links: addresses and ports of Services that pods of this node answer from
            themselves (direct server return), and where these pods' packets come in.
        deny_with: whether the sender of a denied packet is told.
    """

    field_mask: int = DEFAULT_FIELD_MASK
    nflog_group: int = DEFAULT_NFLOG_GROUP
    log_per_second: int = 10
    log_burst: int = 50
    pod_interfaces: tuple[str, ...] = ()
    hold_ranges: tuple[Prefix, ...] = ()
    own_addresses: tuple[bytes, ...] = ()
    ipvs_services: tuple[AddressPort, ...] | None = None
    direct_ports: tuple[AddressPort, ...] = ()
    direct_links: tuple[AnswerLink, ...] = ()
    deny_with: DenyWith = DenyWith.DROP

    @property
    def shift(self) -> int:
        """Position of the field's lowest bit."""
        return (self.field_mask & -self.field_mask).bit_length() - 1

    @property
    def rejects(self) -> bool:
        """Whether denied packets are answered."""
        return self.deny_with is DenyWith.REJECT

    @property
    def width(self) -> int:
        """Bits of the field."""
        return self.field_mask.bit_count()

    def mark(self, number: int) -> int:
        """A class number as mark bits in place."""
        return number << self.shift


def field_mask_fault(mask: int) -> str | None:
    """Why a mask cannot be the field, or None."""
    if not 0 < mask <= 0xFFFFFFFF:
        return "needed a 32-bit mask"
    low = mask & -mask
    if mask // low & (mask // low + 1):
        return "needed contiguous bits"
    if mask.bit_count() < 3:
        return "needed at least 3 bits"
    return None
