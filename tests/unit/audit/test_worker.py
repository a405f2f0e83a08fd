"""Windows, counts, the ring and the written lines."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.audit.attribute import Attributor
from netpol.audit.record import decode_line, encode_line, format_time
from netpol.audit.sink import LineSink
from netpol.audit.worker import AuditWorker
from tests.unit.audit import samples
from tests.unit.audit.samples import API, DB, WEB, Judge, message


class ListSink:
    """Keeps lines; refuses them while `full`."""

    def __init__(self):
        self.lines, self.full, self.reopened = [], False, 0

    def write(self, chunk, lines):
        if self.full:
            return False
        new = chunk.splitlines()
        assert len(new) == lines
        self.lines += new
        return True

    def reopen(self):
        self.reopened += 1


def make(judge=None, *, sink=None, **how):
    judge = judge or Judge(samples.DB_POLICY, samples.DENY_ALL)
    attributor = Attributor(
        party=judge.party, resolve=judge.resolve, generation=lambda: judge.generation
    )
    return AuditWorker(node="node1", attributor=attributor, sink=sink, **how)


def test_a_line_has_the_documented_fields_and_values():
    sink = ListSink()
    worker = make(sink=sink, interface_name={2: "veth1", 3: "eth0"}.get, missed=lambda: 7)
    worker.take([message(WEB, DB), message(WEB, DB, sport=40001)])
    worker.flush()
    (line,) = sink.lines
    assert json.loads(line) == {
        "ts": "2023-11-14T22:13:20.000001Z",
        "verdict": "deny",
        "direction": "ingress",
        "reason": "denied",
        "node": "node1",
        "src": {
            "ip": WEB,
            "port": 40000,
            "kind": "pod",
            "namespace": "shop",
            "pod": "web",
            "uid": "uid-web",
            "name": "shop/web",
        },
        "dst": {
            "ip": DB,
            "port": 5432,
            "kind": "pod",
            "namespace": "shop",
            "pod": "db",
            "uid": "uid-db",
            "name": "shop/db",
        },
        "proto": "TCP",
        "icmp_type": None,
        "icmp_code": None,
        "in": "veth1",
        "out": "eth0",
        "policies": ["shop/db", "shop/deny-all"],
        "rule": {
            "policy": "shop/db",
            "direction": "ingress",
            "number": 1,
            "failed": [{"term": "pods with app=api in shop", "reason": "shop/web has app=web"}],
        },
        "class": "abcdefghij",
        "generation": 1,
        "count": 2,
        "suppressed": 0,
        "lost": 7,
        "note": "",
    }
    assert encode_line(decode_line(line)) == line + b"\n"
    assert worker.recent() == [decode_line(line)]


def test_lost_packets_are_told_once():
    missed = 3
    worker = make(missed=lambda: missed)
    worker.take([message(WEB, DB), message(API, WEB)])
    worker.flush()
    missed = 5
    worker.take([message(WEB, DB)])
    worker.flush()
    assert [r.lost for r in worker.recent()] == [3, 0, 2]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([WEB, API]),
            st.sampled_from([WEB, API, DB]),
            st.integers(1, 30),
            st.integers(1, 5),
        ),
        max_size=60,
    ),
    st.integers(1, 20),
)
def test_counts_and_suppressed_add_up_to_the_packets(flows, size):
    worker = make(window_records=size, ring_records=10000)
    for at in range(0, len(flows), 20):
        worker.take([message(s, d, sport=p, dport=q) for s, d, p, q in flows[at : at + 20]])
        worker.flush()
    records = worker.recent()
    assert sum(r.count + r.suppressed for r in records) == len(flows)
    assert worker.stats.packets == len(flows)
    for at in range(0, len(flows), 20):
        kinds = {(s, d, q) for s, d, _, q in flows[at : at + 20]}
        assert len(kinds) <= 20
    if size == 20:
        expected = {(s, d, q) for s, d, _, q in flows}
        assert {(r.src.ip, r.dst.ip, r.dst.port) for r in records} == expected


def test_what_is_not_ours_or_no_packet_is_counted_apart():
    worker = make()
    worker.take(
        [
            message(WEB, DB, prefix="other"),
            message(WEB, DB)._replace(payload=b"\x45"),
            message(WEB, DB),
        ]
    )
    worker.flush()
    assert (worker.stats.foreign, worker.stats.unparsable, worker.stats.records) == (1, 1, 1)


def test_a_packet_without_a_time_gets_the_clocks():
    worker = make(now_us=lambda: 1_000_000)
    worker.take([message(WEB, DB, timestamp_us=None)])
    worker.flush()
    assert worker.recent()[0].ts == "1970-01-01T00:00:01.000000Z"


def test_a_full_sink_loses_lines_but_not_the_ring():
    sink = ListSink()
    worker = make(sink=sink)
    sink.full = True
    worker.take([message(WEB, DB)])
    worker.flush()
    assert (worker.stats.unwritten, len(worker.recent()), sink.lines) == (1, 1, [])


def test_icmp_types_and_spoofed_sources_are_their_own_records():
    worker = make()
    worker.take(
        [
            message(WEB, DB, protocol=1, rest=b"\x08\x00"),
            message(WEB, DB, protocol=1, rest=b"\x0d\x00"),
            message("10.9.9.9", DB, prefix=samples.SPOOFED),
        ]
    )
    worker.flush()
    echo, stamp, spoofed = worker.recent()
    assert (echo.proto, echo.icmp_type, stamp.icmp_type) == ("ICMP", 8, 13)
    assert (echo.src.port, echo.dst.port) == (None, None)
    assert (spoofed.reason, spoofed.direction, spoofed.policies) == ("spoofed", None, ())


async def test_run_writes_windows_and_the_last_one_at_the_end():
    sink = ListSink()
    worker = make(sink=sink, window_s=0.05)

    async def batches():
        yield [message(WEB, DB)]
        await asyncio.sleep(0.2)
        assert len(sink.lines) == 1
        yield [message(WEB, DB), message(API, DB, dport=1)]

    await worker.run(batches())
    assert [decode_line(line).count for line in sink.lines] == [1, 1, 1]


async def test_a_cancelled_run_still_writes_what_it_has():
    sink = ListSink()
    worker = make(sink=sink, window_s=60)

    async def batches():
        yield [message(WEB, DB)]
        await asyncio.sleep(60)

    task = asyncio.create_task(worker.run(batches()), name="audit")
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(sink.lines) == 1


async def test_a_follower_sees_past_and_new_records():
    worker = make()
    worker.take([message(WEB, DB)])
    worker.flush()
    seen = []

    async def follow():
        async for record in worker.follow(past=True):
            seen.append(record.src.pod)
            if len(seen) == 2:
                return

    task = asyncio.create_task(follow(), name="follow")
    await asyncio.sleep(0)
    worker.take([message(API, WEB)])
    worker.flush()
    await asyncio.wait_for(task, 3)
    assert seen == ["web", "api"]


@pytest.mark.parametrize(
    ("stamp", "text"),
    [(0, "1970-01-01T00:00:00.000000Z"), (1_700_000_000_999_999, "2023-11-14T22:13:20.999999Z")],
)
def test_times_are_rfc3339_with_microseconds(stamp, text):
    assert format_time(stamp) == text


def wait_for(condition):
    deadline = time.monotonic() + 3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_file_is_appended_and_reopened_after_a_rotation(tmp_path):
    path = tmp_path / "audit.log"
    path.write_bytes(b"old\n")
    sink = LineSink(path)
    assert sink.write(b"one\n", 1)
    wait_for(lambda: sink.written == 1)
    path.rename(tmp_path / "audit.log.1")
    assert sink.write(b"two\n", 1)
    wait_for(lambda: sink.written == 2)
    sink.reopen()
    assert sink.write(b"three\n", 1)
    sink.close()
    assert (tmp_path / "audit.log.1").read_bytes() == b"old\none\ntwo\n"
    assert path.read_bytes() == b"three\n"
    assert not sink.write(b"late\n", 1)
    assert sink.lost == 1


def test_a_stuck_pipe_holds_up_nobody_and_loss_is_counted(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = LineSink(path, backlog_bytes=1 << 18)
    line = b"x" * 1023 + b"\n"
    start = time.monotonic()
    taken = sum(sink.write(line, 1) for _ in range(2000))
    assert time.monotonic() - start < 1
    assert sink.lost == 2000 - taken > 0
    got = []
    os.set_blocking(fd, True)
    reader = threading.Thread(target=lambda: got.extend(iter(lambda: os.read(fd, 65536), b"")))
    reader.start()
    sink.close()
    reader.join(3)
    os.close(fd)
    assert sum(map(len, got)) == taken * 1024
    assert sink.written == taken


def test_a_full_disk_is_counted():
    sink = LineSink(Path("/dev/full"))
    assert sink.write(b"a\nb\n", 2)
    wait_for(lambda: sink.lost == 2)
    sink.close()
