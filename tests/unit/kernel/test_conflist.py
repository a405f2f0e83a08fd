"""The facts of a CNI configuration, and what a strange one gives instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netpol.kernel.conflist import PodNetwork, read_pod_network


def read(folder: Path, ipam: dict[str, Any], **plugin: Any) -> PodNetwork:
    conf = {"name": "x", "plugins": [{"type": "bridge", "ipam": ipam, **plugin}]}
    (folder / "10-x.conflist").write_text(json.dumps(conf))
    return read_pod_network(folder)


def test_a_subnet_is_held_whole(tmp_path: Path) -> None:
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "fd00::/64"}]],
    }

    found = read(tmp_path, ipam, bridge="kube-bridge")

    assert [str(r) for r in found.ranges] == ["10.1.2.0/24", "fd00::/64"]
    assert found.interfaces == ("kube-bridge",)
    assert found.known


def test_of_a_shared_subnet_only_the_nodes_own_part_is_held(tmp_path: Path) -> None:
    part = {"subnet": "10.244.0.0/16", "rangeStart": "10.244.1.0", "rangeEnd": "10.244.1.255"}

    found = read(tmp_path, {"type": "host-local", "ranges": [[part]]})

    assert [str(r) for r in found.ranges] == ["10.244.1.0/24"]
    assert found.interfaces == ("cni0",)


@pytest.mark.parametrize(
    ("ipam", "note"),
    [
        ({"type": "host-local", "subnet": "0.0.0.0/0"}, "everything"),
        ({"type": "host-local", "subnet": "nonsense"}, "not a CIDR"),
        ({"type": "host-local", "ranges": [[{"subnet": "10.0.0.0/8", "rangeStart": "x"}]]}, "x"),
        ({"type": "dhcp"}, "IPAM dhcp"),
    ],
)
def test_what_cannot_be_held_says_why(tmp_path: Path, ipam: dict[str, Any], note: str) -> None:
    found = read(tmp_path, ipam)

    assert found.ranges == ()
    assert note in found.note


def test_a_bridge_name_that_is_none_is_not_used(tmp_path: Path) -> None:
    found = read(tmp_path, {"type": "dhcp"}, bridge='a"b')

    assert found.interfaces == ()
    assert "--pod-interfaces" in found.note


def test_no_configuration_and_a_broken_one_are_told_apart_from_a_known_one(tmp_path: Path) -> None:
    empty = read_pod_network(tmp_path)
    (tmp_path / "10-x.conflist").write_text("{")
    broken = read_pod_network(tmp_path)

    assert not empty.known
    assert not broken.known
    assert broken.note


def test_plugins_whose_packets_pass_by_the_host(tmp_path):
    conf = {"name": "n", "plugins": [{"type": "macvlan", "ipam": {"type": "dhcp"}}]}
    (tmp_path / "10-x.conflist").write_text(json.dumps(conf))
    found = read_pod_network(tmp_path)
    assert found.unpoliced == "macvlan"
    assert "policy cannot hold" in found.note
