"""The proxy's drivers on a kernel with IPVS: contracts, adoption, and packets of all protocols."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from tests.uml.inside import lan
from tests.uml.inside.checks_vips import CHECKS as VIP_CHECKS
from tests.uml.inside.contract_ipvs import CHECKS as IPVS_CONTRACT
from tests.uml.inside.contract_vips import CHECKS as VIP_CONTRACT
from tests.uml.inside.proxy_driver import PORTS, VIPS

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

Guest = dict[str, Any]

CHECKS = [
    *(f"ipvs: {name}" for name in IPVS_CONTRACT),
    *(f"vips: {name}" for name in VIP_CONTRACT),
    *(f"vips beyond: {name}" for name in VIP_CHECKS),
]
ALL = [f"{name}{family}" for family in VIPS for name in PORTS]


@pytest.fixture(scope="module")
def guest(answers_of: Callable[[str], Guest]) -> Guest:
    """What the group wrote, by the name of each step."""
    return answers_of("proxy_driver")


def test_every_check_was_run(guest: Guest):
    assert sorted(guest["checks"]) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_contracts(guest: Guest, check: str):
    if guest["checks"][check]:
        pytest.fail(guest["checks"][check], pytrace=False)


def test_a_module_that_is_loaded_anew_is_found_at_the_next_look(guest: Guest):
    assert guest["module anew"] == {
        "unloaded": True,
        "before": [errno.ENOENT],
        "empty": True,
        "refused": 0,
        "there": True,
    }


def test_a_service_without_backends_refuses(guest: Guest):
    assert guest["without backends"] == []
    assert guest["addresses"] == []
    assert guest["refused"] == dict.fromkeys(("tcp4", "udp4", "tcp6", "udp6"), True)


@pytest.mark.parametrize(
    ("who", "seen4", "seen6"),
    [
        ("client", lan.v4(10), lan.v6(10)),
        ("node", lan.NODE4, lan.NODE6),
        ("outsider", "172.18.0.9", "fd00:172:18::9"),
    ],
)
def test_all_protocols_of_both_families_reach_the_backend(
    guest: Guest, who: str, seen4: str, seen6: str
):
    assert guest["with backends"] == []
    seen = {name: f"backend saw {seen6 if name.endswith('6') else seen4}" for name in ALL}
    assert guest[f"asked by {who}"] == seen


def test_what_stands_is_found_by_another_process(guest: Guest):
    assert set(guest["adopted"].values()) == {True}
    assert len(guest["adopted"]) == len(ALL)
    assert guest["adopted addresses"]


def test_what_another_program_made_is_read_as_it_is_and_stays(guest: Guest):
    web, sticky = (guest["foreign"][f"10.97.0.1:{port}/TCP"] for port in (80, 81))
    assert "scheduler='wlc', flags=0, persistence_s=0" in web
    assert "scheduler='wlc', flags=0, persistence_s=600" in sticky
    for text in (web, sticky):
        assert text.count("ROUTE") == 2
        assert all(f"weight={n}" in text for n in (1, 2))
    assert guest["foreign stays"]
    assert set(guest["gone"].values()) == {""}


@pytest.mark.parametrize(("family", "client"), [(4, lan.v4(10)), (6, lan.v6(10))])
def test_a_backend_of_weight_0_keeps_what_it_has(guest: Guest, family: int, client: str):
    first, second = f"backend saw {client}", f"other saw {client}"
    assert guest[f"drained, IPv{family}"] == [first, first, second, 0, True]


@pytest.mark.parametrize(("family", "client"), [(4, lan.v4(10)), (6, lan.v6(10))])
def test_flows_of_a_backend_that_goes_end(guest: Guest, family: int, client: str):
    told = guest[f"ended, IPv{family}"]
    first, second = f"backend saw {client}", f"other saw {client}"
    assert told["ended"] == [0, True, 0]
    assert told["said"] == [second, second, first, first]
