"""Overlays on a kernel with IPIP: what carries pods' packets, and a change of it while they flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel.birdnet import lasting

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

Guest = dict[str, Any]
#: What of a running ping may be on its way when it is told to end.
_ON_THE_WAY = 2


@pytest.fixture(scope="module")
def guest(answers_of: Callable[[str], Guest]) -> Guest:
    """What the group wrote, by the name of each step."""
    return answers_of("overlay")


def test_pods_reach_pods_through_ipip(guest: Guest) -> None:
    assert guest["vxlan"] == [True] * 2
    assert guest["cross-subnet"] == [True] * 4
    assert guest["always"] == [True] * 3


def test_the_router_sees_tunnels_alone_each_family_in_its_own(guest: Guest) -> None:
    assert guest["on the wire"] == [
        "10.0.1.1 carries 10.1.1.1",
        "10.0.1.2 carries 10.1.2.1",
        "10.0.2.3 carries 10.1.3.1",
        "fd00:1::1 carries fd01:0:0:1::1",
        "fd00:1::2 carries fd01:0:0:2::1",
        "fd00:2::3 carries fd01:0:0:3::1",
    ]


def test_a_subnet_is_left_without_a_tunnel_unless_all_is_tunnelled(guest: Guest) -> None:
    assert guest["hops"][0] == ["eth0", "eth0"]
    near, far = guest["always hops"]
    assert guest["hops"][1] == far
    assert [near[0], far[0]] == ["knp-ipip0"] * 2
    assert all(hop.startswith("knp-t6-") for hop in (near[1], far[1]))
    assert near[1] != far[1]


def test_what_fills_the_tunnel_passes_and_a_byte_more_is_told(guest: Guest) -> None:
    assert guest["mtu"] == ["fits", "too long"] * 2


def test_a_second_run_changes_nothing(guest: Guest) -> None:
    assert guest["again"] == []


def test_links_that_somebody_changed_are_put_right(guest: Guest) -> None:
    first, second, third = guest["drift"]
    six = guest["hops"][1][1]
    assert first == ["knp-ipip0: mtu 1480", f"{six}: up"]
    assert second == [f"removed link {six}", f"made link {six}"]
    assert third == []


@pytest.mark.parametrize("to", ["ipip", "vxlan"])
def test_a_change_of_encapsulation_loses_no_packet(guest: Guest, to: str) -> None:
    for sent, received in guest[f"pings to {to}"]:
        assert sent > 20
        assert sent - received <= _ON_THE_WAY
    done = guest[f"to {to}"]
    routes = done.index("configured")
    assert all(word.startswith("removed link") for word in done[routes + 1 :])
    assert not any(word.startswith("removed link") for word in done[:routes])


def test_nodes_that_change_one_by_one_reach_each_other_where_both_ways_are_taken(
    guest: Guest,
) -> None:
    first, reached_first, second, reached_second, last, receiver_stays = guest["one by one"]
    for routed, there, back in (first, second):
        assert routed
        assert there[0] == "knp-ipip0"
        assert there[1].startswith("knp-t6-")
        assert back == ["knp-vxlan0"] * 2
    assert reached_first == reached_second == [True] * 4
    assert last == [True] * 3
    assert not receiver_stays


def test_no_session_ends_and_the_old_links_go(guest: Guest) -> None:
    before, after = guest["sessions"]
    assert [len(s) for s in before.values()] == [2, 2, 2]
    assert {n: s.keys() for n, s in after.items()} == {n: s.keys() for n, s in before.items()}
    assert all(lasting(before[n], after[n]) for n in before)
    assert "removed link knp-vxlan0" in guest["to ipip"]
    assert sum("removed link" in word for word in guest["to vxlan"]) == 3
    assert guest["vxlan always"] == [True] * 3
    assert guest["vxlan hops"] == [["knp-vxlan0"] * 2] * 2


def test_without_its_tunnel_a_node_is_unreachable_until_it_has_it_again(guest: Guest) -> None:
    found = guest["without tunnels"]
    assert found["closed"]
    assert found["reached"] == [False, False]
    assert len(found["made"]) == 2
    assert found["back"]


def test_a_machine_that_two_nodes_stand_for_has_one_tunnel(guest: Guest) -> None:
    assert guest["an end changes hands"] == [[]] * 4


def test_somebody_elses_tunnel_is_named(guest: Guest) -> None:
    assert guest["foreign"] == (
        "link knp-ipip0; needed a link of kind ipip; got another link with the same ends"
    )


def test_the_devices_that_come_with_the_modules_are_left_alone(guest: Guest) -> None:
    before, after = guest["fallback"]
    assert before == after
    assert all("state DOWN" in shown for shown in before.values())
