"""Denied packets to audit lines: how many one core attributes and writes in a second."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench import worlds
from bench.measure import Row, settle, timed
from bench.packets import POD_RANGE, restore, world_of
from bench.spaces import spaces
from bench.wire import Frames, Router, syn
from netpol.audit.attribute import Attributor
from netpol.audit.sink import LineSink
from netpol.audit.worker import AuditWorker
from netpol.kernel.drivers import Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.nflog import RCVBUF_BYTES, NflogReader
from netpol.model.flow import Flow, Verdict
from netpol.model.ids import Direction, Protocol
from netpol.policy.evaluate import evaluate, verdict
from netpol.policy.world import World
from netpol.render.logprefix import DropReason, LogPrefix, encode

#: As many as wait in the reader without loss, so that the rate is of packets that were all logged.
PACKETS, KINDS, GROUP = 60_000, 2_000, 77
QUIET_S = 0.5
#: Small enough that most of the packets of the second run are lost, all of which must be counted.
SMALL_RCVBUF_BYTES = 1 << 20


class _Counted(msgspec.Struct):
    """What the check reads of an audit line."""

    count: int
    lost: int = 0
    suppressed: int = 0


@dataclass
class _Outcome:
    seconds: float
    cpu_s: float
    lines: int
    lost: int
    accounted: int


def packets() -> Iterator[Row]:
    """Really denied and really logged packets of many kinds, in a world of 10,000 pods."""
    world = world_of(worlds.make(worlds.TEAMS_WORLD))
    frames, more = _denied(world)
    prefix = encode(LogPrefix(DropReason.DENIED, Direction.INGRESS, "abcdefghijklmnop"))
    log = f'-A FORWARD -j NFLOG --nflog-group {GROUP} --nflog-prefix "{prefix}"'
    rules = f"*mangle\n{log}\n-A FORWARD -j DROP\nCOMMIT\n"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    outcomes = []
    with spaces("router", "sink") as (space, sink):
        router = Router(space, sink, number=0, pods=POD_RANGE)
        restore(space, Variant.NFT, rules)
        for rcvbuf_bytes in (RCVBUF_BYTES, SMALL_RCVBUF_BYTES):
            settle()
            outcomes.append(asyncio.run(_run(world, router, frames, more, rcvbuf_bytes)))
        router.close()
    fast, lossy = outcomes
    for outcome in outcomes:
        if outcome.accounted != PACKETS + 1:
            raise AssertionError(f"{PACKETS + 1} packets denied, {outcome.accounted} accounted for")
    if fast.lost or not lossy.lost:
        raise AssertionError(
            f"lost {fast.lost} with the usual buffer, {lossy.lost} with a small one"
        )
    yield Row(
        "audit.packets_per_s",
        PACKETS / fast.seconds,
        "packets/s",
        target=20_000.0,
        at_least=True,
        note=f"{KINDS} kinds of drops, {fast.lines} lines in {fast.seconds:.2f} s (CPU "
        f"{fast.cpu_s:.2f} s) on one core; with a small buffer {lossy.lost} of {PACKETS + 1} were "
        "lost, and all of them counted",
    )


def _denied(world: World) -> tuple[Frames, Frames]:
    """Packets of some kinds, and one more."""
    rng = random.Random(9)
    pods = list(world.pods.values())
    local = [
        p for p in pods if p.node == worlds.LOCAL_NODE and world.isolating(p, Direction.INGRESS)
    ]
    kinds: set[tuple[bytes, bytes, int]] = set()
    while len(kinds) < KINDS:
        src, dst, port = rng.choice(pods), rng.choice(local), rng.randrange(1, 60_000)
        parties = world.pod_party(src), world.pod_party(dst)
        if None in parties:
            continue
        flow = Flow(parties[0], parties[1], Protocol.TCP, port)  # type: ignore[arg-type]
        if verdict(world, flow) is Verdict.DENY:
            kinds.add((src.addresses[0], dst.addresses[0], port))
    ordered = sorted(kinds)
    raw = [
        syn(src, dst, 1024 + number // KINDS, port)
        for number in range(PACKETS + 1)
        for src, dst, port in (ordered[number % KINDS],)
    ]
    return Frames(raw[:PACKETS]), Frames(raw[PACKETS:])


async def _quiet(worker: AuditWorker, expected: int) -> float:
    """Wait until all packets were counted, or nothing comes any more; returns when that was."""
    seen, since = -1, time.perf_counter()
    while time.perf_counter() - since < QUIET_S:
        if worker.stats.packets != seen:
            seen, since = worker.stats.packets, time.perf_counter()
        if seen >= expected:
            break
        await asyncio.sleep(0.001)
    return since


async def _run(
    world: World, router: Router, frames: Frames, more: Frames, rcvbuf_bytes: int
) -> _Outcome:
    """All packets are sent first and wait in the socket; then the reading side alone is timed."""
    with tempfile.TemporaryDirectory(prefix="netpol-bench-") as folder:
        path = Path(folder) / "audit.log"
        reader = in_netns(router.space, lambda: NflogReader(GROUP, rcvbuf_bytes=rcvbuf_bytes))
        sink = LineSink(path)
        worker = AuditWorker(
            node=worlds.LOCAL_NODE,
            attributor=Attributor(
                party=world.party, resolve=lambda f: evaluate(world, f), generation=lambda: 1
            ),
            sink=sink,
            missed=lambda: reader.stats.missed,
        )
        router.forget()
        router.send(frames)
        begin, cpu = time.perf_counter(), time.process_time()
        reader.start()
        task = asyncio.create_task(worker.run(reader.batches()))
        end = await _quiet(worker, frames.count)
        flush_s = timed(worker.flush)
        cpu_s = time.process_time() - cpu
        # The loss at the end of a burst shows with the next packet.
        router.send(more)
        await _quiet(worker, frames.count + more.count)
        reader.close()
        await task
        sink.close()
        lines = [msgspec.json.decode(x, type=_Counted) for x in path.read_bytes().splitlines()]
    return _Outcome(
        seconds=end - begin + flush_s,
        cpu_s=cpu_s,
        lines=len(lines),
        lost=reader.stats.missed,
        accounted=sum(x.count + x.lost + x.suppressed for x in lines),
    )
