"""The agents of the lab: one netpol-agent process in every node's namespace, started again when it ends.

Owns their command lines, their processes and what is asked of them over their admin sockets. What an
agent does is none of its business.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from netpol.admin import wire
from netpol.lab import processes
from netpol.lab.plan import LabPlan, NodePlan
from netpol.lib.errors import InputError, NetpolError, NoAnswerError

Obj = dict[str, Any]

#: Where an agent answers health and metrics: the loopback of its own namespace, so all may have the same.
HEALTH_ADDRESS = "127.0.0.1:9461"

#: What the lab sets because it relies on it, and what would end an agent at once.
_LABS_OWN = frozenset(
    {
        *("--node", "--api-server", "--token-file", "--kubeconfig", "--config"),
        *("--admin-socket", "--state-dir", "--run-dir", "--cni-conf-dir", "--audit-log"),
        *("--health-addr", "--xtables-lockfile", "--version", "--help"),
    }
)

_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
_STEADY_S = 30.0  # an agent that ran this long starts again at the shortest wait
_STOP_S = 5.0
_ASK_TIMEOUT_S = 5.0


def missing() -> str | None:
    """Return why no agent can be started, or None."""
    if importlib.util.find_spec("netpol.agent") is None:
        return "this installation has no netpol-agent (use --no-agent)"
    return None


def missing_proxy() -> str | None:
    """Return why no agent can serve Services here, or None; tries it in a namespace of its own."""
    from netpol.kernel.ipvs_table import NetlinkIpvs
    from netpol.kernel.netns import in_new_netns

    def attempt() -> None:
        NetlinkIpvs().close()

    try:
        in_new_netns(attempt)
    except NetpolError as error:
        return str(error)
    return None


def check_arguments(words: Sequence[str]) -> None:
    """Refuse arguments that agents would not start with, before anything is built.

    Raises:
        InputError: One is no setting of an agent, or its value is wrong, or the lab itself sets it.
    """
    from netpol import config

    def refuse(message: str) -> NoReturn:
        raise InputError("--agent-arg", needed="settings of netpol-agent", got=message)

    for word in words:
        flag = word.partition("=")[0]
        if flag in _LABS_OWN:
            raise InputError("--agent-arg", needed="what the lab does not set itself", got=flag)
    parser = config.parser()
    parser.allow_abbrev = False
    parser.error = refuse  # type: ignore[method-assign]
    config.load(parser.parse_args(words), {})


def command(plan: LabPlan, node: NodePlan, *, api_url: str, path: Path) -> list[str]:
    """Return the command line of a node's agent; `path` is its token file."""
    agent = [sys.executable, "-m", "netpol"]
    arguments = {
        "--node": node.name,
        "--api-server": api_url,
        "--token-file": str(path),
        "--admin-socket": str(node.admin_socket),
        "--state-dir": str(node.state_dir / "agent"),
        "--cni-conf-dir": str(node.cni_conf_dir),
        "--audit-log": str(node.state_dir / "audit.jsonl"),
        "--health-addr": HEALTH_ADDRESS,
        "--xtables-lockfile": str(node.xtables_lockfile),
    }
    if plan.iptables:
        arguments["--iptables"] = plan.iptables
    if plan.proxy or plan.bgp:
        arguments |= {
            "--run-dir": str(node.run_dir),
            "--service-ranges": ",".join(plan.service_cidrs),
        }
    if plan.proxy:
        agent.append("--proxy")
    if plan.bgp:
        agent.append("--routes")
    if plan.router:
        agent += [f"--advertise-{kind}-ip" for kind in ("cluster", "external", "load-balancer")]
        arguments["--bgp-peers-file"] = str(node.peers_file)
    # `ip netns exec` ends by exec: the pid is the agent's, with a /sys that shows its own links.
    inside = ["ip", "netns", "exec", node.netns]
    return [*inside, *agent, *itertools.chain(*arguments.items()), *plan.agent_args]


