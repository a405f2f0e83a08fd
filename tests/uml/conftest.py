"""One run of the guests for all tests of a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.uml import machine
from tests.uml.inside.main import FAILED

Answers = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for the whole run inside."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(machine.RUN_TIMEOUT_S + 60))


@pytest.fixture(scope="session")
def machine_run() -> dict[str, Answers]:
    """What the groups inside wrote, by the names of group and step."""
    reason = machine.lacking()
    if reason:
        pytest.skip(reason)
    return machine.run_groups(machine.chosen())


@pytest.fixture(scope="session")
def answers_of(machine_run: dict[str, Answers]) -> Callable[[str], Answers]:
    """The answers of one group; fails where the group did not come to its end."""

    def of(group: str) -> Answers:
        if group not in machine_run:
            pytest.skip(f"{machine.GROUPS_VARIABLE} leaves out {group}")
        answers = machine_run[group]
        if FAILED in answers:
            pytest.fail(answers[FAILED], pytrace=False)
        return answers

    return of
