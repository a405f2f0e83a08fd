"""The probe finds this kernel complete, leaves nothing, and names what a kernel lacks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from netpol.kernel import netns, probe
from netpol.kernel.drivers import TableDriver, TableDump, TableError, TableTransaction, Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.kernel.testing import FakeTables
from netpol.model.net import Family
from netpol.model.ruleset import Log

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("variant", Variant)
def test_nothing_is_missing_and_nothing_is_left(space: str, variant: Variant) -> None:
    assert in_netns(space, lambda: probe.missing_features(variant)) == []
    for family in Family:
        assert RestoreTables(variant, netns=space).dump("mangle", family) == TableDump()
    driver = in_netns(space, NetlinkSets)
    assert driver.headers() == {}
    driver.close()


class WithoutNflog(FakeTables):
    def apply(self, tx: TableTransaction) -> None:
        for rules in tx.replace.values():
            if any(isinstance(rule.action, Log) for rule in rules):
                raise TableError("refused", retryable=False, got="no target NFLOG")
        super().apply(tx)


class WithoutMangle(FakeTables):
    def apply(self, tx: TableTransaction) -> None:
        raise TableError(f"refused {tx.table}", retryable=False, got="no table")


@pytest.mark.parametrize(
    ("tables", "needle"),
    [(WithoutNflog(), "target NFLOG"), (WithoutMangle(), "table mangle")],
    ids=["extension", "table"],
)
def test_what_is_missing_is_named_alone(tables: TableDriver, needle: str) -> None:
    (words,) = list(probe._missing_rules(tables, Family.V6))
    assert needle in words
    assert "IPv6" in words


def test_a_new_namespace_is_gone_with_its_thread() -> None:
    def look() -> str:
        return str(Path("/proc/thread-self/ns/net").readlink())

    here = str(Path("/proc/self/ns/net").readlink())
    inside = netns.in_new_netns(look)
    assert inside != here
    assert str(Path("/proc/self/ns/net").readlink()) == here


def test_a_program_started_inside_lives_inside(space: str) -> None:
    def links() -> str:
        done = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
        return done.stdout

    assert len(in_netns(space, links).splitlines()) == 1
    assert in_netns(str(Path("/run/netns") / space), links) == in_netns(space, links)
