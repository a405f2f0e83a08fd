"""Settings of the whole test-suite: Hypothesis profiles."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

#: Small enough for every run; `NETPOL_HYPOTHESIS=deep` looks longer.
settings.register_profile(
    "ci",
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("deep", parent=settings.get_profile("ci"), max_examples=3000)
settings.load_profile(os.environ.get("NETPOL_HYPOTHESIS", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share what is dear (a lab, a server): with two workers they stay together."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))
