"""The walker itself: the kernel's meaning of each form, and a refusal of everything else."""

from __future__ import annotations

import ipaddress

import pytest

from tests.walker.packet import Packet, WalkError
from tests.walker.sets import parse_sets
from tests.walker.tables import Walk, parse_table

FIELD = 0xFFF0_0000
A, B = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("10.0.0.2")
A6, B6 = ipaddress.ip_address("fd00::1"), ipaddress.ip_address("fd00::2")

SETS = """\
create ip4 hash:ip family inet hashsize 64 maxelem 65536
add ip4 10.0.0.1
create net4 hash:net family inet
add net4 10.0.0.0/24
add net4 10.0.1.0/24
create port4 hash:ip,port family inet
add port4 10.0.0.2,tcp:80
add port4 10.0.0.2,udp:53
create pair4 hash:net,net family inet
add pair4 10.0.0.1/32,10.0.0.1/32
create map4 hash:net family inet skbinfo
add map4 10.0.0.0/24 skbmark 0x00100000/0xfff00000
add map4 10.0.0.1/32 skbmark 0x00500000/0xfff00000
add map4 10.0.0.2 skbmark 0x00000000/0xfff00000
create map6 hash:net family inet6 skbinfo
add map6 fd00::/64 skbmark 0x00100000/0xfff00000
add map6 fd00::1/128 skbmark 0x00700000/0xfff00000
"""


def packet(**fields: object) -> Packet:
    base: dict[str, object] = {"src": A, "dst": B, "dport": 80, "mark": 0xC001}
    return Packet(**(base | fields))  # type: ignore[arg-type]


def walk(rules: str, probe: Packet | None = None, version: int = 4) -> Walk:
    text = (
        "*mangle\n" + "\n".join(line.strip() for line in rules.strip().splitlines()) + "\nCOMMIT\n"
    )
    table = parse_table(text, version, parse_sets(SETS))
    return table.walk("FORWARD", probe or packet(), field_mask=FIELD)


def dropped(match: str, probe: Packet | None = None, version: int = 4) -> bool:
    return not walk(f"-A FORWARD {match} -j DROP", probe, version).passed


def test_falling_off_the_end_of_a_hook_passes():
    assert walk("").passed


@pytest.mark.parametrize(
    ("match", "fields", "wanted"),
    [
        ("-p tcp", {}, True),
        ("-p udp", {}, False),
        ("-p tcp -m tcp --tcp-flags SYN,ACK SYN", {}, True),
        ("-p tcp -m tcp --tcp-flags SYN,ACK SYN", {"tcp_flags": frozenset({"SYN", "ACK"})}, False),
        ("-p tcp -m tcp --tcp-flags RST RST", {}, False),
        ("-m conntrack --ctstate DNAT", {}, False),
        ("-m conntrack --ctstate DNAT", {"dnat": True}, True),
        ("-p tcp -m tcp --dport 80", {}, True),
        ("-p tcp -m tcp --dport 81", {}, False),
        ("-p tcp -m tcp --dport 79:80", {}, True),
        ("-p tcp -m multiport --dports 22,79:81", {}, True),
        ("-p tcp -m multiport --dports 22,443", {}, False),
        ("-p sctp -m sctp --dport 80", {"protocol": "sctp"}, True),
        ("-s 10.0.0.1/32", {}, True),
        ("-s 10.0.0.1/32", {"src": B}, False),
        ("! -s 10.0.0.1/32", {"src": B}, True),
        ("-d 10.0.0.0/24", {}, True),
        ("! -d 10.0.0.0/24", {}, False),
        ("-i cni0", {"iif": "cni0"}, True),
        ("-i cni+", {"iif": "cni7"}, True),
        ("-i cni", {"iif": "cni0"}, False),
        ("-m conntrack --ctstate ESTABLISHED", {}, False),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", {"ctstate": "ESTABLISHED"}, True),
        ("-m addrtype --src-type LOCAL", {}, False),
        ("-m addrtype --src-type LOCAL", {"local": frozenset({A})}, True),
        ("-m addrtype --dst-type LOCAL", {"local": frozenset({A})}, False),
        ("-m mark --mark 0xc001/0xffff", {}, True),
        ("-m mark ! --mark 0xc001/0xffff", {}, False),
        ("-m connmark --mark 0x100000/0x100000", {}, False),
        ("-m connmark --mark 0x100000/0x100000", {"connmark": 0x00300000}, True),
        ("-m limit --limit 10/sec --limit-burst 5", {}, True),
        ('-m comment --comment "a b"', {}, True),
        ("-m set --match-set ip4 src", {}, True),
        ("-m set --match-set ip4 dst", {}, False),
        ("-m set ! --match-set ip4 dst", {}, True),
        ("-m set --match-set net4 src", {}, True),
        ("-m set --match-set net4 src", {"src": ipaddress.ip_address("10.0.2.1")}, False),
        ("-m set --match-set port4 dst,dst", {}, True),
        ("-m set --match-set port4 dst,dst", {"dport": 53}, False),
        ("-m set --match-set port4 dst,dst", {"dport": 53, "protocol": "udp"}, True),
        ("-m set --match-set port4 dst,dst", {"dport": None, "protocol": "icmp"}, False),
        ("-m set --match-set pair4 src,dst", {}, False),
        ("-m set --match-set pair4 src,dst", {"dst": A}, True),
    ],
)
def test_matches(match: str, fields: dict[str, object], wanted: bool):
    assert dropped(match, packet(**fields)) is wanted


