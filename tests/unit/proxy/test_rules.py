"""The proxy's chains as values: in the kernel's form, within its limits, and in full as text."""

from __future__ import annotations

import pytest

from netpol.kernel.drivers import TableTransaction
from netpol.kernel.ipvs_program import ipvs_takes_program
from netpol.kernel.rule_text import canonical, check_chain
from netpol.kernel.table_text import transaction_text
from netpol.model.ids import SERVICES
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import Goto, Jump, MapMark, SetMatch
from proxy import names
from proxy.rules import RuleOptions, rulesets

ALL = rulesets(RuleOptions(0x1FFF))


def test_rules_are_as_the_kernel_gives_them_back() -> None:
    for ruleset in ALL.values():
        for name, chain in ruleset.chains.items():
            check_chain(name)
            assert SERVICES.owns(name)
            assert chain == tuple(map(canonical, chain)), name


def test_every_chain_is_reached_and_every_set_is_asked() -> None:
    asked = set()
    for ruleset in ALL.values():
        reached = set(ruleset.hooks.values())
        for chain in ruleset.chains.values():
            for rule in chain:
                if isinstance(rule.action, Jump | Goto):
                    reached.add(rule.action.chain)
                if isinstance(rule.action, MapMark):
                    asked.add(rule.action.name)
                asked |= {match.name for match in rule.matches if isinstance(match, SetMatch)}
        assert reached == set(ruleset.chains)
    assert asked == set(names.SPECS)


def test_sides_fit_the_sets_they_are_asked_of() -> None:
    for ruleset in ALL.values():
        for chain in ruleset.chains.values():
            for rule in chain:
                for match in rule.matches:
                    if isinstance(match, SetMatch):
                        kind = names.SPECS[match.name].kind
                        assert len(match.sides) == kind.partition(":")[2].count(",") + 1


