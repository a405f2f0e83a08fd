"""The programs of a real API server, as envtest's variables name them.

Owns the two variables and the checks that can be made before anything is started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from netpol.lib.errors import InputError, NoAnswerError

API_SERVER_VARIABLE = "TEST_ASSET_KUBE_APISERVER"
ETCD_VARIABLE = "TEST_ASSET_ETCD"


class Assets(NamedTuple):
    """Paths of both programs."""

    kube_apiserver: str
    etcd: str


def from_environment(environment: Mapping[str, str]) -> Assets | None:
    """Return the programs that the environment names; None where it names none.

    Raises:
        InputError: Only one of the two variables is set.
        NoAnswerError: A variable names no file that can be run.
    """
    values = {name: environment.get(name, "") for name in (API_SERVER_VARIABLE, ETCD_VARIABLE)}
    if not any(values.values()):
        return None
    for name, value in values.items():
        other = ETCD_VARIABLE if name == API_SERVER_VARIABLE else API_SERVER_VARIABLE
        if not value:
            raise InputError(
                f"{other} is set and {name} is not",
                needed="both for a real API server, none for the embedded one",
            )
    for name, value in values.items():
        path = Path(value)
        if not path.is_file():
            raise NoAnswerError(name, needed="the path of a program", got=f"no file {value}")
        if not os.access(path, os.X_OK):
            raise NoAnswerError(
                name, needed="a file that can be executed", got=f"{value}, which cannot"
            )
    return Assets(*(str(Path(value).absolute()) for value in values.values()))
