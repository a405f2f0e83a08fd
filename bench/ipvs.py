"""Services in a kernel with IPVS: User-Mode Linux, where only ratios of one run count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench import ipvs_cold, ipvs_endpoint
from bench.measure import Row, median, p99, spread
from tests.uml import machine
from tests.uml.inside.main import FAILED

#: Linux, the tables of 10,000 Services and what Python knows of them.
MEMORY = "2G"
TIMEOUT_S = 400.0


def cold() -> Iterator[Row]:
    """A table and its addresses from nothing."""
    found = _run("bench.ipvs_cold")
    size = f"{ipvs_cold.SERVICES:,} Services x {ipvs_cold.ENDPOINTS} endpoints"
    yield Row(
        "ipvs.cold",
        min(found["ours"]) * 1000,
        "ms",
        baseline=min(found["ipvsadm"]) * 1000,
        target=0.15,
        by_ratio=True,
        note=f"{size}, virtual and real servers from values; minimum of {len(found['ours'])}; baseline: "
        f"ipvsadm --restore, minimum of {len(found['ipvsadm'])}; reading all: {found['dump'] * 1000:.0f} ms",
    )
    yield Row(
        "ipvs.vips",
        min(found["vips"]) * 1000,
        "ms",
        baseline=min(found["ip -batch"]) * 1000,
        by_ratio=True,
        note=f"{ipvs_cold.SERVICES:,} addresses on a new dummy link, with their routes; minimum of "
        f"{len(found['vips'])}; baseline: ip -batch of the same",
    )


def endpoint() -> Iterator[Row]:
    """One endpoint among 100, 1,000 and 10,000 Services, through the whole proxy."""
    found = _run("bench.ipvs_endpoint")
    few, middle, many = (found[str(size)] for size in ipvs_endpoint.SIZES)
    size = f"{ipvs_endpoint.MIDDLE:,} Services x {ipvs_endpoint.ENDPOINTS} endpoints"
    best = min(middle["windows"], key=p99)
    yield Row(
        "ipvs.plan",
        middle["planned"] * 1000,
        "ms",
        note=f"{size}, decoded: their plans; {ipvs_endpoint.LARGE:,}: {many['planned'] * 1000:.0f} ms",
    )
    yield Row(
        "ipvs.endpoint",
        p99(best) * 1000,
        "ms",
        baseline=middle["cold"] * 1000,
        target=0.02,
        by_ratio=True,
        note=f"{size}, one endpoint goes or comes: event to kernel, {spread([t * 1000 for t in best])}, the "
        f"best of {len(middle['windows'])} windows; baseline: the room's cold apply of the same table, with "
        "rules, sets and addresses",
    )
    medians = [min(map(median, world["windows"])) * 1000 for world in (few, many)]
    yield Row(
        "ipvs.endpoint.growth",
        medians[1],
        "ms",
        baseline=medians[0],
        target=1.2,
        by_ratio=True,
        note=f"the same among {ipvs_endpoint.LARGE:,} Services, median; baseline: among "
        f"{ipvs_endpoint.SMALL}; p99 {min(map(p99, many['windows'])) * 1000:.1f} and "
        f"{min(map(p99, few['windows'])) * 1000:.1f} ms; {ipvs_endpoint.LARGE:,} cold: {many['cold']:.1f} s",
    )


def _run(module: str) -> dict[str, Any]:
    reason = machine.lacking()
    if reason:
        raise RuntimeError(reason)
    found = machine.run_guest((module,), memory=MEMORY, timeout_s=TIMEOUT_S)[module]
    if FAILED in found:
        raise RuntimeError(found[FAILED])
    return found
