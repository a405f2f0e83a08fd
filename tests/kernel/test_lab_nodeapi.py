"""What a kubelet of the lab answers: to a client with a certificate of the lab's CA, and to one without."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from netpol.kernel.netns import in_netns
from netpol.lab import spaces, spdy
from netpol.lab.apiserver.tls import Authority, server_context
from netpol.lab.kubelet import PodView
from netpol.lab.nodeapi import NodeApi
from netpol.lab.plan import LabPlan
from netpol.lab.podexec import PodCommands
from netpol.lab.podserver import PodServers
from netpol.lab.podstatus import KUBELET_PORT
from netpol.model.ids import ObjectKey, Protocol

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

NETNS = f"knpt-nodeapi-{os.getpid()}"
KEY = ObjectKey("shop", "web")
ADDRESS = "127.0.0.1"


class Node:
    """A node with one pod in its own network, and clients that stand beside it."""

    def __init__(self, tmp_path: Path) -> None:
        self.authority = Authority()
        self.tmp = tmp_path
        self.servers = PodServers()
        view = PodView(KEY, "u1", "node1", NETNS, (ADDRESS,), (), host_network=True, problem="")
        self.commands = PodCommands(
            files=tmp_path / "names",
            pod=lambda key: view if key == KEY else None,
            entries=list,
            servers=self.servers,
        )
        plan = LabPlan(node_count=1, dual_stack=False)
        (node,) = plan.nodes
        node = type(node)(
            **{name: getattr(node, name) for name in node.__slots__}
            | {"netns": NETNS, "addresses": (ADDRESS,)}
        )
        self.api = NodeApi(
            [node], commands=self.commands, pod=lambda key: view if key == KEY else None
        )

    @asynccontextmanager
    async def client(
        self, *, known: bool = True
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A TLS connection to the node, with or without a certificate."""
        context = ssl.create_default_context(cadata=self.authority.ca_pem.decode())
        if known:
            issued = self.authority.client("netpol-lab-apiserver")
            chain = self.tmp / "client.pem"
            chain.write_bytes(issued.certificate + issued.key)
            context.load_cert_chain(chain)
        sock = in_netns(NETNS, lambda: socket.create_connection((ADDRESS, KUBELET_PORT)))
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=context, server_hostname=ADDRESS
        )
        try:
            yield reader, writer
        finally:
            writer.close()

    async def ask(self, path: str, *, known: bool = True) -> tuple[int, str]:
        """The code and the text of an answer."""
        async with self.client(known=known) as (reader, writer):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: node1\r\n\r\n".encode())
            async with asyncio.timeout(10):
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), body.decode()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    spaces.create([NETNS])
    try:
        in_netns(NETNS, spaces.loopback_up)
        node = Node(tmp_path)
        issued = node.authority.server("netpol-lab-kubelet", (ADDRESS,))
        await node.api.start(server_context(issued, client_ca=node.authority.ca_pem))
        await node.servers.add(KEY, NETNS, [(Protocol.TCP, 80)])
        yield node
        await node.servers.remove(KEY)
        await node.api.close()
    finally:
        spaces.kill_inside([NETNS])
        spaces.remove([NETNS])


async def test_logs_say_who_was_answered(node: Node) -> None:
    in_netns(NETNS, lambda: socket.create_connection((ADDRESS, 80)).close())
    async with asyncio.timeout(10):
        while not node.servers.log(KEY):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    code, text = await node.ask("/containerLogs/shop/web/c?tailLines=1")

    assert code == 200
    assert "TCP 80" in text


@pytest.mark.parametrize(
    ("path", "code", "text"),
    [
        ("/containerLogs/shop/other/c", 404, 'pod "other" is not on this node'),
        ("/containerLogs/shop/web/c?previous=true", 400, "previous terminated container"),
        ("/portForward/shop/web", 404, "logs and exec only"),
        ("/exec/shop/web/c?command=true&output=1", 400, "over SPDY/3.1"),
        ("/exec/shop/web/c?output=1", 400, "at least 1 command"),
    ],
)
async def test_what_cannot_be_answered_is_said(node: Node, path: str, code: int, text: str) -> None:
    answer = await node.ask(path)

    assert answer[0] == code
    assert text in answer[1]


async def test_without_a_certificate_nobody_gets_an_answer(node: Node) -> None:
    with pytest.raises((OSError, ssl.SSLError, IndexError)):
        await node.ask("/containerLogs/shop/web/c", known=False)


async def test_a_command_runs_in_the_pods_network_over_spdy(node: Node) -> None:
    words = "command=sh&command=-c&command=cat%3B+readlink+%2Fproc%2Fself%2Fns%2Fnet"
    path = f"/exec/shop/web/c?{words}&input=1&output=1&error=1"
    head = [
        f"POST {path} HTTP/1.1",
        "Host: node1",
        "Connection: Upgrade",
        "Upgrade: SPDY/3.1",
        "X-Stream-Protocol-Version: v4.channel.k8s.io",
        "X-Stream-Protocol-Version: v3.channel.k8s.io",
        "",
        "",
    ]
    deflate = zlib.compressobj(zdict=spdy.DICTIONARY)
    outputs: dict[int, bytes] = {1: b"", 5: b"", 7: b""}
    async with node.client() as (reader, writer), asyncio.timeout(20):
        writer.write("\r\n".join(head).encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        for stream, kind in ((1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")):
            block = deflate.compress(spdy.header_block({"streamtype": kind}))
            block += deflate.flush(zlib.Z_SYNC_FLUSH)
            writer.write(spdy.control_frame(1, struct.pack(">IIH", stream, 0, 0) + block))
        writer.write(spdy.data_frame(3, b"hello\n", flags=1))
        ended: set[int] = set()
        while ended != set(outputs):
            frame = await spdy.read_frame(reader)
            assert frame is not None
            if not frame.kind:
                outputs[frame.stream] += frame.payload
                ended |= {frame.stream} if frame.flags & 1 else set()

    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"X-Stream-Protocol-Version: v4.channel.k8s.io" in answer
    assert json.loads(outputs[1])["status"] == "Success"
    said, where = outputs[5].decode().split()
    inode = in_netns(NETNS, lambda: Path("/proc/thread-self/ns/net").stat().st_ino)
    assert (said, where) == ("hello", f"net:[{inode}]")
