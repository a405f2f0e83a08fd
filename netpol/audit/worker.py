"""From logged packets to audit lines: decode, aggregate equal drops for a window, write, remember.

Owns the windows, the ring of recent records and their followers. It runs as its own task beside the
enforcement and only reads: batches are short, the loop turns between them, and what is too much is
counted (`suppressed`) instead of worked off. Counting is exact: the `count`, `suppressed` and `lost` of
all records together are the packets that the rules logged, but for those the stats name as unparsable.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from netpol.audit.attribute import Attribution, Attributor
from netpol.audit.packet import Packet, PacketError, parse
from netpol.audit.record import PartyRecord, Record, encode_line, format_time, protocol_name
from netpol.kernel.nflog import NflogMessage
from netpol.model.flow import PartyKind
from netpol.render.logprefix import LogPrefix, decode

#: Equal drops within this time are one record.
WINDOW_S = 1.0
#: Records of one window; further kinds of drops are counted as suppressed. Each costs one evaluation.
WINDOW_RECORDS = 2048
#: Records that are remembered for `recent`, and that a follower may lag behind.
RING_RECORDS = 1000
#: Records written in one go; the loop turns in between.
_FLUSH_RECORDS = 128


class Sink(Protocol):
    """Takes whole lines without waiting; says whether it did."""

    def write(self, chunk: bytes, lines: int) -> bool:
        """Hand over `lines` lines."""

    def reopen(self) -> None:
        """Open the destination anew."""


class _WindowKey(NamedTuple):
    """What makes two drops equal: all that a record shows but the source port."""

    prefix: str
    src: bytes
    dst: bytes
    protocol: int
    dport: int | None
    icmp: tuple[int | None, int | None]
    indev: int
    outdev: int
    fault: str


@dataclass(slots=True)
class _Drops:
    """The equal drops of a window: when and how the first came, how many there are."""

    prefix: LogPrefix
    packet: Packet
    attribution: Attribution
    timestamp_us: int
    count: int = 1


@dataclass(slots=True)
class AuditStats:
    """Totals since the start.

    Attributes:
        packets: packets handed in.
        records: records made.
        suppressed: packets beyond the kinds that one window may hold.
        foreign: packets whose prefix is not ours.
        unparsable: packets whose addresses could not be read.
        unwritten: records that the sink did not take.
    """

    packets: int = 0
    records: int = 0
    suppressed: int = 0
    foreign: int = 0
    unparsable: int = 0
    unwritten: int = 0


class AuditWorker:
    """Turns batches of messages into records.

    Args:
        node: this node's name.
        attributor: explains a packet.
        sink: takes the lines; None keeps them in the ring only.
        missed: packets logged but never handed in, since the start (`NflogStats.missed`).
        interface_name: the name of an interface index, "" for one that is gone.
        window_s: how long equal drops are put together.
        window_records: how many kinds of drops a window may hold.
        now_us: the wall clock, for packets without a time of their own.
    """

    def __init__(
        self,
        *,
        node: str,
        attributor: Attributor,
        sink: Sink | None,
        missed: Callable[[], int] = lambda: 0,
        interface_name: Callable[[int], str] = str,
        window_s: float = WINDOW_S,
        window_records: int = WINDOW_RECORDS,
        ring_records: int = RING_RECORDS,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.stats = AuditStats()
        self._node, self._attributor, self._sink = node, attributor, sink
        self._missed, self._interface_name = missed, interface_name
        self._window_s, self._window_records, self._now_us = window_s, window_records, now_us
        self._open: dict[_WindowKey, _Drops] = {}
        self._suppressed = self._lost_told = 0
        self._ring: deque[Record] = deque(maxlen=ring_records)
        self._followers: set[asyncio.Queue[Record]] = set()
        self._decode_prefix = lru_cache(maxsize=4096)(decode)

    async def run(self, batches: AsyncIterator[Sequence[NflogMessage]]) -> None:
        """Work until the batches end; the last window is written then, or when the task is cancelled."""
        flusher = asyncio.create_task(self._flush_forever(), name="audit-window")
        try:
            async for batch in batches:
                self.take(batch)
        finally:
            flusher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await flusher
            for _ in self._flush_parts():
                continue

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(self._window_s)
            for _ in self._flush_parts():
                await asyncio.sleep(0)

    def take(self, batch: Sequence[NflogMessage]) -> None:
        """Count packets into the open window."""
        window, stats = self._open, self.stats
        stats.packets += len(batch)
        for message in batch:
            try:
                packet = parse(message.payload)
            except PacketError:
                stats.unparsable += 1
                continue
            key = _WindowKey(
                message.prefix,
                packet.src,
                packet.dst,
                packet.protocol,
                packet.dport,
                (packet.icmp_type, packet.icmp_code),
                message.physindev or message.indev,
                message.physoutdev or message.outdev,
                packet.fault,
            )
            drops = window.get(key)
            if drops is not None:
                drops.count += 1
                continue
            prefix = self._decode_prefix(message.prefix)
            if prefix is None:
                stats.foreign += 1
            elif len(window) >= self._window_records:
                stats.suppressed += 1
                self._suppressed += 1
            else:
                stamp = message.timestamp_us
                window[key] = _Drops(
                    prefix,
                    packet,
                    self._attributor.attribute(prefix, packet),
                    self._now_us() if stamp is None else stamp,
                )

    def flush(self) -> None:
        """Close the window now and write its records."""
        for _ in self._flush_parts():
            continue

    def _flush_parts(self) -> Iterator[None]:
        """Close the window and write its records, some at a time."""
        window, self._open = self._open, {}
        drops = list(window.items())
        for at in range(0, len(drops), _FLUSH_RECORDS):
            records = [self._record(key, d) for key, d in drops[at : at + _FLUSH_RECORDS]]
            self.stats.records += len(records)
            self._ring.extend(records)
            for queue in self._followers:
                for record in records:
                    if queue.full():
                        queue.get_nowait()
                    queue.put_nowait(record)
            if self._sink is not None:
                chunk = b"".join(map(encode_line, records))
                if not self._sink.write(chunk, len(records)):
                    self.stats.unwritten += len(records)
            yield

    def _record(self, key: _WindowKey, drops: _Drops) -> Record:
        suppressed, self._suppressed = self._suppressed, 0
        missed = self._missed()
        lost, self._lost_told = missed - self._lost_told, missed
        packet, why = drops.packet, drops.attribution
        if PartyKind.EXTERNAL in (why.src.kind, why.dst.kind):
            # Who was nobody when the packet came may have been found meanwhile.
            why = self._attributor.attribute(drops.prefix, packet)
        direction = drops.prefix.direction
        return Record(
            ts=format_time(drops.timestamp_us),
            direction=None if direction is None else str(direction),
            reason=str(drops.prefix.reason),
            node=self._node,
            src=_with_port(why.src, packet.sport),
            dst=_with_port(why.dst, packet.dport),
            proto=protocol_name(packet.protocol),
            icmp_type=packet.icmp_type,
            icmp_code=packet.icmp_code,
            interface_in=self._interface_name(key.indev) if key.indev else "",
            interface_out=self._interface_name(key.outdev) if key.outdev else "",
            policies=why.policies,
            rule=why.rule,
            class_id=drops.prefix.class_id,
            generation=why.generation,
            count=drops.count,
            suppressed=suppressed,
            lost=lost,
            note=why.note,
        )

    def recent(self) -> list[Record]:
        """The remembered records, oldest first."""
        return list(self._ring)

    async def follow(self, *, past: bool = False) -> AsyncIterator[Record]:
        """Yield records as they are made, after the remembered ones if `past`.

        A follower that lags by more than the ring holds loses the oldest.
        """
        queue: asyncio.Queue[Record] = asyncio.Queue(self._ring.maxlen or RING_RECORDS)
        held = list(self._ring) if past else []
        self._followers.add(queue)
        try:
            for record in held:
                yield record
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)

    def reopen(self) -> None:
        """Have the sink open its destination anew (after a log rotation)."""
        if self._sink is not None:
            self._sink.reopen()


def _with_port(party: PartyRecord, port: int | None) -> PartyRecord:
    """The party with the port of this packet."""
    if port is None:
        return party
    return PartyRecord(
        ip=party.ip,
        port=port,
        kind=party.kind,
        namespace=party.namespace,
        pod=party.pod,
        uid=party.uid,
        name=party.name,
    )
