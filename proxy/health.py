"""What load balancers ask this node: whether a Service has endpoints here, and whether its proxy works.

`HealthPorts` answers on the healthCheckNodePort of every Service with policy Local; `ProxyHealth` keeps
what is known of the proxy itself and answers /healthz and /livez. Bodies and status codes are those of
kube-proxy, since that is what load balancers were told to expect.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.aio.http import EVERYWHERE, Answer, SmallServer
from netpol.aio.runner import BoundedRunner
from netpol.lib.errors import InputError, NetpolError
from netpol.model.ids import ObjectKey

_log = structlog.get_logger(__name__)

#: A change that waits longer than this to be applied makes the proxy unhealthy (kube-proxy: twice its
#: sync period of 30 s).
STALE_S = 60.0
#: How soon a port that could not be had is tried again, and how seldom at last.
RETRY_S, RETRY_MAX_S = 1.0, 30.0

_NOSNIFF = ("X-Content-Type-Options", "nosniff")


class ProxyHealth:
    """Whether the proxy keeps up, and whether this node should get new connections at all."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        # Until the first apply, all that there is to serve waits.
        self._waiting_since_s: float | None = self._clock.monotonic()
        self._updated_wall_s: float | None = None
        #: Whether load balancers may choose this node: not while it is being deleted.
        self.eligible = True

    def queued(self) -> None:
        """A change was seen that is not in the kernel yet."""
        if self._waiting_since_s is None:
            self._waiting_since_s = self._clock.monotonic()

    def updated(self, waiting_since_s: float | None = None) -> None:
        """Something was applied; since when what came meanwhile waits, by the monotonic clock."""
        self._waiting_since_s = waiting_since_s
        self._updated_wall_s = self._clock.wall()

    def healthy(self) -> bool:
        """Whether nothing waits for too long."""
        since_s = self._waiting_since_s
        return since_s is None or self._clock.monotonic() - since_s < STALE_S

    def answer(self, path: str) -> Answer:
        """Answer a request: /healthz also tells of the node, /livez of the proxy alone."""
        if path not in ("/healthz", "/livez"):
            return Answer(404, b"404 page not found\n", "text/plain; charset=utf-8")
        healthy, now_s = self.healthy(), self._clock.wall()
        # While all is well there is nothing older than now; else the last apply says how stale it is.
        at_s = now_s if healthy else self._updated_wall_s
        updated = _stamp(at_s) if at_s is not None else "0001-01-01T00:00:00Z"
        body: dict[str, object] = {"lastUpdated": updated, "currentTime": _stamp(now_s)}
        fine = healthy
        if path == "/healthz":
            body["nodeEligible"] = self.eligible
            fine = healthy and self.eligible
        body["healthy"] = healthy
        family = {"lastUpdated": updated, "healthy": healthy}
        body["status"] = {"IPv4": family, "IPv6": family}
        return Answer(200 if fine else 503, json.dumps(body).encode(), headers=(_NOSNIFF,))


def _stamp(wall_s: float) -> str:
    return dt.datetime.fromtimestamp(wall_s, dt.UTC).isoformat().replace("+00:00", "Z")


class HealthEndpoint:
    """The listener of /healthz and /livez."""

    def __init__(self, health: ProxyHealth) -> None:
        self._server = SmallServer(health.answer)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.port

    async def start(self, address: str) -> None:
        """Listen on ADDRESS:PORT.

        Raises:
            InputError: the address cannot be had.
        """
        host, _, port = address.rpartition(":")
        try:
            await self._server.open((host.strip("[]"),), int(port))
        except OSError as e:
            raise InputError(f"--proxy-health-addr {address}", got=e.strerror or str(e)) from e

    async def stop(self) -> None:
        """Stop listening."""
        await self._server.close()


class PortState(NamedTuple):
    """A health port as it shall be: its number and what it tells."""

    port: int
    local_ready: int


class HealthPortError(NetpolError):
    """Health ports that cannot be had; asked for again until they can."""


class HealthPorts:
    """One listener for each Service that has a health port.

    Args:
        healthy: whether the proxy itself is healthy.
        told: called with a Service and why its port cannot be had, once for each new reason.
    """

    def __init__(
        self,
        *,
        healthy: Callable[[], bool],
        told: Callable[[ObjectKey, str], None] = lambda _key, _why: None,
        clock: Clock | None = None,
    ) -> None:
        self._healthy, self._told = healthy, told
        self._hosts: tuple[str, ...] = EVERYWHERE
        self._wanted: dict[ObjectKey, PortState] = {}
        self._open: dict[ObjectKey, tuple[int, tuple[str, ...], SmallServer]] = {}
        self.faults: dict[ObjectKey, str] = {}
        self._runner = BoundedRunner(
            self._settle, retry_s=RETRY_S, max_s=RETRY_MAX_S, clock=clock or SystemClock()
        )

    def update(self, key: ObjectKey, *, port: int, local_ready: int) -> None:
        """A Service's port and count; port 0 for none. What is told changes at once."""
        before = self._wanted.get(key)
        if port:
            self._wanted[key] = PortState(port, local_ready)
        else:
            self._wanted.pop(key, None)
        if (before.port if before else 0) != port:
            self._runner.mark()

    def listen_on(self, hosts: Sequence[str]) -> None:
        """The addresses to listen on; none means all."""
        wanted = tuple(hosts) or EVERYWHERE
        if wanted != self._hosts:
            self._hosts = wanted
            self._runner.mark()

    async def run_forever(self) -> None:
        """Open and close listeners until cancelled."""
        try:
            await self._runner.run_forever()
        finally:
            for key in list(self._open):
                await self._close(key)

    async def wait_idle(self) -> None:
        """Wait until every port asked for so far listens."""
        await self._runner.wait_idle()

    @property
    def listening(self) -> dict[ObjectKey, int]:
        """The ports that are open."""
        return {key: port for key, (port, _, _) in self._open.items()}

    async def _settle(self) -> None:
        for key, (port, hosts, _) in list(self._open.items()):
            wanted = self._wanted.get(key)
            if wanted is None or wanted.port != port or hosts != self._hosts:
                await self._close(key)
        for key in self.faults.keys() - self._wanted.keys():
            del self.faults[key]
        for key, state in list(self._wanted.items()):
            if key not in self._open:
                await self._listen(key, state.port)
        if self.faults:
            raise HealthPortError("health ports", got="; ".join(self.faults.values()))

    async def _listen(self, key: ObjectKey, port: int) -> None:
        server = SmallServer(lambda _path: self._answer(key))
        hosts = self._hosts
        try:
            await server.open(hosts, port)
        except OSError as e:
            why = f"healthCheckNodePort {port}: {e.strerror or e}"
            if self.faults.get(key) != why:
                self.faults[key] = why
                _log.warning("health port not open", service=str(key), port=port, error=str(e))
                self._told(key, why)
            return
        self.faults.pop(key, None)
        self._open[key] = (port, hosts, server)

    async def _close(self, key: ObjectKey) -> None:
        _, _, server = self._open.pop(key)
        await server.close()

    def _answer(self, key: ObjectKey) -> Answer:
        state = self._wanted.get(key)
        count = state.local_ready if state else 0
        healthy = self._healthy()
        body = {
            "service": {"namespace": key.namespace, "name": key.name},
            "localEndpoints": count,
            "serviceProxyHealthy": healthy,
        }
        return Answer(
            200 if count and healthy else 503,
            json.dumps(body, indent="\t").encode(),
            headers=(_NOSNIFF, ("X-Load-Balancing-Endpoint-Weight", str(count))),
        )
