"""What a lab can be asked over its control socket, and when it counts as ready and as settled.

Owns the operations alone; everything they report is somebody else's state. *Ready* is the condition of
`lab up`: every pod runs and every agent has done its first full sync. *Settled* is the condition of a
probe: every pod there is has come or gone, and every agent has applied at least what the API server
held when it was asked, which is told by the resourceVersion of a bookmark.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from netpol.lab import frr, routing
from netpol.lab.plan import ROUTER
from netpol.lib.errors import InputError, NetpolError, NoAnswerError

if TYPE_CHECKING:
    from netpol.lab.supervisor import Supervisor

Obj = dict[str, Any]

_POLL_S = 0.01
_SETTLE_TIMEOUT_S = 30.0
_OVER = ("Succeeded", "Failed")
_STARTS_MAX = 3  # an agent that ends this often without ever being ready will not get there


class Waiting(NamedTuple):
    """A pod that is not where it should be; `stuck` where waiting alone will not help."""

    text: str
    stuck: bool


class Operations:
    """The operations of one lab."""

    def __init__(self, lab: Supervisor) -> None:
        self._lab = lab

    def table(self) -> dict[str, Callable[[Obj], Awaitable[Obj]]]:
        """Return what the control socket answers."""
        return {
            "status": self._status,
            "pods": self._pods,
            "settle": self._settle,
            "agent": self._agent,
            "exec": self._exec,
            "stop": self._stop,
        }

    # Ready

    async def wait_ready(self, say: Callable[[str], None]) -> None:
        """Wait until everything is ready, telling what is still missing whenever that changes.

        Raises:
            NoAnswerError: An agent ends again and again.
        """
        told: set[str] = set()

        def tell(text: str) -> None:
            if text not in told:
                told.add(text)
                say(text)

        while True:
            pods = self._lab.store.list("pods")
            waiting = self._waiting_pods(pods)
            lines = await self._lab.agents.describe()
            late = [line for line in lines if not line["ready"]]
            total = len(pods)
            text = f"{total - len(waiting)} of {total} pods run"
            if lines:
                text += f", {len(lines) - len(late)} of {len(lines)} agents are ready"
            tell(text)
            if not waiting and not late:
                lag = await self._missing_routes()
                if not lag:
                    return
                tell(f"{lag[0]} yet")
            for pod in waiting:
                if pod.stuck:
                    tell(f"{pod.text} waits")
            for agent in self._lab.agents.agents:
                if agent.last_end:
                    tell(f"agent on {agent.node.name} {agent.last_end}")
                if agent.restarts >= _STARTS_MAX or (not agent.wanted and agent.last_end):
                    what = f"the agent on {agent.node.name} does not stay up"
                    raise NoAnswerError(what, got=agent.last_end)
            await asyncio.sleep(0.05)

    async def unready(self) -> list[str]:
        """Return what keeps the lab from being ready, in words."""
        missing = []  # agents first: pods wait for what their node's agent writes
        for line in await self._lab.agents.describe():
            if not line["ready"]:
                why = f" ({line['problem']})" if line["problem"] else ""
                missing.append(f"agent on {line['node']}{why}")
        missing += [waiting.text for waiting in self._waiting_pods()]
        return missing or await self._missing_routes()

    async def _missing_routes(self) -> list[str]:
        return await routing.lagging(self._lab.plan, self._lab.agents.agents)

    def _waiting_pods(self, pods: list[Obj] | None = None) -> list[Waiting]:
        views = {view.uid: view for view in self._lab.kubelet.pods()}
        waiting = []
        for pod in self._lab.store.list("pods") if pods is None else pods:
            meta = pod["metadata"]
            name = f"pod {meta['namespace']}/{meta['name']}"
            status = pod.get("status") or {}
            view = views.get(meta["uid"])
            if "deletionTimestamp" in meta:
                waiting.append(Waiting(f"{name} (is being deleted)", stuck=False))
            elif status.get("phase") in _OVER or (view is not None and view.addresses):
                continue
            elif view is not None and view.problem:
                waiting.append(Waiting(f"{name} ({view.problem})", stuck=True))
            elif not pod["spec"].get("nodeName"):
                reasons = [c["message"] for c in status.get("conditions") or () if c.get("message")]
                why = "; ".join(reasons) or "no node yet"
                waiting.append(Waiting(f"{name} ({why})", stuck=bool(reasons)))
            else:
                waiting.append(Waiting(name, stuck=False))
        return waiting

    # Settled

    async def _settle(self, request: Obj) -> Obj:
        """Wait until every agent has applied what the API server holds now."""
        timeout_s = float(request.get("timeout_s") or _SETTLE_TIMEOUT_S)
        lagging: list[str] = []
        rv = self._lab.store.resource_version
        try:
            async with asyncio.timeout(timeout_s):
                while moving := [w.text for w in self._waiting_pods() if not w.stuck]:
                    lagging = moving
                    await asyncio.sleep(_POLL_S)
                rv = self._lab.store.resource_version
                needed = await self._lab.api.horizon(rv)
                while lagging := await self._lagging(needed) or await self._missing_routes():
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NoAnswerError(
                "the agents have not applied what the API server holds",
                needed=f"all of resourceVersion {rv} within {timeout_s:g} s",
                got="; ".join(lagging[:5]),
            ) from None
        return {"resource_version": rv}

    async def _lagging(self, needed: Callable[[Obj], int]) -> list[str]:
        """Return what the agents have not seen or applied yet.

        Raises:
            NoAnswerError: An agent does not run and will not be started again.
        """
        agents = self._lab.agents.agents
        for agent in agents:
            if agent.pid is None and not agent.wanted:
                raise NoAnswerError(
                    f"the agent on {agent.node.name} does not run", got=agent.last_end
                )
        answers = await asyncio.gather(
            *(agent.ask("status") for agent in agents), return_exceptions=True
        )
        lagging = []
        for agent, answer in zip(agents, answers, strict=True):
            where = f"agent on {agent.node.name}"
            if isinstance(answer, NetpolError):
                lagging.append(f"{where}: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                lagging.extend(f"{where}: {text}" for text in behind(answer, needed))
        return lagging

    # Reports

    async def _status(self, _: Obj) -> Obj:
        lab, plan = self._lab, self._lab.plan
        sessions = await routing.sessions(lab.agents.agents) if plan.bgp else {}
        router = await asyncio.to_thread(frr.describe, plan) if plan.router else None
        return {
            "name": plan.name,
            "pid": os.getpid(),
            "api_server": lab.api.url,
            "api_server_program": lab.api.program or "embedded",
            "kubeconfig": str(plan.state_dir / "kubeconfig"),
            "state_dir": str(plan.state_dir),
            "iptables": plan.iptables or "as the machine",
            "ip_family": "dual" if plan.dual_stack else "4",
            "switch": {"netns": plan.switch_netns, "addresses": list(plan.switch_addresses)},
            "nodes": [
                {
                    "name": node.name,
                    "netns": node.netns,
                    "addresses": list(node.addresses),
                    "pod_cidrs": list(node.pod_cidrs),
                    "subnet": node.segment,
                    "sessions": sessions.get(node.name, []),
                }
                for node in plan.nodes
            ],
            "routes": plan.routes,
            "router": router,
            "agents": await lab.agents.describe(),
            "pods": self._pod_lines(),
            "waiting": [waiting.text for waiting in self._waiting_pods()],
            "service_addresses": "are served by the agents"
            if plan.proxy
            else "need the proxy (lab up --proxy), which needs a kernel with IPVS",
        }

    async def _pods(self, _: Obj) -> Obj:
        return {"pods": self._pod_lines()}

    def _pod_lines(self) -> list[Obj]:
        return [
            {
                "key": str(view.key),
                "namespace": view.key.namespace,
                "name": view.key.name,
                "node": view.node,
                "netns": view.netns,
                "addresses": list(view.addresses),
                "ports": [[port.name, str(port.protocol), port.number] for port in view.ports],
                "host_network": view.host_network,
                "problem": view.problem,
            }
            for view in self._lab.kubelet.pods()
        ]

    # Actions

    async def _agent(self, request: Obj) -> Obj:
        """Do something to the agent of a node: `kill` (with `signal`), `stop`, `start`, `restart`."""
        node, action = str(request["node"]), str(request["action"])
        agents = self._lab.agents
        match action:
            case "kill":
                number = signal.Signals[str(request.get("signal") or "SIGKILL")]
                return {"pid": agents.kill(node, number)}
            case "stop":
                await agents.stop(node)
            case "start":
                agents.start(node)
            case "restart":
                await agents.stop(node)
                agents.start(node)
            case _:
                raise InputError("action", needed="kill, stop, start or restart", got=action)
        return {"pid": agents.of(node).pid}

    async def _exec(self, request: Obj) -> Obj:
        """Return the namespace that a command for a node runs in."""
        plan = self._lab.plan
        spaces = {node.name: node.netns for node in plan.nodes}
        if plan.router:
            spaces[ROUTER] = plan.router_netns
        name = str(request["node"])
        if name not in spaces:
            raise NoAnswerError("no such node", needed=", ".join(spaces), got=name)
        return {"netns": spaces[name]}

    async def _stop(self, _: Obj) -> Obj:
        """End the supervisor; namespaces and agents stay until `lab down`."""
        self._lab.stopped.set()
        return {}


def behind(status: Obj, needed: Callable[[Obj], int]) -> list[str]:
    """Return what an agent's status says it has not seen or applied yet.

    Args:
        status: of the agent.
        needed: the resourceVersion that a watch must have seen, by its line in the status.
    """
    missing = []
    for watch in status.get("watches") or ():
        seen, rv = int(watch.get("resource_version") or 0), needed(watch)
        if not watch.get("synced") or seen < rv:
            missing.append(f"its watch of {watch.get('kind')} is at {seen}, needs {rv}")
    if not status.get("ready"):
        errors = "; ".join(str(error) for error in status.get("errors") or ())
        missing.append(f"not ready{f' ({errors[:300]})' if errors else ''}")
    if not status.get("in_sync"):
        applied, wanted = status.get("applied_generation"), status.get("generation")
        missing.append(f"generation {wanted}, applied {applied}")
    return missing