SAME4 = "6,32 0 0 12,7 0 0 0,32 0 0 16,29 0 1 0,6 0 0 65535,6 0 0 0"


def test_bpf_compares_what_the_header_holds():
    match = f'-m bpf --bytecode "{SAME4}"'
    assert not dropped(match)
    assert dropped(match, packet(dst=A))
    beyond = SAME4.replace("32 0 0 16", "32 0 0 160")
    assert not dropped(f'-m bpf --bytecode "{beyond}"', packet(dst=A))


@pytest.mark.parametrize("program", ["1,6 0 0 1,6 0 0 1", "1,40 0 0 12", "1,32 0 0 12"])
def test_unknown_bpf_raises(program: str):
    with pytest.raises(WalkError):
        dropped(f'-m bpf --bytecode "{program}"')


def test_icmpv6_type_and_hop_limit():
    match = "-p ipv6-icmp -m icmp6 --icmpv6-type 135 -m hl --hl-eq 255"
    probe = packet(src=A6, dst=B6, protocol="ipv6-icmp", dport=None, icmp_type=135, hop_limit=255)
    assert dropped(match, probe, 6)
    far = packet(src=A6, dst=B6, protocol="ipv6-icmp", dport=None, icmp_type=135, hop_limit=64)
    assert not dropped(match, far, 6)


def test_return_goes_to_the_callers_next_rule():
    got = walk(
        """
        :ONE - [0:0]
        -A FORWARD -j ONE
        -A FORWARD -j DROP
        -A ONE -j RETURN
        -A ONE -j NFLOG --nflog-prefix never
        """
    )
    assert not got.passed
    assert got.prefix is None
    assert [(s.chain, s.number) for s in got.trail] == [("FORWARD", 1), ("ONE", 1), ("FORWARD", 2)]


def test_goto_returns_to_the_caller_of_the_chain_that_jumped():
    got = walk(
        """
        :ONE - [0:0]
        :TWO - [0:0]
        -A FORWARD -j ONE
        -A FORWARD -j NFLOG --nflog-prefix back
        -A ONE -g TWO
        -A ONE -j DROP
        -A TWO -p tcp -j RETURN
        """
    )
    assert got.passed
    assert got.prefix == "back"


def test_goto_out_of_a_hook_ends_the_hook():
    got = walk(
        """
        :ONE - [0:0]
        -A FORWARD -g ONE
        -A FORWARD -j DROP
        -A ONE -p udp -j DROP
        """
    )
    assert got.passed


def test_accept_ends_the_hook_and_passes():
    got = walk(":ONE - [0:0]\n-A FORWARD -j ONE\n-A FORWARD -j DROP\n-A ONE -j ACCEPT")
    assert got.passed


def test_return_in_a_hook_passes():
    assert walk("-A FORWARD -j RETURN\n-A FORWARD -j DROP").passed


def test_map_takes_the_longest_prefix_and_leaves_the_mark_without_one():
    rules = "-A FORWARD -j SET --map-set {} src --map-mark\n-A FORWARD -j DROP"
    assert walk(rules.format("map4")).mark == 0x0050C001
    assert (
        walk(rules.format("map4"), packet(src=ipaddress.ip_address("10.0.0.9"))).mark == 0x0010C001
    )
    assert walk(rules.format("map4"), packet(src=B, mark=0x0050C001)).mark == 0xC001
    outside = packet(src=ipaddress.ip_address("10.9.0.9"), mark=0x0070C001)
    assert walk(rules.format("map4"), outside).mark == 0x0070C001
    six = packet(src=A6, dst=B6)
    assert walk(rules.format("map6"), six, 6).mark == 0x0070C001


