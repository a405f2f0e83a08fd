"""What the rules must know of the node itself: pod interfaces and ranges, own addresses, sysctls, IPVS.

Settings beat what the CNI configuration says. Own addresses come from the
kernel and are watched, since the bridge gets the gateway address only with the first pod. Of the last
pod ranges a state file tells, so that a node that boots without its API server holds from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import structlog

from netpol.config import Settings
from netpol.enforce.served import Backends, IpvsWatch
from netpol.kernel.conflist import PodNetwork, read_pod_network
from netpol.kernel.links import AddressMonitor, own_addresses
from netpol.kernel.marks import conflict, mark_uses
from netpol.kernel.sysctl import keep_bridge_nf
from netpol.lib.errors import InputError
from netpol.model.net import Prefix, parse_prefix
from netpol.model.ruleset import AddressPort
from netpol.render.options import AnswerLink, DenyWith, RenderOptions

_log = structlog.get_logger(__name__)

#: In the state directory: the last pod ranges.
STATE_FILE = "node.json"
#: How often what has no events is looked at: sysctls, the CNI configuration.
LOOK_EVERY_S = 5.0
#: Who else uses the mark is looked up every so many looks: it means running the save tools.
MARKS_EVERY_TURNS = 24


#: Interfaces of this network namespace.
_NET = Path("/sys/class/net")


def _may_be_bridge(name: str) -> bool:
    """Whether an interface is a bridge, or is not there yet and could become one."""
    path = _NET / name
    return not name.endswith("+") and (not path.exists() or (path / "bridge").exists())


class NodeFacts:
    """Facts about one node, for `RenderOptions` and status."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state_file = Path(settings.state_dir) / STATE_FILE
        self._network = PodNetwork()
        self._remembered: tuple[Prefix, ...] = ()
        self._addresses: tuple[bytes, ...] = ()
        self._sysctl_faults: list[str] = []
        self._mark_fault = ""
        self._ipvs = IpvsWatch(marks_are_ours=settings.proxy)
        self._monitor: AddressMonitor | None = None
        self._hasten = asyncio.Event()
        self._direct: tuple[tuple[AddressPort, ...], tuple[AnswerLink, ...]] = ((), ())

    def prepare(self) -> None:
        """Read everything once, before the first rule.

        Raises:
            InputError: somebody else uses bits of our mark field.
        """
        self._remembered = self._recall()
        self._look()
        self._addresses = own_addresses()
        self._ipvs.look()
        self._mark_fault = self._mark_conflict()
        if self._mark_fault:
            raise InputError(self._mark_fault)

    def _mark_conflict(self) -> str:
        """Who else uses bits that are ours, or ""; blocking."""
        s, uses = self._settings, mark_uses()
        fault = conflict(s.field_mask, uses) if s.policy else None
        if fault is None and s.proxy:
            fault = conflict(s.service_mask, uses, flag="--service-mark-mask")
        return fault or ""

    def _look(self) -> None:
        self._network = read_pod_network(Path(self._settings.cni_conf_dir))
        bridged = any(_may_be_bridge(name) for name in self._interfaces())
        self._sysctl_faults = keep_bridge_nf() if bridged else []

    @property
    def blind(self) -> str | None:
        """Why packets of pods do not come to our rules at all, or None: then the node is not ready."""
        return self._sysctl_faults[0] if self._sysctl_faults else None

    @property
    def unpoliced(self) -> str:
        """The CNI's interface plugin where packets of pods pass no rule of this host; else ""."""
        return self._network.unpoliced

    def has_pods(self) -> bool:
        """Whether some pod is attached already: a bridge of pods has ports, a pattern has interfaces."""
        for name in self._interfaces():
            if name.endswith("+"):
                if any(p.name.startswith(name[:-1]) for p in _NET.glob("*")):
                    return True
            elif any((_NET / name / "brif").glob("*")):
                return True
        return False

    def options(self) -> RenderOptions:
        """What the renderers are given."""
        s = self._settings
        served = self._ipvs.served(self._addresses)
        return RenderOptions(
            field_mask=s.field_mask,
            nflog_group=s.nflog_group,
            log_per_second=s.log_per_second,
            log_burst=s.log_burst,
            pod_interfaces=self._interfaces(),
            hold_ranges=self.hold_ranges(),
            own_addresses=self._addresses,
            ipvs_services=None if served is None else served.services,
            direct_ports=self._direct[0],
            direct_links=self._direct[1],
            deny_with=DenyWith(s.deny_with),
        )

    async def watch_ipvs(self, changed: Callable[[], None]) -> None:
        """Mark when IPVS serves something else; until cancelled."""
        await self._ipvs.watch(changed)

    def answer_from(self, ports: Iterable[AddressPort], links: Iterable[AnswerLink]) -> bool:
        """Pods of this node answer with Services' addresses: which, and where; whether that is new."""
        before, self._direct = self._direct, (tuple(sorted(ports)), tuple(sorted(links)))
        return self._direct != before

    def _interfaces(self) -> tuple[str, ...]:
        return self._settings.pod_interfaces or self._network.interfaces

    def pod_ranges(self) -> tuple[Prefix, ...]:
        """Ranges that this node's pods have their addresses from, as far as the node itself tells."""
        return self._settings.ranges or self._network.ranges

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """The node's own addresses."""
        return self._addresses

    def hasten(self) -> None:
        """The CNI configuration was written by this agent: look at it before the first pod comes."""
        self._hasten.set()

    def ipvs_serves(self, services: Mapping[AddressPort, Backends | None] | None) -> bool:
        """IPVS was changed by this agent: how, or None where it must be looked at.

        Returns whether INPUT lets other services through than before.
        """
        if services is None:
            self._ipvs.hasten()
            return False
        return self._ipvs.tell(services)

    def hold_ranges(self) -> tuple[Prefix, ...]:
        """Ranges whose unknown addresses are denied."""
        s = self._settings
        if s.hold_unknown_pods == "off":
            return ()
        if s.ranges:
            return s.ranges
        return self._network.ranges if self._network.known else self._remembered

    async def watch(self, changed: Callable[[], None]) -> None:
        """Mark when an own address, the CNI configuration or a sysctl changed; until cancelled."""
        self._monitor = AddressMonitor()
        asyncio.get_running_loop().add_reader(
            self._monitor.fileno(), self._address_event, self._monitor, changed
        )
        self._renew_addresses(changed)  # of what came before the monitor nobody tells
        turn = 1
        while True:
            before = self.options(), self.pod_ranges()
            self._look()
            if (self.options(), self.pod_ranges()) != before:
                changed()
            self._remember(self.hold_ranges())
            if turn % MARKS_EVERY_TURNS == 0:
                self._mark_fault = await asyncio.to_thread(self._mark_conflict)
            turn += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hasten.wait(), LOOK_EVERY_S)
            self._hasten.clear()

    def _address_event(self, monitor: AddressMonitor, changed: Callable[[], None]) -> None:
        if monitor.drain():
            self._renew_addresses(changed)

    def _renew_addresses(self, changed: Callable[[], None]) -> None:
        now = own_addresses()
        if now != self._addresses:
            self._addresses = now
            changed()

    def close(self) -> None:
        """Release the socket."""
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            self._monitor.close()

    # -- state ------------------------------------------------------------------------------

    def _recall(self) -> tuple[Prefix, ...]:
        try:
            data = json.loads(self._state_file.read_text(encoding="utf-8"))
            return tuple(parse_prefix(r) for r in data["hold_ranges"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as e:
            _log.warning("state file ignored", path=str(self._state_file), error=str(e))
            return ()

    def _remember(self, ranges: tuple[Prefix, ...]) -> None:
        if ranges == self._remembered:
            return
        temporary = self._state_file.with_suffix(".tmp")
        try:
            self._state_file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"hold_ranges": [str(r) for r in ranges]})
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._state_file)
        except OSError as e:
            _log.warning("state file not written", path=str(self._state_file), error=str(e))
            return
        self._remembered = ranges

    # -- status -----------------------------------------------------------------------------

    def faults(self) -> list[str]:
        """What keeps policy from being complete on this node."""
        marks = [self._mark_fault] if self._mark_fault else []
        return [*self._sysctl_faults, *marks, *self._ipvs.faults()]

    def describe(self) -> dict[str, Any]:
        """For status and the log; without policy, nothing that only policy does."""
        if not self._settings.policy:
            return {"pod_ranges": [str(r) for r in self.pod_ranges()]}
        held = self.hold_ranges()
        notes = [self._network.note] if self._network.note else []
        if not self._interfaces():
            notes.append("no pod interfaces known: sources are not checked")
        if not held:
            notes.append("unknown pods are not held")
        served = self._ipvs.served(self._addresses)
        notes += served.notes if served is not None else ()
        return {
            "pod_interfaces": list(self._interfaces()),
            "hold_ranges": [str(r) for r in held],
            "ipvs_services": None if served is None else len(served.services),
            "notes": notes,
        }
