"""The probe finds this kernel complete, leaves nothing, and names what a kernel lacks."""

from __future__ import annotations

import itertools
import shutil
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
from netpol.model.ruleset import Log, Reject

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("variant", Variant)
def test_nothing_is_missing_and_nothing_is_left(space: str, variant: Variant) -> None:
    assert in_netns(space, lambda: probe.missing_features(variant, rejects=True)) == {}
    for family, table in itertools.product(Family, ("mangle", "filter")):
        assert RestoreTables(variant, netns=space).dump(table, family) == TableDump()
    driver = in_netns(space, NetlinkSets)
    assert driver.headers() == {}
    driver.close()


@pytest.mark.parametrize("variant", Variant)
def test_a_machine_without_ip6tables_lacks_one_family(
    space: str, variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (f"iptables-{variant}-save", f"iptables-{variant}-restore"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        missing = in_netns(space, lambda: probe.missing_features(variant, rejects=True))
    assert list(missing) == [Family.V6]
    assert "ip6tables" in " ".join(missing[Family.V6])


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


class WithoutReject(FakeTables):
    def apply(self, tx: TableTransaction) -> None:
        for rules in tx.replace.values():
            if any(isinstance(rule.action, Reject) for rule in rules):
                raise TableError("refused", retryable=False, got="no target REJECT")
        super().apply(tx)


def test_what_an_answer_needs_is_named() -> None:
    assert [
        w.partition(" for ")[0] for w in probe._missing_answers(WithoutReject(), Family.V4)
    ] == [
        "target REJECT (ipt_REJECT, ip6t_REJECT)",
        "resets by target REJECT",
    ]
    assert next(probe._missing_answers(WithoutMangle(), Family.V6)).startswith("table filter")


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
