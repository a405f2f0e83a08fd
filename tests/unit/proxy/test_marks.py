"""Numbers of servers by mark."""

from __future__ import annotations

from netpol.model.ids import ObjectKey
from netpol.model.net import Family
from proxy.marks import MarkKey, Marks


def key(name: str) -> MarkKey:
    return MarkKey(ObjectKey("ns", name), "http", Family.V4)


def test_numbers_lie_in_the_field_and_stay():
    marks = Marks(0x000F_FF00)
    assert [marks.assign(key(n)) for n in "aba"] == [0x100, 0x200, 0x100]
    assert marks.value(key("c")) is None


def test_a_full_field_has_nothing_left_until_one_is_free():
    marks = Marks(0x3)
    assert [marks.assign(key(n)) for n in "abcd"] == [1, 2, 3, None]
    marks.release([key("b")])
    assert marks.assign(key("d")) == 2
    assert marks.assign(key("b")) is None


def test_what_a_former_agent_gave_is_taken_over():
    marks = Marks(0xF00)
    marks.adopt({key("a"): 0x300, key("b"): 0x301, key("c"): 0x1000, key("d"): 0x300})
    assert marks.used == {key("a"): 3}
    assert [marks.assign(key(n)) for n in "bcd"] == [0x100, 0x200, 0x400]


def test_marks_of_others_are_never_given():
    marks = Marks(0xF00)
    marks.ban([0x100, 0x7700])
    assert marks.assign(key("a")) == 0x200
    marks.release([key("a"), key("never")])
    assert marks.assign(key("b")) == 0x200
