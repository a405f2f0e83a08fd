"""/healthz, /readyz and /metrics over HTTP, for kubelet and Prometheus."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from netpol.lib.errors import InputError

#: What stands for all addresses of the node, of both families.
EVERYWHERE = "0.0.0.0"  # noqa: S104 - kubelet and Prometheus come from outside
#: Says why not, or None.
Fault = Callable[[], str | None]


class Gauges(Collector):
    """Metrics read at scrape time from values that the rooms keep anyway."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return self._read()


def gauge(name: str, text: str, value: float) -> Metric:
    """One value that goes up and down."""
    return GaugeMetricFamily(f"netpol_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    """One value that only grows."""
    return CounterMetricFamily(f"netpol_{name}", text, value=value)


class HealthServer:
    """The HTTP server.

    Args:
        alive: why the process should be restarted, or None.
        ready: why it is not ready, or None.
        metrics: read at every scrape.
        has_ipv6: whether one socket can serve both families.
    """

    def __init__(
        self,
        *,
        alive: Fault,
        ready: Fault,
        metrics: Callable[[], Iterable[Metric]],
        has_ipv6: Callable[[], bool] = socket.has_dualstack_ipv6,
    ) -> None:
        self._has_ipv6 = has_ipv6
        self._registry = CollectorRegistry()
        ProcessCollector(namespace="netpol", registry=self._registry)
        self._registry.register(Gauges(metrics))
        app = web.Application()
        app.router.add_get("/healthz", self._probe(alive))
        app.router.add_get("/readyz", self._probe(ready))
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)

    @staticmethod
    def _probe(fault: Fault) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            why = fault()
            return web.Response(text=f"{why or 'ok'}\n", status=503 if why else 200)

        return answer

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def start(self, host: str, port: int) -> None:
        """Listen; on `EVERYWHERE` over IPv6 too, where the kernel has it.

        Raises:
            InputError: the address cannot be had.
        """
        await self._runner.setup()
        try:
            if host == EVERYWHERE and self._has_ipv6():
                # One socket for both, as a node with IPv6 alone needs it.
                both = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
                await web.SockSite(self._runner, both).start()
            else:
                await web.TCPSite(self._runner, host, port).start()
        except OSError as e:
            raise InputError(f"--health-addr {host}:{port}", got=e.strerror or str(e)) from e

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()
