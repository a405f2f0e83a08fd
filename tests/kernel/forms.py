"""Every form of match and action that the model has, for the suites that must not miss one."""

from __future__ import annotations

from netpol.model.ids import ChainName, Protocol, SetName
from netpol.model.net import Family, Prefix, parse_prefix
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
    SetKind,
    SetMark,
    SetMatch,
    SetSpec,
    Side,
    TcpFlags,
)

CHAIN_A, CHAIN_B = ChainName("KNP-A"), ChainName("KNP-B")
FIELD = 0xFFF00000
TCP, UDP, SCTP = (IpProtocol(p) for p in (Protocol.TCP, Protocol.UDP, Protocol.SCTP))


def set_specs(family: Family) -> tuple[SetSpec, ...]:
    """The sets that the rules below name: addresses, address and port, marks; and so on."""
    return (
        SetSpec(SetName(f"KNP-S{family}"), SetKind.HASH_IP, family),
        SetSpec(SetName(f"KNP-P{family}"), SetKind.HASH_IP_PORT, family),
        SetSpec(SetName(f"KNP-M{family}"), SetKind.HASH_NET, family, marks=True),
        SetSpec(SetName(f"KNP-MP{family}"), SetKind.HASH_IP_PORT, family, marks=True),
        SetSpec(SetName(f"KNP-Q{family}"), SetKind.HASH_IP_PORT_NET, family),
    )


def spans(*pairs: tuple[int, int]) -> tuple[PortSpan, ...]:
    return tuple(PortSpan(first, last) for first, last in pairs)


def actions(family: Family) -> list[Action]:
    """Of the mangle table."""
    marks, port_marks = (spec.name for spec in set_specs(family)[2:4])
    return [
        Return(),
        Drop(),
        Accept(),
        Jump(CHAIN_B),
        Goto(CHAIN_B),
        SetMark(1 << 20, FIELD),
        SetMark(0, FIELD),
        SetMark(5, 0xFFFFFFFF),
        MapMark(marks, Side.SRC),
        MapMark(marks, Side.DST),
        MapMark(port_marks, Side.DST, Side.DST),
        MapMark(port_marks, Side.SRC, Side.DST),
        Log(5, "KNP|D|I|abc|1"),
        Log(65535, "a b\"c'd\\e !"),
        Log(0, ""),
        Log(3, "p" * 63),
    ]


def reject(family: Family) -> Reject:
    return Reject("icmp-admin-prohibited" if family is Family.V4 else "icmp6-adm-prohibited")


def rejects(family: Family) -> tuple[Rule, ...]:
    """The rules of filter that answer."""
    syn = TcpFlags(("FIN", "SYN", "RST", "ACK"), ("SYN",))
    return (
        Rule(Return(), (MarkMatch(1 << 20, FIELD, negate=True),)),
        Rule(Drop(), (CtState(("INVALID",)),)),
        Rule(Reject("tcp-reset"), (TCP, CtState(("DNAT",)))),
        Rule(Reject("tcp-reset"), (TCP, syn)),
        Rule(reject(family), (), "told"),
    )


def masquerades(family: Family) -> tuple[Rule, ...]:
    """The rules of nat's POSTROUTING."""
    return (
        Rule(Masquerade()),
        Rule(Masquerade(), (TCP, SameAddress(family)), "hairpin"),
        Rule(Return(), (AddrType(Side.SRC, "LOCAL"),)),
    )


