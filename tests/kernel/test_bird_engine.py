"""The engine with real BIRDs: changes, refusals, deaths, adoption."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from netpol.kernel.netns import in_netns
from netpol.lib.errors import KernelError, KernelMissingError, NoAnswerError
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine, RefusedError
from routes.bird.render import render
from routes.options import RouteOptions
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, Host, bird_net

pytestmark = pytest.mark.kernel
T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def net() -> Iterator[BirdNet]:
    with bird_net([(1, 1), (1, 2)]) as made:
        yield made


def options(host: Host) -> RouteOptions:
    return RouteOptions(run_dir=str(host.folder / "run"))


def config(net: BirdNet, name: str) -> str:
    host = net.hosts[name]
    return render(plan([h.node() for h in net.hosts.values()], name, options(host)))


def folder(host: Host) -> Folder:
    return Folder(host.folder / "run")


def inside(host: Host, work: Callable[[BirdEngine], Awaitable[T]]) -> T:
    """Run work with an engine in a node's namespace; BIRD outlives it."""

    async def main() -> T:
        engine = BirdEngine(BirdDaemon(folder(host)), has_routes=has_routes)
        await engine.prepare()
        try:
            return await work(engine)
        finally:
            await engine.close()

    async def has_routes() -> bool:
        return "proto bird" in host.run("ip", "route")

    return in_netns(host.netns, lambda: asyncio.run(main()))


@pytest.fixture(autouse=True)
def no_birds_left(net: BirdNet) -> Iterator[None]:
    yield
    for host in net.hosts.values():
        pid = BirdDaemon(folder(host)).running()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def pid_of(host: Host) -> int:
    pid = BirdDaemon(folder(host)).running()
    assert pid is not None
    return pid


def routes_come(net: BirdNet, one: Host, other: Host) -> bool:
    net.nudge()
    return net.wait(lambda: one.routes() == set(other.pods))


async def start(engine: BirdEngine, text: str) -> bool:
    return await engine.apply(text)


def test_start_change_and_no_change(net: BirdNet) -> None:
    one = net.hosts["n1"]

    async def work(engine: BirdEngine) -> list[bool]:
        text = config(net, "n1")
        first = await engine.apply(text)
        again = await engine.apply(text)
        alone = render(plan([one.node()], "n1", options(one)))
        changed = await engine.apply(alone)
        sessions = [p for p in (await engine.protocols()).values() if p.kind == "BGP"]
        assert sessions == []
        return [first, again, changed]

    assert inside(one, work) == [True, False, True]
    mode = (one.folder / "run/bird.conf").stat()
    assert mode.st_mode & 0o777 == 0o640
    assert Path(f"/proc/{pid_of(one)}/status").read_text().split("Uid:\t")[1].split()[0] != "0"


def test_a_refused_configuration_changes_nothing_and_names_its_line(net: BirdNet) -> None:
    one, two = net.hosts.values()
    good = config(net, "n1")
    inside(two, lambda e: start(e, config(net, "n2")))
    inside(one, lambda e: start(e, good))
    assert routes_come_by_engines(one, two)
    bad = good.replace("watchdog warning 2 s;", "nonsense here;")

    async def work(engine: BirdEngine) -> tuple[int, str, str]:
        with pytest.raises(RefusedError) as refused:
            await engine.apply(bad)
        return refused.value.fault.line, str(refused.value), engine._folder.config.read_text()

    line, said, kept = inside(one, work)
    assert bad.splitlines()[line - 1] == "nonsense here;"
    assert f"line {line}" in said
    assert kept == good
    assert one.routes() == set(two.pods)


def routes_come_by_engines(one: Host, other: Host) -> bool:
    """Keep both daemons awake from within, until the routes are there."""

    async def work(engine: BirdEngine) -> bool:
        for _ in range(200):
            await engine.control.ask("show status")
            if one.routes() == set(other.pods) and other.routes() == set(one.pods):
                return True
            await asyncio.sleep(0.1)
        return False

    return inside(one, work)


