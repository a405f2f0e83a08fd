"""Who else uses bits of the packet mark: routing rules, and other programs' iptables rules.

Our field is written and cleared while a packet is judged, so a bit that somebody else keeps there would be
lost, and one that somebody sets would send packets to a wrong class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pyroute2 import IPRoute

from netpol.kernel.variant import saved_rules
from netpol.model.ids import OWN_PREFIX

_AF_INET, _AF_INET6 = 2, 10
_FULL = 0xFFFFFFFF
#: What writes the mark (xt_MARK, xt_CONNMARK restoring it), as the save tools print it.
_WRITES = re.compile(
    r"-j (?:MARK --set-xmark (?P<value>0x[0-9a-f]+)(?:/(?P<mask>0x[0-9a-f]+))?"
    r"|CONNMARK --restore-mark(?: --nfmask (?P<zeroed>0x[0-9a-f]+) --ctmask (?P<copied>0x[0-9a-f]+))?)"
)


class MarkUse(NamedTuple):
    """Bits of the mark that something reads or writes, and what it is."""

    mask: int
    what: str


def mark_uses() -> list[MarkUse]:
    """Every use of the packet mark that is not ours, in this network namespace. Blocking."""
    # pyroute2 refuses to work in a thread that runs an event loop.
    with ThreadPoolExecutor(1) as pool:
        routing = pool.submit(_routing_rules).result()
    lines = (line for saved in saved_rules().values() for line in saved)
    return [*routing, *iptables_uses(lines)]


def _routing_rules() -> list[MarkUse]:
    out = []
    with IPRoute() as route:
        for family, command in ((_AF_INET, "ip rule"), (_AF_INET6, "ip -6 rule")):
            for rule in route.get_rules(family=family):
                mark = rule.get("FRA_FWMARK")
                if mark is None:
                    continue
                mask = rule.get("FRA_FWMASK")
                mask = _FULL if mask is None else int(mask)
                priority = rule.get("FRA_PRIORITY") or 0
                out.append(MarkUse(mask, f"{command} {priority}: fwmark {int(mark):#x}/{mask:#x}"))
    return out


def iptables_uses(lines: Iterable[str]) -> list[MarkUse]:
    """The uses in the output of save tools; those of our own chains left out."""
    out = []
    for line in lines:
        found = _WRITES.search(line)
        if found is None or line.startswith(f"-A {OWN_PREFIX}"):
            continue
        out.append(MarkUse(_written(found), f"iptables rule {line}"))
    return out


def _written(found: re.Match[str]) -> int:
    """The bits that a rule may change: those that it zeroes, and those that it XORs in (xt_mark.c).

    `--set-xmark 0x1/0x0`, which iptables makes of `--xor-mark 0x1`, zeroes none.
    """
    if found["value"] is not None:
        return _number(found["value"]) | (_number(found["mask"]) if found["mask"] else _FULL)
    if found["zeroed"] is not None:
        return _number(found["zeroed"]) | _number(found["copied"])
    return _FULL


def _number(text: str) -> int:
    return int(text, 16)


def conflict(field_mask: int, uses: Iterable[MarkUse], *, flag: str = "--mark-mask") -> str | None:
    """Who shares bits with the field, and a mask that nobody does; None when nobody does."""
    uses = list(uses)
    clashes = [u for u in uses if u.mask & field_mask]
    if not clashes:
        return None
    taken = 0
    for use in uses:
        taken |= use.mask
    free = free_mask(taken, field_mask.bit_count())
    advice = f"{flag} {free:#010x} is free" if free else "no run of bits is free"
    return f"mark field {field_mask:#010x} overlaps with {clashes[0].what}; {advice}"


def free_mask(taken: int, width: int) -> int:
    """The highest run of free bits, as wide as wanted or as there is (at least 3), without kube-proxy's.

    Returns 0 where there is none.
    """
    taken |= 0xC000  # kube-proxy's masquerade and drop marks
    for want in range(width, 2, -1):
        for shift in range(32 - want, -1, -1):
            mask = ((1 << want) - 1) << shift
            if not mask & taken:
                return mask
    return 0
