"""The keeping of agent processes, with real processes in the agent's place."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from netpol.admin.server import AdminServer
from netpol.lab import processes
from netpol.lab.agents import Agent, AgentSet
from netpol.lab.plan import LabPlan
from netpol.lib.errors import NoAnswerError

pytestmark = pytest.mark.kernel

ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def agent(tmp_path: Path, *command: str) -> Agent:
    return Agent(node=LabPlan(state_root=tmp_path).nodes[0], command=list(command), env=ENV)


@contextlib.asynccontextmanager
async def kept(one: Agent, *, restart: bool = True) -> AsyncIterator[AgentSet]:
    agents = AgentSet([one], restart=restart)
    task = asyncio.create_task(agents.run())
    try:
        yield agents
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if one.pid is not None:
            agents.kill(one.node.name, signal.SIGKILL)
            assert one.process is not None
            await one.process.wait()


async def running(one: Agent, *, other_than: int | None = None) -> int:
    for _ in range(500):
        if one.pid not in (None, other_than):
            break
        await asyncio.sleep(0.01)
    assert one.pid is not None
    return one.pid


async def test_a_killed_agent_is_started_again_and_recorded(tmp_path: Path) -> None:
    one = agent(tmp_path, "sleep", "60")
    async with kept(one) as agents:
        first = await running(one)
        agents.kill("node1", signal.SIGKILL)
        second = await running(one, other_than=first)
        assert one.restarts == 1
        assert "SIGKILL" in one.last_end
        await asyncio.sleep(0.05)
        recorded = processes.recorded(one.record)
        assert recorded is not None
        assert (recorded.pid, recorded.alive) == (second, True)


async def test_a_stopped_agent_stays_stopped_until_it_is_started(tmp_path: Path) -> None:
    one = agent(tmp_path, "sleep", "60")
    async with kept(one) as agents:
        first = await running(one)
        await agents.stop("node1")
        await asyncio.sleep(0.7)  # longer than the first back-off
        assert one.pid is None
        with pytest.raises(NoAnswerError, match="does not run"):
            agents.kill("node1", signal.SIGKILL)
        agents.start("node1")
        assert await running(one) != first


async def test_without_restart_an_ended_agent_is_left_and_its_last_words_are_told(
    tmp_path: Path,
) -> None:
    one = agent(tmp_path, "sh", "-c", "echo no such setting; exit 2")
    async with kept(one, restart=False) as agents:
        for _ in range(500):
            if not one.wanted:
                break
            await asyncio.sleep(0.01)
        (line,) = await agents.describe()
        assert line["problem"] == "ended by exit code 2: no such setting"
        assert not line["ready"]


async def test_the_state_of_an_agent_is_what_its_socket_says(tmp_path: Path) -> None:
    one = agent(tmp_path, "sleep", "60")

    async def status(_: object) -> dict[str, object]:
        return {"ready": True, "in_sync": False, "errors": ["a policy is refused"]}

    server = AdminServer(str(one.node.admin_socket), {"status": status})
    async with kept(one) as agents:
        await running(one)
        await server.start()
        try:
            (line,) = await agents.describe()
        finally:
            await server.close()
        expected = (True, False, "a policy is refused")
        assert (line["ready"], line["in_sync"], line["problem"]) == expected
        (line,) = await agents.describe()
        assert not line["ready"]
        assert "no agent answers" in line["problem"]


async def test_an_unknown_node_has_no_agent(tmp_path: Path) -> None:
    agents = AgentSet([agent(tmp_path, "true")], restart=False)
    with pytest.raises(NoAnswerError, match="node1"):
        agents.of("node7")
