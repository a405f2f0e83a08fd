"""The proxy's drivers in memory pass the contracts that the kernel passes in the guest (tests/uml)."""

from __future__ import annotations

import pytest

from netpol.kernel.testing_ipvs import FakeIpvs, FakeVips
from tests.uml.inside import contract_ipvs, contract_vips


@pytest.mark.parametrize("name", contract_ipvs.CHECKS)
def test_ipvs(name: str) -> None:
    contract_ipvs.CHECKS[name](FakeIpvs())


@pytest.mark.parametrize("name", contract_vips.CHECKS)
def test_vips(name: str) -> None:
    vips = FakeVips()
    own = (contract_vips.NODE4, contract_vips.NODE6, contract_vips.SECOND4, contract_vips.SECOND6)
    vips.node_addresses = set(own)
    contract_vips.CHECKS[name](vips)
