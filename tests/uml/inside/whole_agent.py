"""The whole agent with policy and proxy, as on a node, against the lab's API server in the same process.

What its parts do is tested elsewhere; here is whether they are put together rightly: one kernel, one API
server, packets of pods and of the node, a restart, and a cleanup. Two pods, each behind a link of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from netpol.kernel.modules import load_module
from netpol.kernel.netns import create, in_netns

Say = Callable[[str, Any], None]

NODE, NODE_IP = "n1", "192.0.2.1"
BACKEND, CLIENT = "backend", "client"
GATEWAY = "10.244.1.1"
PODS = {BACKEND: "10.244.1.5", CLIENT: "10.244.1.6"}
VIP, BALANCER, PORT, NODE_PORT, HEALTH_PORT = "10.96.7.7", "198.51.100.9", 80, 30080, 31999
SOCKET, RUN_DIR = "/run/agent.sock", "/run/netpol-agent"
TIMEOUT_S = 1.0
READY_S = 60.0

SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {
        "type": "LoadBalancer",
        "loadBalancerClass": "netpol.io/loadbalancer",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": HEALTH_PORT,
        "clusterIP": VIP,
        "ports": [{"port": PORT, "targetPort": 8080, "nodePort": NODE_PORT}],
    },
}
SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "ports": [{"port": 8080}],
    "endpoints": [{"addresses": [PODS[BACKEND]], "nodeName": NODE}],
}
#: A Service with direct server return, a client outside that dials it, and a policy that ends tunnels.
OUTSIDE, OUTSIDE_IP, DIRECT_IP, DIRECT_PORT = "outside", "198.18.0.9", "203.0.113.7", 8080
DIRECT = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "direct", "annotations": {"netpol.io/service.dsr": "tunnel"}},
    "spec": {
        "clusterIP": "10.96.7.8",
        "externalIPs": [DIRECT_IP],
        "ports": [{"port": DIRECT_PORT}],
    },
}
GUARD = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "guard"},
    "spec": {"podSelector": {"matchLabels": {"app": BACKEND}}, "ingress": [{}]},
}
DENY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "deny"},
    "spec": {"podSelector": {"matchLabels": {"app": CLIENT}}, "policyTypes": ["Egress"]},
}


def run(say: Say) -> None:
    """Everything."""
    for module in ("dummy", "veth", "ip_vs", "ip_vs_rr", "ipip"):
        load_module(module)
    _network()
    in_netns(BACKEND, _serve)
    say("lacks", _lacks())
    asyncio.run(_run(say))


def _lacks() -> list[Any]:
    """What the agent's look at the kernel says: of what it needs, and of a scheduler that is not there."""
    from netpol.agent.proxy_node import missing_for_proxy
    from netpol.config import DEFAULT_SERVICE_MARK_MASK as MASK
    from netpol.kernel.drivers import Variant

    def lacks(scheduler: str) -> list[list[str]]:
        found = missing_for_proxy(Variant.LEGACY, mark_mask=MASK, scheduler=scheduler)
        return list(found.values())

    return [lacks("rr"), lacks("nosuch")]


def _network() -> None:
    lines = [
        "link add node0 type dummy",
        f"addr add {NODE_IP}/24 dev node0",
        "link set node0 up",
    ]
    for name, address in PODS.items():
        create(name)
        lines += [
            f"link add v{name} type veth peer name eth0 netns {name}",
            f"link set v{name} up",
            # As the ptp plugin: with arp_ignore a link answers for the addresses that are its own.
            f"addr add {GATEWAY}/32 dev v{name}",
            f"route add {address} dev v{name} src {NODE_IP}",
            f"-n {name} link set eth0 up",
            f"-n {name} addr add {address}/32 dev eth0",
            f"-n {name} route add {GATEWAY} dev eth0",
            f"-n {name} route add default via {GATEWAY}",
        ]
    create(OUTSIDE)
    lines += [
        f"link add out0 type veth peer name eth0 netns {OUTSIDE}",
        "link set out0 up",
        "addr add 198.18.0.1/24 dev out0",
        f"-n {OUTSIDE} link set eth0 up",
        f"-n {OUTSIDE} addr add {OUTSIDE_IP}/24 dev eth0",
        f"-n {OUTSIDE} route add default via 198.18.0.1",
    ]
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