def test_a_first_configuration_that_is_refused_starts_nothing(net: BirdNet) -> None:
    one = net.hosts["n1"]

    async def work(engine: BirdEngine) -> str:
        with pytest.raises(RefusedError) as refused:
            await engine.apply("protocol nonsense {}\n")
        return str(refused.value)

    assert "line 1" in inside(one, work)
    assert BirdDaemon(folder(one)).running() is None


def test_bird_outlives_the_agent_and_is_found_again(net: BirdNet) -> None:
    one = net.hosts["n1"]
    text = config(net, "n1")
    inside(one, lambda e: start(e, text))
    before = pid_of(one)

    async def again(engine: BirdEngine) -> bool:
        assert engine.status.running
        return await engine.apply(text)

    assert inside(one, again) is False
    assert pid_of(one) == before


def test_a_bird_that_dies_is_started_again_without_a_lost_packet(net: BirdNet) -> None:
    one, two = net.hosts.values()
    inside(two, lambda e: start(e, config(net, "n2")))
    inside(one, lambda e: start(e, config(net, "n1")))
    assert routes_come_by_engines(one, two)

    async def work(engine: BirdEngine) -> str:
        running = asyncio.create_task(engine.run())
        flood = asyncio.create_task(
            asyncio.to_thread(
                one.run,
                "ping",
                "-c",
                "200",
                "-i",
                "0.05",
                "-I",
                one.pod_addresses[0],
                two.pod_addresses[0],
            )
        )
        await asyncio.sleep(1)
        pid = pid_of(one)
        os.kill(pid, signal.SIGKILL)
        for _ in range(100):
            await asyncio.sleep(0.1)
            if BirdDaemon(folder(one)).running() not in (None, pid):
                break
        said = await flood
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert engine.status.starts >= 1
        return said

    assert " 0% packet loss" in inside(one, work)
    assert one.routes() == set(two.pods)


def test_what_nobody_confirms_is_undone_by_bird_and_told_again_by_the_next(net: BirdNet) -> None:
    """The agent may be what a change cut off, or may be killed while it waits."""
    one, two = net.hosts.values()
    inside(two, lambda e: start(e, config(net, "n2")))
    good = config(net, "n1")
    inside(one, lambda e: start(e, good))
    assert routes_come_by_engines(one, two)
    wrong = good.replace(" as 64512;\n  neighbor", " as 64999;\n  neighbor")
    assert wrong != good

    async def work(engine: BirdEngine) -> None:
        assert await engine.apply(wrong, undo_s=2)

    inside(one, work)
    assert not sessions_up(one)
    assert net.wait(lambda: one.routes() == set(two.pods) and sessions_up(one) == 1)

    async def confirmed(engine: BirdEngine) -> None:
        assert await engine.apply(without_n2(net), undo_s=2)
        await engine.confirm()
        await asyncio.sleep(3)
        assert await engine.sessions() == {}

    inside(one, confirmed)


def sessions_up(host: Host) -> int:
    async def work(engine: BirdEngine) -> int:
        return sum((await engine.sessions()).values())

    return inside(host, work)


def test_a_port_that_is_taken_is_told_and_taken_when_free(net: BirdNet) -> None:
    one, two = net.hosts.values()
    inside(two, lambda e: start(e, config(net, "n2")))
    squatter = in_netns(one.netns, lambda: socket.create_server(("10.0.1.1", 179)))

    async def work(engine: BirdEngine) -> None:
        running = asyncio.create_task(engine.run())
        await engine.apply(config(net, "n1"))
        for _ in range(100):
            await asyncio.sleep(0.1)
            if "taken" in engine.status.error:
                break
        assert "taken" in engine.status.error
        squatter.close()
        for _ in range(200):
            await asyncio.sleep(0.1)
            if not engine.status.error and engine.status.established:
                break
        assert engine.status.error == ""
        assert engine.status.established == 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    inside(one, work)


