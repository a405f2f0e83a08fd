"""Which variant a host uses, on hosts of every kind; looking creates no table."""

from __future__ import annotations

import subprocess

import pytest

from netpol.kernel.drivers import Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.tables import legacy_tables
from netpol.kernel.variant import detect
from netpol.model.net import FAMILIES

pytestmark = pytest.mark.kernel


def run(space: str, tool: str, *rules: str) -> None:
    for rule in rules:
        args = [tool, *(["-w"] if "legacy" in tool else []), "-t", "mangle", *rule.split()]
        done = in_netns(space, lambda a=args: subprocess.run(a, capture_output=True, check=False))
        assert done.returncode == 0, done.stderr


def default() -> Variant:
    said = subprocess.run(["iptables", "-V"], capture_output=True, text=True, check=True).stdout
    return Variant.NFT if "nf_tables" in said else Variant.LEGACY


def test_a_fresh_host_uses_its_default_and_gets_no_table(space: str) -> None:
    assert in_netns(space, detect) is default()
    for family in FAMILIES:
        assert in_netns(space, lambda f=family: legacy_tables(f)) == set()


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("hint", ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"])
@pytest.mark.parametrize("family", ["iptables", "ip6tables"])
def test_kubelets_hint_beats_the_number_of_rules(
    space: str, variant: Variant, hint: str, family: str
) -> None:
    other = Variant.LEGACY if variant is Variant.NFT else Variant.NFT
    run(space, f"{family}-{variant}", f"-N {hint}")
    run(space, f"{family}-{other}", *["-A FORWARD -s ::/0" if family[2] == "6" else "-A INPUT"] * 3)
    assert in_netns(space, detect) is variant


@pytest.mark.parametrize("variant", Variant)
def test_more_rules_win_without_a_hint(space: str, variant: Variant) -> None:
    other = Variant.LEGACY if variant is Variant.NFT else Variant.NFT
    run(space, f"iptables-{variant}", "-A FORWARD -p tcp", "-A FORWARD -p udp")
    run(space, f"iptables-{other}", "-A FORWARD -p tcp")
    assert in_netns(space, detect) is variant
