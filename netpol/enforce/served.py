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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

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
#: More differences than these are taken over in the thread that found them.
TAKEN_AT_ONCE = 500

_LOOPBACK6 = bytes(15) + b"\x01"
_LINK_LOCAL6 = Prefix(b"\xfe\x80" + bytes(14), 10)

Reader: TypeAlias = Callable[[], IpvsTable | None]
#: The distinct real servers of a service.
Backends: TypeAlias = frozenset[RealServer]


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
    choice = Choice(table)
    choice.own = frozenset(own_addresses)
    return choice.served(marks_are_ours=marks_are_ours)


class _Kept(Enum):
    """Why a service is kept out."""

    AT_HOME = "with a backend on this node itself"
    OTHER_WAY = "that forward without NAT"
    CATCH_ALL = "for all ports of an address"


class Choice:
    """The services of a table, and which of them are let through; a change costs what it changes.

    Attributes:
        services: each with its distinct real servers; changed by `put` alone.
        version: another number whenever other services are let through or kept out.
    """

    def __init__(self, table: IpvsTable) -> None:
        self.services: dict[AddressPort, Backends] = {}
        self.fwmarks, self.strange = table.fwmarks, table.strange
        self.version = 0
        self._own: frozenset[bytes] = frozenset()
        self._kept: dict[AddressPort, _Kept] = {}
        # How many services are at an address, and how many have a backend there.
        self._at: Counter[bytes] = Counter(service.address for service in table.services)
        self._behind: Counter[bytes] = Counter()
        for service, backends in table.services.items():
            self._enter(service, backends)

    @property
    def own(self) -> frozenset[bytes]:
        """The node's own addresses, those that only Services have left out."""
        return self._own

    @own.setter
    def own(self, addresses: frozenset[bytes]) -> None:
        moved, self._own = addresses ^ self._own, addresses
        if any(a in self._behind for a in moved):
            self._judge_all()

    def put(self, service: AddressPort, backends: Backends | None) -> None:
        """A service has these backends now; None is one that is gone."""
        old = self.services.pop(service, None)
        if old == backends:
            if old is not None:
                self.services[service] = old
            return
        address, was_at = service.address, self._at[service.address]
        if old is not None:
            self._count(self._at, {address}, -1)
            self._count(self._behind, {b.address for b in old}, -1)
            if backends is None:
                self._kept.pop(service, None)
                self.version += 1
        if backends is not None:
            self._at[address] += 1
            self._enter(service, backends, new=old is None)
        if bool(was_at) is not bool(self._at.get(address)) and address in self._behind:
            self._judge_all()  # a backend of one service is, or was, the address of another

    def served(self, *, marks_are_ours: bool) -> Served:
        """What is let through, and what is not, in words."""
        many = Counter(self._kept.values())
        counted = (
            *((many[why], why.value) for why in (_Kept.AT_HOME, _Kept.OTHER_WAY)),
            (0 if marks_are_ours else self.fwmarks, "by packet mark"),
            (many[_Kept.CATCH_ALL], _Kept.CATCH_ALL.value),
            (len(self.strange), "that cannot be read"),
        )
        notes = [
            f"IPVS services {what}: {count}, judged by the address that the client names"
            for count, what in counted
            if count
        ]
        return Served(tuple(sorted(self.services.keys() - self._kept.keys())), tuple(notes))

    def _enter(self, service: AddressPort, backends: Backends, *, new: bool = True) -> None:
        self.services[service] = backends
        self._count(self._behind, {b.address for b in backends}, 1)
        self.version += new
        self._judge(service, backends)

    @staticmethod
    def _count(counter: Counter[bytes], addresses: Iterable[bytes], step: int) -> None:
        for address in addresses:
            counter[address] += step
            if not counter[address]:
                del counter[address]

    def _judge_all(self) -> None:
        for service, backends in self.services.items():
            self._judge(service, backends)

    def _judge(self, service: AddressPort, backends: Backends) -> None:
        before, why = self._kept.get(service), self._why(service, backends)
        if why is before:
            return
        self.version += 1
        if why is None:
            del self._kept[service]
        else:
            self._kept[service] = why

    def _why(self, service: AddressPort, backends: Backends) -> _Kept | None:
        if not service.port:
            return _Kept.CATCH_ALL
        if any(b.forward not in (Forward.NAT, Forward.LOCAL) for b in backends):
            return _Kept.OTHER_WAY
        return _Kept.AT_HOME if any(map(self._is_here, backends)) else None

    def _is_here(self, backend: RealServer) -> bool:
        # What IPVS serves is local too, or its packets would not come to it. A backend of one Service may
        # be the address of another.
        address = backend.address
        return address in self._own or address in self._at or _is_here(backend)