def test_another_bird_beside_ours_is_told(net: BirdNet) -> None:
    one = net.hosts["n1"]
    (one.folder / "theirs").mkdir()
    net.run_bird("theirs", one.netns, _their_config(one))

    async def work(engine: BirdEngine) -> None:
        await engine.apply(without_n2(net))
        running = asyncio.create_task(engine.run())
        for _ in range(100):
            await asyncio.sleep(0.1)
            if engine.status.beside:
                break
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert "another BIRD runs in this network (process" in engine.status.beside
        assert not engine.status.error

    inside(one, work)


def _their_config(host: Host) -> Path:
    path = host.folder / "theirs/bird.conf"
    path.write_text("router id 10.9.9.9;\nprotocol device {}\n")
    return path


def test_a_folder_that_cannot_be_written_is_told_and_mended_by_itself(net: BirdNet) -> None:
    one = net.hosts["n1"]
    where = folder(one)

    async def work(engine: BirdEngine) -> None:
        await engine.apply(without_n2(net))
        mount = "mount", "-t", "tmpfs", "-o", "size=16k,mode=2770", "tmpfs", str(where.path)
        await asyncio.to_thread(subprocess.run, mount, check=True)
        try:
            (where.path / "filler").write_bytes(bytes(16384))
            with pytest.raises(KernelError, match=r"bird\.conf\.tmp.*No space left"):
                await engine.apply(config(net, "n1"))
        finally:
            await asyncio.to_thread(subprocess.run, ["umount", str(where.path)], check=True)
        assert await engine.apply(config(net, "n1"))

    inside(one, work)
    assert len(sessions_of(one)) == 1


def test_a_full_disk_gives_up_the_old_log_first(tmp_path: Path) -> None:
    mount = "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)
    subprocess.run(mount, check=True)
    try:
        daemon = BirdDaemon(Folder(tmp_path))
        daemon.folder.old_log.write_bytes(bytes(16384))
        daemon.write(daemon.folder.candidate, "router id 10.0.0.1;\n")
        assert daemon.folder.candidate.read_text() == "router id 10.0.0.1;\n"
        assert not daemon.folder.old_log.exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


async def test_no_bird_and_an_old_bird_are_named(tmp_path: Path) -> None:
    with pytest.raises(KernelMissingError, match="bird2"):
        await BirdDaemon(Folder(tmp_path), binary="no-such-bird").check()
    old = tmp_path / "bird"
    old.write_text("#!/bin/sh\necho BIRD version 1.6.8\n")
    old.chmod(0o755)
    with pytest.raises(KernelMissingError, match=r"2\.0\.12 or later"):
        await BirdDaemon(Folder(tmp_path), binary=str(old)).check()


def test_bird_in_a_container_of_its_own(net: BirdNet) -> None:
    """The agent writes and waits; another program starts BIRD, and again after its death."""
    one = net.hosts["n1"]
    where = Folder(one.folder / "bird")

    def sidecar() -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "routes.bird.sidecar", "--run-dir", str(one.folder)]
        # What a runtime gives a container: the same folder under the name that both have.
        return subprocess.Popen(["ip", "netns", "exec", one.netns, *words], cwd=REPOSITORY)

    async def main() -> None:
        async def has_routes() -> bool:
            return False

        engine = BirdEngine(BirdDaemon(where, external=True), has_routes=has_routes)
        await engine.prepare()
        beside = sidecar()
        try:
            settings = RouteOptions(run_dir=str(where.path))
            assert await engine.apply(render(plan([one.node()], "n1", settings)))
            running = asyncio.create_task(engine.run())
            first = BirdDaemon(where).running()
            assert first is not None
            os.kill(first, signal.SIGKILL)
            beside.wait()
            beside = sidecar()
            for _ in range(100):
                await asyncio.sleep(0.1)
                if BirdDaemon(where).running() not in (None, first) and not engine.status.error:
                    break
            assert engine.status.error == ""
            assert engine.status.starts == 0
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        finally:
            await engine.close()
            beside.kill()
            beside.wait()

    in_netns(one.netns, lambda: asyncio.run(main()))