IN_FULL = {
    "mangle": """\
*mangle
:KNP-SVC-PRE - [0:0]
:KNP-SVC-OUT - [0:0]
:KNP-SVC-OWN - [0:0]
:KNP-SVC-POST - [0:0]
-A KNP-SVC-PRE -m conntrack --ctstate INVALID,NEW,UNTRACKED -m set --match-set KNP-SVC-POD4 src \
-j SET --map-set KNP-SVC-MARK4 dst,dst --map-mark
-A KNP-SVC-OUT -m conntrack --ctstate INVALID,NEW,UNTRACKED -m addrtype --src-type LOCAL -j KNP-SVC-OWN
-A KNP-SVC-OWN -m set --match-set KNP-SVC-LB4 dst,dst -m set ! --match-set KNP-SVC-SRC4 dst,dst,src -j DROP
-A KNP-SVC-OWN -j SET --map-set KNP-SVC-MARK4 dst,dst --map-mark
-A KNP-SVC-POST -m mark ! --mark 0x0/0x1fff -j MARK --set-xmark 0x0/0x1fff
-I PREROUTING 1 -j KNP-SVC-PRE
-I OUTPUT 1 -j KNP-SVC-OUT
-I POSTROUTING 1 -j KNP-SVC-POST
COMMIT
""",
    "filter": """\
*filter
:KNP-SVC-IN - [0:0]
:KNP-SVC-NEW - [0:0]
:KNP-SVC-VIP - [0:0]
:KNP-SVC-REFUSE - [0:0]
:KNP-SVC-FWD - [0:0]
-A KNP-SVC-IN -m conntrack --ctstate INVALID,NEW,UNTRACKED -j KNP-SVC-NEW
-A KNP-SVC-IN -m set --match-set KNP-SVC-VIP4 dst -g KNP-SVC-VIP
-A KNP-SVC-NEW -m set --match-set KNP-SVC-LB4 dst,dst -m set ! --match-set KNP-SVC-SRC4 dst,dst,src -j DROP
-A KNP-SVC-NEW -m mark --mark 0x0/0x1fff -m set --match-set KNP-SVC-DROP4 dst,dst -j DROP
-A KNP-SVC-NEW -m set --match-set KNP-SVC-REJECT4 dst,dst -g KNP-SVC-REFUSE
-A KNP-SVC-VIP -m conntrack --ctstate INVALID,RELATED,ESTABLISHED \
-m set --match-set KNP-SVC-PORT4 dst,dst -j RETURN
-A KNP-SVC-VIP -m set --match-set KNP-SVC-PORT4 dst,dst -m bpf --bytecode "IPVS TAKES" -j RETURN
-A KNP-SVC-VIP -p icmp -m icmp --icmp-type 8 -j RETURN
-A KNP-SVC-VIP -p icmp -m conntrack --ctstate RELATED -j RETURN
-A KNP-SVC-VIP -m conntrack --ctstate RELATED,ESTABLISHED --ctdir REPLY -j RETURN
-A KNP-SVC-VIP -g KNP-SVC-REFUSE
-A KNP-SVC-REFUSE -p tcp -j REJECT --reject-with tcp-reset
-A KNP-SVC-REFUSE -j REJECT --reject-with icmp-port-unreachable
-A KNP-SVC-FWD -m conntrack --ctstate RELATED,ESTABLISHED --ctdir REPLY -j ACCEPT
-I INPUT 1 -j KNP-SVC-IN
-I FORWARD 1 -j KNP-SVC-FWD
COMMIT
""",
    "nat": """\
*nat
:KNP-SVC-PRE - [0:0]
:KNP-SVC-OUT - [0:0]
:KNP-SVC-POST - [0:0]
:KNP-SVC-MASQ - [0:0]
-A KNP-SVC-PRE -m set --match-set KNP-SVC-VIP4 dst -j ACCEPT
-A KNP-SVC-PRE -m set --match-set KNP-SVC-PORT4 dst,dst -j ACCEPT
-A KNP-SVC-OUT -m set --match-set KNP-SVC-VIP4 dst -j ACCEPT
-A KNP-SVC-OUT -m set --match-set KNP-SVC-PORT4 dst,dst -j ACCEPT
-A KNP-SVC-POST -m ipvs --ipvs -j KNP-SVC-MASQ
-A KNP-SVC-MASQ -m addrtype --src-type LOCAL -j RETURN
-A KNP-SVC-MASQ -m bpf --bytecode "6,32 0 0 12,7 0 0 0,32 0 0 16,29 0 1 0,6 0 0 65535,6 0 0 0" \
-j MASQUERADE --random-fully
-A KNP-SVC-MASQ -m set --match-set KNP-SVC-POD4 src -j RETURN
-A KNP-SVC-MASQ -m set --match-set KNP-SVC-POD4 dst -j RETURN
-A KNP-SVC-MASQ -j MASQUERADE --random-fully
-I PREROUTING 1 -j KNP-SVC-PRE
-I OUTPUT 1 -j KNP-SVC-OUT
-I POSTROUTING 1 -j KNP-SVC-POST
COMMIT
""",
}


@pytest.mark.parametrize("table", IN_FULL)
def test_a_table_in_full(table: str) -> None:
    want = ALL[table, Family.V4]
    tx = TableTransaction(table, Family.V4, want.chains, hooks=want.hooks)
    text = transaction_text(tx, SERVICES).replace(ipvs_takes_program(Family.V4), "IPVS TAKES")
    assert text == IN_FULL[table]


@pytest.mark.parametrize("table", IN_FULL)
def test_the_families_differ_in_nothing_but_their_words(table: str) -> None:
    texts = []
    for family in FAMILIES:
        want = ALL[table, family]
        tx = TableTransaction(table, family, want.chains, hooks=want.hooks)
        text = transaction_text(tx, SERVICES)
        words = (("6 dst", "4 dst"), ("6 src", "4 src"), ("icmp6-port", "icmp-port"))
        for six, four in (
            *words,
            ("ipv6-icmp -m icmp6 --icmpv6-type 128", "icmp -m icmp --icmp-type 8"),
        ):
            text = text.replace(six, four)
        text = text.replace("-p ipv6-icmp", "-p icmp")
        texts.append([line for line in text.splitlines() if "--bytecode" not in line])
    assert texts[0] == texts[1]
