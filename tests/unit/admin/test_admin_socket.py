"""The admin socket, server and client as they are used: over a real socket, in threads."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from netpol.admin import client, wire
from netpol.admin.server import AdminServer
from netpol.lib.errors import InputError, NoAnswerError


async def echo(args):
    return args


async def refuse(args):
    raise InputError("args.pod", needed="NS/NAME", got="nothing")


async def break_down(args):
    raise RuntimeError("boom")


async def count(args):
    for i in range(args["n"]):
        yield {"item": i}
        await asyncio.sleep(0)


HANDLERS = {"echo": echo, "refuse": refuse, "break": break_down, "count": count}


@pytest.fixture
async def path(tmp_path):
    server = AdminServer(str(tmp_path / "run" / "agent.sock"), HANDLERS)
    await server.start()
    yield str(tmp_path / "run" / "agent.sock")
    await server.close()


async def call(path, op, **args):
    return await asyncio.to_thread(client.call, path, op, **args)


async def test_an_answer_is_what_the_handler_returned(path):
    assert await call(path, "echo", a=1, b=["x", None]) == {"a": 1, "b": ["x", None]}


async def test_errors_keep_their_class_and_words(path):
    with pytest.raises(InputError, match=r"args\.pod; needed NS/NAME; got nothing"):
        await call(path, "refuse")
    with pytest.raises(NoAnswerError, match="RuntimeError: boom"):
        await call(path, "break")
    with pytest.raises(InputError, match="no operation 'nope'; needed break, count"):
        await call(path, "nope")
    assert await call(path, "echo", still=1) == {"still": 1}


async def test_a_follower_gets_every_item_and_then_the_end(path):
    got = await asyncio.to_thread(lambda: list(client.follow(path, "count", n=3)))
    assert got == [{"item": 0}, {"item": 1}, {"item": 2}]


async def test_the_socket_is_for_root_only(path):
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600  # noqa: ASYNC240


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b'{"op": 1}\n', b'{"op":"echo","args":[]}\n'])
async def test_garbage_is_answered_and_the_connection_goes_on(path, line):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(line + wire.encode_request(wire.Request("echo", {"k": 1})))
    assert "error" in json.loads(await reader.readline())
    assert json.loads(await reader.readline()) == {"ok": {"k": 1}}
    writer.close()
    await writer.wait_closed()


async def test_an_endless_line_ends_the_connection_and_nothing_else(path):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"x" * (wire.REQUEST_MAX_BYTES + 10) + b"\n")
    assert "too long" in json.loads(await reader.readline())["error"]["message"]
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert await call(path, "echo") == {}


async def test_the_second_agent_of_a_node_is_refused(path):
    second = AdminServer(path, HANDLERS)
    with pytest.raises(NoAnswerError, match=f"another netpol-agent .* process {os.getpid()}"):
        await second.start()
    assert await call(path, "echo", first=1) == {"first": 1}


async def test_a_stale_socket_is_replaced(tmp_path):
    stale = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(stale))
    server = AdminServer(str(stale), HANDLERS)
    await server.start()
    assert await call(str(stale), "echo") == {}
    await server.close()
    assert not stale.exists()


async def test_a_killed_agent_leaves_no_lock(tmp_path):
    path = str(tmp_path / "agent.sock")
    code = (
        "import asyncio,sys\nfrom netpol.admin.server import AdminServer\n"
        "async def main():\n await AdminServer(sys.argv[1], {}).start()\n print('up', flush=True)\n"
        " await asyncio.sleep(60)\nasyncio.run(main())"
    )
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:  # noqa: ASYNC220
        assert other.stdout.readline() == b"up\n"
        server = AdminServer(path, HANDLERS)
        with pytest.raises(NoAnswerError, match=f"process {other.pid}"):
            await server.start()
        other.kill()
        other.wait()
        await server.start()
        assert await call(path, "echo") == {}
        await server.close()


async def test_no_agent_is_said_with_the_path(tmp_path):
    with pytest.raises(NoAnswerError, match=f"no agent answers at {tmp_path}/none"):
        client.call(str(tmp_path / "none"), "status")


async def test_a_silent_agent_does_not_hang_the_client(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)
        s.listen()
        with pytest.raises(NoAnswerError, match="does not answer in time"):
            client.call(path, "status", timeout_s=0.1)


async def test_closing_ends_followers(tmp_path):
    async def forever(args):
        while True:
            yield 1
            await asyncio.sleep(0.01)

    path = str(tmp_path / "s")
    server = AdminServer(path, {"forever": forever})
    await server.start()
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(wire.encode_request(wire.Request("forever", {})))
    assert await reader.readline() == b'{"ok":1}\n'
    await asyncio.wait_for(server.close(), 5)
    writer.close()
    await writer.wait_closed()
