"""The process that is the lab: API server, controllers, kubelet, pod servers, agents (composition root).

Run as `python -m netpol.lab.supervisor STATE_DIR` by `launch`; reads STATE_DIR/spec.json, tells its progress
in STATE_DIR/progress.jsonl, and is asked over STATE_DIR/lab.sock. It is crash-only: it builds, and
`lab down` takes down, whether this process still lives or not.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from netpol.lab import agents, cluster, cni, frr, names, network, processes, routing
from netpol.lab.agents import Agent, AgentSet
from netpol.lab.apis import EmbeddedApi, LabApi
from netpol.lab.apiserver import ApiError
from netpol.lab.assets import Assets
from netpol.lab.control import ControlServer
from netpol.lab.endpointslices import SliceController
from netpol.lab.events import Recorder
from netpol.lab.kubelet import Kubelet
from netpol.lab.launch import PROGRESS, SPEC
from netpol.lab.operations import Operations
from netpol.lab.plan import API_PORT, LabPlan
from netpol.lab.podexec import PATH, PodCommands
from netpol.lab.podserver import PodServers
from netpol.lab.scheduler import Scheduler
from netpol.lib.errors import NetpolError, NoAnswerError

Obj = dict[str, Any]

_POLL_S = 0.02
_HEARTBEAT_S = 10.0


class Progress:
    """The file that `lab up` follows."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Tell what comes next."""
        self._write({"text": text})

    def ready(self) -> None:
        """Tell that all is up."""
        self._write({"ready": True})

    def failed(self, error: str, exit_code: int) -> None:
        """Tell that it will not get up."""
        self._write({"error": error, "exit_code": exit_code})

    def _write(self, entry: Obj) -> None:
        entry["at_s"] = round(time.monotonic() - self._began, 3)
        line = json.dumps(entry)
        print(line, flush=True)
        with self._file.open("a") as stream:
            stream.write(line + "\n")


