"""The container runtime's half of CNI: runs the real plugins of a node's conflist for one pod at a time.

Owns the protocol (environment, configuration on stdin, prevResult handed from plugin to plugin, errors on
stdout) and the results kept for CHECK and DEL. The plugins run inside the node's namespace, as children
of threads that stand there. Knows pods only as a container id and a namespace.

Traps of the plugins that are met here: a failed ADD leaves half an interface, so DEL comes before the
next try; `isDefaultGateway` must not meet an ipam route to 0/0; the first ADDs race to make the bridge,
so the first of a node goes alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from netpol.kernel.netns import enter, path_of
from netpol.lab.plan import POD_BRIDGE, NodePlan
from netpol.lib.errors import InputError, KernelMissingError, NetpolError

CONFLIST_NAME = "10-kuberouter.conflist"
CNI_VERSION = "1.0.0"
IFNAME = "eth0"

_PLUGIN_TIMEOUT_S = 30
#: A pod says why it waits after this; then the kubelet asks again.
_RANGES_TRIES = 250
_POLL_S = 0.02
_WORKERS = 3  # an ADD waits for the kernel most of its time; more only queue there


class CniError(NetpolError):
    """A plugin refused; the message is its own, in one line."""


class PortMapping(NamedTuple):
    """A hostPort, as the capability `portMappings` wants it."""

    host_port: int
    container_port: int
    protocol: str
    host_ip: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the wire form."""
        entry: dict[str, Any] = {
            "hostPort": self.host_port,
            "containerPort": self.container_port,
            "protocol": self.protocol.lower(),
        }
        return entry | ({"hostIP": self.host_ip} if self.host_ip else {})


def conflist(node: NodePlan, *, ranges: bool = True) -> dict[str, Any]:
    """Return the configuration of a node: bridge with host-local addresses, then portmap.

    Args:
        node: whose it is.
        ranges: whether its podCIDRs are in it; the node's agent puts them in otherwise.
    """
    bridge: dict[str, Any] = {
        "type": "bridge",
        "bridge": POD_BRIDGE,
        "isGateway": True,
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(node.state_dir / "cni/networks"),
        },
    }
    if ranges:
        bridge["ipam"] |= {"ranges": [[{"subnet": cidr}] for cidr in node.pod_cidrs]}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    return {"cniVersion": CNI_VERSION, "name": "knp", "plugins": [bridge, portmap]}


def write_conflist(node: NodePlan, *, ranges: bool = True) -> Path:
    """Write the node's configuration where a container runtime would look for it."""
    target = node.cni_conf_dir / CONFLIST_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(conflist(node, ranges=ranges), indent=2) + "\n")
    return target


def check_plugins(bin_dir: Path) -> None:
    """Refuse a directory that lacks one of the plugins.

    Raises:
        KernelMissingError: Names what is missing.
    """
    missing = [
        n for n in ("bridge", "host-local", "portmap") if not os.access(bin_dir / n, os.X_OK)
    ]
    if missing:
        needed = "the CNI plugins (package containernetworking-plugins, or --cni-dir)"
        raise KernelMissingError(f"no {', '.join(missing)} in {bin_dir}", needed=needed)