def match_lists(family: Family) -> list[tuple[Match, ...]]:
    v4 = family is Family.V4
    net = parse_prefix("10.0.0.0/8" if v4 else "fd00::/16")
    odd = parse_prefix("10.244.3.64/27" if v4 else "fd00:10:244:3::40/123")
    host = parse_prefix("10.1.1.1/32" if v4 else "fd00::1/128")
    everything = Prefix(bytes(family.bits // 8), 0)
    addresses, ports, _, _, nets = (spec.name for spec in set_specs(family))
    forms: list[tuple[Match, ...]] = [
        (),
        (TCP,),
        (UDP,),
        (SCTP,),
        (IpProtocol(Protocol.IPIP if family is Family.V4 else Protocol.IPV6),),
        (IpProtocol(Protocol.ICMP if v4 else Protocol.ICMPV6),),
        (TCP, DstPorts(Protocol.TCP, spans((80, 80)))),
        (TCP, DstPorts(Protocol.TCP, spans((1, 65535)))),
        (TCP, DstPorts(Protocol.TCP, spans((1024, 65535)))),
        (UDP, DstPorts(Protocol.UDP, spans((80, 90)))),
        (SCTP, DstPorts(Protocol.SCTP, spans((7, 7)))),
        (SCTP, DstPorts(Protocol.SCTP, spans((7, 9)))),
        (TCP, DstPorts(Protocol.TCP, spans((80, 80), (443, 443), (8000, 8010)))),
        (UDP, DstPorts(Protocol.UDP, spans(*((n, n) for n in range(1, 16))))),
        (SCTP, DstPorts(Protocol.SCTP, spans((1, 2), (4, 5)))),
        (TCP, TcpFlags(("FIN", "SYN", "RST", "ACK"), ("SYN",))),
        (TCP, TcpFlags(("RST",), ("RST",))),
        (CtState(("RELATED",)), TCP, TcpFlags(("URG", "PSH"), ("PSH", "URG"))),
        (InInterface("kube-bridge"),),
        (InInterface("veth+"),),
        (InInterface("fifteen-letters"),),
        (InPort("veth1"),),
        (NetMatch(Side.SRC, host), InPort("fifteen-letters")),
        (InInterface("+"),),
        (NetMatch(Side.SRC, net), NetMatch(Side.DST, host)),
        (NetMatch(Side.DST, odd), NetMatch(Side.SRC, odd)),
        (NetMatch(Side.SRC, net, negate=True),),
        (NetMatch(Side.DST, host, negate=True),),
        (NetMatch(Side.DST, everything),),
        (CtState(("ESTABLISHED",)),),
        (CtState(("RELATED", "NEW")),),
        (CtState(("ESTABLISHED", "RELATED"), replies=True), TCP),
        (CtState(("INVALID", "NEW", "RELATED", "ESTABLISHED", "UNTRACKED", "SNAT", "DNAT")),),
        (SetMatch(addresses, (Side.SRC,)),),
        (SetMatch(addresses, (Side.DST,), negate=True),),
        (SetMatch(ports, (Side.SRC, Side.DST)),),
        (SetMatch(ports, (Side.DST, Side.DST), negate=True),),
        (SetMatch(nets, (Side.DST, Side.DST, Side.SRC)),),
        (
            SetMatch(nets, (Side.SRC, Side.SRC, Side.DST), negate=True),
            SetMatch(addresses, (Side.SRC,)),
        ),
        (MarkMatch(1 << 20, FIELD),),
        (MarkMatch(0, FIELD, negate=True),),
        (MarkMatch(5, 0xFFFFFFFF),),
        (ConnmarkMatch(1, 1),),
        (ConnmarkMatch(0x80000000, 0x80000000, negate=True),),
        (ConnmarkMatch(5, 0xFFFFFFFF),),
        (AddrType(Side.SRC, "LOCAL"),),
        (AddrType(Side.DST, "MULTICAST"),),
        (SameAddress(family),),
        (IpvsTakes(family),),
        (Limit(10, 20),),
        (Limit(3000, 5),),
        (Limit(1, 1),),
        (
            MarkMatch(1 << 20, FIELD),
            CtState(("NEW",)),
            TCP,
            DstPorts(Protocol.TCP, spans((5, 5))),
            NetMatch(Side.SRC, net),
            SetMatch(addresses, (Side.SRC,)),
            SetMatch(ports, (Side.DST, Side.DST)),
            InInterface("x"),
            Limit(7, 9),
        ),
    ]
    if v4:
        icmp = IpProtocol(Protocol.ICMP)
        forms += [(icmp, IcmpType(8)), (icmp, IcmpType(0))]
    else:
        icmpv6 = IpProtocol(Protocol.ICMPV6)
        forms += [(icmpv6, Icmpv6Type(135), HopLimit(255)), (HopLimit(1),)]
    return forms


COMMENTS = (
    "plain",
    'team/allow web: it\'s "quoted" \\ ünï ! -j',
    "c" * 255,
    " blanks at both ends ",
    "--comment",
)


def rules(family: Family) -> tuple[Rule, ...]:
    """Each action, each match list, and each match list under a comment."""
    lists = match_lists(family)
    return (
        *(Rule(action) for action in actions(family)),
        *(Rule(Return(), matches) for matches in lists),
        *(Rule(Drop(), m, COMMENTS[n % len(COMMENTS)]) for n, m in enumerate(lists)),
        *(Rule(Drop(), (), comment) for comment in COMMENTS),
        *(Rule(action, lists[5], "with ports") for action in actions(family)),
    )
