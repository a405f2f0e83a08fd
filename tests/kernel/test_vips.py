"""What the proxy's drivers say on a kernel that lacks what they need; where it has it, see tests/uml."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.netns import in_netns
from netpol.kernel.vips import DummyVips
from netpol.lib.errors import KernelMissingError

pytestmark = pytest.mark.kernel


def test_no_ipvs() -> None:
    if Path("/proc/net/ip_vs").exists():
        pytest.skip("this kernel has IPVS")
    with pytest.raises(KernelMissingError, match="ip_vs"):
        NetlinkIpvs()


def test_no_dummy_links(space: str) -> None:
    add = ["ip", "-n", space, "link", "add", "x", "type", "dummy"]
    if subprocess.run(add, check=False, capture_output=True).returncode == 0:
        pytest.skip("this kernel has dummy links")
    vips = in_netns(space, DummyVips)
    assert vips.dump() is None
    with pytest.raises(KernelMissingError, match="dummy"):
        vips.apply(add=[bytes([10, 96, 0, 1])], remove=[])
    vips.close()
