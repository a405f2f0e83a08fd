"""Exec over SPDY: a client's streams become channels, and the command's output comes back on them."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from netpol.lab import spdy
from netpol.lab.apiserver import ExecRequest, Process
from netpol.lab.apiserver.exec import ERROR, STDERR, STDIN, STDOUT, run_exec
from netpol.lib.errors import NoAnswerError

FIN = 1
OUTPUT = {ERROR, STDIN, STDOUT, STDERR}


def test_the_dictionary_is_the_one_of_the_protocol() -> None:
    """By its length and by the checksum that a zlib stream names its dictionary with."""
    assert len(spdy.DICTIONARY) == 1423
    assert zlib.adler32(spdy.DICTIONARY) == 0xE3C6A7C2


def test_header_blocks_come_back_as_they_were() -> None:
    headers = {"streamtype": "stdin", "empty": ""}

    assert spdy.read_header_block(spdy.header_block(headers)) == headers


@pytest.mark.parametrize("cut", [0, 3, 4, 9])
def test_a_block_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="cut off"):
        spdy.read_header_block(spdy.header_block({"streamtype": "stdin"})[:cut])


class Client:
    """The other side: opens streams, sends, and sorts what comes back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._deflate = zlib.compressobj(zdict=spdy.DICTIONARY)
        self._inflate = zlib.decompressobj(zdict=spdy.DICTIONARY)
        self.received: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.replies: list[int] = []
        self.pings: list[bytes] = []
        self.refused: list[int] = []

    def open(self, stream: int, kind: str) -> None:
        block = self._deflate.compress(spdy.header_block({"Streamtype": kind}))
        block += self._deflate.flush(zlib.Z_SYNC_FLUSH)
        payload = struct.pack(">IIH", stream, 0, 0) + block
        self.writer.write(spdy.control_frame(1, payload))

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.writer.write(spdy.data_frame(stream, data, flags=FIN if end else 0))

    async def read_until(self, ended: set[int]) -> None:
        while not ended <= self.ended:
            frame = await spdy.read_frame(self.reader)
            assert frame is not None, "the server went"
            self._take(frame)

    def _take(self, frame: spdy.Frame) -> None:
        match frame.kind:
            case 0:
                old = self.received.get(frame.stream, b"")
                self.received[frame.stream] = old + frame.payload
                if frame.flags & FIN:
                    self.ended.add(frame.stream)
            case 2:
                (stream,) = struct.unpack_from(">I", frame.payload)
                assert spdy.read_header_block(self._inflate.decompress(frame.payload[4:])) == {}
                self.replies.append(stream)
            case 3:
                self.refused.append(struct.unpack_from(">I", frame.payload)[0])
            case 6:
                self.pings.append(frame.payload)


@asynccontextmanager
async def connected(
    serve: Callable[[spdy.ExecSession], Awaitable[None]],
) -> AsyncIterator[Client]:
    failures: list[BaseException] = []
    done = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(spdy.ExecSession(reader, writer))
        except BaseException as error:  # noqa: BLE001 - shown by the test below
            failures.append(error)
        finally:
            writer.close()
            done.set()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        async with asyncio.timeout(10):
            await done.wait()
        server.close()
    if failures:
        raise failures[0]


async def _start(wanted: ExecRequest) -> Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *wanted.command, stdin=pipe, stdout=pipe, stderr=pipe
    )


def command(*words: str) -> ExecRequest:
    return ExecRequest({}, "c", words, stdin=True, stdout=True, stderr=True, tty=False)


async def run(session: spdy.ExecSession, wanted: ExecRequest) -> None:
    await session.opened(OUTPUT)
    await run_exec(wanted, _start, send=session.send, messages=session.messages())
    await session.finish()


async def test_a_command_gets_its_input_and_says_its_output_and_exit_code() -> None:
    wanted = command("sh", "-c", "cat; echo oh >&2; exit 7")
    async with connected(lambda session: run(session, wanted)) as client:
        for stream, kind in ((1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")):
            client.open(stream, kind)
        client.send(3, b"hello ")
        client.send(3, b"world", end=True)
        await client.read_until({1, 5, 7})

    assert client.replies == [1, 3, 5, 7]
    assert client.received[5] == b"hello world"
    assert client.received[7] == b"oh\n"
    status = json.loads(client.received[1])
    assert (status["status"], status["reason"]) == ("Failure", "NonZeroExitCode")
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]


async def test_input_that_comes_before_the_last_stream_is_not_lost() -> None:
    async with connected(lambda session: run(session, command("cat"))) as client:
        client.open(3, "stdin")
        client.send(3, b"early", end=True)
        for stream, kind in ((1, "error"), (5, "stdout"), (7, "stderr")):
            client.open(stream, kind)
        await client.read_until({1, 5, 7})

    assert client.received[5] == b"early"
    assert json.loads(client.received[1])["status"] == "Success"


async def test_pings_are_answered_and_unknown_streams_refused() -> None:
    async with connected(lambda session: run(session, command("cat"))) as client:
        client.writer.write(spdy.control_frame(6, b"\0\0\0\x01"))
        client.open(9, "video")
        for stream, kind in ((1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")):
            client.open(stream, kind)
        client.send(3, b"", end=True)
        await client.read_until({1, 5, 7})

    assert client.pings == [b"\0\0\0\x01"]
    assert client.refused == [9]


async def test_a_client_that_goes_ends_its_command() -> None:
    started: asyncio.Future[Process] = asyncio.get_running_loop().create_future()

    async def start(wanted: ExecRequest) -> Process:
        process = await _start(wanted)
        started.set_result(process)
        return process

    async def serve(session: spdy.ExecSession) -> None:
        await session.opened(OUTPUT)
        sleeper = command("sleep", "60")
        await run_exec(sleeper, start, send=session.send, messages=session.messages())

    async with connected(serve) as client:
        for stream, kind in ((1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")):
            client.open(stream, kind)
        process = await started

    assert process.returncode is not None


async def test_a_client_that_opens_too_little_and_goes_is_an_error() -> None:
    with pytest.raises(NoAnswerError, match="a client that went"):
        async with connected(lambda session: run(session, command("cat"))) as client:
            client.open(1, "error")
