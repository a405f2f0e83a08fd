"""What the room makes of settings, its link and its files."""

from __future__ import annotations

import os
from pathlib import Path

from netpol.aio.clock import ManualClock
from netpol.kernel.routes import Underlay
from netpol.model.net import Prefix, parse_prefix
from routes.bird.daemon import BirdDaemon, Folder
from routes.bird.engine import BirdEngine
from routes.drain import DRAIN_S
from routes.options import RouteOptions
from routes.state import Facts
from routes.sync import RoutesRoom


async def no_routes() -> bool:
    return False


def room(folder: Path, clock: ManualClock, *, subnets: tuple[Prefix, ...] = ()) -> RoutesRoom:
    return RoutesRoom(
        BirdEngine(BirdDaemon(Folder(folder)), has_routes=no_routes, clock=clock),
        node="n1",
        options=RouteOptions(run_dir=str(folder), subnets=subnets),
        facts=Facts,
        clock=clock,
    )


LINK = Underlay(
    "eth0",
    1500,
    (parse_prefix("10.0.1.0/24"), parse_prefix("fd00:1::/64")),
    (parse_prefix("172.30.0.0/16"),),
)


def test_a_family_without_named_subnets_has_those_of_the_link(tmp_path: Path) -> None:
    """Else all nodes would count as one segment there."""
    named = (parse_prefix("10.0.0.0/16"),)
    made = room(tmp_path, ManualClock(), subnets=named)._live_options(LINK)
    assert made.subnets == (*named, parse_prefix("fd00:1::/64"))
    assert set(made.connected) == {*LINK.subnets, *LINK.connected}


def test_what_a_drain_withdrew_does_not_come_back_by_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    assert not room(tmp_path, clock)._drain.withdrawn
    file = tmp_path / "drain"
    file.touch()
    began_s = clock.wall() - DRAIN_S - 1
    os.utime(file, (began_s, began_s))
    assert room(tmp_path, clock)._drain.withdrawn
    began_s = clock.wall() - 1
    os.utime(file, (began_s, began_s))
    young = room(tmp_path, clock)
    assert young.options.drain
    assert not young._drain.withdrawn
