"""Inside the guest: one endpoint of one Service changes, from the bytes of its watch event to the kernel.

The way is the agent's: decoded, planned, lowered and applied by the room, with real drivers. The same room
tells what a full cold apply of its Services takes.
"""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import services
from netpol.config import DEFAULT_SERVICE_MARK_MASK
from netpol.k8s.decode import decode_object
from netpol.kernel.conntrack import NetlinkFlows
from netpol.kernel.drivers import Variant
from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.modules import load_module
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.kernel.vips import DummyVips
from netpol.model.ids import SERVICES, Protocol
from netpol.model.ipvs import ServerId
from netpol.model.net import Family, parse_address
from netpol.model.objects import EndpointSlice, Node, Service
from proxy.apply import Drivers
from proxy.changes import Tracker
from proxy.ledger_file import LedgerFile
from proxy.rules import RuleOptions, rulesets
from proxy.status import SyncOptions
from proxy.sync import ProxyRoom
from proxy.work import Static

SMALL, MIDDLE, LARGE = SIZES = (100, 1000, 10_000)
ENDPOINTS = 10
#: Events come at random, this far apart in the mean, so that looks and drains fall in between. Windows are
#: told apart, since another program on the machine can make a window slow, and none fast.
WINDOWS, EVENTS, GAP_S = 3, 120, 0.02
#: For the first look at everything, which a start brings with it.
SETTLE_S = 4.0
MARK_MASK = DEFAULT_SERVICE_MARK_MASK
APPLY_TIMEOUT_S = 30.0
SOURCES = {Family.V4: parse_address(services.NODE_ADDRESS)}


def run(say: Callable[[str, Any], None]) -> None:
    """All figures, in seconds."""
    for command in (
        "ip link add eth0 type dummy",
        "ip link set eth0 up",
        f"ip addr add {services.NODE_ADDRESS}/24 dev eth0",
    ):
        subprocess.run(command.split(), check=True)
    load_module("ip_vs")
    load_module("ip_vs_rr")
    for size in SIZES:
        say(str(size), asyncio.run(_measure(size)))


def _drivers() -> Drivers:
    return Drivers(
        NetlinkIpvs(),
        DummyVips(),
        NetlinkSets(mark_mask=MARK_MASK, owner=SERVICES),
        RestoreTables(Variant.LEGACY, owner=SERVICES),
        NetlinkFlows(),
        eyes=NetlinkIpvs(),
    )


async def _measure(size: int) -> dict[str, Any]:
    tracker = Tracker(services.NODE)
    node = Node(name=services.NODE, addresses=(parse_address(services.NODE_ADDRESS),))
    tracker.node(None, node)
    slices: list[EndpointSlice] = []
    for n in range(size):
        service: Service = decode_object("Service", services.service_json(n))
        slices.append(decode_object("EndpointSlice", services.slice_json(n, ENDPOINTS)))
        tracker.service(None, service)
        tracker.slice(None, slices[-1])
    begin_s = time.monotonic()
    plans = tracker.flush()
    planned_s = time.monotonic() - begin_s
    gc.collect()
    gc.freeze()
    applied = asyncio.Event()
    drivers = await asyncio.to_thread(_drivers)
    static = Static(rulesets(RuleOptions(MARK_MASK)), {}, SOURCES)
    room = ProxyRoom(
        drivers,
        ledger=LedgerFile(Path(f"/run/bench-ledger-{size}")),
        static=lambda: static,
        options=SyncOptions(mark_mask=MARK_MASK),
        applied=applied.set,
    )
    running = asyncio.create_task(room.run_forever())

    async def wait(begin_s: float) -> float:
        try:
            async with asyncio.timeout(APPLY_TIMEOUT_S):
                while not room.in_sync:
                    applied.clear()
                    await applied.wait()
        except TimeoutError as e:
            raise AssertionError(f"not applied: {room.status}") from e
        return time.monotonic() - begin_s

    begin_s = time.monotonic()
    room.changed(plans)
    room.start()
    cold_s = await wait(begin_s)
    _check(room, drivers, size)
    await asyncio.sleep(SETTLE_S)
    rng = random.Random(1)
    windows: list[list[float]] = []
    for _ in range(WINDOWS):
        took_s: list[float] = []
        for event in range(EVENTS):
            if event % 2 == 0:
                n, gone = rng.randrange(size), rng.randrange(ENDPOINTS)
            await asyncio.sleep(rng.random() * 2 * GAP_S)
            body = services.slice_json(n, ENDPOINTS, without=gone if event % 2 == 0 else -1)
            begin_s = time.monotonic()
            new: EndpointSlice = decode_object("EndpointSlice", body)
            tracker.slice(slices[n], new)
            slices[n] = new
            room.changed(tracker.flush())
            took_s.append(await wait(begin_s))
            if event % 20 == 0:
                _check_weight(drivers, n, n * ENDPOINTS + gone)
        windows.append(took_s)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    room.close()
    return {"planned": planned_s, "cold": cold_s, "windows": windows}


def _check(room: ProxyRoom, drivers: Drivers, size: int) -> None:
    found = drivers.ipvs.dump()
    reals = sum(len(state.reals) for state in found.values())
    if (len(found), reals) != (size, size * ENDPOINTS) or not room.ready:
        raise AssertionError(f"{len(found)} servers, {reals} backends, {room.status}")


def _check_weight(drivers: Drivers, n: int, gone: int) -> None:
    """An endpoint that went drains."""
    id_ = ServerId(Family.V4, Protocol.TCP, services.vip(n), services.PORT)
    reals = drivers.ipvs.read([id_])[id_].reals
    weights = {r.address: state.config.weight for r, state in reals.items()}
    if weights.get(services.backend(gone), 0) != 0 or len(reals) < ENDPOINTS - 1:
        raise AssertionError(f"{id_}: {weights}")
