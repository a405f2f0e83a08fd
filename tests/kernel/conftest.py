"""A network namespace of its own for each test of the kernel; what is in it is shown when one fails."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.kernel import netns
from netpol.kernel.drivers import Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.net import FAMILIES

_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("kernel"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture
def space(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of a fresh namespace; the xtables lock is the test's own."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    name = f"knpt-k{os.getpid()}-{next(_numbers)}"
    netns.create(name)
    request.node.stash[_SPACE] = name
    try:
        yield name
    finally:
        netns.delete(name)


@pytest.fixture
def sets(space: str) -> Iterator[NetlinkSets]:
    driver = in_netns(space, NetlinkSets)
    try:
        yield driver
    finally:
        driver.close()


_SPACE = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    name = item.stash.get(_SPACE, None)
    if report.when == "call" and report.failed and name and netns.exists(name):
        report.sections.append((f"namespace {name}", _state_of(name)))
    return report


def _state_of(space: str) -> str:
    parts = [
        f"# {variant}, IPv{family}\n{RestoreTables(variant, netns=space).save_text('mangle', family)}"
        for variant in Variant
        for family in FAMILIES
    ]
    listed = in_netns(
        space,
        lambda: subprocess.run(["ipset", "list"], capture_output=True, text=True, check=False),
    )
    return "\n".join([*parts, listed.stdout + listed.stderr])
