import json

import pytest

from bench import measure
from bench.__main__ import GROUPS
from bench.measure import Row


@pytest.mark.parametrize(
    ("row", "ratio", "target", "met"),
    [
        (Row("a", 4.0, "ms", target=5.0), None, "<= 5 ms", True),
        (Row("a", 6.0, "ms", target=5.0), None, "<= 5 ms", False),
        (Row("a", 6.0, "ms"), None, None, None),
        (Row("a", 2.0, "us", baseline=10.0, target=0.25, by_ratio=True), 0.2, "<= 0.25x", True),
        (Row("a", 3.0, "us", baseline=10.0, target=0.25, by_ratio=True), 0.3, "<= 0.25x", False),
        (Row("a", 6.0, "ms", baseline=3.0, target=10.0), 2.0, "<= 10 ms", True),
        (Row("a", 9.0, "1/s", target=8.0, at_least=True), None, ">= 8 1/s", True),
        (Row("a", 7.0, "1/s", target=8.0, at_least=True), None, ">= 8 1/s", False),
    ],
)
def test_a_row_says_what_it_is_measured_against(row, ratio, target, met):
    shown = row.as_json()
    assert (shown["ratio"], shown["target"], shown["met"]) == (ratio, target, met)
    assert set(shown) >= {"id", "value", "unit", "baseline", "ratio", "target", "met"}
    json.dumps(shown)


def test_figures_have_four_digits():
    row = Row("a", 1.23456789, "ms", baseline=98765.4321).as_json()
    assert (row["value"], row["baseline"], row["ratio"]) == (1.235, 98765.0, 1.25e-05)


def test_the_99th_percentile_leaves_one_in_a_hundred_out():
    assert measure.p99([1.0] * 99 + [500.0]) == 1.0
    assert measure.p99([1.0] * 98 + [500.0] * 2) == 500.0
    assert measure.p99([3.0]) == 3.0


def test_interleaved_keeps_the_minimum_of_every_call_and_makes_all_rounds():
    values = {"a": [3.0, 1.0, 2.0], "b": [9.0, 8.0, 7.0]}
    best = measure.interleaved({k: v.pop for k, v in values.items()}, rounds=3)
    assert best == {"a": 1.0, "b": 7.0}
    assert values == {"a": [], "b": []}


def test_the_table_shows_a_missed_target():
    rows = [Row("a.b", 6.0, "ms", target=5.0).as_json(), Row("c", 1.0, "s").as_json()]
    head, missed, other = measure.table(rows).splitlines()
    assert head.split() == ["id", "value", "unit", "baseline", "ratio", "target", "met"]
    assert missed.split() == ["a.b", "6", "ms", "-", "-", "<=", "5", "ms", "NO"]
    assert other.split()[-1] == "-"


def test_an_id_belongs_to_one_group():
    ids = [i for ids in GROUPS.values() for i in ids]
    assert len(ids) == len(set(ids))