def without_n2(net: BirdNet) -> str:
    one = net.hosts["n1"]
    return render(plan([one.node()], "n1", options(one)))


def sessions_of(host: Host) -> list[str]:
    async def work(engine: BirdEngine) -> list[str]:
        return [n for n, p in (await engine.protocols()).items() if p.kind == "BGP"]

    return inside(host, work)


def test_a_file_that_bird_never_read_is_not_taken_for_what_is_in_force(net: BirdNet) -> None:
    """An agent that is killed after the rename leaves the new file and the old configuration."""
    one = net.hosts["n1"]
    inside(one, lambda e: start(e, without_n2(net)))
    wanted = config(net, "n1")
    BirdDaemon(folder(one)).write(folder(one).config, wanted)
    assert sessions_of(one) == []
    inside(one, lambda e: start(e, wanted))
    assert len(sessions_of(one)) == 1


def test_a_change_that_a_former_agent_left_unconfirmed_stays(net: BirdNet) -> None:
    one = net.hosts["n1"]
    inside(one, lambda e: start(e, without_n2(net)))
    wanted = config(net, "n1")
    BirdDaemon(folder(one)).write(folder(one).config, wanted)

    async def killed(engine: BirdEngine) -> None:
        assert not (await engine.control.ask("configure timeout 2")).failed

    inside(one, killed)

    async def next_one(engine: BirdEngine) -> None:
        await engine.apply(wanted)
        await asyncio.sleep(2.5)

    inside(one, next_one)
    assert len(sessions_of(one)) == 1


def test_an_answer_that_did_not_come_leaves_nothing_taken_for_sure(net: BirdNet) -> None:
    """BIRD hangs for a while in the middle of a change, then does what it was told."""
    one = net.hosts["n1"]
    first, second = without_n2(net), config(net, "n1")
    inside(one, lambda e: start(e, first))

    async def work(engine: BirdEngine) -> list[str]:
        await engine.apply(first)
        ask = engine.control.ask

        async def lost(command: str) -> object:
            said = await ask(command)
            if command == "configure":
                raise NoAnswerError("BIRD", needed="an answer", got="none")
            return said

        engine.control.ask = lost  # type: ignore[method-assign,assignment]
        with pytest.raises(NoAnswerError):
            await engine.apply(second)
        engine.control.ask = ask  # type: ignore[method-assign]
        await engine.apply(first)
        return [n for n, p in (await engine.protocols()).items() if p.kind == "BGP"]

    assert inside(one, work) == []


def test_a_bird_that_hangs_is_ended_by_an_agent_that_comes_to_it(
    net: BirdNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = net.hosts["n1"]
    inside(one, lambda e: start(e, without_n2(net)))
    before = pid_of(one)
    os.kill(before, signal.SIGSTOP)
    wanted = config(net, "n1")

    async def work(engine: BirdEngine) -> None:
        for _ in range(2):
            with pytest.raises(NoAnswerError):
                await engine.apply(wanted)
        await engine.apply(wanted)

    monkeypatch.setattr(
        "routes.bird.control.BirdControl.__init__.__kwdefaults__", {"answer_s": 0.5}
    )
    inside(one, work)
    assert pid_of(one) != before
    assert len(sessions_of(one)) == 1


def test_a_bird_whose_files_are_gone_is_not_joined_by_a_second(net: BirdNet) -> None:
    one = net.hosts["n1"]
    inside(one, lambda e: start(e, without_n2(net)))
    before = pid_of(one)
    for path in (folder(one).pid, folder(one).socket):
        path.unlink()
    assert pid_of(one) == before

    async def work(engine: BirdEngine) -> None:
        for _ in range(2):
            with pytest.raises(NoAnswerError):
                await engine.apply(config(net, "n1"))
        await engine.apply(config(net, "n1"))

    inside(one, work)
    assert Path(f"/proc/{before}/cmdline").read_bytes() == b""  # nobody has looked after it yet
    assert pid_of(one) != before