class Supervisor:
    """Builds one lab and keeps it."""

    def __init__(self, spec: Obj, progress: Progress) -> None:
        self._plan = plan = LabPlan.from_json(spec["plan"])
        self._spec = spec
        self._progress = progress
        self._tasks: list[asyncio.Task[None]] = []
        self.stopped = asyncio.Event()
        self.servers = PodServers()
        self._commands = PodCommands(
            files=plan.state_dir / "names",
            pod=lambda key: self.kubelet.pod(key),  # noqa: PLW0108 - it is made below
            entries=self._names,
            servers=self.servers,
        )
        self.api = self._make_api(secrets.token_urlsafe(32))
        self.store = self.api.store
        path = cluster.iptables_path(plan, PATH)
        self._runtimes: dict[str, cni.CniRuntime] = {}
        self._env = {"PATH": path, "HOME": "/root", "PYTHONUNBUFFERED": "1"}
        self.kubelet = Kubelet(
            store=self.store,
            plan=plan,
            runtimes=self._runtimes,
            servers=self.servers,
            recorder=Recorder(self.store, "kubelet"),
        )
        self.agents = AgentSet([], restart=False)

    def _make_api(self, token: str) -> LabApi:
        plan, assets = self._plan, self._spec["assets"]
        if assets is None:
            return EmbeddedApi(plan, self._commands, token)
        from netpol.lab.nodeapi import NodeApi  # what few labs need is loaded by those
        from netpol.lab.realapi import RealApi

        return RealApi(
            plan,
            Assets(*assets),
            node_api=NodeApi(
                plan.nodes,
                commands=self._commands,
                pod=lambda key: self.kubelet.pod(key),  # noqa: PLW0108 - it is made below
            ),
            token=token,
            timeout_s=float(self._spec["timeout_s"]),
        )

    async def up(self) -> None:
        """Build everything in order, then wait until all pods and agents are ready.

        Raises:
            NetpolError: Something cannot be built; what stands is left to `lab down`.
        """
        plan, say = self._plan, self._progress.say
        if plan.agent and (why := agents.missing()):
            raise NoAnswerError(why)
        if plan.bgp and (why := routing.missing()):
            raise NoAnswerError("--routes bgp", needed="BIRD 2", got=why)
        cni.check_plugins(plan.cni_bin_dir)
        say(f"network of {plan.node_count} nodes")
        await asyncio.to_thread(network.up, plan)
        if self._spec["assets"] is not None:
            say(f"the API server {self.api.program}")
        await self.api.start()
        self.api.kubeconfig(plan.state_dir / "kubeconfig")
        created = cluster.create_objects(self.store, plan, self._spec)
        for part in self.api.parts():
            self._run(part)
        for node in plan.nodes:
            cni.write_conflist(node, ranges=not plan.bgp)
            self._runtimes[node.name] = cni.CniRuntime(
                node, bin_dir=plan.cni_bin_dir, path=self._env["PATH"]
            )
        await self._start_agents()
        self._run(Scheduler(self.store, Recorder(self.store, "default-scheduler")).run())
        self._run(SliceController(self.store).run())
        self._run(self.kubelet.run())
        self._run(self._commands.run())
        self._run(self._heartbeat())
        operations = Operations(self)
        control = ControlServer(plan.state_dir / "lab.sock", operations.table())
        await control.start()
        self._progress.say(f"{created} pods and {len(self.agents.agents)} agents")
        async with asyncio.timeout(float(self._spec["timeout_s"])):
            await operations.wait_ready(say)

    async def _start_agents(self) -> None:
        plan = self._plan
        if not plan.agent:
            return
        account = cluster.agent_account(self.store)
        url = f"http://{plan.switch_addresses[0]}:{API_PORT}"
        if plan.bgp:
            routing.prepare(plan)
        if plan.router:
            self._progress.say(f"the router {plan.router}")
            await asyncio.to_thread(frr.start, plan, self._env)
        found = []
        for node in plan.nodes:
            if plan.router:
                processes.replace_text(node.peers_file, frr.peers_yaml(plan, node))
            token_file = node.state_dir / "token"
            processes.replace_text(token_file, await self.api.token_for(*account))
            line = agents.command(plan, node, api_url=url, path=token_file)
            env = self._env | {"XTABLES_LOCKFILE": str(node.xtables_lockfile)}
            if "PYTHONPATH" in os.environ:
                env["PYTHONPATH"] = os.environ["PYTHONPATH"]
            found.append(Agent(node=node, command=line, env=env))
        self.agents = AgentSet(found, restart=plan.restart_agents)
        self._run(self.agents.run())

    def _names(self) -> list[names.Named]:
        pods = [
            names.Named(view.key.namespace, view.key.name, view.addresses, service=False)
            for view in self.kubelet.pods()
            if view.addresses
        ]
        slices = self.store.list("endpointslices.discovery.k8s.io")
        return pods + names.named_services(self.store.list("services"), slices)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            try:
                cluster.renew_leases(self.store, self._plan)
            except ApiError as error:
                print(f"supervisor: leases: {error.message}", flush=True)  # the next ones may do

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A part of the lab that dies takes the lab with it, instead of leaving it half alive."""
        if not task.cancelled() and (error := task.exception()) is not None:
            print(f"supervisor: a part ended: {error!r}", flush=True)
            self._progress.failed(f"a part of the lab ended: {error!r}", 3)
            self.stopped.set()

    @property
    def plan(self) -> LabPlan:
        """The lab."""
        return self._plan

    async def close(self) -> None:
        """End what runs in this process; everything else is `lab down`'s."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.api.close()


async def _main(state_dir: Path) -> int:
    spec = json.loads((state_dir / SPEC).read_text())
    progress = Progress(state_dir / PROGRESS)
    supervisor = Supervisor(spec, progress)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stopped.set)
    try:
        await supervisor.up()
    except TimeoutError:
        waiting = await Operations(supervisor).unready()
        needed = f"all of it within {spec['timeout_s']:g} s (--timeout-s)"
        error = NoAnswerError("the lab is not ready", needed=needed, got="; ".join(waiting[:5]))
        progress.failed(str(error), error.exit_code)
        return 1
    except NetpolError as error:
        progress.failed(str(error), error.exit_code)
        return 1
    except ApiError as error:
        progress.failed(f"the API server: {error.message}", 3)
        return 1
    progress.ready()
    await supervisor.stopped.wait()
    await supervisor.close()
    return 0


def main() -> int:
    """Run the lab in a state directory until told to stop."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a socket for every port of every pod
    os.umask(0o077)
    return asyncio.run(_main(Path(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
