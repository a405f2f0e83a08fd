"""`netpol-ctl cleanup` ends BIRD, takes its routes, tunnels and passwords away, and leaves others' alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.ctl.cleanup_routes import clean_routes
from netpol.kernel.netns import in_netns
from netpol.kernel.overlay import apply_overlay
from netpol.model.net import parse_prefix
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine
from routes.bird.render import render
from routes.options import OverlayMode, RouteOptions
from routes.overlay import LINK_PREFIXES, overlay_of
from routes.plan import plan
from tests.kernel.birdnet import BirdNet, Host, bird_net

pytestmark = pytest.mark.kernel
SUBNETS = tuple(parse_prefix(f"10.0.{n}.0/24") for n in (1, 2))


@pytest.fixture
def net() -> Iterator[BirdNet]:
    with bird_net([(1, 1), (2, 2)]) as made:
        try:
            yield made
        finally:
            for host in made.hosts.values():
                pid = BirdDaemon(folder(host)).running()
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)


def folder(host: Host) -> Folder:
    return Folder(host.folder / "bird")


def run(net: BirdNet, host: Host) -> None:
    """A node as an agent leaves it that has ended: BIRD runs, routes lead into a tunnel."""
    nodes = [h.node() for h in net.hosts.values()]
    options = RouteOptions(
        run_dir=str(folder(host).path), subnets=SUBNETS, overlay=OverlayMode.ALWAYS
    )
    made = plan(nodes, host.name, options)

    async def no_routes() -> bool:
        return False

    async def main() -> None:
        engine = BirdEngine(BirdDaemon(folder(host)), has_routes=no_routes)
        await engine.prepare()
        await engine.apply(render(made))
        await engine.close()

    def inside() -> None:
        overlay = overlay_of(made, underlay_mtu=1500)
        apply_overlay(overlay, prefixes=LINK_PREFIXES, prune=True)
        asyncio.run(main())

    in_netns(host.netns, inside)


def awake(net: BirdNet) -> None:
    for host in net.hosts.values():
        net.ask(folder(host).socket, "show status")


def test_nothing_of_routes_is_left(net: BirdNet, tmp_path: Path) -> None:
    one, two = net.hosts.values()
    for host in (one, two):
        run(net, host)

    def learnt() -> bool:
        awake(net)
        return one.routes() == set(two.pods)

    assert net.wait(learnt), one.routes()
    one.run("ip", "route", "add", "198.51.100.0/24", "via", "10.0.1.254")
    words = ("-m", "netpol.ctl.main", "cleanup", "--run-dir", str(one.folder))
    done = subprocess.run(
        [
            *("ip", "netns", "exec", one.netns, sys.executable, *words),
            *("--socket", str(tmp_path / "none.sock")),
        ],
        env={**os.environ, "XTABLES_LOCKFILE": str(tmp_path / "lock")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 bird, 2 routes, 1 tunnel" in done.stdout
    assert one.routes() == set()
    assert "knp-" not in one.run("ip", "link")
    assert "198.51.100.0/24" in one.run("ip", "route")
    assert BirdDaemon(folder(one)).running() is None
    assert not folder(one).path.exists()

    def told() -> bool:
        net.ask(folder(two).socket, "show status")
        return two.routes() == set()

    assert net.wait(told), two.routes()
    assert in_netns(one.netns, lambda: clean_routes(one.folder, [])) == {
        "birds": 0,
        "routes": 0,
        "tunnels": 0,
    }


def test_routes_of_another_bird_stay(net: BirdNet) -> None:
    one, two = net.hosts.values()
    folder(one).path.mkdir()
    folder(one).config.write_text("# one of ours has run here\n")
    nodes = [h.node() for h in net.hosts.values()]
    options = RouteOptions(run_dir=str(net.folder), overlay=OverlayMode.NEVER)
    for host in (one, two):
        net.start(host.name, render(plan(nodes, host.name, options)))
    assert net.wait(lambda: one.routes() == set(two.pods)), one.routes()
    left: list[str] = []
    assert in_netns(one.netns, lambda: clean_routes(one.folder, left))["routes"] == 0
    assert "another BIRD runs here" in left[0]
    assert one.routes() == set(two.pods)
    # Where none of ours has run there is nothing of ours to take.
    again: list[str] = []
    in_netns(one.netns, lambda: clean_routes(one.folder / "elsewhere", again))
    assert again == []
