"""Which pod has an address, for addresses of pods that the agent does not watch: asked for one by one.

An agent watches the cluster's pods only while a policy needs them. The audit log still wants names; it
asks here, gets what is known at once, and the answer of the API server with a later question.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable

import structlog

from netpol.aio.clock import Clock
from netpol.k8s.api import Api
from netpol.k8s.decode import POD
from netpol.k8s.errors import ApiError, DecodeError
from netpol.k8s.listing import list_all
from netpol.k8s.watching import Selection
from netpol.model.net import format_address
from netpol.model.objects import Endpoint

_log = structlog.get_logger(__name__)

#: Requests to the API server per second, at most: a flood of drops from unknown addresses stays cheap.
REQUESTS_PER_S = 5.0
#: How long an answer counts, also "nobody".
KEEP_S = 60.0
#: Addresses remembered, and addresses that may wait.
KNOWN_MAX, WAITING_MAX = 4096, 256


class PodResolver:
    """Answers from memory and asks in the background.

    Args:
        api: the connection, once there is one.
        changed: told when an answer with a pod has come.
    """

    def __init__(
        self, api: Callable[[], Api | None], *, clock: Clock, changed: Callable[[], None]
    ) -> None:
        self._api, self._clock, self._changed = api, clock, changed
        self._known: OrderedDict[bytes, tuple[float, Endpoint | None]] = OrderedDict()
        self._waiting: asyncio.Queue[bytes] = asyncio.Queue(WAITING_MAX)
        self._asked: set[bytes] = set()
        self.failures = 0

    def ask(self, address: bytes) -> None:
        """Find out about an address unless it is known or asked for; never waits."""
        known = self._known.get(address)
        if address in self._asked or (known and self._clock.monotonic() - known[0] < KEEP_S):
            return
        if not self._waiting.full():
            self._asked.add(address)
            self._waiting.put_nowait(address)

    def pods(self) -> Iterable[Endpoint]:
        """The pods found, as far as the answers still count."""
        since = self._clock.monotonic() - KEEP_S
        return [pod for at, pod in self._known.values() if pod is not None and at > since]

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            address = await self._waiting.get()
            try:
                await self._resolve(address)
            except (ApiError, DecodeError) as e:
                self.failures += 1
                _log.warning("address not resolved", address=format_address(address), error=str(e))
            finally:
                self._asked.discard(address)
            await self._clock.sleep(1 / REQUESTS_PER_S)

    async def _resolve(self, address: bytes) -> None:
        api = self._api()
        if api is None:
            return
        selection = Selection(fields=(f"status.podIP={format_address(address)}",))
        found = [item.value for item in (await list_all(api, POD, selection=selection)).items]
        # The field selector looks at the first address only, and old pods may still carry it.
        pod = next((p for p in found if p.live and address in p.addresses), None)
        self._known[address] = self._clock.monotonic(), pod
        self._known.move_to_end(address)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        if pod is not None:
            self._changed()
