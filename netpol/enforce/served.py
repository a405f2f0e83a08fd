"""Which of the packets that reach INPUT are not for the node but for IPVS, and are judged at OUTPUT.

IPVS takes a request after our chain at INPUT has seen it, gives it the backend's address and sends it on
by OUTPUT, where it is judged as what it became. This module says for which services that is so, of all
their backends; of any other one, INPUT's judgement would be the only one:

    a backend on the node itself   delivered from INPUT, OUTPUT never sees it
    a tunnel                       OUTPUT sees the tunnel, sent by the node
    direct routing                 OUTPUT sees the service's address still
    a service by packet mark       no address tells it
    all ports of an address        no single port tells it

Their packets are judged at INPUT like any others, by the address that they carry.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from netpol.kernel.ipvs import CONNTRACK_KEY, Forward, IpvsTable, RealServer, read_ipvs
from netpol.kernel.sysctl import keep_sysctl, read_sysctl
from netpol.lib.errors import KernelError, NetpolError
from netpol.model.net import Prefix
from netpol.model.ruleset import AddressPort

_log = structlog.get_logger(__name__)

#: How often the table is read. A service that ended is a hole of this length: until then a packet to
#: its address and port reaches the node without the egress judgement.
LOOK_EVERY_S = 1.0
#: A large table is read so seldom that reading takes at most this part of the time.
LOOK_SHARE = 0.02
#: The same while somebody asks for looks.
HASTE_SHARE = 0.2

_LOOPBACK6 = bytes(15) + b"\x01"
_LINK_LOCAL6 = Prefix(b"\xfe\x80" + bytes(14), 10)

Reader: TypeAlias = Callable[[], IpvsTable | None]


@dataclass(frozen=True, slots=True)
class Served:
    """The services that INPUT lets through, and what keeps others out, in words."""

    services: tuple[AddressPort, ...] = ()
    notes: tuple[str, ...] = ()


def served_by(
    table: IpvsTable, own_addresses: Collection[bytes], *, marks_are_ours: bool = False
) -> Served:
    """Pick the services all of whose packets OUTPUT will see with a backend's address.

    Services by mark of our own proxy stand behind services by address, which tell of them.
    """
    # What IPVS serves is local too, or its packets would not come to it; `own_addresses` leaves out those
    # that only Services have. A backend of one Service may be the address of another.
    own = frozenset(own_addresses) | {service.address for service in table.services}
    # Each real server is looked at once: thousands of services share them.
    all_of_them = frozenset().union(*table.services.values())
    otherwise = {b for b in all_of_them if b.forward not in (Forward.NAT, Forward.LOCAL)}
    here = {b for b in all_of_them if _is_here(b, own)}
    passing: list[AddressPort] = []
    at_home = other_way = catch_all = 0
    for service, backends in table.services.items():
        if not service.port:
            catch_all += 1
        elif not backends.isdisjoint(otherwise):
            other_way += 1
        elif not backends.isdisjoint(here):
            at_home += 1
        else:
            passing.append(service)
    counted = (
        (at_home, "with a backend on this node itself"),
        (other_way, "that forward without NAT"),
        (0 if marks_are_ours else table.fwmarks, "by packet mark"),
        (catch_all, "for all ports of an address"),
        (len(table.strange), "that cannot be read"),
    )
    notes = [
        f"IPVS services {what}: {count}, judged by the address that the client names"
        for count, what in counted
        if count
    ]
    return Served(tuple(sorted(passing)), tuple(notes))


def _is_here(backend: RealServer, own: frozenset[bytes]) -> bool:
    if backend.forward is Forward.LOCAL or backend.address in own:
        return True
    # `own` leaves these out. Loopback is here; a link-local backend is a cache on the node, in all
    # uses that we know.
    if len(backend.address) == 4:
        return backend.address[0] == 127 or backend.address[:2] == b"\xa9\xfe"
    return backend.address == _LOOPBACK6 or _LINK_LOCAL6.contains(backend.address)


class IpvsWatch:
    """Reads what IPVS serves, again and again, and keeps its packets in conntrack.

    `look` blocks for as long as reading takes, so that `watch` runs it in a thread; everything else is
    for the loop, and sees the table of the last look as a whole.
    """

    def __init__(self, read: Reader = read_ipvs, *, marks_are_ours: bool = False) -> None:
        self._read, self._marks_are_ours = read, marks_are_ours
        self._table: IpvsTable | None = None
        self._known: tuple[IpvsTable | None, tuple[bytes, ...], Served] = (None, (), Served())
        self._fault = ""
        self._conntrack_fault = ""
        self.look_took_s = 0.0
        self._soon = asyncio.Event()

    def hasten(self) -> None:
        """Have the next look at once: the table was changed just now."""
        self._soon.set()

    def look(self) -> bool:
        """Read the table; whether it is another one than at the last look.

        What cannot be read stays as it was, and is a fault: dropping all services of all isolated pods
        would be worse than the hole that a service leaves which ends meanwhile.
        """
        begin_s = time.monotonic()
        before = self._table
        try:
            now = self._read()
            if before and now and before.services.keys() - now.services.keys():
                # The kernel's walk may pass over a service while another one goes: ask again, and
                # believe what both say. A service that stays must not be denied for a second.
                again = self._read()
                if again is not None:
                    now = _union(now, again)
        except NetpolError as e:
            self._tell(str(e))
            return False
        self._tell("")
        if now != before:
            self._table = now
        self._conntrack_fault = "" if now is None else _keep_conntrack()
        self.look_took_s = time.monotonic() - begin_s
        return now != before

    def _tell(self, fault: str) -> None:
        if fault and fault != self._fault:
            _log.warning("IPVS cannot be read", error=fault)
        self._fault = fault

    def served(self, own_addresses: tuple[bytes, ...]) -> Served | None:
        """What is let through at INPUT; None where the kernel has no IPVS."""
        if self._table is None:
            return None
        table, own, served = self._known
        if table is not self._table or own != own_addresses:
            served = served_by(self._table, own_addresses, marks_are_ours=self._marks_are_ours)
            self._known = (self._table, own_addresses, served)
        return served

    def faults(self) -> list[str]:
        """What keeps packets to Services from being judged rightly."""
        return [f for f in (self._fault, self._conntrack_fault) if f]

    async def watch(self, changed: Callable[[], None]) -> None:
        """Look until cancelled; tell of every change."""
        while True:
            await asyncio.sleep(self.look_took_s / HASTE_SHARE)
            with contextlib.suppress(TimeoutError):
                rest_s = max(LOOK_EVERY_S, self.look_took_s / LOOK_SHARE)
                await asyncio.wait_for(self._soon.wait(), rest_s)
            self._soon.clear()
            if await asyncio.to_thread(self.look):
                changed()


def _union(one: IpvsTable, two: IpvsTable) -> IpvsTable:
    services = dict(one.services)
    for service, backends in two.services.items():
        services[service] = services.get(service, frozenset()) | backends
    return IpvsTable(services, two.fwmarks, two.strange)


def _keep_conntrack() -> str:
    """Keep `net.ipv4.vs.conntrack` at 1; returns why it is not, or ""."""
    if read_sysctl(CONNTRACK_KEY) is None:
        # Replies of such services are new connections to every rule, and are judged as those.
        missing = KernelError("IPVS", needed="CONFIG_IP_VS_NFCT", got="a kernel without it")
        return str(missing)
    return keep_sysctl(CONNTRACK_KEY, "1") or ""
