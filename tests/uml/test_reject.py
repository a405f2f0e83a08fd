"""`--deny-with=reject` where IPVS is between client and backend: who is told, and how soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.uml, pytest.mark.kernel]

#: No answer may take as long as the first repetition of a SYN (1 s).
SOON_S = 0.9
#: IPVS does not send ICMPv6 errors back to its clients, and over a bridge the kernel sends resets past it.
SILENT = {"vip6", "vip6 udp", "other to vip6"}


@pytest.fixture(scope="module")
def guest(answers_of: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, tuple[str, float]]]:
    """What each client was told, by step and question."""
    return answers_of("reject")


def test_without_policy_everybody_is_answered(
    guest: dict[str, dict[str, tuple[str, float]]],
) -> None:
    told = guest["nobody denies"]
    assert {name: word for name, (word, _) in told.items() if word} == {}
    assert len(told) == 10


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (
            "egress denies",
            {
                "direct": "ECONNREFUSED",
                "direct6": "ECONNREFUSED",
                "vip": "EHOSTUNREACH",
                "vip udp": "EHOSTUNREACH",
            },
        ),
        (
            "ingress denies",
            {
                "other to vip": "EHOSTUNREACH",
                "outsider to nodeport": "EHOSTUNREACH",
                "outsider to nodeport6": "ECONNREFUSED",
            },
        ),
    ],
)
def test_clients_of_ipvs_are_told(
    guest: dict[str, dict[str, tuple[str, float]]], step: str, wanted: dict[str, str]
) -> None:
    told = guest[step]
    assert {n: w for n, (w, _) in told.items() if n not in SILENT} == wanted
    assert all(seconds < SOON_S for name, (_, seconds) in told.items() if name not in SILENT)


def test_and_some_of_ipv6_are_not_but_nothing_passes(
    guest: dict[str, dict[str, tuple[str, float]]],
) -> None:
    """If these ever change, docs/adr/0008-reject.md says too little."""
    told = guest["egress denies"] | guest["ingress denies"]
    assert {told[name][0] for name in SILENT} == {"silence"}
