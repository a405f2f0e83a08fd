"""Servers for these tests: in the test's own loop, and in a thread for real kubectl."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from netpol.lab.apiserver import ADMIN, ApiServer, ExecRequest, LogRequest, Store

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
TIMEOUT_S = 30


async def connections_closed():
    """Wait until the loop watches no socket but its own, so that none is left to the collector."""
    async with asyncio.timeout(TIMEOUT_S):
        while len(asyncio.get_running_loop()._selector.get_map()) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass
class Answer:
    status: int
    body: Any
    headers: Any


class Client:
    """A plain HTTP client of one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def call(self, method, path, body=None, *, headers=None, kind="application/json"):
        data = body
        sent = dict(headers or {})
        if body is not None:
            sent["Content-Type"] = kind
            if not isinstance(body, bytes):
                data = aiohttp.JsonPayload(body)
                data.headers["Content-Type"] = kind
        async with self.session.request(
            method, self.url + path, data=data, headers=sent
        ) as response:
            text = await response.text()
            body = await response.json() if text[:1] in "{[" and text else text
            return Answer(response.status, body, response.headers)

    async def get(self, path, **more):
        return await self.call("GET", path, **more)

    async def post(self, path, body, **more):
        return await self.call("POST", path, body, **more)

    async def put(self, path, body, **more):
        return await self.call("PUT", path, body, **more)

    async def patch(self, path, body, kind="application/merge-patch+json", **more):
        return await self.call("PATCH", path, body, kind=kind, **more)

    async def delete(self, path, body=None, **more):
        return await self.call("DELETE", path, body, **more)


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer(bookmark_s=0.1) as found:
        yield found
    await connections_closed()


@pytest.fixture
async def api(server: ApiServer) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(session, server.url)


@pytest.fixture
def store() -> Store:
    return Store()


async def local_process(request: ExecRequest) -> asyncio.subprocess.Process:
    """Run the command on this machine, as a pod's namespace would."""
    pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(
        *request.command, stdin=pipe if request.stdin else none, stdout=pipe, stderr=pipe
    )


async def three_lines(request: LogRequest) -> AsyncIterator[bytes]:
    """Yield three lines, or the last of them."""
    lines = [f"{request.container} {number}\n".encode() for number in range(3)]
    for line in lines[-request.tail_lines :] if request.tail_lines else lines:
        yield line


class Kubectl:
    """Real kubectl against a server that runs in a thread of this process."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = folder
        self.server = ApiServer(
            tokens={"the-token": ADMIN},
            tls=True,
            exec_hook=local_process,
            log_hook=three_lines,
            bookmark_s=1,
        )
        self._thread = threading.Thread(target=self.loop.run_forever, name="apiserver")
        self._thread.start()
        self.on_loop(self.server.start())
        self.server.kubeconfig(folder / "config", "the-token")

    def on_loop(self, work):
        future: Future = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(TIMEOUT_S)

    def stored(self, call, *args, **more):
        """Call a method of the store on the server's loop."""

        async def work():
            return getattr(self.server.store, call)(*args, **more)

        return self.on_loop(work())

    def popen(self, *args, **more):
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "KUBECONFIG": str(self.folder / "config"),
        }
        return subprocess.Popen(
            [KUBECTL, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | more.pop("env", {}),
        )

    def run(self, line, stdin="", *, code=0, args=(), env=None):
        """Run a command line; return what it printed, errors behind the output."""
        with self.popen(*line.split(), *args, env=env or {}) as process:
            out, err = process.communicate(stdin, timeout=TIMEOUT_S)
        assert process.returncode == code, f"kubectl {line}: {process.returncode}\n{out}{err}"
        return out + err

    def stop(self):
        self.on_loop(self.server.stop())
        self.on_loop(connections_closed())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT_S)
        self.loop.close()


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    if KUBECTL is None:
        pytest.skip("needed kubectl: install the lab extra")
    found = Kubectl(tmp_path_factory.mktemp("kubectl"))
    yield found
    found.stop()
