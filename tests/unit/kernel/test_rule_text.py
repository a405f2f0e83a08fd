"""Rules as text: every form by hand, both ways, and what may not become text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    EmptySet,
    ForeignRule,
    HookState,
    SetTransaction,
    TableError,
    TableTransaction,
)
from netpol.kernel.rule_parse import parse_words, split_words
from netpol.kernel.rule_text import canonical, quote, rule_text, rule_words, same_address_program
from netpol.kernel.set_text import hashsize_for, maxelem_for, restore_text
from netpol.kernel.table_text import (
    parse_counters,
    parse_save,
    transaction_text,
    without_others,
)
from netpol.model.ids import (
    EVERYBODY,
    POLICY,
    ROUTES,
    SERVICES,
    ChainName,
    Owner,
    Protocol,
    SetName,
)
from netpol.model.net import FAMILIES, Family, Prefix, parse_address, parse_prefix
from netpol.model.ruleset import (
    AddressPort,
    CtState,
    Drop,
    DstPorts,
    Goto,
    Hook,
    HopLimit,
    IcmpType,
    InInterface,
    IpProtocol,
    IpvsSends,
    Jump,
    Limit,
    Log,
    MarkMatch,
    Match,
    NetMatch,
    NetPair,
    PortSpan,
    Return,
    Rule,
    SetKind,
    SetMark,
    SetMatch,
    SetSpec,
    Side,
    TcpFlags,
)
from tests.kernel import forms

TCP = IpProtocol(Protocol.TCP)


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
def test_every_form_survives_its_own_text(family: Family) -> None:
    for rule in forms.rules(family):
        assert parse_words(split_words(rule_text(rule, family))) == canonical(rule)


def test_what_ipvs_sends_on_is_a_form_too() -> None:
    """Not among the others, which every kernel is asked to take: xt_ipvs comes with IPVS."""
    rule = Rule(Jump(forms.CHAIN_B), (TCP, IpvsSends()), "sent on")
    for family in FAMILIES:
        text = rule_text(rule, family)
        assert text == '-p tcp -m ipvs --ipvs -m comment --comment "sent on" -j KNP-B'
        assert parse_words(split_words(text)) == rule


@pytest.mark.parametrize(
    ("match", "family"),
    [(IcmpType(8), Family.V4), (TcpFlags(("SYN",), ("SYN",)), Family.V4)],
)
def test_options_of_a_protocol_need_its_match(match: Match, family: Family) -> None:
    with pytest.raises(ValueError, match="protocol match"):
        rule_text(Rule(Drop(), (match,)), family)


def test_a_rule_in_full() -> None:
    rule = Rule(
        SetMark(0, 0xFFF00000),
        (
            CtState(("NEW",)),
            TCP,
            DstPorts(Protocol.TCP, (PortSpan(80, 80),)),
            SetMatch(SetName("KNP-S"), (Side.SRC,)),
            NetMatch(Side.DST, parse_prefix("10.0.0.0/8"), negate=True),
        ),
        "team/web",
    )
    assert rule_text(rule, Family.V4) == (
        "! -d 10.0.0.0/8 -p tcp -m conntrack --ctstate NEW -m tcp --dport 80"
        " -m set --match-set KNP-S src -m comment --comment team/web"
        " -j MARK --set-xmark 0x0/0xfff00000"
    )


@pytest.mark.parametrize(
    "rule",
    [
        Rule(Return(), (), "two\nlines"),
        Rule(Return(), (), "tab\t"),
        Rule(Return(), (), "\0"),
        Rule(Return(), (), "\udc80"),
        Rule(Return(), (), "ü" * 128),
        Rule(Log(1, "p" * 64)),
        Rule(Log(1, "a\nb")),
        Rule(Jump(ChainName("KNP-A -j ACCEPT"))),
        Rule(Goto(ChainName(""))),
        Rule(Return(), (InInterface("a b"),)),
        Rule(Return(), (InInterface("x" * 16),)),
        Rule(Return(), (NetMatch(Side.SRC, Prefix(bytes(16), 8)),)),
        Rule(Return(), (TCP, IpProtocol(Protocol.UDP))),
        Rule(Return(), (DstPorts(Protocol.TCP, (PortSpan(1, 1),)),)),
        Rule(Return(), (IpProtocol(Protocol.UDP), DstPorts(Protocol.TCP, (PortSpan(1, 1),)))),
        Rule(Return(), (TCP, DstPorts(Protocol.TCP, ()))),
        Rule(Return(), (TCP, DstPorts(Protocol.TCP, (PortSpan(9, 1),)))),
        Rule(Return(), (TCP, DstPorts(Protocol.TCP, (PortSpan(1, 2),) * 8))),
        Rule(Return(), (CtState(("NEW,ESTABLISHED",)),)),
        Rule(Return(), (CtState(()),)),
        Rule(Return(), (CtState(("NEW", "OLD")),)),
        Rule(Return(), (Limit(1, 0),)),
        Rule(Return(), (HopLimit(1),)),
        Rule(Return(), (Limit(0, 1),)),
        Rule(Return(), (Limit(10_001, 1),)),
    ],
)
def test_what_iptables_would_refuse_or_misread_is_no_text(rule: Rule) -> None:
    with pytest.raises(ValueError):
        rule_text(rule, Family.V4)


@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=60))
def test_any_printable_comment_stays_one_word(comment: str) -> None:
    rule = Rule(Drop(), (), comment)
    if not comment.isprintable() or len(comment.encode()) > 255:
        return
    words = rule_words(rule, Family.V4)
    assert split_words(" ".join(map(quote, words))) == words
    assert parse_words(words) == rule


@pytest.mark.parametrize(
    "text",
    [
        "-j QUEUE",
        "-m ipvs ! --ipvs -j RETURN",
        "-m conntrack --ctstate NEW --ctdir ORIGINAL -j RETURN",
        "-m conntrack --ctdir REPLY -j RETURN",
        "-m ipvs --vproto 6 -j RETURN",
        "-j MASQUERADE",
        "-j MASQUERADE --random-fully --to-ports 1-2",
        "-p icmp -m icmp --icmp-type 3/1 -j RETURN",
        "-p icmp -m icmp --icmp-type any -j RETURN",
        "-j SET --map-set KNP-S dst,dst,src --map-mark",
        "-p tcp -m tcp ! --tcp-flags SYN SYN -j DROP",
        "-p tcp -m tcp --tcp-option 5 -j DROP",
        "-j KUBE-FORWARD",
        "-p tcp",
        "-p tcp -m tcp --sport 1 -j DROP",
        "! -p tcp -j DROP",
        "! -i eth0 -j DROP",
        "-o eth0 -j DROP",
        "-s 10.0.0.0/255.0.255.0 -j DROP",
        "-m set --match-set A src --return-nomatch -j DROP",
        "-m mark --mark 0x1 -j MARK --and-mark 0x1",
        "-j NFLOG --nflog-group 1 --nflog-size 9",
        "-j SET --add-set A src",
        "-j SET --map-set A src --map-prio",
        "-m limit --limit 5/min -j DROP",
        "-m multiport --sports 1,2 -j DROP",
        "-p tcp -m multiport --dports 80 -j DROP",
        '-m bpf --bytecode "1,6 0 0 0" -j DROP',
        "-j DROP extra",
        "-m",
        "",
    ],
)
def test_anything_else_is_foreign(text: str) -> None:
    assert parse_words(split_words(text)) is None


def test_the_program_that_compares_addresses() -> None:
    assert same_address_program(Family.V4) == (
        "6,32 0 0 12,7 0 0 0,32 0 0 16,29 0 1 0,6 0 0 65535,6 0 0 0"
    )

    def accepts(family: Family, packet: bytes) -> bool:
        """Run classic BPF: ld, tax, jeq x, ret."""
        steps = [[int(w) for w in s.split()] for s in same_address_program(family).split(",")[1:]]
        a = x = at = 0
        while True:
            code, yes, no, k = steps[at]
            at += 1
            if code == 32:
                a = int.from_bytes(packet[k : k + 4], "big")
            elif code == 7:
                x = a
            elif code == 29:
                at += yes if a == x else no
            else:
                return k != 0

    for family, offset in ((Family.V4, 12), (Family.V6, 8)):
        n = family.bits // 8
        address = bytes(range(1, n + 1))
        assert accepts(family, bytes(offset) + address + address)
        for i in range(n):  # one bit of any byte makes the difference
            other = bytes(b ^ (i == j) for j, b in enumerate(address))
            assert not accepts(family, bytes(offset) + address + other)


A, B, OLD = ChainName("KNP-A"), ChainName("KNP-B"), ChainName("KNP-OLD")


def test_a_transaction_in_full() -> None:
    tx = TableTransaction(
        "mangle",
        Family.V4,
        {A: (Rule(Jump(B)), Rule(Drop(), (), "c d")), B: ()},
        (OLD,),
        {Hook.FORWARD: A, Hook.INPUT: None, Hook.OUTPUT: A},
        {
            Hook.FORWARD: HookState(((2, OLD), (5, A))),
            Hook.INPUT: HookState(((1, OLD),)),
            Hook.OUTPUT: HookState(((1, A),)),
        },
    )
    assert transaction_text(tx).splitlines() == [
        "*mangle",
        ":KNP-A - [0:0]",
        ":KNP-B - [0:0]",
        ":KNP-OLD - [0:0]",
        "-A KNP-A -j KNP-B",
        '-A KNP-A -m comment --comment "c d" -j DROP',
        "-D FORWARD -j KNP-A",
        "-I FORWARD 1 -j KNP-A",
        "-D FORWARD -j KNP-OLD",
        "-D INPUT -j KNP-OLD",
        "-X KNP-OLD",
        "COMMIT",
    ]


SAVED = """\
# Warning: iptables-legacy tables present, use iptables-legacy-save to see them
*mangle
:PREROUTING ACCEPT [0:0]
:FORWARD DROP [7:8]
:KNP-A - [0:0]
:KNP-B - [0:0]
:KUBE-X - [0:0]
[1:2] -A FORWARD -s 10.0.0.0/8 -j KNP-A
[3:4] -A FORWARD -j KNP-A
[3:4] -A FORWARD -j KUBE-X
[3:4] -A PREROUTING -j KNP-A
[5:6] -A KNP-A -m mark --mark 0x5 -j RETURN
[7:8] -A KNP-A -p tcp -j QUEUE
[9:9] -A KUBE-X -j KNP-A
COMMIT
"""


def test_only_our_part_of_a_table_is_read() -> None:
    plain = "\n".join(line.split("] ", 1)[-1] for line in SAVED.splitlines())
    dump = parse_save(plain.replace(":FORWARD DROP [7:8", ":FORWARD DROP [7:8]"))
    assert dump.chains == {
        A: (Rule(Return(), (MarkMatch(5, 0xFFFFFFFF),)), ForeignRule("-p tcp -j QUEUE")),
        B: (),
    }
    assert dump.hooks == {
        Hook.FORWARD: HookState(((2, A),)),
        Hook.PREROUTING: HookState(((1, A),)),
    }
    assert parse_counters(SAVED) == {A: ((5, 6), (7, 8)), B: ()}


TWO_OWNERS = """\
*mangle
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KNP-A - [0:0]
:KNP-SVC-A - [0:0]
:KNP-RT-A - [0:0]
-A INPUT -j KNP-A
-A INPUT -j KNP-SVC-A
-A INPUT -j KNP-A
-A INPUT -j KNP-RT-A
-A OUTPUT -j KUBE-X
-A OUTPUT -j KNP-A
-A OUTPUT -j KNP-SVC-A
-A KNP-A -j RETURN
-A KNP-SVC-A -j DROP
-A KNP-SVC-A -j KNP-SVC-A
COMMIT
"""
SVC, RT = ChainName("KNP-SVC-A"), ChainName("KNP-RT-A")


@pytest.mark.parametrize(
    ("owner", "chain", "inputs", "outputs"),
    [
        (POLICY, A, HookState(((1, A), (3, A))), HookState(((2, A),))),
        # Behind those that go first, but only those at the hook's head.
        (SERVICES, SVC, HookState(((2, SVC),), place=2), HookState(((3, SVC),))),
        (ROUTES, RT, HookState(((4, RT),), place=4), None),
    ],
    ids=["policy", "services", "routes"],
)
def test_each_owner_reads_its_own(
    owner: Owner, chain: ChainName, inputs: HookState, outputs: HookState | None
) -> None:
    dump = parse_save(TWO_OWNERS, owner)
    assert set(dump.chains) == {chain}
    assert dump.hooks.get(Hook.INPUT) == inputs
    assert dump.hooks.get(Hook.OUTPUT) == outputs
    everything = parse_save(TWO_OWNERS, EVERYBODY)
    assert everything.chains[chain] == dump.chains[chain]
    assert len(everything.hooks[Hook.INPUT].jumps) == 4


def test_what_policy_excludes_is_cut_out_of_the_text() -> None:
    left = without_others(TWO_OWNERS, POLICY)
    gone = {
        ":KNP-SVC-A - [0:0]",
        ":KNP-RT-A - [0:0]",
        "-A KNP-SVC-A -j DROP",
        "-A KNP-SVC-A -j KNP-SVC-A",
    }
    assert left.splitlines() == [line for line in TWO_OWNERS.splitlines() if line not in gone]
    assert without_others(TWO_OWNERS, SERVICES) == TWO_OWNERS


def test_a_transaction_touches_only_its_owners_chains() -> None:
    theirs = TableTransaction("mangle", Family.V4, {SVC: ()})
    with pytest.raises(TableError, match="not ours"):
        transaction_text(theirs, POLICY)
    with pytest.raises(TableError, match="not ours"):
        transaction_text(TableTransaction("mangle", Family.V4, delete=(A,)), SERVICES)
    state = {Hook.INPUT: HookState(((5, SVC),), place=2)}
    moved = TableTransaction("mangle", Family.V4, {SVC: ()}, (), {Hook.INPUT: SVC}, state)
    assert transaction_text(moved, SERVICES).splitlines() == [
        "*mangle",
        ":KNP-SVC-A - [0:0]",
        "-D INPUT -j KNP-SVC-A",
        "-I INPUT 2 -j KNP-SVC-A",
        "COMMIT",
    ]


def test_set_transactions_in_full() -> None:
    marks = SetSpec(SetName("KNP-M"), SetKind.HASH_NET, Family.V4, marks=True)
    ports = SetSpec(SetName("KNP-P"), SetKind.HASH_IP_PORT, Family.V6)
    pairs = SetSpec(SetName("KNP-N"), SetKind.HASH_NET_NET, Family.V4)
    pod = parse_prefix("10.0.0.1/32")
    tx = SetTransaction(
        (
            CreateSet(marks, 100),
            AddMembers(marks, {pod: 0x00400000, parse_prefix("10.0.0.0/24"): 1 << 20}),
            CreateSet(ports),
            AddMembers(ports, {AddressPort(parse_address("fd00::1"), Protocol.SCTP, 7): None}),
            CreateSet(pairs),
            AddMembers(pairs, {NetPair(pod, parse_prefix("10.0.0.0/24")): None}),
            DeleteMembers(marks, [pod]),
            EmptySet(ports),
            DestroySet(ports.name),
        )
    )
    assert restore_text(tx).splitlines() == [
        "create KNP-M hash:net family inet hashsize 128 maxelem 1048576 skbinfo",
        "add KNP-M 10.0.0.1 skbmark 0x00400000/0xfff00000",
        "add KNP-M 10.0.0.0/24 skbmark 0x00100000/0xfff00000",
        "create KNP-P hash:ip,port family inet6 hashsize 64 maxelem 1048576",
        "add KNP-P fd00::1,sctp:7",
        "create KNP-N hash:net,net family inet hashsize 64 maxelem 1048576",
        "add KNP-N 10.0.0.1,10.0.0.0/24",
        "del KNP-M 10.0.0.1",
        "flush KNP-P",
        "destroy KNP-P",
    ]


@given(st.integers(0, 1 << 22))
def test_a_set_has_room_for_what_is_expected_and_as_much_again(size: int) -> None:
    assert maxelem_for(size) >= max(2 * size, 1 << 20)
    buckets = hashsize_for(size)
    assert buckets & (buckets - 1) == 0
    assert buckets >= min(size, 1 << 20)
    assert buckets == 64 or buckets < 2 * size
