"""The proxy's rules: what iptables does for packets to Services, before and after IPVS. Pure.

The chains never change with Services; sets do (`proxy.names`, `proxy.lower`). Where each stands:

    mangle PREROUTING   a pod of this node begins: the mark of MARK, which picks the server by mark
    mangle OUTPUT       the node itself begins: sources of LB, then the mark as for pods
    mangle POSTROUTING  the mark goes, so that nobody behind us sees it
    nat PREROUTING      what is ours is not for other programs' DNAT (host ports, leftovers of a proxy)
    nat OUTPUT          the same for the node
    filter INPUT        sources of LB, DROP, REJECT; on a VIP only served ports, ping and errors
    filter FORWARD      answers pass
    nat POSTROUTING     masquerade, of what IPVS sends on

IPVS takes a packet at INPUT (priority 98 or 99, behind filter) or, of the node's own, at OUTPUT (-98, before
filter and behind mangle and nat), writes the backend's address into it, and sends it to OUTPUT and
POSTROUTING once more. Policy judges in mangle and comes first in every hook that both have: what it denies is
not rejected here, and it judges the client's own address, since masquerade comes last. nat sees only the
first packet of a connection, and IPVS's only with `net.ipv4.vs.conntrack=1`.

Case by case:

pod to a VIP or NodePort
    PREROUTING marks it where the row serves clients of this node otherwise than others (MARK); INPUT lets the
    served port through. Not masqueraded: the backend, here or elsewhere, sees the pod, and its answer comes
    back by this node, where the pod is.
node to a VIP or NodePort
    As a pod, in OUTPUT. A new mark has the kernel look up the route again, which finds the same one: nothing
    routes by these bits. Its source is an address of the node (the route of a VIP says so), not masqueraded.
external client to a NodePort, or to a VIP that is routed here
    No mark, so the server by address: with a Local policy that has backends of this node alone, and the
    source stays. To a backend of another node the source is this node, since its answer must come back here.
Local, no endpoint here, some elsewhere
    External clients are dropped, not refused (a load balancer tries elsewhere): DROP, unless marked. What is
    established goes on, since it is served by a backend that drains.
no endpoint at all
    Refused at once (REJECT): TCP by a reset, the rest by "port unreachable". IPVS has a server without
    backends, which by itself answers TCP with "port unreachable" too; but that finds a client on this node
    still in connect(), which keeps it for a soft error and sends its SYN again after a second. So it goes
    for the node itself, whose packets IPVS takes before filter sees them.
pod to its own Service (hairpin)
    Source and destination become one address, which the pod would take for its own loopback: masqueraded.
    The node that reaches itself is none: its loopback is where such a packet belongs.
sources that may dial (LB, SRC)
    For everybody, pods and the node too, as kube-proxy does. Looked at when a connection begins.
a port of a VIP that no Service has
    Refused at once: TCP by a reset, the rest by "port unreachable". The node listens on its own addresses
    alone, whatever sockets on 0.0.0.0 or :: say. This is asked of every packet, not of the first one only:
    an old connection's addresses and ports open nothing.
answers of a backend
    Pass filter's FORWARD, also where a host's policy there is DROP, as with Docker. The request came by INPUT
    and OUTPUT, and mangle has judged both. Nothing else is let through that the host would not forward.
answers to a VIP
    A process of the node may speak from one, if it binds to it or while the address has no route with a
    source yet: what answers it comes in. Nobody else begins a connection that way.
a port of a VIP that is served, by a packet that IPVS leaves to the node
    Refused as well: IPVS begins no connection from source port 20 or for a frame to everybody, and a
    listener of the node on that very port would answer.
ping to a VIP, errors about its connections
    Reach the node and IPVS. Neighbours are never told of a VIP: IPv4 by arp_ignore, IPv6 because the kernel
    answers for the addresses of the asked link only; neither needs a rule.
what no Service has a part in
    From pod to pod, to the node, through the node: one look at conntrack where a packet enters, one at the
    VIP set where it reaches INPUT; never masqueraded, since IPVS does not send it.

IPVS compares the whole mark: a packet that has bits of others beside ours is served as an external client's.
"""

from __future__ import annotations

from dataclasses import dataclass

from netpol.model.ids import ChainName, Protocol
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import (
    Accept,
    AddrType,
    Chain,
    CtState,
    Drop,
    Goto,
    Hook,
    IcmpType,
    Icmpv6Type,
    IpProtocol,
    IpvsSends,
    IpvsTakes,
    Jump,
    MapMark,
    MarkMatch,
    Masquerade,
    Match,
    Reject,
    Return,
    Rule,
    Ruleset,
    SameAddress,
    SetMark,
    SetMatch,
    Side,
)
from proxy import names
from proxy.names import PREFIX


def _chain(tail: str) -> ChainName:
    return ChainName(PREFIX + tail)


#: Of the hooks, in each table that has one.
PREROUTING, INPUT, OUTPUT = _chain("PRE"), _chain("IN"), _chain("OUT")
POSTROUTING = _chain("POST")
#: filter: a connection that begins; a packet to an address of ours.
NEW, VIP = _chain("NEW"), _chain("VIP")
FORWARD = _chain("FWD")
#: filter: where what is refused ends.
REFUSE = _chain("REFUSE")
#: mangle: a connection that the node begins.
OWN = _chain("OWN")
#: nat: a connection that IPVS sends on.
MASQUERADE = _chain("MASQ")

