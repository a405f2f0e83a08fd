"""Interface plugins, IPAMs and chained plugins that the host's kernel may lack take our conflist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.uml.inside.steps_cni import CASES, CIDRS, LEASE, LOCAL, MTU, SITE, STATIC

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

Guest = dict[str, Any]


@pytest.fixture(scope="module")
def guest(answers_of: Callable[[str], Guest]) -> Guest:
    """What the group wrote, by the name of each case."""
    return answers_of("cni")


@pytest.mark.parametrize("case", CASES)
def test_a_chain_takes_what_we_write_and_leaves_nothing(guest: Guest, case: str) -> None:
    found = guest[case]
    assert found["wrote"] == [True, False]
    assert found["mtu"] == MTU
    assert found["checked"]
    assert found["left"] == []


@pytest.mark.parametrize(
    ("case", "addresses"),
    [
        ("vlan", ["10.1.1.2/24", "fd01:0:0:1::2/64"]),
        ("vlan, static", [f"{STATIC}/24"]),
        ("macvlan, dhcp", [f"{LEASE}/24"]),
        ("bridge", ["10.1.1.2/24"]),
    ],
)
def test_addresses_come_from_the_ipam_that_stands_there(
    guest: Guest, case: str, addresses: list[str]
) -> None:
    assert guest[case]["addresses"] == addresses
    given = CASES[case][0]["ipam"]
    ranges = [[{"subnet": cidr}] for cidr in CIDRS[: len(addresses)]]
    assert guest[case]["ipam"] == ({**LOCAL, "ranges": ranges} if given == LOCAL else given)


def test_a_vlan_and_a_macvlan_reach_their_network_and_are_told_to_be_unpoliced(
    guest: Guest,
) -> None:
    assert guest["vlan"]["seen"] == guest["vlan, static"]["seen"] == [True, "vlan", 5]
    assert guest["macvlan, dhcp"]["seen"] == [True, "macvlan", None]
    assert [guest[case]["unpoliced"] for case in CASES] == ["vlan", "vlan", "macvlan", ""]


def test_a_lease_is_asked_for_and_given_back(guest: Guest) -> None:
    heard = guest["dhcp heard"]
    assert heard[:2] == ["discover", "request"]
    assert heard[-1] == "release"


def test_chained_plugins_shape_tune_and_map_a_port(guest: Guest) -> None:
    assert guest["bridge"]["seen"] == {
        "martians": "1",
        "shaped": ["bwp", "veth"],  # to the pod, and by an ifb device from it
        "answer": SITE,
    }
