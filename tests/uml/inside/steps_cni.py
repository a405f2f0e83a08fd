"""Real CNI plugins take our conflist where the kernel has vlan, tbf and ifb: interfaces, IPAMs, chains.

The node has a link to a network of its site, on which are a VLAN, a DHCP server and somebody who asks pods.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netpol.kernel import netns
from netpol.kernel.conflist import read_pod_network
from netpol.kernel.modules import load_module
from netpol.model.net import parse_prefix
from routes.cni import keep_conflist
from routes.conflist import FILE_NAME
from tests.cniruntime import PLUGINS, Runtime, conflist
from tests.uml.inside.dhcp import DhcpServer

Say = Callable[[str, Any], None]

CIDRS = ("10.1.1.0/24", "fd01:0:0:1::/64")
MTU = 1410
SITE, VLAN_SITE = "192.0.2.1", "10.1.1.250"
LEASE = "192.0.2.77"
STATIC = "10.1.1.99"
HOST_PORT, POD_PORT = 8080, 80
RATE_BITS = 8_000_000
_FOLDER = Path("/run/cni-test")
_SOCKET = Path("/run/cni-test.sock")
_TOOLS = Path("/run/cni-tools")

DHCP = {"type": "dhcp", "daemonSocketPath": str(_SOCKET)}
LOCAL = {"type": "host-local"}
#: Name of a case to its plugins.
CASES: dict[str, list[dict[str, Any]]] = {
    "vlan": [{"type": "vlan", "master": "up0", "vlanId": 5, "ipam": LOCAL}, {"type": "tuning"}],
    "vlan, static": [
        {
            "type": "vlan",
            "master": "up0",
            "vlanId": 5,
            "ipam": {"type": "static", "addresses": [{"address": f"{STATIC}/24"}]},
        }
    ],
    "macvlan, dhcp": [{"type": "macvlan", "master": "up0", "mode": "bridge", "ipam": DHCP}],
    "bridge": [
        {"type": "bridge", "bridge": "kube-bridge", "isDefaultGateway": True, "ipam": LOCAL},
        {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
_GIVEN = {
    "portMappings": [{"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": "tcp"}],
    "bandwidth": {
        "ingressRate": RATE_BITS,
        "ingressBurst": RATE_BITS,
        "egressRate": RATE_BITS,
        "egressBurst": RATE_BITS,
    },
}


def run(say: Say) -> None:
    """All cases, one container each."""
    for module in ("veth", "bridge", "8021q", "macvlan", "ifb"):
        load_module(module)
    _site()
    _TOOLS.mkdir()
    # This kernel has no nft. No ip6tables: CHECK of portmap 1.1.1 looks for its IPv4 rules there, too.
    (_TOOLS / "iptables").symlink_to("/usr/sbin/xtables-legacy-multi")
    server = netns.in_netns("site", lambda: DhcpServer("up1", SITE, LEASE))
    threading.Thread(target=server.serve, daemon=True).start()
    daemon = subprocess.Popen([PLUGINS / "dhcp", "daemon", "-socketpath", str(_SOCKET)])
    try:
        _wait(_SOCKET.exists)
        for name, plugins in CASES.items():
            say(name, _case(name, plugins))
        say("dhcp heard", server.heard)
    finally:
        daemon.kill()
        daemon.wait()


def _site() -> None:
    netns.create("site")
    _ip(
        "link add up0 type veth peer name up1 netns site",
        "link set up0 up",
        "addr add 192.0.2.2/24 dev up0",
    )
    _ip(
        "link set up1 up",
        f"addr add {SITE}/24 dev up1",
        "link add link up1 name vlan5 type vlan id 5",
        "link set vlan5 up",
        f"addr add {VLAN_SITE}/24 dev vlan5",
        space="site",
    )


def _case(name: str, plugins: list[dict[str, Any]]) -> dict[str, Any]:
    folder = _FOLDER / name.replace(", ", "-")
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_text(conflist(plugins))
    cidrs = tuple(parse_prefix(p) for p in CIDRS[: 1 if name == "bridge" else 2])
    wrote = [keep_conflist(folder, cidrs, mtu=MTU) for _ in range(2)]
    pod = f"pod-{folder.name}"
    netns.create(pod)
    runtime = Runtime(folder, pod=pod, given=_GIVEN, path=str(_TOOLS))
    result = runtime.run("ADD")
    found = {
        "wrote": wrote,
        "ipam": json.loads((folder / FILE_NAME).read_text())["plugins"][0]["ipam"],
        "unpoliced": read_pod_network(folder).unpoliced,
        "addresses": [ip["address"] for ip in result["ips"]],
        "mtu": _link(pod)["mtu"],
        "seen": _seen(name, pod),
        "checked": runtime.run("CHECK") == result,
    }
    runtime.run("DEL")
    found["left"] = [*_link(pod), *_left(name)]
    return found


def _seen(name: str, pod: str) -> Any:
    """What shows that the case does its work: who answers, and what stands in the kernel."""
    if name != "bridge":
        target = SITE if name.endswith("dhcp") else VLAN_SITE
        said = _output("ip", "netns", "exec", pod, "ping", "-c", "1", "-W", "2", target)
        kind = _link(pod)["linkinfo"]
        return [" 0% packet loss" in said, kind["info_kind"], kind["info_data"].get("id")]
    netns.in_netns(pod, lambda: _serve(POD_PORT))
    shaped = [
        q["dev"] for q in json.loads(_output("tc", "-j", "qdisc", "show")) if q["kind"] == "tbf"
    ]
    return {
        "martians": netns.in_netns(
            pod, Path("/proc/sys/net/ipv4/conf/eth0/log_martians").read_text
        ).strip(),
        "shaped": sorted(dev.rstrip("0123456789abcdef") for dev in shaped),
        "answer": netns.in_netns("site", lambda: _ask("192.0.2.2", HOST_PORT)),
    }


def _left(name: str) -> list[str]:
    """What a container leaves behind on the node."""
    if name != "bridge":
        return []
    rules = _output("iptables-legacy", "-t", "nat", "-S")
    shaped = json.loads(_output("tc", "-j", "qdisc", "show"))
    return [
        *(line for line in rules.splitlines() if f"--dport {HOST_PORT}" in line),
        *(q["dev"] for q in shaped if q["kind"] == "tbf"),
    ]


def _serve(port: int) -> None:
    server = socket.create_server(("", port))

    def answer() -> None:
        connection, (peer, *_) = server.accept()
        with server, connection:
            connection.sendall(peer.encode())

    threading.Thread(target=answer, daemon=True).start()


def _ask(address: str, port: int) -> str:
    with socket.create_connection((address, port), timeout=3) as connection:
        return connection.recv(100).decode()


def _link(pod: str) -> dict[str, Any]:
    shown = _output("ip", "-n", pod, "-j", "-d", "link", "show", "eth0")
    links = json.loads(shown) if shown.startswith("[") else [{}]
    found: dict[str, Any] = links[0]
    return found


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _ip(*lines: str, space: str = "") -> None:
    where = ["-n", space] if space else []
    subprocess.run(["ip", *where, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
