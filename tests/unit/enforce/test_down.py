"""A family that is down is left alone for growing times, and longer where trying it takes long."""

from __future__ import annotations

import pytest

from netpol.enforce.down import REST_PER_WORK, RETRY_MAX_S, DownFamilies, fault_text
from netpol.model.net import Family

V4, V6 = Family.V4, Family.V6
ERROR = RuntimeError("no")


def test_nothing_is_down_at_first() -> None:
    down = DownFamilies()
    assert not down
    assert down.pause_s(5.0) is None
    assert down.resting(5.0) == {}
    assert fault_text(down.errors) == ""


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success() -> None:
    down, now_s, pauses = DownFamilies(), 100.0, []
    for _ in range(9):
        down.tried({V6: ERROR}, rested={}, now_s=now_s, took_s=0.0)
        pause_s = down.pause_s(now_s)
        assert pause_s is not None
        assert down.resting(now_s + pause_s - 0.01) == {V6: ERROR}
        now_s += pause_s
        assert down.resting(now_s) == {}
        assert down.pause_s(now_s) == 0
        pauses.append(pause_s)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, RETRY_MAX_S, RETRY_MAX_S, RETRY_MAX_S]
    down.tried({}, rested={}, now_s=now_s, took_s=0.0)
    assert not down
    down.tried({V6: ERROR}, rested={}, now_s=now_s, took_s=0.0)
    assert down.pause_s(now_s) == 0.5


def test_one_that_rests_stays_as_it_is() -> None:
    down = DownFamilies()
    down.tried({V6: ERROR}, rested={}, now_s=0.0, took_s=0.0)
    rested = down.resting(0.2)
    down.tried({}, rested=rested, now_s=0.2, took_s=0.1)
    assert down.pause_s(0.2) == pytest.approx(0.3)
    assert down.errors == {V6: ERROR}


def test_a_try_that_hangs_rests_in_proportion() -> None:
    down = DownFamilies()
    down.tried({V6: ERROR}, rested={}, now_s=60.0, took_s=60.0)
    assert down.pause_s(60.0) == 60.0 * REST_PER_WORK


def test_faults_are_said_by_family() -> None:
    assert fault_text({V6: ERROR, V4: ValueError()}) == "IPv4: ValueError; IPv6: no"
