"""The routes part of the agent: what it follows, and what costs it nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from netpol.agent.routes import PEERS_EVERY_S, RoutesPart, route_options
from netpol.aio.clock import ManualClock
from netpol.aio.tasks import TaskSet
from netpol.config import Settings
from netpol.k8s.cache import Change
from netpol.kernel.drivers import Variant
from netpol.model.ids import ObjectKey
from netpol.model.net import parse_address
from netpol.model.objects import EndpointSlice, SliceEndpoint
from routes.options import Encapsulation

pytestmark = pytest.mark.kernel

GOOD = "[{address: 192.0.2.1, asn: 65000, password: hunter2}]"
BAD = "[{address: 192.0.2.1, asn: 65000, password: hunter2, bfd: perhaps}]"


class World:
    """A part on a clock, and what it told."""

    def __init__(self, folder: Path, clock: ManualClock, peers: str) -> None:
        self.file = folder / "peers.yaml"
        self.file.write_text(peers)
        self.told: list[list[bytes]] = []
        settings = Settings(
            node="n1", run_dir=str(folder), bgp_peers_file=str(self.file), routes=True
        )
        self.part = RoutesPart(
            settings,
            variant=Variant.NFT,
            clock=clock,
            cni_written=lambda: None,
            peers_read=self._told,
        )
        self.tasks = TaskSet()

    def _told(self, peers: Iterable[bytes]) -> None:
        self.told.append(list(peers))


async def test_peers_are_followed_and_a_broken_file_keeps_the_last_good_ones(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    world = World(tmp_path, clock, BAD)
    part = world.part
    await part.prepare()
    part.synced()
    assert "bfd" in (part.fault() or "")
    assert not part.room._started  # BIRD may have peers that would be taken away
    world.tasks.spawn("peers", part._follow_peers())
    try:
        world.file.write_text(GOOD)
        await clock.advance(PEERS_EVERY_S)
        assert part.room._started
        assert [p.password for p in part.room.options.peers] == ["hunter2"]
        assert world.told == [[parse_address("192.0.2.1")]]
        assert part.errors() == []
        generation = part.room.generation
        await clock.advance(3 * PEERS_EVERY_S)
        assert part.room.generation == generation
        world.file.write_text(BAD)
        await clock.advance(PEERS_EVERY_S)
        assert [p.asn for p in part.room.options.peers] == [65000]
        (error,) = part.errors()
        assert "--bgp-peers-file" in error
        assert "hunter2" not in repr(part.document())
        world.file.write_text(GOOD.replace("hunter2", "hunter3"))
        await clock.advance(PEERS_EVERY_S)
        assert [p.password for p in part.room.options.peers] == ["hunter3"]
        assert part.room.generation > generation
    finally:
        await world.tasks.cancel()
        await part.stop()


async def test_endpoints_elsewhere_cost_no_run(tmp_path: Path) -> None:
    part = World(tmp_path, ManualClock(), GOOD).part
    key = ObjectKey("shop", "web")

    def piece(*endpoints: tuple[str, bool]) -> EndpointSlice:
        made = tuple(
            SliceEndpoint((parse_address(f"10.1.1.{n}"),), node, None, ready, ready, not ready)
            for n, (node, ready) in enumerate(endpoints, 1)
        )
        return EndpointSlice(key=ObjectKey("shop", "w"), service=key, endpoints=made)

    def runs(before: EndpointSlice | None, after: EndpointSlice | None) -> bool:
        generation = part.room.generation
        part._slice_changed(Change(key, before, after))
        return part.room.generation > generation

    elsewhere, here = piece(("n2", True)), piece(("n2", True), ("n1", True))
    assert not runs(None, elsewhere)
    assert not runs(elsewhere, piece(("n2", False), ("n3", True)))
    assert runs(elsewhere, here)
    assert not runs(here, piece(("n1", True)))
    assert runs(here, piece(("n2", True), ("n1", False)))
    assert runs(here, None)
    await part.stop()


def test_what_the_settings_say(tmp_path: Path) -> None:
    settings = Settings(
        node="n1",
        run_dir=str(tmp_path),
        overlay_accept=("ipip",),
        external_ip_cidr=("203.0.113.0/24",),
        loadbalancer_pools=("198.51.100.0/28", "192.0.2.6-192.0.2.9", "fd00::1-fd00::1"),
    )
    options = route_options(settings)
    assert options.accept == (Encapsulation.IPIP,)
    assert [str(p) for p in options.vip_cidrs] == [
        *("203.0.113.0/24", "198.51.100.0/28"),
        *("192.0.2.6/31", "192.0.2.8/31", "fd00::1/128"),
    ]
