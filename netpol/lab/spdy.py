"""SPDY/3.1 as API servers speak it to kubelets: the streams of one exec, over one connection.

Owns frames, header blocks and the turning of streams into the numbered channels of `apiserver.exec`. Of
SPDY only what a server needs that opens no stream itself and has no flow control (the other side, the
reference implementation, has none either).
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator
from typing import NamedTuple

from netpol.lab.apiserver.exec import CLOSE, ERROR, RESIZE, STDERR, STDIN, STDOUT
from netpol.lib.errors import NoAnswerError

#: The protocol of the streams: with it the exit code comes as a Status on the error stream.
CHANNELS = "v4.channel.k8s.io"

_VERSION = 3
_SYN_STREAM, _SYN_REPLY, _RST_STREAM, _PING, _GOAWAY = 1, 2, 3, 6, 7
_FIN = 1
_CONTROL = 0x8000_0000
_FRAME_MAX_BYTES = 1 << 24  # the length field has 24 bits
_STREAM_TYPES = {
    "error": ERROR,
    "stdin": STDIN,
    "stdout": STDOUT,
    "stderr": STDERR,
    "resize": RESIZE,
}
_OPEN_TIMEOUT_S = 30.0
_GOODBYE_S = 2.0

# The dictionary that both sides begin their header compression with (SPDY/3, 2.6.10.1): words with
# their lengths, then text that is common in values.
_WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language "
    "accept-ranges age allow authorization cache-control connection content-base content-encoding "
    "content-language content-length content-location content-md5 content-range content-type date "
    "etag expect expires from host if-match if-modified-since if-none-match if-range "
    "if-unmodified-since last-modified location max-forwards pragma proxy-authenticate "
    "proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url "
    "public set-cookie keep-alive origin"
)
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request"
    "401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented"
    "503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 "
    "Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,"
    "application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age="
    "gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = (
    b"".join(
        struct.pack(">I", len(word)) + word.replace("_", " ").encode() for word in _WORDS.split()
    )
    + _TAIL.encode()
)


class Frame(NamedTuple):
    """A frame; `kind` is 0 for data, and then `stream` says whose."""

    kind: int
    stream: int
    flags: int
    payload: bytes


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """Return the next frame, None at the end of the connection."""
    try:
        first, second = struct.unpack(">II", await reader.readexactly(8))
        payload = await reader.readexactly(second & 0xFF_FFFF)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    flags = second >> 24
    if first & _CONTROL:
        return Frame(first & 0xFFFF, 0, flags, payload)
    return Frame(0, first, flags, payload)


def control_frame(kind: int, payload: bytes, *, flags: int = 0) -> bytes:
    """Return a control frame as bytes."""
    head = struct.pack(">II", _CONTROL | _VERSION << 16 | kind, flags << 24 | len(payload))
    return head + payload


def data_frame(stream: int, payload: bytes, *, flags: int = 0) -> bytes:
    """Return a data frame as bytes."""
    return struct.pack(">II", stream, flags << 24 | len(payload)) + payload


def header_block(headers: dict[str, str]) -> bytes:
    """Return headers as they are before compression."""
    parts = [struct.pack(">I", len(headers))]
    for pair in headers.items():
        for text in pair:
            parts += [struct.pack(">I", len(text)), text.encode()]
    return b"".join(parts)


def read_header_block(data: bytes) -> dict[str, str]:
    """Return the headers of a block that was decompressed.

    Raises:
        ValueError: It is no such block.
    """
    try:
        (count,) = struct.unpack_from(">I", data)
        place = 4
        texts = []
        for _ in range(2 * count):
            (size,) = struct.unpack_from(">I", data, place)
            texts.append(data[place + 4 : place + 4 + size].decode())
            place += 4 + size
    except struct.error as error:
        raise ValueError("a header block is cut off") from error
    return {name.lower(): value for name, value in zip(texts[::2], texts[1::2], strict=True)}


class ExecSession:
    """The streams of one command, as channels: `send` and `messages` are what `run_exec` takes.

    Args:
        reader: of the connection, behind the answer to the upgrade.
        writer: of the same.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._deflate = zlib.compressobj(zdict=DICTIONARY)
        self._streams: dict[int, int] = {}  # stream: channel
        self._early: list[bytes] = []

    async def opened(self, wanted: set[int]) -> None:
        """Wait until the client has opened the streams of these channels.

        Raises:
            NoAnswerError: It went, or does something else.
        """
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                while not wanted <= set(self._streams.values()):
                    frame = await read_frame(self._reader)
                    if frame is None:
                        raise NoAnswerError("exec over SPDY", got="a client that went")
                    self._early += await self._take(frame)
        except TimeoutError:
            got = f"{len(self._streams)} of {len(wanted)} streams in {_OPEN_TIMEOUT_S:g} s"
            raise NoAnswerError("exec over SPDY", got=got) from None
        except (ValueError, zlib.error, struct.error) as error:
            raise NoAnswerError("exec over SPDY", got=f"an unusable frame: {error}") from error

    async def messages(self) -> AsyncIterator[bytes]:
        """Yield messages of the client: the number of a channel, then bytes."""
        for message in self._early:
            yield message
        self._early.clear()
        while (frame := await read_frame(self._reader)) is not None:
            if frame.kind == _GOAWAY:
                return
            for message in await self._take(frame):
                yield message

    async def send(self, message: bytes) -> None:
        """Send a message to the client; one for a channel without a stream is dropped."""
        stream = self._of_channel(message[0])
        if stream is not None:
            self._writer.write(data_frame(stream, message[1:]))
            await self._writer.drain()

    async def finish(self) -> None:
        """End the streams of output and wait a moment for the client, which closes the connection."""
        for stream, channel in self._streams.items():
            if channel in (ERROR, STDOUT, STDERR):
                self._writer.write(data_frame(stream, b"", flags=_FIN))
        try:
            await self._writer.drain()
            async with asyncio.timeout(_GOODBYE_S):
                while (frame := await read_frame(self._reader)) is not None:
                    if frame.kind == _GOAWAY:
                        break
        except (TimeoutError, ConnectionError):
            return  # it has all of it, or is gone

    async def _take(self, frame: Frame) -> list[bytes]:
        match frame.kind:
            case 0:
                channel = self._streams.get(frame.stream)
                if channel is None:
                    return []
                found = [bytes((channel,)) + frame.payload] if frame.payload else []
                if frame.flags & _FIN:
                    found.append(bytes((CLOSE, channel)))
                return found
            case 1:
                await self._open(frame)
            case 6:
                self._writer.write(control_frame(_PING, frame.payload))
                await self._writer.drain()
            case _:
                return []  # settings and the like: nothing that an exec depends on
        return []

    async def _open(self, frame: Frame) -> None:
        (stream,) = struct.unpack_from(">I", frame.payload)
        headers = read_header_block(self._inflate.decompress(frame.payload[10:]))
        channel = _STREAM_TYPES.get(headers.get("streamtype", ""))
        if channel is None:
            refusal = struct.pack(">II", stream, 3)  # REFUSED_STREAM
            self._writer.write(control_frame(_RST_STREAM, refusal))
        else:
            self._streams[stream] = channel
            block = self._deflate.compress(header_block({}))
            block += self._deflate.flush(zlib.Z_SYNC_FLUSH)
            self._writer.write(control_frame(_SYN_REPLY, struct.pack(">I", stream) + block))
        await self._writer.drain()

    def _of_channel(self, channel: int) -> int | None:
        return next((s for s, c in self._streams.items() if c == channel), None)