@dataclass(slots=True)
class Agent:
    """An agent as the lab sees it."""

    node: NodePlan
    command: list[str]
    env: dict[str, str]
    restarts: int = 0
    last_end: str = ""
    wanted: bool = True
    process: asyncio.subprocess.Process | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        """The process id, None while it does not run."""
        if self.process is None or self.process.returncode is not None:
            return None
        return self.process.pid

    @property
    def record(self) -> Path:
        """Where the process is written down for `lab down`."""
        return self.node.state_dir / "agent.process"

    @property
    def log(self) -> Path:
        """What the agent prints."""
        return self.node.state_dir / "agent.log"

    async def ask(self, op: str, **arguments: Any) -> Any:
        """Ask the agent over its admin socket.

        Raises:
            NoAnswerError: It does not answer.
        """
        path = self.node.admin_socket
        request = wire.encode_request(wire.Request(op, arguments))
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(
                    str(path), limit=wire.ANSWER_MAX_BYTES
                )
                try:
                    writer.write(request)
                    line = await reader.readline()
                finally:
                    writer.close()
        except TimeoutError:
            raise NoAnswerError(f"no answer at {path} in {_ASK_TIMEOUT_S:g} s") from None
        except OSError as error:
            got = error.strerror or str(error)
            raise NoAnswerError(f"no agent answers at {path}", got=got) from error
        if not line:
            raise NoAnswerError(f"the agent at {path} ended without an answer")
        return wire.decode_answer(line)

    def last_words(self) -> str:
        """Return the last line of its log, for messages."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            lines = []
        return lines[-1][:300] if lines else "it printed nothing"


class AgentSet:
    """All agents.

    Args:
        agents: one for each node.
        restart: whether one that ended is started again.
    """

    def __init__(self, agents: list[Agent], *, restart: bool) -> None:
        self._agents = {agent.node.name: agent for agent in agents}
        self._restart = restart

    @property
    def agents(self) -> list[Agent]:
        """The agents, node1's first."""
        return list(self._agents.values())

    def of(self, node: str) -> Agent:
        """Return a node's agent.

        Raises:
            NoAnswerError: No agent is kept for such a node.
        """
        agent = self._agents.get(node)
        if agent is None:
            needed = f"one of {', '.join(self._agents)}" if self._agents else "a lab with agents"
            raise NoAnswerError(f"no agent on node {node!r}", needed=needed)
        return agent

    async def run(self) -> None:
        """Keep the agents running until cancelled; then they are left to `lab down`."""
        async with asyncio.TaskGroup() as tasks:
            for agent in self.agents:
                tasks.create_task(self._keep(agent), name=f"agent {agent.node.name}")

    async def _keep(self, agent: Agent) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            if not agent.wanted:
                agent.wake.clear()
                await agent.wake.wait()
                failures = 0
                continue
            began = loop.time()
            await self._run_once(agent)
            if not self._restart and agent.wanted:
                agent.wanted = False
                continue
            if loop.time() - began > _STEADY_S:
                failures = 0
            agent.wake.clear()
            try:
                delay_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                await asyncio.wait_for(agent.wake.wait(), delay_s)
            except TimeoutError:
                failures += 1
            if agent.wanted:
                agent.restarts += 1

    async def _run_once(self, agent: Agent) -> None:
        agent.node.state_dir.mkdir(parents=True, exist_ok=True)
        with agent.log.open("ab") as log:
            try:
                agent.process = await asyncio.create_subprocess_exec(
                    *agent.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=agent.env,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                agent.last_end = f"cannot be started: {error}"
                return
        processes.record(agent.record, agent.process.pid)
        code = await agent.process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        agent.last_end = f"ended by {how}: {agent.last_words()}"
        print(f"agent on {agent.node.name}: {agent.last_end}", flush=True)

    def kill(self, node: str, number: int) -> int:
        """Send a signal to a node's agent; return its pid.

        Raises:
            NoAnswerError: It does not run.
        """
        agent = self.of(node)
        if agent.pid is None:
            raise NoAnswerError(f"the agent on {node} does not run", got=agent.last_end)
        pid = agent.pid
        os.kill(pid, number)
        return pid

    async def stop(self, node: str) -> None:
        """End a node's agent by SIGTERM, then SIGKILL, and keep it ended."""
        agent = self.of(node)
        agent.wanted = False
        agent.wake.set()
        process = agent.process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()

    def start(self, node: str) -> None:
        """Have a node's agent running again, now."""
        agent = self.of(node)
        agent.wanted = True
        agent.wake.set()

    async def describe(self) -> list[Obj]:
        """Return one line of state for each agent."""
        return list(await asyncio.gather(*(self._describe(agent) for agent in self.agents)))

    async def _describe(self, agent: Agent) -> Obj:
        line: Obj = {
            "node": agent.node.name,
            "pid": agent.pid,
            "socket": str(agent.node.admin_socket),
            "log": str(agent.log),
            "audit_log": str(agent.node.state_dir / "audit.jsonl"),
            "restarts": agent.restarts,
            "last_end": agent.last_end,
            "ready": False,
            "in_sync": False,
            "problem": "",
        }
        if agent.pid is None:
            return line | {"problem": agent.last_end or "not started"}
        try:
            status = await agent.ask("status")
        except NetpolError as error:
            return line | {"problem": str(error)}
        errors = [str(text) for text in status.get("errors") or ()]
        return line | {
            "ready": bool(status.get("ready")),
            "in_sync": bool(status.get("in_sync")),
            "generation": status.get("generation"),
            "applied_generation": status.get("applied_generation"),
            "problem": "; ".join(errors)[:500],
        }
