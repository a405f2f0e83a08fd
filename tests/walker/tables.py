"""Chains out of iptables-restore or iptables-save text, and a packet's way through them.

Owns the kernel's meaning of the few matches and targets that netpol uses: return and goto, marks, sets,
log prefixes. Whatever is written in another way raises, so that a rule is never passed over in silence.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.walker.bpf import parse_program, run
from tests.walker.packet import Packet, WalkError
from tests.walker.sets import IpSet, masked_value

#: XT_EXTENSION_MAXNAMELEN - 1, xt_comment's 256 and xt_nflog_info's 64 with their NUL.
CHAIN_NAME_MAX = 28
COMMENT_MAX = 255
LOG_PREFIX_MAX = 63
#: XT_MULTI_PORTS.
MULTIPORT_MAX = 15
STEPS_MAX = 100_000

BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
PROTOCOLS = {"tcp", "udp", "sctp", "icmp", "ipv6-icmp", "icmpv6", "icmp6"}
WITH_PORTS = ("tcp", "udp", "sctp")
FLAGS = {"FIN", "SYN", "RST", "PSH", "ACK", "URG"}
STATES = {"NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED"}
ICMP6 = ("icmpv6", "icmp6")

Test = Callable[[Packet, int], bool]


class Target(NamedTuple):
    """What a rule does: kind and its argument."""

    kind: str
    chain: str = ""
    value: int = 0
    mask: int = 0
    side: str = ""
    prefix: str = ""


@dataclass
class ParsedRule:
    """One rule; `tests` get the packet and its current mark."""

    text: str
    tests: list[Test]
    target: Target | None
    sets: list[str]


class Step(NamedTuple):
    """A rule that matched."""

    chain: str
    number: int
    text: str


class Walk(NamedTuple):
    """The outcome of one hook."""

    passed: bool
    mark: int
    trail: tuple[Step, ...]
    prefix: str | None
    # How the sender was told: the word after `--reject-with`.
    answer: str = ""

    def __str__(self) -> str:
        return "\n".join(
            [
                "pass" if self.passed else "drop",
                *(f"  {s.chain}[{s.number}] {s.text}" for s in self.trail),
            ]
        )


@dataclass
class Table:
    """The chains of one table of one family."""

    version: int
    name: str = ""
    chains: dict[str, list[ParsedRule]] = field(default_factory=dict)
    sets: Mapping[str, IpSet] = field(default_factory=dict)

    def walk(
        self, hook: str, packet: Packet, *, field_mask: int, denied: int | None = None
    ) -> Walk:
        """Send a packet through a hook.

        Args:
            hook: which one.
            packet: what comes.
            field_mask: the bits of the mark that the rules may write.
            denied: a value of them that may be left behind beside 0, for other hooks to see.

        Raises:
            WalkError: the law of the mark is broken (bits outside the field changed, or the field not
                zero after a pass), or the chains run in a circle.
        """
        if packet.version != self.version:
            raise WalkError("a packet of the other family")
        mark, trail, prefix, passed, answer = packet.mark, [], None, True, ""
        stack = [(hook, 0)]
        steps = 0
        while stack:
            chain, position = stack.pop()
            rules = self.chains.get(chain, [] if chain in BUILT_IN else None)
            if rules is None:
                raise WalkError(f"no chain {chain}")
            if position >= len(rules):
                continue  # the caller's next rule is on the stack
            steps += 1
            if steps > STEPS_MAX:
                raise WalkError(f"{chain}: runs in a circle")
            rule = rules[position]
            stack.append((chain, position + 1))
            if not all(test(packet, mark) for test in rule.tests):
                continue
            trail.append(Step(chain, position + 1, rule.text))
            target = rule.target
            if target is None:
                continue
            if target.kind == "RETURN":
                stack.pop()
            elif target.kind in ("DROP", "REJECT"):
                passed, answer = False, target.prefix
                break
            elif target.kind == "ACCEPT":
                break
            elif target.kind == "jump":
                stack.append((target.chain, 0))
            elif target.kind == "goto":
                stack.pop()
                stack.append((target.chain, 0))
            elif target.kind == "MARK":
                mark = (mark & ~target.mask) ^ target.value
            elif target.kind == "SET":
                found, entry = self.sets[target.chain].lookup(packet, (target.side,))
                if found and entry is not None:
                    mark = (mark & ~entry[1]) ^ entry[0]
            elif target.kind == "NFLOG":
                prefix = target.prefix
            else:
                raise WalkError(f"target {target.kind}")
            if (mark ^ packet.mark) & ~field_mask & 0xFFFFFFFF:
                raise WalkError(f"{rule.text}: mark bits outside the field changed ({mark:#x})")
        if passed and mark & field_mask not in (0, denied):
            raise WalkError(f"{hook}: the field is {mark & field_mask:#x} after a pass\n{trail}")
        return Walk(passed, mark, tuple(trail), prefix, answer)


# -- text ---------------------------------------------------------------------------------------


def parse_table(text: str, version: int, sets: Mapping[str, IpSet]) -> Table:
    """Read one table's text; check every reference as the kernel would at COMMIT.

    Raises:
        WalkError: a form that is not known here, or that the kernel would refuse.
    """
    table = Table(version, sets=sets)
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith("#") or line == "COMMIT":
            continue
        if line.startswith("*"):
            if table.name and table.name != line[1:]:
                raise WalkError(f"{line}: a second table")
            table.name = line[1:]
        elif line.startswith(":"):
            name = line[1:].split()[0]
            if len(name) > CHAIN_NAME_MAX:
                raise WalkError(f"{name}: longer than {CHAIN_NAME_MAX}")
            table.chains[name] = []  # a declaration flushes
        else:
            _command(table, re.sub(r"^\[\d+:\d+\] ", "", line))
    _check(table)
    return table


def _command(table: Table, line: str) -> None:
    words = shlex.split(line)
    command, chain, *rest = words
    if chain not in table.chains and chain not in BUILT_IN:
        raise WalkError(f"{line}: no chain {chain}")
    rules = table.chains.setdefault(chain, [])
    if command in ("-A", "--append"):
        rules.append(_rule(rest, line, table))
    elif command in ("-I", "--insert"):
        position = int(rest.pop(0)) if rest and rest[0].isdigit() else 1
        rules.insert(position - 1, _rule(rest, line, table))
    elif command in ("-D", "--delete") and len(rest) == 1 and rest[0].isdigit():
        del rules[int(rest[0]) - 1]
    elif command in ("-F", "--flush") and not rest:
        rules.clear()
    elif command in ("-X", "--delete-chain") and not rest:
        del table.chains[chain]
    else:
        raise WalkError(f"{line}: command {command} is not known")


def _check(table: Table) -> None:
    for name, rules in table.chains.items():
        for rule in rules:
            target = rule.target
            if target and target.kind in ("jump", "goto") and target.chain not in table.chains:
                raise WalkError(f"{name}: {rule.text}: no chain {target.chain}")
            for used in rule.sets:
                if used not in table.sets:
                    raise WalkError(f"{name}: {rule.text}: no set {used}")
                if table.sets[used].version != table.version:
                    raise WalkError(f"{name}: {rule.text}: {used} is of the other family")


class _Reader:
    """The words of one rule, read from the left."""

    def __init__(self, words: list[str], line: str) -> None:
        self.words, self.line, self.position = words, line, 0

    def more(self) -> bool:
        return self.position < len(self.words)

    def next(self) -> str:
        if not self.more():
            raise WalkError(f"{self.line}: a word is missing")
        self.position += 1
        return self.words[self.position - 1]

    def take(self, *expected: str) -> bool:
        if tuple(self.words[self.position : self.position + len(expected)]) != expected:
            return False
        self.position += len(expected)
        return True

    def unknown(self, what: str) -> WalkError:
        return WalkError(f"{self.line}: {what!r} is not known here")


def _rule(words: list[str], line: str, table: Table) -> ParsedRule:
    reader = _Reader(words, line)
    rule = ParsedRule(line, [], None, [])
    protocol = ""
    while reader.more():
        negate = reader.take("!")
        word = reader.next()
        if word in ("-p", "--protocol") and not negate:
            protocol = _protocol(reader, rule)
        elif word in ("-s", "--source", "-d", "--destination"):
            side = "src" if word in ("-s", "--source") else "dst"
            rule.tests.append(_net(side, reader.next(), negate=negate, table=table))
        elif word in ("-i", "--in-interface", "-o", "--out-interface"):
            rule.tests.append(
                _interface(word[-1] if len(word) == 2 else word[2], reader, negate=negate)
            )
        elif word in ("-m", "--match") and not negate:
            _match(reader, rule, protocol, table)
        elif word in ("-j", "--jump") and not negate:
            _target(reader, rule, table)
        elif word in ("-g", "--goto") and not negate:
            rule.target = Target("goto", reader.next())
        elif word in ("--dport", "--destination-port") and not negate and protocol in WITH_PORTS:
            rule.tests.append(_ports([reader.next()]))
        elif word == "--tcp-flags" and not negate and protocol == "tcp":
            rule.tests.append(_tcp_flags(reader.next(), reader.next()))
        elif word == "--icmpv6-type" and not negate and protocol == "ipv6-icmp":
            rule.tests.append(_icmp(int(reader.next())))
        else:
            raise reader.unknown(word)
    return rule


def _protocol(reader: _Reader, rule: ParsedRule) -> str:
    name = reader.next()
    if name not in PROTOCOLS:
        raise reader.unknown(name)
    wanted = "ipv6-icmp" if name in ICMP6 else name
    rule.tests.append(lambda packet, _mark: packet.protocol == wanted)
    return wanted


def _tcp_flags(looked_at: str, present: str) -> Test:
    mask, want = set(looked_at.split(",")), set(present.split(","))
    if not mask <= FLAGS or not want <= mask:
        raise WalkError(f"--tcp-flags {looked_at} {present}")
    return lambda packet, _mark: mask & packet.tcp_flags == want


def _icmp(wanted: int) -> Test:
    return lambda packet, _mark: packet.icmp_type == wanted


def _net(side: str, text: str, *, negate: bool, table: Table) -> Test:
    network = ipaddress.ip_network(text)
    if network.version != table.version:
        raise WalkError(f"{text} is of the other family")
    return lambda packet, _mark: (packet.side(side) in network) != negate


def _interface(direction: str, reader: _Reader, *, negate: bool) -> Test:
    name = reader.next()
    wild = name.removesuffix("+")

    def test(packet: Packet, _mark: int) -> bool:
        have = packet.iif if direction == "i" else packet.oif
        return (have.startswith(wild) if name.endswith("+") else have == name) != negate

    return test


def _ports(texts: list[str]) -> Test:
    spans = []
    for text in texts:
        first, colon, last = text.partition(":")
        spans.append((int(first), int(last) if colon else int(first)))
        if not 0 <= spans[-1][0] <= spans[-1][1] <= 65535:
            raise WalkError(f"ports {text}")
    return lambda packet, _mark: (
        packet.dport is not None and any(a <= packet.dport <= b for a, b in spans)
    )


def _match(reader: _Reader, rule: ParsedRule, protocol: str, table: Table) -> None:
    name = reader.next()
    if name in (*WITH_PORTS, "icmp6", "icmpv6", "icmp"):
        if name != protocol and not (name in ICMP6 and protocol == "ipv6-icmp"):
            raise reader.unknown(f"-m {name} after -p {protocol}")
    elif name == "comment":
        if not reader.take("--comment"):
            raise reader.unknown("comment")
        if len(reader.next().encode()) > COMMENT_MAX:
            raise WalkError(f"{reader.line}: comment over {COMMENT_MAX}")
    elif name == "multiport":
        if protocol not in WITH_PORTS or not reader.take("--dports"):
            raise reader.unknown("multiport")
        texts = reader.next().split(",")
        if len(texts) + sum(":" in t for t in texts) > MULTIPORT_MAX:
            raise WalkError(f"{reader.line}: more ports than multiport takes")
        rule.tests.append(_ports(texts))
    elif name == "conntrack":
        if not reader.take("--ctstate"):
            raise reader.unknown("conntrack")
        states = reader.next().split(",")
        if not set(states) <= {*STATES, "DNAT"}:
            raise reader.unknown(",".join(states))
        rule.tests.append(
            lambda packet, _mark: packet.ctstate in states or (packet.dnat and "DNAT" in states)
        )
    elif name == "hl" and table.version == 6:
        if not reader.take("--hl-eq"):
            raise reader.unknown("hl")
        limit = int(reader.next())
        rule.tests.append(lambda packet, _mark: packet.hop_limit == limit)
    elif name == "set":
        negate = reader.take("!")
        if not reader.take("--match-set"):
            raise reader.unknown("set")
        used, sides = reader.next(), tuple(reader.next().split(","))
        rule.sets.append(used)
        rule.tests.append(lambda packet, _mark: table.sets[used].lookup(packet, sides)[0] != negate)
    elif name in ("mark", "connmark"):
        negate = reader.take("!")
        if not reader.take("--mark"):
            raise reader.unknown(name)
        value, mask = masked_value(reader.next())
        if name == "mark":
            rule.tests.append(lambda _packet, mark: (mark & mask == value) != negate)
        else:
            rule.tests.append(lambda packet, _mark: (packet.connmark & mask == value) != negate)
    elif name == "addrtype":
        _addrtype(reader, rule)
    elif name == "bpf":
        if not reader.take("--bytecode"):
            raise reader.unknown("bpf")
        program = parse_program(reader.next())
        rule.tests.append(lambda packet, _mark: run(program, packet))
    elif name == "limit":
        while reader.take("--limit") or reader.take("--limit-burst"):
            reader.next()  # the budget is never used up here
    else:
        raise reader.unknown(f"-m {name}")


def _addrtype(reader: _Reader, rule: ParsedRule) -> None:
    negate = reader.take("!")
    side = reader.next()
    kind = reader.next()
    if side not in ("--src-type", "--dst-type") or kind not in ("LOCAL", "MULTICAST", "BROADCAST"):
        raise reader.unknown(f"{side} {kind}")

    def test(packet: Packet, _mark: int) -> bool:
        address = packet.side(side[2:5])
        if kind == "LOCAL":
            return (address in packet.local or address.is_loopback) != negate
        if kind == "MULTICAST":
            return address.is_multicast != negate
        return (int(address) == 0xFFFFFFFF and address.version == 4) != negate

    rule.tests.append(test)


def _target(reader: _Reader, rule: ParsedRule, table: Table) -> None:
    name = reader.next()
    if name in ("RETURN", "DROP", "ACCEPT"):
        rule.target = Target(name)
    elif name == "MARK":
        if not reader.take("--set-xmark"):
            raise reader.unknown("MARK")
        value, mask = masked_value(reader.next())
        rule.target = Target("MARK", value=value, mask=mask)
    elif name == "SET":
        if not reader.take("--map-set"):
            raise reader.unknown("SET")
        used, side = reader.next(), reader.next()
        if not reader.take("--map-mark"):
            raise reader.unknown("SET without --map-mark")
        rule.sets.append(used)
        rule.target = Target("SET", used, side=side)
    elif name == "NFLOG":
        prefix = ""
        while reader.more():
            option = reader.next()
            if option not in (
                "--nflog-prefix",
                "--nflog-group",
                "--nflog-size",
                "--nflog-threshold",
            ):
                raise reader.unknown(option)
            value_text = reader.next()
            if option == "--nflog-prefix":
                prefix = value_text
        if len(prefix) > LOG_PREFIX_MAX:
            raise WalkError(f"{reader.line}: prefix over {LOG_PREFIX_MAX}")
        rule.target = Target("NFLOG", prefix=prefix)
    elif name == "REJECT":
        if table.name != "filter":
            raise WalkError(f"{reader.line}: REJECT is only valid in filter")
        if not reader.take("--reject-with"):
            raise reader.unknown("REJECT")
        rule.target = Target("REJECT", prefix=reader.next())
    elif name in table.chains:
        rule.target = Target("jump", name)
    else:
        raise reader.unknown(f"-j {name}")
