"""The lab's network and the CNI plugins, on the real kernel."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.kernel.netns import in_netns
from netpol.lab import cni, network, spaces
from netpol.lab.plan import POD_BRIDGE, LabPlan, netns_prefix
from netpol.lib.errors import KernelMissingError

pytestmark = pytest.mark.kernel

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[LabPlan]:
    made = LabPlan(name=f"tn{os.getpid()}", state_root=tmp_path)
    try:
        network.up(made)
        yield made
    finally:
        network.down(made.name)


def ping(netns: str, address: str) -> bool:
    command = ["ip", "netns", "exec", netns, "ping", "-c", "1", "-W", "2", address]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def wait_for_netns(pid: int, netns: str) -> None:
    """`ip netns exec` enters after it was started: before that, the process is not there."""
    there = Path("/run/netns", netns).stat().st_ino
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/ns/net").stat().st_ino != there:
        assert time.monotonic() < deadline, f"{pid} never entered {netns}"
        time.sleep(0.01)


def links(netns: str) -> set[str]:
    return set(in_netns(netns, lambda: [name for _, name in socket.if_nameindex()]))


def runtime(plan: LabPlan, index: int) -> cni.CniRuntime:
    node = plan.nodes[index]
    cni.write_conflist(node)
    return cni.CniRuntime(node, bin_dir=plan.cni_bin_dir, path=PATH)


def pod_space(plan: LabPlan, name: str) -> str:
    netns = plan.pod_netns(namespace="t", name=name, uid="1")
    spaces.create([netns])

    def prepare() -> None:
        spaces.write_sysctls(network.NO_DAD)
        spaces.loopback_up()

    in_netns(netns, prepare)
    return netns


def test_nodes_reach_each_other_and_the_switch_at_once_by_both_families(plan: LabPlan) -> None:
    first, second = plan.nodes
    for address in (*second.addresses, *plan.switch_addresses):
        assert ping(first.netns, address), address


def test_a_second_up_changes_nothing(plan: LabPlan) -> None:
    before = spaces.names(netns_prefix(plan.name))
    network.up(plan)
    assert spaces.names(netns_prefix(plan.name)) == before
    assert ping(plan.nodes[0].netns, plan.nodes[1].addresses[0])


def test_down_removes_the_namespaces_with_what_runs_there(plan: LabPlan) -> None:
    command = ["ip", "netns", "exec", plan.nodes[0].netns, "sleep", "60"]
    with subprocess.Popen(command) as sleeper:
        wait_for_netns(sleeper.pid, plan.nodes[0].netns)
        assert network.down(plan.name)
        assert sleeper.wait(timeout=5) == -9
    assert spaces.names(netns_prefix(plan.name)) == []
    assert network.down(plan.name) == []


def test_nothing_of_the_machine_changes(plan: LabPlan) -> None:
    names = {name for _, name in socket.if_nameindex()}
    assert not names & {"br0", "n1", "n2", POD_BRIDGE}
    for prefix in ("172.30.", "10.244."):
        shown = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
        assert prefix not in shown


def test_what_must_hold_on_a_node_is_set(plan: LabPlan) -> None:
    def read(name: str) -> str:
        return Path("/proc/sys", name).read_text().strip()

    for name in (
        "net/bridge/bridge-nf-call-iptables",
        "net/bridge/bridge-nf-call-ip6tables",
        "net/ipv4/ip_forward",
        "net/ipv6/conf/all/forwarding",
    ):
        assert in_netns(plan.nodes[0].netns, lambda n=name: read(n)) == "1", name


async def test_pods_of_two_nodes_are_plugged_reach_each_other_and_are_unplugged(
    plan: LabPlan,
) -> None:
    runtimes = [runtime(plan, 0), runtime(plan, 1)]
    with contextlib.ExitStack() as stack:
        for each in runtimes:
            stack.callback(each.close)
        pods = [pod_space(plan, f"p{i}") for i in range(4)]
        found = await asyncio.gather(
            *(runtimes[i % 2].add(f"c{i}", netns) for i, netns in enumerate(pods))
        )
        assert all(len(addresses) == 2 for addresses in found)
        assert {a[0].rpartition(".")[0] for a in found} == {"10.244.1", "10.244.2"}
        for address in (*found[1], *found[2]):  # on the other node, on the same node
            assert ping(pods[0], address), address
        assert ping(plan.switch_netns, found[0][0])  # the outside world
        await runtimes[0].check("c0", pods[0])
        await runtimes[0].delete("c0", pods[0])
        assert "eth0" not in links(pods[0])
        with pytest.raises(FileNotFoundError):
            await runtimes[0].check("c0", pods[0])
        await runtimes[0].delete("c0", pods[0])  # a second DEL is no error


async def test_a_plugin_that_refuses_is_quoted_and_leaves_nothing_half_done(plan: LabPlan) -> None:
    with contextlib.closing(runtime(plan, 0)) as first:
        node = plan.nodes[0]
        config = cni.conflist(node)
        config["plugins"][0]["ipam"]["ranges"] = [[{"subnet": "10.244.1.0/30"}]]
        (node.cni_conf_dir / cni.CONFLIST_NAME).write_text(json.dumps(config))
        pods = [pod_space(plan, f"p{i}") for i in range(2)]
        await first.add("c0", pods[0])
        with pytest.raises(cni.CniError, match="no IP addresses available") as refused:
            await first.add("c1", pods[1])
        assert "\n" not in str(refused.value)
        assert "eth0" not in links(pods[1])
        await first.delete("c0", pods[0])
        await first.add("c1", pods[1])  # what was freed can be had


def test_a_folder_without_plugins_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(KernelMissingError, match="bridge, host-local, portmap"):
        cni.check_plugins(tmp_path)
