"""Annotations of a Service: flags, switches and precedence."""

from __future__ import annotations

import pytest

from netpol.model.ipvs import SCHED_FLAG_1, SCHED_FLAG_2, SCHED_FLAG_3
from netpol.model.labels import labels
from proxy.annotations import read, slice_weight

ROUTER, OURS = "kube-router.io/service.", "netpol.io/service."


def wishes(**annotations: str):
    return read(labels({ROUTER + k.replace("_", "."): v for k, v in annotations.items()}), "rr")


@pytest.mark.parametrize(
    ("scheduler", "text", "flags"),
    [
        ("mh", "flag-1", SCHED_FLAG_1),
        ("mh", "flag-1,flag-2", SCHED_FLAG_1 | SCHED_FLAG_2),
        ("mh", " flag-2 , flag-3,", SCHED_FLAG_2 | SCHED_FLAG_3),
        ("mh", "mh-fallback,mh-port", SCHED_FLAG_1 | SCHED_FLAG_2),
        ("sh", "sh-fallback,sh-port", SCHED_FLAG_1 | SCHED_FLAG_2),
        ("rr", "flag-3", SCHED_FLAG_3),
        ("mh", "", 0),
    ],
)
def test_flags(scheduler, text, flags):
    found = wishes(scheduler=scheduler, schedflags=text)
    assert (found.flags, found.refused) == (flags, ())


def test_bad_flags_are_left_out_and_the_others_stay():
    found = wishes(scheduler="sh", schedflags="sh-port,nope,mh-port")
    assert found.flags == SCHED_FLAG_2
    assert [r.message.rpartition("got ")[2] for r in found.refused] == [
        "'nope'; it is left out",
        "'mh-port'; it is left out",
    ]


@pytest.mark.parametrize(
    ("text", "on"), [("", True), ("true", True), ("True", True), ("false", False), (" true ", True)]
)
def test_switches(text, on):
    found = wishes(local=text, skiplbips=text)
    assert (found.local, found.skip_balancer_addresses, found.refused) == (on, on, ())


def test_ours_counts_and_the_other_is_not_even_read():
    both = labels({f"{ROUTER}scheduler": "nonsense", f"{OURS}scheduler": "lc"})
    found = read(both, "rr")
    assert (found.scheduler, found.refused) == ("lc", ())


def test_a_long_value_is_cut_in_the_message():
    (refused,) = wishes(scheduler="x" * 5000).refused
    assert len(refused.message) < 300


def test_control_characters_do_not_reach_the_message():
    (refused,) = wishes(scheduler="a\nb\x1b[31m").refused
    assert refused.message.isprintable()


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("1", 1),
        ("65535", 65535),
        ("0", None),
        ("65536", None),
        ("-1", None),
        ("²", None),
        ("", None),
    ],
)
def test_weights_of_slices(text, weight):
    assert slice_weight(labels({"netpol.io/weight": text})) == weight


def test_weights_change_only_schedulers_that_have_a_weighted_twin():
    assert wishes().scheduler_for(weighted=True) == "wrr"
    assert wishes().scheduler_for(weighted=False) == "rr"
    assert read((), "lc").scheduler_for(weighted=True) == "wlc"
    assert read((), "mh").scheduler_for(weighted=True) == "mh"
    assert wishes(scheduler="rr").scheduler_for(weighted=True) == "rr"
