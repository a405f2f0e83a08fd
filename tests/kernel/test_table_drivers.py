"""The table drivers of the real kernel under the contracts, one owner and two."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from netpol.kernel.drivers import TableDriver, Variant
from netpol.kernel.iptc_tables import IptcTables
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import POLICY, SERVICES, Owner
from netpol.model.ruleset import Hook
from tests.kernel.contract_owners import Meddle, OwnersContract
from tests.kernel.contract_tables import TableContract

pytestmark = pytest.mark.kernel

Maker = Callable[[str, Owner, ExitStack], TableDriver]


def _restore(variant: Variant) -> Maker:
    return lambda space, owner, _: RestoreTables(variant, netns=space, owner=owner)


def _iptc(space: str, owner: Owner, stack: ExitStack) -> TableDriver:
    restore = RestoreTables(Variant.LEGACY, netns=space, owner=owner)
    driver = in_netns(space, lambda: IptcTables(restore, in_process_rules_max=1000))
    stack.callback(driver.close)
    return driver


MAKERS: dict[str, Maker] = {
    "restore-nft": _restore(Variant.NFT),
    "restore-legacy": _restore(Variant.LEGACY),
    "iptc": _iptc,
}


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def tables(maker: Maker, space: str, stack: ExitStack) -> TableDriver:
    return maker(space, POLICY, stack)


class TestTableDrivers(TableContract):
    pass


class TestTwoOwners(OwnersContract):
    @pytest.fixture
    def services(self, maker: Maker, space: str, stack: ExitStack) -> TableDriver:
        return maker(space, SERVICES, stack)

    @pytest.fixture
    def service_sets(self, space: str) -> Iterator[NetlinkSets]:
        driver = in_netns(space, lambda: NetlinkSets(owner=SERVICES))
        yield driver
        driver.close()

    @pytest.fixture
    def meddle(self, space: str, tables: TableDriver) -> Meddle:
        def run(hook: Hook) -> None:
            tool = f"iptables-{tables.variant}"
            words = [tool, "-w", "-t", "mangle", "-A", hook, "-s", "192.0.2.1", "-j", "DROP"]
            done = in_netns(space, lambda: subprocess.run(words, capture_output=True, check=False))
            assert done.returncode == 0, done.stderr

        return run
