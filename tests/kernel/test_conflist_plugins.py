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
from routes.conflist import FILE_NAME, fresh
from tests.cniruntime import PLUGINS, Runtime, conflist

pytestmark = pytest.mark.kernel

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
    plugins = [
        {**plugin, "ipam": {"type": "host-local"}},
        {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    (tmp_path / FILE_NAME).write_text(conflist(plugins))
    assert keep_conflist(tmp_path, CIDRS, mtu=1410)
    node, pod = spaces
    runtime = Runtime(tmp_path, node=node, pod=pod)
    result = runtime.run("ADD")
    assert [in_a_podcidr(ip["address"]) for ip in result["ips"]] == [True, True]
    shown = subprocess.run(
        ["ip", "-n", spaces[1], "link", "show", "eth0"], capture_output=True, text=True, check=True
    )
    assert "mtu 1410" in shown.stdout
    runtime.run("CHECK")
    runtime.run("DEL")


def test_a_static_ipam_keeps_its_addresses(tmp_path: Path, spaces: tuple[str, str]) -> None:
    ipam = {"type": "static", "addresses": [{"address": "192.0.2.9/24"}]}
    (tmp_path / FILE_NAME).write_text(conflist([{"type": "bridge", "bridge": "b9", "ipam": ipam}]))
    keep_conflist(tmp_path, CIDRS, mtu=1500)
    node, pod = spaces
    result = Runtime(tmp_path, node=node, pod=pod).run("ADD")
    assert [ip["address"] for ip in result["ips"]] == ["192.0.2.9/24"]


@pytest.mark.parametrize(
    "plugin",
    [
        *("bridge", "ptp", "vlan", "macvlan", "ipvlan"),
        *("host-local", "static", "dhcp", "tuning", "portmap", "bandwidth"),
    ],
)
def test_every_plugin_speaks_the_version_of_a_fresh_file(plugin: str) -> None:
    version = fresh()["cniVersion"]
    done = subprocess.run(
        [PLUGINS / plugin],
        input=json.dumps({"cniVersion": version}),
        capture_output=True,
        text=True,
        check=True,
        env={"CNI_COMMAND": "VERSION"},
    )
    assert version in json.loads(done.stdout)["supportedVersions"]


def test_a_fresh_file_works(tmp_path: Path, spaces: tuple[str, str]) -> None:
    assert keep_conflist(tmp_path, CIDRS, mtu=1450)
    node, pod = spaces
    result = Runtime(tmp_path, node=node, pod=pod).run("ADD")
    assert len(result["ips"]) == 2
