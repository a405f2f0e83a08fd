"""Audit throughput: synthetic NFLOG messages decoded, attributed, aggregated and written as JSON.

1,000 different denied flows, repeated; packets per second of CPU time on one core. The kernel's part
(netlink reads) is not in it. Row audit.packets_per_s.
"""

from __future__ import annotations

import struct
import tempfile
import time
from pathlib import Path

from netpol.audit.attribute import Attributor
from netpol.audit.sink import LineSink
from netpol.audit.worker import AuditWorker
from netpol.kernel import nflog
from netpol.kernel.netlink import HEADER_SIZE, nla
from tests.unit.audit import samples

FLOWS = 1000
PACKETS = 100_000
#: Packets of one window: what arrives in a second at the target rate.
WINDOW = 20_000


def _frame(seq: int, payload: bytes) -> bytes:
    """The attributes of one message in the order in which the kernel writes them."""
    body = b"".join(
        (
            struct.pack("!BBH", 2, 0, 77),
            nla(1, struct.pack("!HBB", 0x0800, 2, 0)),
            nla(10, samples.INGRESS.encode() + b"\0"),
            *(nla(kind, struct.pack("!I", 2 + kind)) for kind in (4, 6, 5, 7)),
            nla(2, struct.pack("!I", 7)),
            nla(3, struct.pack("!QQ", 1_700_000_000, seq % 1_000_000)),
            nla(12, struct.pack("!I", seq)),
            nla(9, payload.ljust(nflog.COPY_BYTES, b"\0")),
        )
    )
    return struct.pack("=IHHII", HEADER_SIZE + len(body), 0x400, 0, 0, 0) + body


def measure() -> float:
    """Packets per second of CPU time."""
    payloads = [
        samples.payload(f"10.9.{i // 250}.{i % 250 + 1}", samples.DB, sport=20000 + i)
        for i in range(FLOWS)
    ]
    frames = [_frame(i, payloads[i % FLOWS]) for i in range(PACKETS)]
    judge = samples.Judge(samples.DB_POLICY, samples.DENY_ALL)
    with tempfile.TemporaryDirectory() as folder:
        sink = LineSink(Path(folder) / "audit.log")
        worker = AuditWorker(
            node="node1",
            attributor=Attributor(
                party=judge.party, resolve=judge.resolve, generation=lambda: judge.generation
            ),
            sink=sink,
        )
        start = time.process_time()
        for at in range(0, PACKETS, nflog.BATCH_PACKETS):
            chunk = frames[at : at + nflog.BATCH_PACKETS]
            messages = [nflog.decode(f, HEADER_SIZE, len(f)) for f in chunk]
            worker.take([m for m in messages if m is not None])
            if at // WINDOW != (at + nflog.BATCH_PACKETS) // WINDOW:
                worker.flush()
        worker.flush()
        spent_s = time.process_time() - start
        sink.close()
    if worker.stats.packets != PACKETS or worker.stats.suppressed:
        raise AssertionError(worker.stats)
    return PACKETS / spent_s


if __name__ == "__main__":
    print(f"audit.packets_per_s {measure():.0f}")
