"""One boot of the guest for all tests of a session."""

from __future__ import annotations

from typing import Any

import pytest

from tests.uml import machine


@pytest.fixture(scope="session")
def guest() -> dict[str, Any]:
    """What the script inside wrote, by the name of each step."""
    reason = machine.lacking()
    if reason:
        pytest.skip(reason)
    return machine.run_guest()
