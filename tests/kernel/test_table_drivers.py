"""The table drivers of the real kernel under one contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from netpol.kernel.drivers import TableDriver, Variant
from netpol.kernel.iptc_tables import IptcTables
from netpol.kernel.netns import in_netns
from netpol.kernel.tables import RestoreTables
from tests.kernel.contract_tables import TableContract

pytestmark = pytest.mark.kernel


def _restore(variant: Variant) -> Callable[[str], TableDriver]:
    return lambda space: RestoreTables(variant, netns=space)


MAKERS: dict[str, Callable[[str], TableDriver]] = {
    "restore-nft": _restore(Variant.NFT),
    "restore-legacy": _restore(Variant.LEGACY),
    "iptc": lambda space: in_netns(
        space,
        lambda: IptcTables(RestoreTables(Variant.LEGACY, netns=space), in_process_rules_max=1000),
    ),
}


class TestTableDrivers(TableContract):
    @pytest.fixture(params=MAKERS)
    def tables(self, request: pytest.FixtureRequest, space: str) -> Iterator[TableDriver]:
        driver = MAKERS[request.param](space)
        yield driver
        close = getattr(driver, "close", None)
        if close is not None:
            close()
