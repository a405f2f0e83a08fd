"""Direct server return on this node: the ends of tunnels in pods, and who is told what came of them.

plans --Ends--> what pods must have --PodTunnels--> links in pods
                                            |
                              policy: where answers of a Service's address may come in
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import structlog

from netpol.kernel.dsr import Ends as WantedEnds
from netpol.kernel.dsr import Made, PodLink
from netpol.model.ids import ObjectKey
from netpol.model.net import format_address
from netpol.model.ruleset import AddressPort
from proxy.dsr import Ends
from proxy.rows import ServicePlan

_log = structlog.get_logger("netpol")

#: How often it is looked whether all ends are there: pods appear before their namespaces have addresses, and
#: nobody tells of what is done inside a pod.
LOOK_EVERY_S = 5.0
#: The same while something is missing.
RETRY_S = 1.0

#: Told where answers may come in: what they come from, and of each address the pods' links.
Answers = Callable[[Iterable[AddressPort], Iterable[tuple[bytes, PodLink]]], None]


class Tunnels(Protocol):
    """Whoever makes the ends; `netpol.kernel.dsr.PodTunnels`."""

    def apply(self, wanted: WantedEnds) -> Made:
        """Have these ends and no other ones (blocking)."""
        ...


class DirectReturn:
    """The ends on this node.

    Args:
        tunnels: makes them.
        answers: told where answers may come in, whenever that may have changed.
        told: there may be something new to tell by Events.
    """

    def __init__(
        self,
        tunnels: Tunnels,
        *,
        answers: Answers = lambda _ports, _links: None,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._tunnels, self._answers, self._told = tunnels, answers, told
        self._ends = Ends()
        self._wake = asyncio.Event()
        self._made = Made()
        self.error = ""

    def changed(self, plans: Mapping[ObjectKey, ServicePlan | None]) -> None:
        """Some Services are planned otherwise."""
        if self._ends.change(plans):
            self._wake.set()

    @property
    def faults(self) -> dict[ObjectKey, list[str]]:
        """What failed, by Service."""
        out: dict[ObjectKey, list[str]] = {}
        for pod, why in sorted(self._made.faults.items()):
            for service in self._ends.services(pod):
                text = f"direct server return to {format_address(pod)}: {why}"
                out.setdefault(service, []).append(text)
        return out

    async def run_forever(self) -> None:
        """Have the ends that are wanted, until cancelled; begins with removing what a former agent left."""
        with ThreadPoolExecutor(1, thread_name_prefix="direct") as pool:
            while True:
                self._wake.clear()
                await self._apply(pool)
                wait_s = RETRY_S if self.error or self._made.faults else LOOK_EVERY_S
                with contextlib.suppress(TimeoutError):
                    idle = not self.error and not self._ends.wanted()
                    await asyncio.wait_for(self._wake.wait(), None if idle else wait_s)

    async def _apply(self, pool: ThreadPoolExecutor) -> None:
        wanted, ports = self._ends.wanted(), self._ends.sources()
        # What goes is not let in any more before it goes; what comes is let in once it is there.
        known = self._made.links
        self._tell(wanted, ports, {p: known[p] for p in wanted.keys() & known.keys()})
        loop = asyncio.get_running_loop()
        try:
            made = await loop.run_in_executor(pool, self._tunnels.apply, wanted)
        except Exception as e:  # noqa: BLE001 - what fails in a pod must not end the agent
            self.error = f"direct server return: {e}"
            _log.error("no ends of tunnels", error=self.error, exc_info=e)
            return
        self.error = ""
        changed, self._made = made.faults != self._made.faults, made
        self._tell(wanted, ports, made.links)
        if changed:
            self._told()

    def _tell(
        self,
        wanted: Mapping[bytes, frozenset[bytes]],
        ports: frozenset[AddressPort],
        links: Mapping[bytes, PodLink],
    ) -> None:
        places = [(vip, link) for pod, link in links.items() for vip in wanted[pod]]
        self._answers(ports if places else (), places)
