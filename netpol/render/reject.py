"""`--deny-with=reject`: how a denied packet leaves mangle, what filter answers, and the net below it.

REJECT exists only in the filter table, behind everybody's rules. So a denied packet gets a value in the
mark field that nothing else leaves a hook with, and ACCEPT takes it past the rest of the hook. Rule 1 of
the same hook of filter answers it. Whatever happens there, POSTROUTING of mangle drops what still has the
value. Behind INPUT no table of every kernel could do that, so what INPUT denies is dropped.

Only what opens something is answered. A packet in the middle of a connection, or of none that is known,
may come from the other end of one that policy allows: an answer would end that one.
"""

from __future__ import annotations

from netpol.model.ids import ChainName, Protocol
from netpol.model.net import Family
from netpol.model.ruleset import (
    Accept,
    Chain,
    CtState,
    Drop,
    Hook,
    IpProtocol,
    MarkMatch,
    Reject,
    Return,
    Rule,
    Ruleset,
    SetMark,
    TcpFlags,
)
from netpol.render import names
from netpol.render.options import DENIED, RenderOptions

#: The table of the answers.
TABLE = "filter"
#: The hooks whose denied packets are answered.
HOOKS = (Hook.FORWARD, Hook.OUTPUT)

#: "Communication with destination administratively prohibited": RFC 1812 section 5.2.7.1 (type 3, code
#: 13), RFC 4443 section 3.1 (type 1, code 1).
_PROHIBITED = {
    Family.V4: Reject("icmp-admin-prohibited"),
    Family.V6: Reject("icmp6-adm-prohibited"),
}
_TCP = IpProtocol(Protocol.TCP)
#: What opens a connection: `--syn` of iptables.
_SYN = TcpFlags(("FIN", "SYN", "RST", "ACK"), ("SYN",))
_RST = TcpFlags(("RST",), ("RST",))


def mark_denied(options: RenderOptions) -> Rule:
    """The end of a class, instead of a drop."""
    return Rule(SetMark(options.mark(DENIED), options.field_mask))


def clear_foreign(hook: Hook, options: RenderOptions) -> Chain:
    """The value that somebody else gave a packet says nothing; later only ours must be found."""
    if not options.rejects or hook not in HOOKS:
        return ()
    return (Rule(SetMark(0, options.field_mask), (_denied(options),)),)


def pass_answers(hook: Hook, options: RenderOptions) -> Chain:
    """A reset comes by OUTPUT with the pod's address that it speaks for; conntrack relates it.

    Being a reset, it can open nothing. An ICMP error has the node's address, and passes as such.
    """
    if not options.rejects or hook is not Hook.OUTPUT:
        return ()
    return (Rule(Return(), (_TCP, CtState(("RELATED",)), _RST)),)


def leave(hook: Hook, options: RenderOptions) -> Chain:
    """Behind a tree: what it denied goes no further."""
    if not options.rejects:
        return ()
    return (Rule(Accept() if hook in HOOKS else Drop(), (_denied(options),)),)


def net_chains(options: RenderOptions) -> dict[ChainName, Chain]:
    """The chain of mangle that stops what filter let pass, or never saw."""
    if not options.rejects:
        return {}
    return {names.hook_chain(Hook.POSTROUTING): (Rule(Drop(), (_denied(options),)),)}


def filter_ruleset(options: RenderOptions, family: Family) -> Ruleset:
    """All that is ours in filter."""
    if not options.rejects:
        return Ruleset()
    tell = _PROHIBITED[family]
    before = (
        Rule(Return(), (_denied(options, negate=True),)),
        Rule(Drop(), (CtState(("INVALID",)),)),
    )
    behind = (Rule(Drop(), (_TCP,)), Rule(tell))
    # The kernel sends a reset over a bridge past NAT and IPVS, from an address that the client never
    # called. What is judged at OUTPUT has come through IPVS, which leaves no sign in the state, and sends
    # ICMP errors back to the client, but not those of IPv6: there a reset is what some clients get.
    forward = (
        *before,
        Rule(tell, (_TCP, _SYN, CtState(("DNAT",)))),
        Rule(Reject("tcp-reset"), (_TCP, _SYN)),
        *behind,
    )
    refuse = tell if family is Family.V4 else Reject("tcp-reset")
    output = (*before, Rule(refuse, (_TCP, _SYN)), *behind)
    return Ruleset(
        {names.REJECT: forward, names.REJECT_OUTPUT: output},
        {Hook.FORWARD: names.REJECT, Hook.OUTPUT: names.REJECT_OUTPUT},
    )


def _denied(options: RenderOptions, *, negate: bool = False) -> MarkMatch:
    return MarkMatch(options.mark(DENIED), options.field_mask, negate)
