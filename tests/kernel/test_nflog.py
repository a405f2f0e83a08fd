"""The NFLOG reader on the real kernel: both families and variants, ownership, exact loss."""

import asyncio
import contextlib
import os
import socket
import subprocess

import pytest

from netpol.audit.packet import parse
from netpol.kernel.netns import create, delete, in_netns, open_socket
from netpol.kernel.nflog import NflogReader
from netpol.lib.errors import KernelError
from tests.kernel.probespaces import Bridge

pytestmark = pytest.mark.kernel

GROUP = 77
PREFIX = "KNP|D|I|abcdefghij"
LOG = f'-j NFLOG --nflog-group {GROUP} --nflog-prefix "{PREFIX}"'


@pytest.fixture
def netns():
    name = f"knpt-nflog-{os.getpid()}"
    create(name)
    yield name
    delete(name)


@pytest.fixture
def load(netns, tmp_path):
    def load(text, *, variant="nft", tool="iptables"):
        subprocess.run(
            ["ip", "netns", "exec", netns, f"{tool}-{variant}-restore"],
            input=f"*mangle\n:OUTPUT ACCEPT\n{text}\nCOMMIT\n",
            text=True,
            check=True,
            env={**os.environ, "XTABLES_LOCKFILE": str(tmp_path / "lock")},
        )

    return load


@pytest.fixture
def reader(netns):
    it = in_netns(netns, lambda: NflogReader(GROUP))
    yield it
    it.close()


async def take(reader, count):
    """Read `count` messages, or what comes within 3 seconds."""
    out = []
    try:
        async with asyncio.timeout(3):
            async for batch in reader.batches():
                out += batch
                if len(out) >= count:
                    break
    except TimeoutError:
        pass
    return out


@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize(
    "case", [("iptables", socket.AF_INET, "127.0.0.1"), ("ip6tables", socket.AF_INET6, "::1")]
)
async def test_a_logged_packet_is_decoded_whole(netns, load, reader, variant, case):
    tool, family, address = case
    load(
        f"-A OUTPUT -p udp --dport 999 -j MARK --set-mark 0x1234\n-A OUTPUT -p udp --dport 999 {LOG}",
        variant=variant,
        tool=tool,
    )
    reader.start()
    with open_socket(netns, family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 888))
        for size in (10, 2000):
            sock.sendto(b"x" * size, (address, 999))
    messages = await take(reader, 2)
    assert [m.prefix for m in messages] == [PREFIX, PREFIX]
    first, second = messages
    assert (first.seq, second.seq) == (0, 1)
    assert first.hw_protocol == (0x0800 if family == socket.AF_INET else 0x86DD)
    assert (first.hook, first.mark, first.indev, first.outdev) == (3, 0x1234, 0, 1)
    packet = parse(first.payload)
    packed = socket.inet_pton(family, address)
    assert packet == (packed, packed, 17, 888, 999, None, None, "")
    assert len(first.payload) == (20 if family == socket.AF_INET else 40) + 8 + 10
    assert len(second.payload) == 128
    assert parse(second.payload).dport == 999
    assert reader.stats.received == 2
    assert reader.stats.missed == 0


async def test_a_group_has_one_reader_and_is_free_again_after_it(netns, reader):
    with pytest.raises(KernelError, match=r"NFLOG group 77; needed a group that nobody reads"):
        in_netns(netns, lambda: NflogReader(GROUP))
    in_netns(netns, lambda: NflogReader(GROUP + 1)).close()
    reader.close()
    in_netns(netns, lambda: NflogReader(GROUP)).close()


async def test_the_same_group_in_another_namespace_is_another_group(netns, reader):
    other = f"{netns}-b"
    create(other)
    try:
        in_netns(other, lambda: NflogReader(GROUP)).close()
    finally:
        delete(other)


async def test_loss_in_the_kernel_is_counted_to_the_packet(netns, load):
    load(f"-A OUTPUT -p udp --dport 999 {LOG}\n-A OUTPUT -p udp --dport 999 -j DROP")
    reader = in_netns(netns, lambda: NflogReader(GROUP, rcvbuf_bytes=1 << 18))
    try:
        sent = 0
        with open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(20000):  # nobody reads meanwhile
                sent += flood(sock)
            reader.start()
            await asyncio.sleep(0.3)
            sent += flood(sock)  # shows the gap before it
            await asyncio.sleep(0.3)
        stats = reader.stats
        assert stats.lost > 1000
        assert stats.overruns >= 1
        assert stats.received + stats.lost == sent
        assert len(await take(reader, stats.received)) == stats.received
    finally:
        reader.close()


def flood(sock):
    with contextlib.suppress(PermissionError):  # what OUTPUT drops comes back as EPERM
        sock.sendto(b"x", ("127.0.0.1", 999))
    return 1


async def test_a_full_queue_drops_and_counts(netns, load):
    load(f"-A OUTPUT -p udp --dport 999 {LOG}")
    reader = in_netns(netns, lambda: NflogReader(GROUP, queue_packets=10))
    try:
        reader.start()
        with open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(500):
                flood(sock)
            await asyncio.sleep(0.3)
        assert (reader.stats.received, reader.stats.dropped, reader.stats.lost) == (500, 490, 0)
        assert [m.seq for m in await take(reader, 10)] == list(range(10))
    finally:
        reader.close()


async def test_closing_ends_the_batches_after_what_is_queued(netns, load, reader):
    load(f"-A OUTPUT -p udp --dport 999 {LOG}")
    reader.start()
    with open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flood(sock)
        await asyncio.sleep(0.3)
    reader.close()
    reader.close()
    assert [len(batch) async for batch in reader.batches()] == [1]


async def test_bridged_packets_name_their_ports_of_the_bridge(tmp_path):
    with Bridge("nflog", 2, tmp_path=tmp_path) as bridge:
        reader = in_netns(bridge.node, lambda: NflogReader(GROUP))
        try:
            reader.start()
            bridge.rules("nft", 4, f":FORWARD ACCEPT\n-A FORWARD -p udp --dport 999 {LOG}")
            with open_socket(bridge.pods[0], socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", (bridge.texts(1)[0], 999))
                (message,) = await take(reader, 1)
        finally:
            reader.close()

        def names():
            return dict(socket.if_nameindex())

        known = in_netns(bridge.node, names)
    assert [known[i] for i in (message.indev, message.outdev)] == ["br0", "br0"]
    assert [known[i] for i in (message.physindev, message.physoutdev)] == ["v0", "v1"]
    assert message.timestamp_us is not None
