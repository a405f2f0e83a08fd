"""One rule as text: what iptables-restore takes. Pure; `rule_parse` is the way back.

Both variants (iptables 1.8.9) take and print every form here alike, so there is one spelling. The
kernel forgets some of what was asked; `canonical` says what it will remember, so that a rule that was
written equals the one read back:

- interface, addresses and `-p` are tested first, in a fixed order, wherever they were written;
- a prefix of length 0 and the interface `+` match everything and are not kept;
- conntrack states are a bit field;
- `limit` keeps ten-thousandths of a second between packets.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import assert_never

from netpol.kernel.ipvs_program import ipvs_takes_program
from netpol.model.ids import ChainName, Protocol
from netpol.model.net import Family
from netpol.model.ruleset import (
    CHAIN_NAME_MAX,
    COMMENT_MAX,
    LOG_PREFIX_MAX,
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
    Reject,
    Return,
    Rule,
    SameAddress,
    SetMark,
    SetMatch,
    Side,
    TcpFlags,
)

PROTOCOL_WORDS = {
    Protocol.TCP: "tcp",
    Protocol.UDP: "udp",
    Protocol.SCTP: "sctp",
    Protocol.ICMP: "icmp",
    Protocol.ICMPV6: "ipv6-icmp",
    # By number: the tool knows these names only where the machine has /etc/protocols.
    Protocol.IPIP: "4",
    Protocol.IPV6: "41",
}
PORT_MODULES = {"tcp": Protocol.TCP, "udp": Protocol.UDP, "sctp": Protocol.SCTP}

#: The order in which iptables-save prints them.
CT_STATES = ("INVALID", "NEW", "RELATED", "ESTABLISHED", "UNTRACKED", "SNAT", "DNAT")
#: The order in which iptables-save prints them; bit by bit as in the header (RFC 9293 section 3.1).
TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")
#: XT_LIMIT_SCALE: `limit` counts in ten-thousandths of a second.
LIMIT_SCALE = 10_000
#: What `limit` takes, and does not print, where no burst is given (XT_LIMIT_BURST).
LIMIT_BURST_DEFAULT = 5
#: Above, rate times burst may overflow in the kernel (xt_limit's user2credits).
LIMIT_BURST_MAX = 10_000
#: XT_MULTI_PORTS: ports of one multiport match; a span takes two.
MULTIPORT_MAX = 15
#: IFNAMSIZ - 1.
INTERFACE_MAX = 15
FULL_MASK = 0xFFFFFFFF

_PLAIN_WORD = re.compile(r"[A-Za-z0-9_.:,/+=@%^!|-]+\Z")
_NAME = re.compile(r"[^\s!\"'\\-][^\s\"'\\]*\Z")


def same_address_program(family: Family) -> str:
    """Classic BPF that accepts a packet whose source address is its destination, as xt_bpf takes it.

    Word by word: load the source's, move to X, load the destination's, give up where they differ.
    """
    first, words = (12, 1) if family is Family.V4 else (8, 4)
    size = words * 4
    steps: list[str] = []
    for n in range(words):
        after = (words - n - 1) * 4 + 1  # from behind the jump to the last instruction
        at = first + 4 * n
        steps += [f"32 0 0 {at}", "7 0 0 0", f"32 0 0 {at + size}", f"29 0 {after} 0"]
    steps += ["6 0 0 65535", "6 0 0 0"]
    return ",".join([str(len(steps)), *steps])


# -- canonical form -----------------------------------------------------------------------------


def canonical(rule: Rule) -> Rule:
    """The rule as the kernel will give it back."""
    base: list[tuple[int, Match]] = []
    rest: list[Match] = []
    for match in rule.matches:
        rank = _base_rank(match)
        if rank is None:
            rest.append(_canonical_match(match))
        elif not _matches_everything(match):
            base.append((rank, match))
    base.sort(key=lambda pair: pair[0])
    matches = (*(match for _, match in base), *rest)
    return rule if matches == rule.matches else replace(rule, matches=matches)


def _base_rank(match: Match) -> int | None:
    if isinstance(match, NetMatch):
        return 0 if match.side is Side.SRC else 1
    if isinstance(match, InInterface):
        return 2
    if isinstance(match, IpProtocol):
        return 3
    return None


def _matches_everything(match: Match) -> bool:
    if isinstance(match, NetMatch):
        return match.prefix.length == 0 and not match.negate
    return isinstance(match, InInterface) and match.name == "+"


def _canonical_match(match: Match) -> Match:
    if isinstance(match, CtState):
        states = tuple(state for state in CT_STATES if state in match.states)
        return CtState(states, match.replies)
    if isinstance(match, TcpFlags):
        return TcpFlags(_in_order(match.looked_at), _in_order(match.present))
    if isinstance(match, Limit):
        kept = LIMIT_SCALE // max(1, LIMIT_SCALE // max(1, match.per_second))
        return Limit(kept, match.burst)
    return match


def _in_order(flags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(flag for flag in TCP_FLAGS if flag in flags)


# -- rule to words ------------------------------------------------------------------------------


def rule_words(rule: Rule, family: Family) -> list[str]:
    """The words after `-A CHAIN`, unquoted.

    Raises:
        ValueError: what iptables would refuse, cut short without a word, or read as something else.
    """
    words: list[str] = []
    protocol: Protocol | None = None
    seen: set[int] = set()
    for match in rule.matches:
        _check_before_rounding(match)
    for match in canonical(rule).matches:
        rank = _base_rank(match)
        if rank is not None:
            if rank in seen:
                raise ValueError(f"two matches of one kind cannot stand in a rule: {match}")
            seen.add(rank)
        if isinstance(match, IpProtocol):
            protocol = match.protocol
        words += _match_words(match, family, protocol)
    if rule.comment:
        _check_text(rule.comment, COMMENT_MAX, "comment")
        words += ["-m", "comment", "--comment", rule.comment]
    return words + _action_words(rule.action)


def rule_text(rule: Rule, family: Family) -> str:
    """The rule as it stands in a file for iptables-restore, after `-A CHAIN`. Raises ValueError."""
    return " ".join(quote(word) for word in rule_words(rule, family))


def quote(word: str) -> str:
    """Quote a word for iptables-restore, which knows double quotes and, inside, the backslash."""
    if _PLAIN_WORD.match(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def check_chain(name: ChainName) -> None:
    """Refuse a chain name that iptables would refuse or that would change the meaning of the text.

    Raises:
        ValueError: an unusable name.
    """
    if not _NAME.match(name) or len(name.encode()) > CHAIN_NAME_MAX:
        raise ValueError(f"{name!r} is not a chain name (1 to {CHAIN_NAME_MAX} bytes, no blanks)")


def _check_text(text: str, most: int, what: str) -> None:
    if len(text.encode()) > most:
        raise ValueError(f"{what} of {len(text.encode())} bytes is longer than {most}: {text!r}")
    if not text.isprintable():
        raise ValueError(f"{what} has characters that are not printable: {text!r}")


def _check_before_rounding(match: Match) -> None:
    """Refuse what `canonical` would quietly turn into something else."""
    if isinstance(match, CtState):
        unknown = set(match.states) - set(CT_STATES)
        if unknown or not match.states:
            raise ValueError(f"no such conntrack state: {sorted(unknown)}")
    if isinstance(match, TcpFlags):
        unknown = {*match.looked_at, *match.present} - set(TCP_FLAGS)
        if unknown or not match.present or not set(match.present) <= set(match.looked_at):
            raise ValueError(f"needed flags of TCP, those present among those looked at: {match}")
    if isinstance(match, Limit) and (
        not 1 <= match.per_second <= LIMIT_SCALE or not 1 <= match.burst <= LIMIT_BURST_MAX
    ):
        raise ValueError(
            f"not 1 to {LIMIT_SCALE} a second, bursts of 1 to {LIMIT_BURST_MAX}: {match}"
        )


def _match_words(match: Match, family: Family, protocol: Protocol | None) -> list[str]:
    match match:
        case NetMatch():
            if match.prefix.family is not family:
                raise ValueError(f"{match.prefix} is not IPv{family}")
            return [
                *_not(match.negate),
                "-s" if match.side is Side.SRC else "-d",
                str(match.prefix),
            ]
        case InInterface():
            if not _NAME.match(match.name) or len(match.name.encode()) > INTERFACE_MAX:
                raise ValueError(f"{match.name!r} is not the name of an interface")
            return ["-i", match.name]
        case InPort():
            if not _NAME.match(match.name) or len(match.name.encode()) > INTERFACE_MAX:
                raise ValueError(f"{match.name!r} is not the name of an interface")
            return ["-m", "physdev", "--physdev-in", match.name]
        case IpProtocol():
            return ["-p", PROTOCOL_WORDS[match.protocol]]
        case DstPorts():
            return _port_words(match, protocol)
        case TcpFlags():
            if protocol is not Protocol.TCP:
                raise ValueError("flags of TCP need its protocol match in the same rule")
            looked_at, present = ",".join(match.looked_at), ",".join(match.present)
            return ["-m", "tcp", "--tcp-flags", looked_at, present]
        case CtState():
            direction = ["--ctdir", "REPLY"] if match.replies else []
            return ["-m", "conntrack", "--ctstate", ",".join(match.states), *direction]
        case IcmpType():
            if protocol is not Protocol.ICMP:
                raise ValueError("a type of ICMP needs its protocol match in the same rule")
            return ["-m", "icmp", "--icmp-type", str(match.number)]
        case Icmpv6Type():
            return ["-m", "icmp6", "--icmpv6-type", str(match.number)]
        case HopLimit():
            if family is not Family.V6:
                raise ValueError("the hop limit is a field of IPv6")
            return ["-m", "hl", "--hl-eq", str(match.value)]
        case SetMatch():
            name, sides = match.name, ",".join(match.sides)
            return ["-m", "set", *_not(match.negate), "--match-set", name, sides]
        case MarkMatch():
            return ["-m", "mark", *_not(match.negate), "--mark", _masked(match.value, match.mask)]
        case ConnmarkMatch():
            return [
                "-m",
                "connmark",
                *_not(match.negate),
                "--mark",
                _masked(match.value, match.mask),
            ]
        case AddrType():
            return ["-m", "addrtype", f"--{match.side}-type", match.kind]
        case SameAddress():
            if match.family is not family:
                raise ValueError(f"the addresses of IPv{match.family} in a rule of IPv{family}")
            return ["-m", "bpf", "--bytecode", same_address_program(family)]
        case IpvsTakes():
            if match.family is not family:
                raise ValueError(f"a header of IPv{match.family} in a rule of IPv{family}")
            return ["-m", "bpf", "--bytecode", ipvs_takes_program(family)]
        case IpvsSends():
            return ["-m", "ipvs", "--ipvs"]
        case Limit():
            if not 1 <= match.per_second <= LIMIT_SCALE or match.burst < 1:
                raise ValueError(
                    f"a limit is 1 to {LIMIT_SCALE} a second and a burst over 0: {match}"
                )
            rate = f"{match.per_second}/sec"
            return ["-m", "limit", "--limit", rate, "--limit-burst", str(match.burst)]
        case _:
            assert_never(match)


def _port_words(match: DstPorts, protocol: Protocol | None) -> list[str]:
    if match.protocol is not protocol or match.protocol not in PORT_MODULES.values():
        raise ValueError(f"ports of {match.protocol} need its protocol match in the same rule")
    for span in match.spans:
        if not 0 <= span.first <= span.last <= 0xFFFF:
            raise ValueError(f"{span.first}:{span.last} is not a span of ports")
    texts = [str(s.first) if s.first == s.last else f"{s.first}:{s.last}" for s in match.spans]
    if len(texts) == 1:
        return ["-m", PROTOCOL_WORDS[match.protocol], "--dport", texts[0]]
    slots = sum(1 if s.first == s.last else 2 for s in match.spans)
    if not 1 <= slots <= MULTIPORT_MAX:
        raise ValueError(f"a multiport match has {MULTIPORT_MAX} slots, not {slots}")
    return ["-m", "multiport", "--dports", ",".join(texts)]


def _action_words(action: Action) -> list[str]:
    match action:
        case Return():
            return ["-j", "RETURN"]
        case Drop():
            return ["-j", "DROP"]
        case Accept():
            return ["-j", "ACCEPT"]
        case Jump():
            check_chain(action.chain)
            return ["-j", action.chain]
        case Goto():
            check_chain(action.chain)
            return ["-g", action.chain]
        case SetMark():
            return ["-j", "MARK", "--set-xmark", f"{action.value:#x}/{action.mask:#x}"]
        case MapMark():
            port = "" if action.port_side is None else f",{action.port_side}"
            return ["-j", "SET", "--map-set", action.name, f"{action.side}{port}", "--map-mark"]
        case Log():
            _check_text(action.prefix, LOG_PREFIX_MAX, "log prefix")
            prefix = ["--nflog-prefix", action.prefix] if action.prefix else []
            return ["-j", "NFLOG", *prefix, "--nflog-group", str(action.group)]
        case Reject():
            return ["-j", "REJECT", "--reject-with", action.with_]
        case Masquerade():
            return ["-j", "MASQUERADE", "--random-fully"]
        case _:
            assert_never(action)


def _not(negate: bool) -> list[str]:  # noqa: FBT001 - reads as the word it writes
    return ["!"] if negate else []


def _masked(value: int, mask: int) -> str:
    return f"{value:#x}" if mask == FULL_MASK else f"{value:#x}/{mask:#x}"
