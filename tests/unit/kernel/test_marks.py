from __future__ import annotations

import pytest

from netpol.kernel.marks import MarkUse, conflict, free_mask, iptables_uses

SAVED = """\
*mangle
-A KNP-OK -j MARK --set-xmark 0x0/0xfff00000
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A cali-x -m comment --comment "-j DROP" -j MARK --set-xmark 0x10000000/0x10000000
-A PREROUTING -j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000
-A OUTPUT -j CONNMARK --restore-mark
-A OUTPUT -m mark --mark 0x1/0x1 -j RETURN
"""


def test_finds_what_writes_the_mark_and_leaves_our_own_chains_out() -> None:
    found = [u.mask for u in iptables_uses(SAVED.splitlines())]

    assert found == [0x4000, 0x10000000, 0xFF0000, 0xFFFFFFFF]


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        ("MARK --set-xmark 0x1/0x0", 0x1),  # --xor-mark 0x1
        ("MARK --set-xmark 0x10/0x10", 0x10),  # --or-mark 0x10
        ("MARK --set-xmark 0x0/0xffff0000", 0xFFFF0000),  # --and-mark 0xffff
        ("MARK --set-xmark 0x30/0xf0", 0xF0),  # --set-mark 0x30/0xf0
        ("MARK --set-xmark 0x300/0xf0", 0x3F0),
        ("MARK --set-xmark 0x0/0x0", 0),
        ("MARK --set-xmark 0x5", 0xFFFFFFFF),
        ("CONNMARK --restore-mark --nfmask 0x0 --ctmask 0xff", 0xFF),
        ("CONNMARK --restore-mark --nfmask 0xf00 --ctmask 0xff", 0xFFF),
        ("CONNMARK --restore-mark", 0xFFFFFFFF),
    ],
)
def test_a_rule_writes_what_it_zeroes_and_what_it_xors_in(rule: str, bits: int) -> None:
    assert [u.mask for u in iptables_uses([f"-A PREROUTING -j {rule}"])] == [bits]


def test_a_mark_that_is_xored_in_overlaps() -> None:
    uses = iptables_uses(["-A PREROUTING -j MARK --set-xmark 0x100000/0x0"])

    assert "overlaps" in (conflict(0xFFF00000, uses) or "")


def test_names_the_rule_and_a_free_mask() -> None:
    uses = [MarkUse(0x4000, "a"), MarkUse(0x10000000, "iptables rule -A cali-x")]

    fault = conflict(0xFFF00000, uses)

    assert fault == (
        "mark field 0xfff00000 overlaps with iptables rule -A cali-x; --mark-mask 0x0fff0000 is free"
    )


def test_no_overlap_is_no_fault() -> None:
    assert conflict(0xFFF00000, [MarkUse(0xC000, "kube-proxy")]) is None


def test_a_narrower_run_is_offered_where_no_wide_one_is_free() -> None:
    assert free_mask(0xFFFFFFF0, 12) == 0xF
    assert free_mask(0xFFFFFFFC, 12) == 0
