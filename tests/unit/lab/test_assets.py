"""The two variables that choose a real API server, and what is said when they are unusable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from netpol.lab.assets import API_SERVER_VARIABLE, ETCD_VARIABLE, Assets, from_environment
from netpol.lib.errors import InputError, NoAnswerError

PROGRAM = sys.executable


@pytest.mark.parametrize("environment", [{}, {API_SERVER_VARIABLE: "", ETCD_VARIABLE: ""}])
def test_without_the_variables_the_embedded_server_is_meant(environment: dict[str, str]) -> None:
    assert from_environment(environment) is None


def test_both_variables_name_the_programs() -> None:
    both = {API_SERVER_VARIABLE: PROGRAM, ETCD_VARIABLE: PROGRAM}

    assert from_environment(both) == Assets(PROGRAM, PROGRAM)


@pytest.mark.parametrize(
    ("set_one", "missing"),
    [(API_SERVER_VARIABLE, ETCD_VARIABLE), (ETCD_VARIABLE, API_SERVER_VARIABLE)],
)
def test_one_variable_alone_is_refused_and_the_other_is_named(set_one: str, missing: str) -> None:
    with pytest.raises(InputError, match=f"{set_one} is set and {missing} is not"):
        from_environment({set_one: PROGRAM})


@pytest.mark.parametrize("broken", [API_SERVER_VARIABLE, ETCD_VARIABLE])
def test_a_missing_file_is_named_with_its_variable(broken: str) -> None:
    both = {API_SERVER_VARIABLE: PROGRAM, ETCD_VARIABLE: PROGRAM, broken: "/no/such/program"}

    with pytest.raises(NoAnswerError, match=f"{broken}; .*no file /no/such/program"):
        from_environment(both)


def test_a_file_that_cannot_be_executed_is_told_from_one_that_is_missing(tmp_path: Path) -> None:
    plain = tmp_path / "etcd"
    plain.write_text("text")
    plain.chmod(0o600)

    with pytest.raises(NoAnswerError, match="can be executed"):
        from_environment({API_SERVER_VARIABLE: PROGRAM, ETCD_VARIABLE: str(plain)})
