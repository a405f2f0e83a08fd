"""50,000 members into a set: our driver against `ipset restore`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from bench.measure import Row, interleaved, settle, timed
from netpol.kernel.drivers import AddMembers, CreateSet, DestroySet, SetTransaction
from netpol.kernel.set_text import restore_text
from netpol.kernel.sets import NetlinkSets
from netpol.model.ids import SetName
from netpol.model.net import Family
from netpol.model.ruleset import Member, SetKind, SetSpec

ENTRIES, ROUNDS = 50_000, 7


def load() -> Iterator[Row]:
    """Create a set and fill it; from members as values, or from text that is ready."""
    sets = NetlinkSets()
    spec = SetSpec(SetName("KNP-bench"), SetKind.HASH_IP, Family.V4)
    members: dict[Member, int | None] = {
        bytes((10, 100 + n // 65536, n // 256 % 256, n % 256)): None for n in range(ENTRIES)
    }
    fill = SetTransaction((CreateSet(spec, ENTRIES), AddMembers(spec, members)))
    text = restore_text(fill)

    def clean() -> None:
        if sets.headers()[spec.name] != ENTRIES:
            raise AssertionError("the set is not full")
        sets.apply(SetTransaction((DestroySet(spec.name),)))

    def ours() -> float:
        took_s = timed(lambda: sets.apply(fill))
        clean()
        return took_s * 1000

    def theirs() -> float:
        took_s = timed(
            lambda: subprocess.run(["ipset", "restore"], input=text, text=True, check=True)
        )
        clean()
        return took_s * 1000

    settle()
    best = interleaved({"ours": ours, "ipset restore": theirs}, rounds=ROUNDS)
    sets.close()
    yield Row(
        "ipset.load_50k",
        best["ours"],
        "ms",
        baseline=best["ipset restore"],
        target=0.5,
        by_ratio=True,
        note=f"{ENTRIES / best['ours'] * 1000:.0f} entries/s; minimum of {ROUNDS} rounds; "
        "baseline: ipset restore of the same set, its text ready",
    )