#: RFC 792 and RFC 4443: echo request.
_ECHO: dict[Family, Match] = {Family.V4: IcmpType(8), Family.V6: Icmpv6Type(128)}
_ICMP = {Family.V4: IpProtocol(Protocol.ICMP), Family.V6: IpProtocol(Protocol.ICMPV6)}
_UNREACHABLE = {
    Family.V4: Reject("icmp-port-unreachable"),
    Family.V6: Reject("icmp6-port-unreachable"),
}
#: Every packet but those of a connection that was answered; and all but those that may begin one.
_BEGINS = CtState(("INVALID", "NEW", "UNTRACKED"))
_GOES_ON = CtState(("INVALID", "RELATED", "ESTABLISHED"))
_NODE = AddrType(Side.SRC, "LOCAL")
_DIALLED = (Side.DST, Side.DST)


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """What the operator chose about the rules.

    Attributes:
        mark_mask: the bits of the mark that are the proxy's.
    """

    mark_mask: int


def rulesets(options: RuleOptions) -> dict[tuple[str, Family], Ruleset]:
    """All chains and hooks, by table and family."""
    return {
        (table, family): make(options, family)
        for table, make in (("mangle", _mangle), ("filter", _filter), ("nat", _nat))
        for family in FAMILIES
    }


def _mangle(options: RuleOptions, family: Family) -> Ruleset:
    mask = options.mark_mask
    mark = Rule(MapMark(names.MARK[family].name, Side.DST, Side.DST))
    from_pod = SetMatch(names.POD[family].name, (Side.SRC,))
    chains: dict[ChainName, Chain] = {
        PREROUTING: (Rule(mark.action, (_BEGINS, from_pod)),),
        OUTPUT: (Rule(Jump(OWN), (_BEGINS, _NODE)),),
        OWN: (_other_sources(family), mark),
        POSTROUTING: (Rule(SetMark(0, mask), (MarkMatch(0, mask, negate=True),)),),
    }
    hooks = {
        Hook.PREROUTING: PREROUTING,
        Hook.OUTPUT: OUTPUT,
        Hook.POSTROUTING: POSTROUTING,
    }
    return Ruleset(chains, hooks)


def _filter(options: RuleOptions, family: Family) -> Ruleset:
    # Who has a mark is of this node, and is served by the server of the mark.
    outsider = MarkMatch(0, options.mark_mask)
    dropped = SetMatch(names.DROP[family].name, _DIALLED)
    rejected = SetMatch(names.REJECT[family].name, _DIALLED)
    served = SetMatch(names.PORT[family].name, _DIALLED)
    chains: dict[ChainName, Chain] = {
        INPUT: (
            Rule(Jump(NEW), (_BEGINS,)),
            Rule(Goto(VIP), (SetMatch(names.VIP[family].name, (Side.DST,)),)),
        ),
        NEW: (
            _other_sources(family),
            Rule(Drop(), (outsider, dropped)),
            Rule(Goto(REFUSE), (rejected,)),
        ),
        VIP: (
            Rule(Return(), (_GOES_ON, served)),
            Rule(Return(), (served, IpvsTakes(family))),
            Rule(Return(), (_ICMP[family], _ECHO[family])),
            Rule(Return(), (_ICMP[family], CtState(("RELATED",)))),
            Rule(Return(), (CtState(("RELATED", "ESTABLISHED"), replies=True),)),
            Rule(Goto(REFUSE)),
        ),
        REFUSE: (
            Rule(Reject("tcp-reset"), (IpProtocol(Protocol.TCP),)),
            Rule(_UNREACHABLE[family]),
        ),
        FORWARD: (Rule(Accept(), (CtState(("RELATED", "ESTABLISHED"), replies=True),)),),
    }
    return Ruleset(chains, {Hook.INPUT: INPUT, Hook.FORWARD: FORWARD})


def _other_sources(family: Family) -> Rule:
    """Drop what comes to a row with sources from another one."""
    restricted = SetMatch(names.LB[family].name, _DIALLED)
    allowed = SetMatch(names.SRC[family].name, (*_DIALLED, Side.SRC), negate=True)
    return Rule(Drop(), (restricted, allowed))


def _nat(_: RuleOptions, family: Family) -> Ruleset:
    pods = names.POD[family].name
    # Nothing but IPVS translates what goes to a VIP or a NodePort: ACCEPT ends this table's hook alone.
    ours = (
        Rule(Accept(), (SetMatch(names.VIP[family].name, (Side.DST,)),)),
        Rule(Accept(), (SetMatch(names.PORT[family].name, _DIALLED),)),
    )
    chains: dict[ChainName, Chain] = {
        PREROUTING: ours,
        OUTPUT: ours,
        POSTROUTING: (Rule(Jump(MASQUERADE), (IpvsSends(),)),),
        MASQUERADE: (
            Rule(Return(), (_NODE,)),
            Rule(Masquerade(), (SameAddress(family),)),
            Rule(Return(), (SetMatch(pods, (Side.SRC,)),)),
            Rule(Return(), (SetMatch(pods, (Side.DST,)),)),
            Rule(Masquerade()),
        ),
    }
    hooks = {
        Hook.PREROUTING: PREROUTING,
        Hook.OUTPUT: OUTPUT,
        Hook.POSTROUTING: POSTROUTING,
    }
    return Ruleset(chains, hooks)
