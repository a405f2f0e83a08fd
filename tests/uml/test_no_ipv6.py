"""A kernel without IPv6 has a working policy of IPv4, and an agent that says what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.uml import machine

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

_MODULE = "tests.uml.inside.no_ipv6"


@pytest.fixture(scope="module")
def guest() -> dict[str, Any]:
    """A guest of its own: a kernel module, once switched off, stays so."""
    reason = machine.lacking()
    if reason:
        pytest.skip(reason)
    answers = machine.run_guest((_MODULE,))[_MODULE]
    assert "failed" not in answers, answers["failed"]
    return answers


def test_only_ipv6_is_missing(guest: dict[str, Any]) -> None:
    assert list(guest["missing"]) == ["6"]
    assert "table mangle for IPv6" in guest["missing"]["6"][0]


def test_ipv4_is_in_force_and_ipv6_is_said_to_be_down(guest: dict[str, Any]) -> None:
    assert guest["down"] == [6]
    assert guest["error"].startswith("IPv6: ")
    assert guest["refused"] == []
    assert any(name.startswith("KNP-PI-") for name in guest["chains"])
    # The pod and its range; of IPv6 both are held, since a family that is down can only deny more.
    assert guest["sets"]["KNP-IMAP4"] == 2
    assert guest["marks of IPv6"] == [guest["mark of held"]]
