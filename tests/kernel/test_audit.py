"""From dropped packets on the real kernel to written lines: right, and counted to the packet."""

import asyncio
import contextlib
import os
import socket
import subprocess
import time

import pytest

from netpol.audit.attribute import Attributor
from netpol.audit.record import decode_line
from netpol.audit.sink import LineSink
from netpol.audit.worker import AuditWorker
from netpol.kernel.netns import create, delete, in_netns, open_socket
from netpol.kernel.nflog import NflogReader, interface_name
from tests.unit.audit import samples
from tests.unit.audit.samples import DB, WEB, Judge

pytestmark = pytest.mark.kernel

GROUP = 77


@pytest.fixture
def netns(tmp_path):
    """A namespace that has the pods' addresses and drops what goes from web to db."""
    name = f"knpt-audit-{os.getpid()}"
    create(name)
    for address in (WEB, DB):
        subprocess.run(["ip", "-n", name, "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    subprocess.run(
        ["ip", "netns", "exec", name, "iptables-nft-restore"],
        input=(
            "*mangle\n:OUTPUT ACCEPT\n"
            f"-A OUTPUT -p udp --dport 5432 -j NFLOG --nflog-group {GROUP}"
            f' --nflog-prefix "{samples.INGRESS}"\n'
            "-A OUTPUT -p udp --dport 5432 -j DROP\nCOMMIT\n"
        ),
        text=True,
        check=True,
        env={**os.environ, "XTABLES_LOCKFILE": str(tmp_path / "lock")},
    )
    yield name
    delete(name)


@pytest.mark.parametrize("rcvbuf_bytes", [1 << 18, 64 << 20])
async def test_a_flood_is_logged_and_every_packet_accounted_for(netns, tmp_path, rcvbuf_bytes):
    judge = Judge(samples.DB_POLICY, samples.DENY_ALL)
    reader = in_netns(netns, lambda: NflogReader(GROUP, rcvbuf_bytes=rcvbuf_bytes))
    sink = LineSink(tmp_path / "audit.log")
    worker = AuditWorker(
        node="node1",
        attributor=Attributor(
            party=judge.party, resolve=judge.resolve, generation=lambda: judge.generation
        ),
        sink=sink,
        missed=lambda: reader.stats.missed,
        interface_name=interface_name,
        window_s=0.1,
    )
    reader.start()
    task = asyncio.create_task(worker.run(reader.batches()), name="audit")
    flooding_s = 1.0

    def flood():
        sent = 0
        with open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((WEB, 0))
            until = time.monotonic() + flooding_s
            while time.monotonic() < until:
                for _ in range(100):
                    with contextlib.suppress(PermissionError):  # dropped in OUTPUT
                        sock.sendto(b"x" * 40, (DB, 5432))
                    sent += 1
        return sent

    sent = await asyncio.to_thread(flood)
    await asyncio.sleep(0.3)
    # One more packet shows what was lost at the end of the flood.
    flooding_s = 0
    with open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((WEB, 0))
        with contextlib.suppress(PermissionError):
            sock.sendto(b"x", (DB, 5432))
        sent += 1
    await asyncio.sleep(0.4)
    reader.close()
    await asyncio.wait_for(task, 10)
    sink.close()

    records = [decode_line(x) for x in (tmp_path / "audit.log").read_bytes().splitlines()]
    assert sum(r.count + r.lost + r.suppressed for r in records) == sent
    assert {(r.src.pod, r.dst.pod, r.proto, r.interface_out) for r in records} == {
        ("web", "db", "UDP", "lo")
    }
    assert records[0].policies == ("shop/db", "shop/deny-all")
    assert worker.recent() == records
    print(f"\n{sent} packets in 1 s, {reader.stats}, {len(records)} lines")
