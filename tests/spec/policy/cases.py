"""The whole case table, in the order of its rows."""

from __future__ import annotations

import re

from tests.spec.policy import (
    cases_blocks,
    cases_cluster,
    cases_peers,
    cases_ports,
    cases_selection,
)
from tests.spec.policy.case import Case

#: Every row that must have a case.
ROWS = (*(str(n) for n in range(1, 99)), "79a", "79b")


def _order(case: Case) -> tuple[int, str]:
    number = re.match(r"\d+", case.row)
    return int(number[0]) if number else 0, case.row


CASES: tuple[Case, ...] = tuple(
    sorted(
        (
            *cases_selection.CASES,
            *cases_peers.CASES,
            *cases_blocks.CASES,
            *cases_ports.CASES,
            *cases_cluster.CASES,
        ),
        key=_order,
    )
)