class CniRuntime:
    """Runs the conflist that stands in the node's directory, read anew for every pod.

    Args:
        node: the node that the pods are on.
        bin_dir: where the plugins are.
        path: PATH of the plugins; portmap takes `iptables` from there.
    """

    def __init__(self, node: NodePlan, *, bin_dir: Path, path: str) -> None:
        self._node = node
        self._bin_dir = bin_dir
        self._env = {"PATH": path, "XTABLES_LOCKFILE": str(node.xtables_lockfile)}
        self._results = node.state_dir / "cni/results"
        self._results.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(
            max_workers=_WORKERS,
            thread_name_prefix=f"cni-{node.name}",
            initializer=enter,
            initargs=(node.netns,),
        )
        self._first = asyncio.Lock()
        self._bridge_made = False

    def close(self) -> None:
        """Let running plugins end and take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def add(
        self, container_id: str, netns: str, *, ports: Sequence[PortMapping] = ()
    ) -> tuple[str, ...]:
        """Plug a namespace into the node's network; return its addresses, v4 first.

        Raises:
            CniError: A plugin refused; what was half done is undone.
        """
        await self._await_ranges()
        if self._bridge_made:
            return await self._add(container_id, netns, ports)
        async with self._first:
            addresses = await self._add(container_id, netns, ports)
            self._bridge_made = True
            return addresses

    async def _await_ranges(self) -> None:
        """Wait for the node's agent to put the podCIDRs into the configuration."""
        for _ in range(_RANGES_TRIES):
            ipam = self._config(())["plugins"][0].get("ipam") or {}
            if ipam.get("type") != "host-local" or ipam.get("ranges"):
                return
            await asyncio.sleep(_POLL_S)
        raise CniError(
            f"no pod range in {CONFLIST_NAME}", needed="the node's agent, which writes it"
        )

    async def _add(
        self, container_id: str, netns: str, ports: Sequence[PortMapping]
    ) -> tuple[str, ...]:
        config = self._config(ports)
        try:
            result = await self._run(lambda: self._chain("ADD", config, container_id, netns))
        except CniError:
            await self._undo(config, container_id, netns)
            raise
        kept = {"config": config, "result": result}
        (self._results / container_id).write_text(json.dumps(kept))
        addresses = [str(ip["address"]).partition("/")[0] for ip in (result or {}).get("ips", ())]
        return tuple(sorted(addresses, key=lambda address: ":" in address))

    async def check(self, container_id: str, netns: str) -> None:
        """Ask the plugins whether the network still is as they left it.

        Raises:
            CniError: It is not; the message says what.
        """
        kept = json.loads((self._results / container_id).read_text())
        config, result = kept["config"], kept["result"]
        await self._run(lambda: self._chain("CHECK", config, container_id, netns, result))

    async def delete(self, container_id: str, netns: str) -> None:
        """Unplug a namespace, with the configuration and the result of its ADD.

        Raises:
            CniError: A plugin refused.
        """
        file = self._results / container_id
        if file.exists():
            kept = json.loads(file.read_text())
            config, result = kept["config"], kept["result"]
        else:
            config, result = self._config(()), None
        await self._run(lambda: self._chain("DEL", config, container_id, netns, result))
        file.unlink(missing_ok=True)

    async def _undo(self, config: dict[str, Any], container_id: str, netns: str) -> None:
        try:
            await self._run(lambda: self._chain("DEL", config, container_id, netns))
        except CniError as error:
            print(f"cni: undo of a failed ADD of {container_id}: {error}", flush=True)

    async def _run(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _config(self, ports: Sequence[PortMapping]) -> dict[str, Any]:
        file = self._node.cni_conf_dir / CONFLIST_NAME
        try:
            config: dict[str, Any] = json.loads(file.read_text())
            plugins = config["plugins"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(str(file), needed="a CNI conflist", got=str(error)) from error
        for plugin in plugins:
            if ports and (plugin.get("capabilities") or {}).get("portMappings"):
                mappings = [port.as_json() for port in ports]
                plugin["runtimeConfig"] = {"portMappings": mappings}
        return config

    def _chain(
        self,
        command: str,
        config: dict[str, Any],
        container_id: str,
        netns: str,
        result: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Run all plugins of a list; DEL runs from the last to the first."""
        plugins = config["plugins"]
        for plugin in reversed(plugins) if command == "DEL" else plugins:
            stdin = {"cniVersion": config["cniVersion"], "name": config["name"]} | plugin
            if result is not None:
                stdin["prevResult"] = result
            answer = self._plugin(command, plugin["type"], stdin, container_id, netns)
            if command == "ADD":
                result = answer
        return result

    def _plugin(
        self, command: str, kind: str, stdin: dict[str, Any], container_id: str, netns: str
    ) -> dict[str, Any] | None:
        env = self._env | {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": str(path_of(netns)),
            "CNI_IFNAME": IFNAME,
            "CNI_PATH": str(self._bin_dir),
        }
        try:
            done = subprocess.run(
                [str(self._bin_dir / kind)],
                input=json.dumps(stdin).encode(),
                capture_output=True,
                env=env,
                timeout=_PLUGIN_TIMEOUT_S,
                check=False,
            )
        except OSError as error:
            raise CniError(f"CNI {kind} {command}", got=str(error)) from error
        except subprocess.TimeoutExpired as error:
            raise CniError(
                f"CNI {kind} {command}", got=f"no end in {_PLUGIN_TIMEOUT_S} s"
            ) from error
        if done.returncode:
            raise CniError(f"CNI {kind} {command}", got=error_line(done.stdout, done.stderr))
        return json.loads(done.stdout) if done.stdout.strip() else None


def error_line(stdout: bytes, stderr: bytes) -> str:
    """Return what a failed plugin says, in one line: its error object, or else its last words."""
    try:
        error = json.loads(stdout)
        parts = [str(error[name]) for name in ("msg", "details") if error.get(name)]
    except (ValueError, AttributeError, KeyError):
        parts = []
    if not parts:
        words = stderr.decode(errors="replace") or stdout.decode(errors="replace")
        parts = [words.strip() or "no message"]
    return " ".join("; ".join(parts).split())[:500]