def test_xmark_clears_by_mask_and_flips_by_value():
    got = walk("-A FORWARD -j MARK --set-xmark 0x0/0xfff00000", packet(mark=0xABC0C001))
    assert got.mark == 0xC001


@pytest.mark.parametrize(
    "rules",
    [
        "-A FORWARD -j MARK --set-xmark 0x100000/0xfff00000",  # left behind
        "-A FORWARD -j MARK --set-xmark 0x0/0xffffffff\n-A FORWARD -j DROP",  # others' bits
    ],
)
def test_the_law_of_the_mark(rules: str):
    with pytest.raises(WalkError):
        walk(rules)


def test_a_circle_is_found():
    with pytest.raises(WalkError, match="circle"):
        walk(":ONE - [0:0]\n:TWO - [0:0]\n-A FORWARD -j ONE\n-A ONE -g TWO\n-A TWO -g ONE")


def test_insert_delete_flush_and_counters():
    text = """
        :ONE - [0:0]
        [3:120] -A FORWARD -j DROP
        -I FORWARD 1 -j ONE
        -A FORWARD -j DROP
        -D FORWARD 3
        -D FORWARD 2
        -A ONE -j DROP
        -F ONE
        """
    assert walk(text).passed


@pytest.mark.parametrize(
    "rules",
    [
        "-A FORWARD -j QUEUE",
        "-A FORWARD -j REJECT --reject-with tcp-reset",
        "-A FORWARD -p udp -m udp --tcp-flags SYN SYN -j DROP",
        "-A FORWARD -j NOWHERE",
        "-A NOWHERE -j DROP",
        "-A FORWARD -p tcp -m tcp --sport 80 -j DROP",
        "-A FORWARD -m set --match-set nothing src -j DROP",
        "-A FORWARD -m set --match-set map6 src -j DROP",
        "-A FORWARD -m string --string x -j DROP",
        "-A FORWARD -s fd00::/8 -j DROP",
        "-A FORWARD --dport 80 -j DROP",
        "-A FORWARD -p tcp -m multiport --dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14:15,16 -j DROP",
        "-A FORWARD -m mark --mark 1 -j CONNMARK --save-mark",
        f"-A FORWARD -j NFLOG --nflog-prefix {'x' * 64}",
        f"-A FORWARD -m comment --comment {'x' * 256} -j DROP",
        f":{'x' * 29} - [0:0]",
        "-R FORWARD 1 -j DROP",
    ],
)
def test_unknown_or_refused_rules_raise(rules: str):
    with pytest.raises(WalkError):
        walk(rules)


@pytest.mark.parametrize(
    "text",
    [
        "create x hash:mac",
        "create x hash:ip comment",
        f"create {'x' * 32} hash:ip",
        "add y 10.0.0.1",
        "create x hash:net\nadd x 0.0.0.0/0",
        "create x hash:net\nadd x 10.0.0.0/24 nomatch",
        "create x hash:net\nadd x fd00::/64",
        "create x hash:ip\nadd x 10.0.0.0/24",
        "create x hash:ip\nadd x 10.0.0.1\nadd x 10.0.0.1",
        "create x hash:ip\nadd x 10.0.0.1 skbmark 0x1/0x1",
        "create x hash:ip,port\nadd x 10.0.0.1,icmp:8",
        "create x hash:net,net\nadd x 10.0.0.1",
        "create x hash:ip maxelem 1\nadd x 10.0.0.1\nadd x 10.0.0.2",
        "create x hash:ip\ncreate x hash:ip",
        "rename x y",
    ],
)
def test_unknown_or_refused_sets_raise(text: str):
    with pytest.raises(WalkError):
        parse_sets(text)


def test_deleted_and_existing_members():
    sets = parse_sets(
        "create x hash:ip\nadd x 10.0.0.1\nadd x 10.0.0.1 -exist\nadd x 10.0.0.2\ndel x 10.0.0.2\n"
    )
    assert sets["x"].lookup(packet(), ("src",)) == (True, None)
    assert sets["x"].lookup(packet(), ("dst",)) == (False, None)
