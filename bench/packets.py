"""What rules cost a packet: the first one of a connection, and those that follow."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench import worlds
from bench.kuberouter_layout import Layout
from bench.measure import Row, interleaved, settle
from bench.node import OPTIONS
from bench.spaces import spaces
from bench.wire import Frames, Router, syn
from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.k8s.decode import KINDS, decode
from netpol.kernel.drivers import Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.objects import Endpoint
from netpol.policy.compile import compile_policy
from netpol.policy.world import World
from netpol.render.node import graph_of

#: Short rounds and many: the minimum wants stretches in which nobody else disturbs the core.
FLOWS, PAIRS, ROUNDS = 1_500, 5, 40
ESTABLISHED_PACKETS, ESTABLISHED_ROUNDS = 2_000, 120
#: Where a namespace's objects lie in memory matters as much as a rule does: the median of some is told.
ESTABLISHED_BUILDS = 5
POD_RANGE = "10.64.1.0/24"
ESTABLISHED_RULE = (
    "*filter\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n"
)
#: A folder with pp-iptables.gz and pp-ipset.gz: real rules of the peer, measured beside ours.
PEER_RULES = os.environ.get("NETPOL_PEER_RULES", "")

Load = Callable[[str], None]


def new_connection() -> Iterator[Row]:
    """250 local pods with an ingress and an egress policy each."""
    yield _new_connection(Variant.NFT, "packet.new_connection")
    yield _new_connection(Variant.LEGACY, "packet.new_connection.legacy")


def established() -> Iterator[Row]:
    """A pod that 50 policies isolate."""
    yield _established(Variant.NFT, "packet.established")
    yield _established(Variant.LEGACY, "packet.established.legacy")


def _new_connection(variant: Variant, name: str) -> Row:
    world = world_of(worlds.one_policy_each())
    layout = Layout(world, worlds.LOCAL_NODE)
    loads: dict[str, Load] = {
        "bare": lambda space: restore(space, variant, ESTABLISHED_RULE),
        "netpol": lambda space: _load_netpol(space, variant, world),
        "kube-router": lambda space: _load_text(space, variant, layout.sets, layout.rules),
    }
    if PEER_RULES:
        loads["peer"] = lambda space: _load_peer(space, variant, Path(PEER_RULES))
    with _routers(loads) as routers:
        frames = [
            Frames([syn(src.addresses[0], dst.addresses[0], 1024 + n, 80) for n in range(FLOWS)])
            for src, dst in _pairs(layout.order)
        ]
        costs = [_cost(routers, each) for each in frames]
        _check_denied(routers["netpol"], layout.order)
    mean = {k: statistics.fmean(c[k] for c in costs) for k in loads}
    ours, theirs = mean["netpol"] - mean["bare"], mean["kube-router"] - mean["bare"]
    shown = ", ".join(f"{k} {v:.2f}" for k, v in mean.items())
    return Row(
        name,
        ours,
        "us",
        baseline=theirs,
        target=0.25,
        by_ratio=True,
        note=f"a new connection in us: {shown}; {PAIRS} pairs, minimum of {ROUNDS} rounds",
    )


def _pairs(order: list[Endpoint]) -> list[tuple[Endpoint, Endpoint]]:
    """Pairs of one namespace whose later pod stands at even distances along the list."""
    out = []
    for step in range(PAIRS):
        at = (step + 1) * len(order) // PAIRS - 1
        dst = order[at]
        src = next(p for p in reversed(order[:at]) if p.key.namespace == dst.key.namespace)
        out.append((src, dst) if step % 2 else (dst, src))
    return out


def _cost(routers: dict[str, Router], frames: Frames) -> dict[str, float]:
    def run(router: Router) -> float:
        router.forget()
        before = router.forwarded()
        took_us = router.send(frames) * 1e6
        passed = router.forwarded() - before
        if passed < frames.count:
            raise AssertionError(f"{router.space}: {frames.count} sent, {passed} passed")
        router.forget()
        return took_us

    settle()
    return interleaved({k: lambda r=r: run(r) for k, r in routers.items()}, rounds=ROUNDS)  # type: ignore[misc]


def _check_denied(router: Router, order: list[Endpoint]) -> None:
    """The rules judge: another namespace, another port and an unknown source do not pass."""
    dst = order[0]
    src = next(p for p in order if p.key.namespace == dst.key.namespace and p != dst)
    other = next(p for p in order if p.key.namespace != dst.key.namespace)
    pairs = (
        (other.addresses[0], 80),
        (src.addresses[0], 81),
        (bytes((10, 64, 1, 254)), 80),
        (bytes((203, 0, 113, 9)), 80),
    )
    before = router.forwarded()
    router.send(Frames([syn(a, dst.addresses[0], 60000 + n, p) for n, (a, p) in enumerate(pairs)]))
    if router.forwarded() != before:
        raise AssertionError("packets that must be denied passed netpol's rules")


def _established(variant: Variant, name: str) -> Row:
    world = world_of(worlds.many_policies_on_one())
    builds = [_established_once(variant, world) for _ in range(ESTABLISHED_BUILDS)]
    builds.sort(key=lambda best: best["netpol"] / best["no rules"])
    best = builds[len(builds) // 2]
    added_ns = (best["netpol"] - best["no rules"]) * 1000
    ratios = ", ".join(f"{b['netpol'] / b['no rules']:.3f}" for b in builds)
    return Row(
        name,
        best["netpol"],
        "us",
        baseline=best["no rules"],
        target=1.05,
        by_ratio=True,
        note=f"{added_ns:+.0f} ns; socket to socket over a routed veth; minimum of "
        f"{ESTABLISHED_ROUNDS} rounds of {ESTABLISHED_PACKETS} packets, the median of "
        f"{ESTABLISHED_BUILDS} pairs of namespaces ({ratios}); conntrack is on in both",
    )


def _established_once(variant: Variant, world: World) -> dict[str, float]:
    """A packet in us, with and without rules, in namespaces made for it."""
    src, dst = (p.addresses[0] for p in world.pods.values())
    loads: dict[str, Load] = {
        # The rule is for another hook: conntrack works, and no rule is asked.
        "no rules": lambda space: restore(
            space, variant, ESTABLISHED_RULE.replace("FORWARD", "INPUT")
        ),
        "netpol": lambda space: _load_netpol(space, variant, world),
    }
    many, back = (Frames([bytes(18)] * ESTABLISHED_PACKETS) for _ in range(2))

    def run(near: socket.socket, far: socket.socket) -> float:
        return (many.send(near) + back.receive(far)) * 1e6

    with _routers(loads) as routers:
        ends = {k: r.connect(src, dst, 80) for k, r in routers.items()}
        for near, far in ends.values():
            # Both directions are seen: from here on the connection is established.
            near.send(b"there")
            far.settimeout(2)
            near.settimeout(2)
            far.sendto(b"back", far.recvfrom(64)[1])
            near.recv(64)
            far.setblocking(False)
            near.setblocking(True)
        settle()
        best = interleaved(
            {k: lambda e=e: run(*e) for k, e in ends.items()},  # type: ignore[misc]
            rounds=ESTABLISHED_ROUNDS,
        )
        for near, far in ends.values():
            near.close()
            far.close()
    return best


@contextlib.contextmanager
def _routers(loads: dict[str, Load]) -> Iterator[dict[str, Router]]:
    """A router for each way to load rules, on one core with the sender."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    roles = [f"r{n}" for n in range(len(loads))]
    with spaces("sink", *roles) as (sink, *names):
        routers = {
            key: Router(space, sink, number=number, pods=POD_RANGE)
            for number, (key, space) in enumerate(zip(loads, names, strict=True))
        }
        try:
            for key, load in loads.items():
                load(routers[key].space)
            yield routers
        finally:
            for router in routers.values():
                router.close()


