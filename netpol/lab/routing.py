"""Whether the lab's nodes have all routes that they should, and the sessions that bring them.

Owns the questions to agents and router, and the folders that BIRD needs; who routes is the agents' business.
"""

from __future__ import annotations

import asyncio
import pwd
import shutil
from collections.abc import Sequence
from typing import Any

from netpol.lab import frr
from netpol.lab.agents import Agent
from netpol.lab.plan import LabPlan
from netpol.lab.podexec import PATH
from netpol.lib.errors import NetpolError, NoAnswerError

Obj = dict[str, Any]

_BIRD_USER = "bird"  # as Debian's package makes it
#: Anybody may go through to a folder below; what is listed and read there is root's.
_PASSAGE = 0o711


def missing() -> str | None:
    """Return why the agents of a lab cannot speak BGP here, or None."""
    if shutil.which("bird", path=PATH) is None:
        return "no BIRD (Debian package bird2)"
    try:
        pwd.getpwnam(_BIRD_USER)
    except KeyError:
        return f"no user {_BIRD_USER} (Debian package bird2)"
    return None


def choose(
    asked: str | None, *, agent: bool, needed_for: str, fault: str | None
) -> tuple[str, str]:
    """Return who routes, "bgp" or "static", and a remark on it for people.

    Args:
        asked: what was asked for; None for what this machine can do.
        agent: whether the lab has agents.
        needed_for: the flag that cannot do without BGP, or "".
        fault: why there can be no BGP here, or None.

    Raises:
        NoAnswerError: BGP is needed, and there can be none.
    """
    if asked == "static" or (not agent and asked is None):
        return "static", ""
    if fault is None:
        return "bgp", ""
    flag = "--routes bgp" if asked else needed_for
    if flag:
        raise NoAnswerError(f"{flag}: the agents cannot speak BGP here", needed="BIRD 2", got=fault)
    return "static", f"{fault}: the lab routes between its nodes itself (--routes static)"


def prepare(plan: LabPlan) -> None:
    """Make the folders on the way to BIRD's, which it reaches as its own user."""
    for node in plan.nodes:
        for folder in (node.state_dir, node.run_dir):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(_PASSAGE)


async def lagging(plan: LabPlan, agents: Sequence[Agent]) -> list[str]:
    """Return which routes are missing, in words; nothing where the lab routes by itself."""
    if not plan.bgp:
        return []
    found = [text for texts in await asyncio.gather(*map(_lacks, agents)) for text in texts]
    if plan.router and not found:
        found += await asyncio.to_thread(_router_lacks, plan)
    return found


async def _lacks(agent: Agent) -> list[str]:
    try:
        answer: Obj = await agent.ask("routes")
        peers: Obj = await agent.ask("peers")
    except NetpolError as error:
        return [f"routes of {agent.node.name}: {error}"]
    return lacks(agent.node.name, answer, peers)


def lacks(node: str, routes: Obj, peers: Obj) -> list[str]:
    """Return what a node's own answers say it lacks."""
    absent = [str(prefix) for prefix in routes["missing"]]
    absent += [
        str(row["prefix"])
        for row in routes["routes"]
        if row["kernel"] != "agrees" or not row["reachable"]
    ]
    down = [str(p["peer"]) for p in peers["peers"] if p["state"] != "Established"]
    return [
        *([f"{node} has no route to {', '.join(absent)}"] if absent else []),
        *([f"{node} has no BGP session with {', '.join(down)}"] if down else []),
    ]


def _router_lacks(plan: LabPlan) -> list[str]:
    try:
        have = frr.learnt(plan)
    except NetpolError as error:
        return [str(error)]
    absent = [cidr for node in plan.nodes for cidr in node.pod_cidrs if cidr not in have]
    return [f"the router has no route to {', '.join(absent)}"] if absent else []


async def sessions(agents: Sequence[Agent]) -> dict[str, list[Obj]]:
    """Return the BGP sessions of every node; an agent that does not answer has none to tell."""

    async def of(agent: Agent) -> list[Obj]:
        try:
            answer = await agent.ask("peers")
        except NetpolError:
            return []  # its own line of the status says what is wrong with it
        return list(answer["peers"])

    found = await asyncio.gather(*map(of, agents))
    return {agent.node.name: peers for agent, peers in zip(agents, found, strict=True)}
