"""As little of a container runtime as calls a chain of CNI plugins on the conflist that we keep.

Used with the host's kernel and inside the guest of `tests/uml`; imports nothing that costs time there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from routes.conflist import FILE_NAME

PLUGINS = Path("/usr/lib/cni")
#: The newest version of the CNI that Debian's plugins speak.
CNI_VERSION = "0.4.0"


class PluginError(Exception):
    """A plugin said no; the text is what it said."""


class Runtime:
    """One container: its plugins are called as the conflist in `folder` says."""

    def __init__(
        self,
        folder: Path,
        *,
        pod: str,
        node: str = "",
        given: dict[str, Any] | None = None,
        path: str | None = None,
    ) -> None:
        """Args: folder: where the conflist is; host-local and dhcp keep their state there, too.

        pod, node: named network namespaces; without a node the plugins run in this one.
        given: what a runtime adds for plugins that declare the capability, by its name.
        path: where plugins find iptables; this process's without it.
        """
        self._folder, self._pod = folder, pod
        self._in_node = ("ip", "netns", "exec", node) if node else ()
        self._given = {"portMappings": [], **(given or {})}
        self._path = path or os.environ["PATH"]
        self.result: dict[str, Any] | None = None

    def run(self, command: str) -> dict[str, Any]:
        """ADD, CHECK or DEL, through the whole chain; the last result of ADD.

        Raises:
            PluginError: one of them fails.
        """
        conf = json.loads((self._folder / FILE_NAME).read_text())
        plugins = conf["plugins"]
        for plugin in reversed(plugins) if command == "DEL" else plugins:
            answer = self._call(command, plugin, conf)
            if command == "ADD":
                self.result = answer
        return self.result or {}

    def _call(self, command: str, plugin: dict[str, Any], conf: dict[str, Any]) -> dict[str, Any]:
        given = {**plugin, "cniVersion": conf["cniVersion"], "name": conf["name"]}
        capabilities = given.pop("capabilities", {})
        if capabilities:
            given["runtimeConfig"] = {k: v for k, v in self._given.items() if capabilities.get(k)}
        if self.result is not None:
            given["prevResult"] = self.result
        if isinstance(given.get("ipam"), dict) and given["ipam"].get("type") == "host-local":
            given["ipam"] = {**given["ipam"], "dataDir": str(self._folder / "ipam")}
        done = subprocess.run(
            [*self._in_node, str(PLUGINS / plugin["type"])],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": self._path,
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": "c1",
                "CNI_NETNS": f"/run/netns/{self._pod}",
                "CNI_IFNAME": "eth0",
                "CNI_PATH": str(PLUGINS),
            },
        )
        if done.returncode != 0:
            raise PluginError(f"{plugin['type']} {command}: {done.stdout}{done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        return answer


def conflist(plugins: list[dict[str, Any]]) -> str:
    """The text of a conflist with these plugins."""
    return json.dumps({"cniVersion": CNI_VERSION, "name": "n", "plugins": plugins})