def world_of(cluster: worlds.Cluster) -> World:
    def all_of(kind: str, objects: list[worlds.Json]) -> list[object]:
        return [decode(KINDS[kind], msgspec.json.encode(o)).value for o in objects]

    return World.build(
        namespaces=all_of("Namespace", cluster.namespaces),  # type: ignore[arg-type]
        pods=all_of("Pod", cluster.pods),  # type: ignore[arg-type]
        policies=[
            compile_policy(p)  # type: ignore[arg-type]
            for p in all_of("NetworkPolicy", cluster.policies)
        ],
        nodes=all_of("Node", cluster.nodes),  # type: ignore[arg-type]
    )


def _load_netpol(space: str, variant: Variant, world: World) -> None:
    """As the agent does on a fresh node."""
    sets = in_netns(space, NetlinkSets)
    tables = RestoreTables(variant, netns=space)
    plane = Dataplane(graph_of(world, worlds.LOCAL_NODE), OPTIONS)
    execute(plane.reconcile(dump_kernel(sets, tables)), sets, tables)
    sets.close()


def _load_text(space: str, variant: Variant, sets: str, rules: str) -> None:
    subprocess.run(
        ["ip", "netns", "exec", space, "ipset", "restore"], input=sets, text=True, check=True
    )
    restore(space, variant, rules)


def restore(space: str, variant: Variant, text: str) -> None:
    tool = f"iptables-{variant}-restore"
    subprocess.run(["ip", "netns", "exec", space, tool], input=text, text=True, check=True)


def _load_peer(space: str, variant: Variant, folder: Path) -> None:
    import gzip

    texts = [
        gzip.decompress((folder / name).read_bytes()).decode()
        for name in ("pp-ipset.gz", "pp-iptables.gz")
    ]
    _load_text(space, variant, *texts)
