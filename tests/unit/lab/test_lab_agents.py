"""The command lines of the lab's agents, and what may be added to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol.lab import agents
from netpol.lab.plan import LabPlan
from netpol.lib.errors import InputError


def test_further_arguments_come_last_and_outlive_the_plans_file() -> None:
    plan = LabPlan(agent_args=("--deny-with=reject", "--no-hold-unknown-pods"))
    plan = LabPlan.from_json(plan.as_json())
    line = agents.command(plan, plan.nodes[0], api_url="http://a", path=Path("token"))
    assert line[-2:] == ["--deny-with=reject", "--no-hold-unknown-pods"]


def test_settings_of_an_agent_are_taken() -> None:
    agents.check_arguments(["--deny-with=reject", "--deny-with", "drop"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--deny-with=maybe"], "maybe"),
        (["--no-such-setting"], "no-such-setting"),
        (["--deny=reject"], "--deny=reject"),
        (["--deny-with"], "expected one argument"),
        (["word"], "word"),
        (["--node=other"], "what the lab does not set itself; got --node"),
        (["--version"], "--version"),
        (["--help"], "--help"),
    ],
)
def test_what_an_agent_would_not_start_with_is_refused_at_once(
    words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        agents.check_arguments(words)
