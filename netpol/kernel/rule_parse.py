"""One rule out of what iptables-save prints. Pure; `rule_text` is the way there.

Reading is strict: what is not exactly a form of the model is None, and its owner calls it foreign.
Both variants (iptables 1.8.9) print every form alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from netpol.kernel.ipvs_program import ipvs_takes_program
from netpol.kernel.rule_text import (
    FULL_MASK,
    LIMIT_BURST_DEFAULT,
    PORT_MODULES,
    PROTOCOL_WORDS,
    same_address_program,
)
from netpol.model.ids import OWN_PREFIX, ChainName, Protocol, SetName
from netpol.model.net import Family, parse_prefix
from netpol.model.ruleset import (
    Accept,
    Action,
    AddrType,
    ConnmarkMatch,
    CtState,
    Drop,
    DstPorts,
    Goto,
    HopLimit,
    IcmpType,
    Icmpv6Type,
    InInterface,
    InPort,
    IpProtocol,
    IpvsSends,
    IpvsTakes,
    Jump,
    Limit,
    Log,
    MapMark,
    MarkMatch,
    Masquerade,
    Match,
    NetMatch,
    PortSpan,
    Reject,
    Return,
    Rule,
    SameAddress,
    SetMark,
    SetMatch,
    Side,
    TcpFlags,
)

_PROTOCOLS_BY_WORD = {word: protocol for protocol, word in PROTOCOL_WORDS.items()} | {
    # As /etc/protocols names them, where there is one.
    "ipencap": Protocol.IPIP,
    "ipv6": Protocol.IPV6,
}
_PROGRAMS: dict[str, Match] = {
    **{same_address_program(family): SameAddress(family) for family in Family},
    **{ipvs_takes_program(family): IpvsTakes(family) for family in Family},
}
_WORD = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|(\S+))')
_ESCAPE = re.compile(r"\\(.)")


def split_words(text: str) -> list[str]:
    """Split a line of iptables-save into words, undoing its quotes."""
    return [
        _ESCAPE.sub(r"\1", found[1]) if found[1] is not None else found[2]
        for found in _WORD.finditer(text)
    ]


def parse_words(words: list[str]) -> Rule | None:
    """Read the words after `-A CHAIN`; None where they are not exactly a form of the model."""
    try:
        return _Reader(words).rule()
    except (ValueError, IndexError, StopIteration):
        return None


def parse_bytecode(program: str) -> Match | None:
    """The match that a program of xt_bpf stands for; None for one that is not ours."""
    return _PROGRAMS.get(program)


class _Reader:
    """One pass over the words of one rule; anything unexpected raises ValueError."""

    def __init__(self, words: list[str]) -> None:
        self._words: Iterator[str] = iter(words)
        self._matches: list[Match] = []
        self._module = ""
        self._protocol: Protocol | None = None
        self._comment = ""

    def rule(self) -> Rule:
        negate = False
        for word in self._words:
            if word == "!" and not negate:
                negate = True
            elif word in ("-j", "-g"):
                self._refuse(negate)
                action = self._action(word)
                self._refuse(next(self._words, None) is not None)
                return Rule(action, tuple(self._matches), self._comment)
            else:
                self._option(word, negate=negate)
                negate = False
        raise ValueError("a rule without a target")

    @staticmethod
    def _refuse(condition: bool) -> None:  # noqa: FBT001 - the condition is the call
        if condition:
            raise ValueError("not a form of the model")

    def _option(self, word: str, *, negate: bool) -> None:
        if word == "--ipvs" and self._module == "ipvs":
            self._refuse(negate)
            self._matches.append(IpvsSends())
            return
        value = next(self._words)
        match word:
            case "-s" | "-d":
                side = Side.SRC if word == "-s" else Side.DST
                prefix = parse_prefix(value if "/" in value else f"{value}/32")
                self._matches.append(NetMatch(side, prefix, negate))
                return
            case "--match-set" if self._module == "set":
                sides = tuple(Side(side) for side in next(self._words).split(","))
                self._matches.append(SetMatch(SetName(value), sides, negate))
                return
            case "--tcp-flags" if self._module == "tcp":
                self._refuse(negate)
                present = next(self._words)
                self._matches.append(TcpFlags(tuple(value.split(",")), tuple(present.split(","))))
                return
            case "--mark" if self._module == "mark":
                self._matches.append(MarkMatch(*_value_and_mask(value), negate))
                return
            case "--mark" if self._module == "connmark":
                self._matches.append(ConnmarkMatch(*_value_and_mask(value), negate))
                return
        self._refuse(negate)
        if word == "-m":
            self._module = value
        elif word == "--comment" and self._module == "comment" and not self._comment:
            self._comment = value
        elif word == "--ctdir" and self._module == "conntrack":
            state = self._matches.pop()
            if not isinstance(state, CtState) or value != "REPLY":
                raise ValueError(word)
            self._matches.append(CtState(state.states, replies=True))
        elif word == "--limit-burst" and self._module == "limit":
            last = self._matches.pop()
            if not isinstance(last, Limit):
                raise ValueError(word)
            self._matches.append(Limit(last.per_second, int(value)))
        else:
            self._matches.append(self._plain_match(word, value))

    def _plain_match(self, word: str, value: str) -> Match:
        match self._module, word:
            case _, "-i":
                return InInterface(value)
            case _, "-p":
                self._protocol = _PROTOCOLS_BY_WORD.get(value)
                if self._protocol is None:
                    raise ValueError(value)
                return IpProtocol(self._protocol)
            case "tcp" | "udp" | "sctp", "--dport":
                return DstPorts(PORT_MODULES[self._module], (_span(value),))
            case "multiport", "--dports" if self._protocol is not None and "," in value:
                return DstPorts(self._protocol, tuple(_span(part) for part in value.split(",")))
            case "conntrack", "--ctstate":
                return CtState(tuple(value.split(",")))
            case "icmp", "--icmp-type":
                return IcmpType(int(value))
            case "icmp6", "--icmpv6-type":
                return Icmpv6Type(int(value))
            case "physdev", "--physdev-in":
                return InPort(value)
            case "hl", "--hl-eq":
                return HopLimit(int(value))
            case "addrtype", "--src-type" | "--dst-type":
                return AddrType(Side(word[2:5]), value)
            case "bpf", "--bytecode":
                return parse_bytecode(value) or self._unknown(value)
            case "limit", "--limit":
                number, _, unit = value.partition("/")
                self._refuse(unit != "sec")
                return Limit(int(number), LIMIT_BURST_DEFAULT)
            case _:
                return self._unknown(word)

    @staticmethod
    def _unknown(word: str) -> Match:
        raise ValueError(word)

    def _action(self, word: str) -> Action:
        target = next(self._words)
        if target.startswith(OWN_PREFIX):
            chain = ChainName(target)
            return Jump(chain) if word == "-j" else Goto(chain)
        match target:
            case "RETURN":
                return Return()
            case "DROP":
                return Drop()
            case "ACCEPT":
                return Accept()
            case "MARK":
                self._expect("--set-xmark")
                return SetMark(*_value_and_mask(next(self._words)))
            case "SET":
                self._expect("--map-set")
                name, sides = SetName(next(self._words)), next(self._words).split(",")
                self._expect("--map-mark")
                self._refuse(len(sides) > 2)
                return MapMark(name, *(Side(side) for side in sides))
            case "NFLOG":
                return self._log()
            case "REJECT":
                self._expect("--reject-with")
                return Reject(next(self._words))
            case "MASQUERADE":
                self._expect("--random-fully")
                return Masquerade()
        raise ValueError(target)

    def _log(self) -> Log:
        prefix, group = "", 0
        for word in self._words:
            value = next(self._words)
            if word == "--nflog-prefix":
                prefix = value
            elif word == "--nflog-group":
                group = int(value)
            else:
                raise ValueError(word)
        return Log(group, prefix)

    def _expect(self, word: str) -> None:
        self._refuse(next(self._words) != word)


def _span(text: str) -> PortSpan:
    first, colon, last = text.partition(":")
    return PortSpan(int(first), int(last) if colon else int(first))


def _value_and_mask(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return int(value, 16), int(mask, 16) if slash else FULL_MASK