def _is_here(backend: RealServer) -> bool:
    """Whether a backend is on the node by what own addresses leave out.

    Loopback is here; a link-local backend is a cache on the node, in all uses that we know.
    """
    if backend.forward is Forward.LOCAL:
        return True
    if len(backend.address) == 4:
        return backend.address[0] == 127 or backend.address[:2] == b"\xa9\xfe"
    return backend.address == _LOOPBACK6 or _LINK_LOCAL6.contains(backend.address)


class _News(NamedTuple):
    """What a look found: what differs, or all of it anew where that is much."""

    services: Mapping[AddressPort, Backends | None] = {}
    anew: Choice | None = None


class IpvsWatch:
    """Knows what IPVS serves, and keeps its packets in conntrack.

    Others' changes are found by reading the table again and again, in a thread, since it may be large. Who
    changes it in this process says so (`tell`), and costs no more than the change. Everything but reading
    is for the loop.
    """

    def __init__(self, read: Reader = read_ipvs, *, marks_are_ours: bool = False) -> None:
        self._read, self._marks_are_ours = read, marks_are_ours
        self._choice: Choice | None = None
        self._known: tuple[object, Served] = (None, Served())
        self._told: dict[AddressPort, Backends | None] = {}  # since the last look began
        self._fault = ""
        self._conntrack_fault = ""
        self.look_took_s = 0.0
        self._soon = asyncio.Event()

    def hasten(self) -> None:
        """Have the next look at once: the table was changed just now, and how is not known."""
        self._soon.set()

    def tell(self, services: Mapping[AddressPort, Backends | None]) -> bool:
        """These services were changed just now, None is one that is gone; whether others are let through."""
        choice = self._choice
        if choice is None:
            self.hasten()
            return False
        before = choice.version
        for service, backends in services.items():
            choice.put(service, backends)
        self._told.update(services)
        return choice.version != before

    def look(self) -> bool:
        """Read the table; whether it is another one than was known. Blocks for as long as that takes.

        What cannot be read stays as it was, and is a fault: dropping all services of all isolated pods
        would be worse than the hole that a service leaves which ends meanwhile.
        """
        self._told = {}
        return self._take(self._news(self._snapshot()))

    def _snapshot(self) -> dict[AddressPort, Backends] | None:
        return None if self._choice is None else dict(self._choice.services)

    def _news(self, known: dict[AddressPort, Backends] | None) -> _News | None:
        """What the table has otherwise than is known; None where it cannot be read, or there is no IPVS."""
        begin_s = time.monotonic()
        try:
            now = self._read()
            if now and known and known.keys() - now.services.keys():
                # The kernel's walk may pass over a service while another one goes: ask again, and
                # believe what both say. A service that stays must not be denied for a second.
                again = self._read()
                if again is not None:
                    now = _union(now, again)
        except NetpolError as e:
            self._complain(str(e))
            return _News()
        self._complain("")
        self._conntrack_fault = "" if now is None else _keep_conntrack()
        self.look_took_s = time.monotonic() - begin_s
        if now is None:
            return None
        choice = self._choice
        fewer = {} if known is None else known
        differs: dict[AddressPort, Backends | None] = {
            s: b for s, b in now.services.items() if fewer.get(s) != b
        }
        differs |= dict.fromkeys(fewer.keys() - now.services.keys())
        others = choice is None or (choice.fwmarks, choice.strange) != (now.fwmarks, now.strange)
        if others or len(differs) > TAKEN_AT_ONCE:
            return _News(differs, Choice(now))
        return _News(differs)

    def _take(self, news: _News | None) -> bool:
        """Take over what a look found, but for what was told meanwhile; whether that changes anything."""
        if news is None:
            had, self._choice = self._choice is not None, None
            return had
        if news.anew is not None:
            news.anew.own = self._choice.own if self._choice is not None else frozenset()
            self._choice = news.anew
            for service, backends in self._told.items():
                news.anew.put(service, backends)
            return True
        choice = self._choice
        differs = {s: b for s, b in news.services.items() if s not in self._told}
        if choice is None or not differs:
            return False
        for service, backends in differs.items():
            choice.put(service, backends)
        return True

    def _complain(self, fault: str) -> None:
        if fault and fault != self._fault:
            _log.warning("IPVS cannot be read", error=fault)
        self._fault = fault

    def served(self, own_addresses: tuple[bytes, ...]) -> Served | None:
        """What is let through at INPUT; None where the kernel has no IPVS."""
        choice = self._choice
        if choice is None:
            return None
        choice.own = frozenset(own_addresses)
        (known, served), now = self._known, (choice, choice.version)
        if known != now:
            served = choice.served(marks_are_ours=self._marks_are_ours)
            self._known = (now, served)
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
            self._told = {}
            if self._take(await asyncio.to_thread(self._news, self._snapshot())):
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
