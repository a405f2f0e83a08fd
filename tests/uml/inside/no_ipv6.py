"""The policy room on a kernel that has no IPv6: the module is loaded, and switched off."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from typing import Any

from netpol.enforce.worker import PolicyRoom
from netpol.kernel.drivers import Variant
from netpol.kernel.probe import missing_features
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import Direction
from netpol.model.net import Family, parse_prefix
from netpol.render import names
from netpol.render.node import graph_of
from netpol.render.options import UNKNOWN, RenderOptions
from netpol.render.static import TABLE
from tests import builders as make
from tests import engine

#: Ten times what it takes in a guest.
SOON_S = 60.0


def run(say: Callable[[str, Any], None]) -> None:
    """See the package."""
    subprocess.run(["/run/modprobe", "ipv6", "disable=1"], check=True)
    missing = missing_features(Variant.LEGACY)
    say("missing", {int(f): words for f, words in missing.items()})
    asyncio.run(_room(say))


async def _room(say: Callable[[str, Any], None]) -> None:
    world = make.world(
        make.node("n1", "172.18.0.2", "fd00:18::2", cidrs=("10.0.1.0/24", "fd00:0:1::/64")),
        make.namespace("a"),
        make.pod("a/web", ip=("10.0.1.2", "fd00:0:1::2"), app="web"),
        make.policy("a/shut", make.selector(app="web"), ingress=[]),
    )
    sets, tables = NetlinkSets(), RestoreTables(Variant.LEGACY)
    ranges = (parse_prefix("10.0.1.0/24"), parse_prefix("fd00:0:1::/64"))
    applied = asyncio.Event()
    room = PolicyRoom(
        graph_of(engine.build(world), "n1"),
        sets=sets,
        tables=tables,
        options=RenderOptions(hold_ranges=ranges),
        applied=applied.set,
    )
    task = asyncio.create_task(room.run_forever())
    room.start()
    await asyncio.wait_for(applied.wait(), SOON_S)
    say("down", [int(f) for f in room.status.down])
    say("error", room.status.error)
    say("refused", [str(k) for k in room.dataplane.refusals.reasons()])
    chains = tables.dump(TABLE, Family.V4).chains
    say("chains", sorted(chains))
    dump = sets.dump()
    say("sets", {str(n): len(d.members) for n, d in dump.items()})
    imap6 = dump[names.class_map(Direction.INGRESS, Family.V6)].members
    say("marks of IPv6", sorted({mark or 0 for mark in imap6.values()}))
    say("mark of held", room.dataplane.options.mark(UNKNOWN))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    room.close()
