"""Real CNI plugins take the conflists that we write: ADD, CHECK, DEL, VERSION."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netpol.kernel import netns
from netpol.model.net import parse_address, parse_prefix
from routes.cni import keep_conflist
from routes.conflist import FILE_NAME

pytestmark = pytest.mark.kernel

PLUGINS = Path("/usr/lib/cni")
CIDRS = tuple(parse_prefix(p) for p in ("10.1.1.0/24", "fd01:0:0:1::/64"))


@pytest.fixture
def spaces() -> Iterator[tuple[str, str]]:
    node, pod = (f"knpt-c{os.getpid()}-{what}" for what in ("node", "pod"))
    netns.create(node)
    netns.create(pod)
    subprocess.run(
        ["ip", "-n", node, "-batch", "-"],
        input="link add up0 type veth peer name up1\nlink set up0 up\nlink set up1 up\n",
        text=True,
        check=True,
    )
    try:
        yield node, pod
    finally:
        netns.delete(pod)
        netns.delete(node)


class Runtime:
    """As little of a container runtime as calls a chain of plugins."""

    def __init__(self, folder: Path, spaces: tuple[str, str]) -> None:
        self._folder = folder
        self._node, self._pod = spaces
        self.result: dict[str, Any] | None = None

    def _call(self, command: str, plugin: dict[str, Any], conf: dict[str, Any]) -> dict[str, Any]:
        given = {**plugin, "cniVersion": conf["cniVersion"], "name": conf["name"]}
        given.pop("capabilities", None)
        if "portMappings" in plugin.get("capabilities", {}):
            given["runtimeConfig"] = {"portMappings": []}
        if self.result is not None:
            given["prevResult"] = self.result
        if isinstance(given.get("ipam"), dict) and given["ipam"].get("type") == "host-local":
            given["ipam"] = {**given["ipam"], "dataDir": str(self._folder / "ipam")}
        done = subprocess.run(
            ["ip", "netns", "exec", self._node, str(PLUGINS / plugin["type"])],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": os.environ["PATH"],
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": "c1",
                "CNI_NETNS": f"/run/netns/{self._pod}",
                "CNI_IFNAME": "eth0",
                "CNI_PATH": str(PLUGINS),
            },
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def run(self, command: str) -> dict[str, Any] | None:
        conf = json.loads((self._folder / FILE_NAME).read_text())
        plugins = conf["plugins"]
        for plugin in reversed(plugins) if command == "DEL" else plugins:
            answer = self._call(command, plugin, conf)
            if command == "ADD":
                self.result = answer
        return self.result


def in_a_podcidr(address: str) -> bool:
    return any(c.contains(parse_address(address.partition("/")[0])) for c in CIDRS)


@pytest.mark.parametrize(
    "plugin",
    [
        {"type": "bridge", "bridge": "kube-bridge", "isGateway": True},
        {"type": "ptp"},
        {"type": "macvlan", "master": "up0", "mode": "bridge"},
    ],
    ids=lambda p: p["type"],
)
def test_the_plugins_take_what_we_write(
    tmp_path: Path, spaces: tuple[str, str], plugin: dict[str, Any]
) -> None:
    conf = {
        "cniVersion": "0.4.0",
        "name": "n",
        "plugins": [
            {**plugin, "ipam": {"type": "host-local"}},
            {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    (tmp_path / FILE_NAME).write_text(json.dumps(conf))
    assert keep_conflist(tmp_path, CIDRS, mtu=1410)
    runtime = Runtime(tmp_path, spaces)
    result = runtime.run("ADD")
    assert result is not None
    assert [in_a_podcidr(ip["address"]) for ip in result["ips"]] == [True, True]
    shown = subprocess.run(
        ["ip", "-n", spaces[1], "link", "show", "eth0"], capture_output=True, text=True, check=True
    )
    assert "mtu 1410" in shown.stdout
    runtime.run("CHECK")
    runtime.run("DEL")


def test_a_static_ipam_keeps_its_addresses(tmp_path: Path, spaces: tuple[str, str]) -> None:
    conf = {
        "cniVersion": "0.4.0",
        "name": "n",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "b9",
                "ipam": {"type": "static", "addresses": [{"address": "192.0.2.9/24"}]},
            }
        ],
    }
    (tmp_path / FILE_NAME).write_text(json.dumps(conf))
    keep_conflist(tmp_path, CIDRS, mtu=1500)
    result = Runtime(tmp_path, spaces).run("ADD")
    assert result is not None
    assert [ip["address"] for ip in result["ips"]] == ["192.0.2.9/24"]


def test_a_fresh_file_works_and_plugins_speak_its_version(
    tmp_path: Path, spaces: tuple[str, str]
) -> None:
    assert keep_conflist(tmp_path, CIDRS, mtu=1450)
    conf = json.loads((tmp_path / FILE_NAME).read_text())
    for plugin in conf["plugins"]:
        done = subprocess.run(
            [str(PLUGINS / plugin["type"])],
            input=json.dumps({"cniVersion": conf["cniVersion"]}),
            capture_output=True,
            text=True,
            check=True,
            env={"CNI_COMMAND": "VERSION"},
        )
        assert conf["cniVersion"] in json.loads(done.stdout)["supportedVersions"]
    result = Runtime(tmp_path, spaces).run("ADD")
    assert result is not None
    assert len(result["ips"]) == 2