def _serve() -> None:
    """Tell everybody who they are, then say again what they say."""
    listener = socket.create_server(("", 8080))

    def talk(one: socket.socket, peer: str) -> None:
        with one:
            one.sendall(f"{peer}\n".encode())
            while data := one.recv(100):
                one.sendall(data)

    def loop() -> None:
        while True:
            one, peer = listener.accept()
            threading.Thread(target=talk, args=(one, peer[0]), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()


def ask(address: str, port: int, space: str = "") -> str:
    """Whom the backend saw, or why it was not reached."""

    def one() -> str:
        try:
            with socket.create_connection((address, port), timeout=TIMEOUT_S) as connection:
                return connection.recv(100).decode().strip()
        except OSError as e:
            return type(e).__name__

    return in_netns(space, one) if space else one()


def get(port: int, path: str) -> int:
    """The status of an answer over HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


async def _run(say: Say) -> None:
    from netpol.k8s.api import Api
    from netpol.lab.apiserver import ApiServer

    async with ApiServer() as server, Api.for_server(server.url) as api:
        await _fill(api)
        async with _agent(server.url) as agent:
            say("ready", agent.report.ready())
            await _until(lambda: ask(BALANCER, PORT) == NODE_IP)
            await _packets(say)
            # As Docker has it. What a backend answers is forwarded.
            await asyncio.to_thread(_forward_policy, "DROP")
            say("forward", await asyncio.to_thread(ask, VIP, PORT, CLIENT))
            say("forward, no Service", await asyncio.to_thread(ask, PODS[BACKEND], 8080, CLIENT))
            await asyncio.to_thread(_forward_policy, "ACCEPT")
            say("status", _status(agent))
            say("services", await _ctl("services", "web", "--socket", SOCKET))
            await _direct(say, api, agent)
            connection = await asyncio.to_thread(
                socket.create_connection, (VIP, PORT), timeout=TIMEOUT_S
            )
            connection.recv(100)
            await api.post("/apis/networking.k8s.io/v1/namespaces/default/networkpolicies", DENY)
            await _until(lambda: ask(VIP, PORT, CLIENT) == "TimeoutError")
            say("denied", await asyncio.to_thread(ask, VIP, 10256, CLIENT))
        say("while it is away", await asyncio.to_thread(ask, VIP, PORT))
        async with _agent(server.url, policy=False) as agent:
            say("restarted", _status(agent))
            connection.sendall(b"still there")
            say("connection", connection.recv(100).decode())
        connection.close()
        cleanup = ("cleanup", "--socket", SOCKET, "--run-dir", RUN_DIR)
        say("cleanup", await _ctl(*cleanup))
        say("left", _left())
        await _kube_proxy(say)
        for name, routes in (("proxy alone", False), ("proxy and routes", True)):
            async with _agent(server.url, policy=False, routes=routes) as agent:
                say(f"{name}: ready", agent.report.ready())
                await _until(lambda: ask(BALANCER, PORT) == NODE_IP)
                questions = ((VIP, PORT, ""), (VIP, PORT, CLIENT), (NODE_IP, NODE_PORT, CLIENT))
                answers = [await asyncio.to_thread(ask, *question) for question in questions]
                say(f"{name}: answers", answers)
                say(f"{name}: status", _status(agent))
                say(f"{name}: facts", agent.report.status()["node_facts"])
                rules = await asyncio.to_thread(_output, "iptables-legacy-save")
                say(f"{name}: chains of policy", rules.count("KNP-INPUT"))
            await _ctl(*cleanup)
            say(f"{name}: left", _left())


async def _fill(api: Any) -> None:
    await api.post(
        "/api/v1/nodes",
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]},
        },
    )
    pods = "/api/v1/namespaces/default/pods"
    for name, address in PODS.items():
        container = {"name": "c", "image": "i"}
        meta = {"name": name, "labels": {"app": name}}
        spec = {"nodeName": NODE, "containers": [container]}
        await api.post(pods, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
        await api.patch(f"{pods}/{name}/status", {"status": status})
    await api.post("/api/v1/namespaces/default/services", SERVICE)
    await api.post("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", SLICE)


@contextlib.asynccontextmanager
async def _agent(url: str, *, policy: bool = True, routes: bool = False) -> AsyncIterator[Any]:
    from netpol.agent import Agent, main
    from netpol.config import Settings
    from netpol.kernel.tables import RestoreTables

    # Both in one process: the library that edits legacy tables in process is not in the guest.
    main._table_driver = RestoreTables
    agent = Agent(
        Settings(
            node=NODE,
            policy=policy,
            proxy=True,
            routes=routes,
            write_cni=False,
            api_server=url,
            admin_socket=SOCKET,
            state_dir="/run/netpol-state",
            run_dir=RUN_DIR,
            audit_log="",
            iptables="legacy",
            service_ranges=("10.96.0.0/12",),
            loadbalancer_pools=(f"{BALANCER}/32",),
            pod_interfaces=tuple(f"v{name}" for name in PODS),
            pod_ranges=("10.244.1.0/24",),
        )
    )
    await agent.start()
    try:
        await _until(lambda: agent.report.ready() is None)
        yield agent
    finally:
        await agent.stop()


async def _until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + READY_S
    while not await asyncio.to_thread(condition):
        if time.monotonic() > end_s:
            return  # the answers tell what is missing
        await asyncio.sleep(0.05)


async def _packets(say: Say) -> None:
    questions = {
        "node to VIP": (VIP, PORT, ""),
        "node to load balancer's address": (BALANCER, PORT, ""),
        "node to NodePort": (NODE_IP, NODE_PORT, ""),
        "pod to VIP": (VIP, PORT, CLIENT),
        "pod to load balancer's address": (BALANCER, PORT, CLIENT),
        "pod to itself": (VIP, PORT, BACKEND),
        "another port of the VIP": (VIP, 10256, CLIENT),
    }
    for name, question in questions.items():
        say(name, await asyncio.to_thread(ask, *question))
    say("health port", await asyncio.to_thread(get, HEALTH_PORT, "/"))
    say("healthz", await asyncio.to_thread(get, 10256, "/healthz"))


async def _direct(say: Say, api: Any, agent: Any) -> None:
    """A Service with direct server return comes, meets a policy, and goes."""
    slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    meta = {"name": "direct-1", "labels": {"kubernetes.io/service-name": "direct"}}
    await api.post("/api/v1/namespaces/default/services", DIRECT)
    await api.post(slices, {**SLICE, "metadata": meta})

    def seen() -> list[Any]:
        tunnels = sum(
            "Tunnel" in x for x in Path("/proc/net/ip_vs").read_text("ascii").splitlines()
        )
        link = in_netns(BACKEND, lambda: "knp-dsr" in dict(socket.if_nameindex()).values())
        return [tunnels, link, ask(DIRECT_IP, DIRECT_PORT, OUTSIDE)]

    await _until(lambda: seen() == [1, True, OUTSIDE_IP])
    say("direct", await asyncio.to_thread(seen))
    say("node to direct", await asyncio.to_thread(ask, DIRECT_IP, DIRECT_PORT))
    policies = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"
    await api.post(policies, GUARD)
    await _until(lambda: seen() == [0, False, OUTSIDE_IP])
    say("direct, isolated", await asyncio.to_thread(seen))
    say("direct, told", [c.message for c in agent.proxy.complaints()])
    await api.delete(f"{policies}/guard")
    await _until(lambda: seen() == [1, True, OUTSIDE_IP])
    say("direct, again", await asyncio.to_thread(seen))
    await api.delete(f"{slices}/direct-1")
    await api.delete("/api/v1/namespaces/default/services/direct")
    await _until(lambda: _status(agent)["servers"] == 4 and not seen()[1])
    say("direct, gone", await asyncio.to_thread(seen))


def _status(agent: Any) -> dict[str, Any]:
    status = agent.report.status()
    rooms = status["rooms"]
    return {
        "in_sync": status["in_sync"],
        "errors": status["errors"],
        "rooms": sorted(rooms),
        "drifts": sum(room.get("drifts", 0) for room in rooms.values()),
        "operations": rooms["proxy"]["operations"],
        "servers": rooms["proxy"]["servers"],
    }


async def _ctl(*words: str) -> tuple[int, str]:
    from netpol.ctl.main import main

    def call() -> tuple[int, str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(list(words))
        return code, out.getvalue()

    return await asyncio.to_thread(call)


async def _kube_proxy(say: Say) -> None:
    """A kube-proxy in IPVS mode left its things, beside an administrator's server and netpol's own."""
    from netpol.kernel.ipvs_table import NetlinkIpvs
    from netpol.kernel.vips import DummyVips
    from netpol.model.ids import Protocol
    from netpol.model.ipvs import AddServer, DeleteServer, ServerId, VirtualServer
    from netpol.model.net import Family, parse_address
    from proxy.ledger import HEADER, Word, line

    def server(address: str, port: int) -> ServerId:
        return ServerId(Family.V4, Protocol.TCP, parse_address(address), port)

    its = [server("10.96.0.1", 443), server(NODE_IP, 30090)]
    others = [server(NODE_IP, 3306), server(NODE_IP, NODE_PORT), server("10.96.7.9", 80)]
    for words in (
        ("ip", "link", "add", "kube-ipvs0", "type", "dummy"),
        *(
            ("ip", "addr", "add", f"{a}/32", "dev", "kube-ipvs0")
            for a in ("10.96.0.1", "10.96.7.9")
        ),
        ("ipset", "create", "KUBE-NODE-PORT-TCP", "bitmap:port", "range", "0-65535"),
        ("ipset", "add", "KUBE-NODE-PORT-TCP", "30090"),
        ("ipset", "add", "KUBE-NODE-PORT-TCP", str(NODE_PORT)),
    ):
        await asyncio.to_thread(subprocess.run, words, check=True)
    vips = await asyncio.to_thread(DummyVips)
    await asyncio.to_thread(vips.apply, add=[parse_address("10.96.7.9")], remove=[])
    ipvs = await asyncio.to_thread(NetlinkIpvs)
    ipvs.apply([AddServer(VirtualServer(id_)) for id_ in (*its, *others)])
    ledger = Path(RUN_DIR) / "ipvs.ledger"
    cleanup = ("cleanup", "--kube-proxy", "--socket", SOCKET, "--run-dir", RUN_DIR)
    say("kube-proxy, no ledger", await _ctl(*cleanup))
    ledger.write_bytes(b"nonsense\n")
    say("kube-proxy, no readable ledger", await _ctl(*cleanup))
    say("kube-proxy, nothing removed", len(ipvs.dump()) == len(its) + len(others))
    ledger.write_bytes(HEADER + line(Word.OURS, server(NODE_IP, NODE_PORT)))
    say("kube-proxy", await _ctl(*cleanup))
    say("kube-proxy, spared", sorted(map(str, ipvs.dump())) == sorted(map(str, others)))
    say("kube-proxy, again", await _ctl(*cleanup))
    await _ctl("cleanup", "--socket", SOCKET, "--run-dir", RUN_DIR)
    say("kube-proxy, then netpol", [str(id_) for id_ in ipvs.dump()])
    ipvs.apply([DeleteServer(id_) for id_ in ipvs.dump()])
    ipvs.close()
    vips.close()


def _forward_policy(policy: str) -> None:
    subprocess.run(["iptables-legacy", "-P", "FORWARD", policy], check=True)


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _left() -> dict[str, Any]:
    table = Path("/proc/net/ip_vs").read_text(encoding="ascii")
    rules = _output("iptables-legacy-save") + _output("ip6tables-legacy-save")
    return {
        "servers": table.splitlines()[3:],
        "rules": [line for line in rules.splitlines() if "KNP-" in line],
        "sets": _output("ipset", "list", "-n").split(),
        "links": _output("ip", "-o", "link").count("knp-ipvs0"),
        "forward": Path("/proc/sys/net/ipv4/ip_forward").read_text(encoding="ascii").strip(),
        "conntrack": Path("/proc/sys/net/ipv4/vs/conntrack").read_text(encoding="ascii").strip(),
        "files": sorted(p.name for p in Path(RUN_DIR).iterdir()),
    }
