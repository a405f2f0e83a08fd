"""The chains that do not depend on policies: the hooks, and where judgements end.

The way of a packet is the same in all hooks; what differs is who may pass unjudged:

    FORWARD  nobody
    INPUT    the node's own loopback, and what IPVS takes: that comes by OUTPUT with the backend's
             address; of the rest only egress is judged (the destination is the node)
    OUTPUT   packets whose source is an address of the node

All of it stands in mangle, where `--map-set` works and no ACCEPT of another program comes first.
"""

from __future__ import annotations

from netpol.model.ids import ChainName, Direction, Protocol
from netpol.model.net import Family, Prefix, family_of, host_prefix
from netpol.model.ruleset import (
    AddrType,
    Chain,
    CtState,
    Drop,
    Goto,
    Hook,
    HopLimit,
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
    Members,
    NetMatch,
    Return,
    Rule,
    SetKind,
    SetMark,
    SetMatch,
    SetSpec,
    Side,
)
from netpol.render import names, reject
from netpol.render.logprefix import DropReason, LogPrefix, encode
from netpol.render.options import RenderOptions

#: Neighbour discovery (RFC 4861): router and neighbour solicitation and advertisement, redirect.
_ND_TYPES = (133, 134, 135, 136, 137)
#: RFC 4861 section 7.1: what crossed a router has a lower hop limit.
_ND_HOP_LIMIT = 255
#: Multicast listener reports (RFC 2710, RFC 3810): a drop would only hide groups from the bridge.
_MLD_TYPES = (131, 132, 143)
_MLD_HOP_LIMIT = 1
#: Multicast reaches every pod of a bridge at once. (So does limited broadcast, which no router forwards:
#: that one is an entry of the ingress map, which costs other packets nothing.)
_MULTICAST = {
    Family.V4: Prefix(b"\xe0\0\0\0", 4),
    Family.V6: Prefix(b"\xff" + bytes(15), 8),
}
_LINK_LOCAL = Prefix(b"\xfe\x80" + bytes(14), 10)

#: The table of all verdicts: `--map-set` works in no other.
TABLE = "mangle"
#: The hooks that netpol judges in, in the order of the design.
HOOKS = (Hook.FORWARD, Hook.INPUT, Hook.OUTPUT)


def static_chains(options: RenderOptions, family: Family) -> dict[ChainName, Chain]:
    """Hook chains and endings."""
    clear = Rule(SetMark(0, options.field_mask))
    out = {names.hook_chain(hook): _hook(hook, options, family) for hook in HOOKS}
    out[names.OK] = (clear,)
    for direction in Direction:
        out[names.held_chain(direction)] = deny(LogPrefix(DropReason.HELD, direction), options)
    out[names.SPOOFED] = deny(LogPrefix(DropReason.SPOOFED), options)
    if options.direct_links:
        out[names.ANSWERS] = _answers(options, family)
    return out | reject.net_chains(options)


def hook_jumps(options: RenderOptions) -> dict[Hook, ChainName]:
    """For each hook of ours the chain that its rule 1 jumps to."""
    hooks = (*HOOKS, Hook.POSTROUTING) if options.rejects else HOOKS
    return {hook: names.hook_chain(hook) for hook in hooks}


def deny(prefix: LogPrefix, options: RenderOptions) -> Chain:
    """Log within the rate, then drop."""
    return (log(prefix, options), Rule(Drop()))


def log(prefix: LogPrefix, options: RenderOptions) -> Rule:
    """Log within the rate."""
    limit = Limit(options.log_per_second, options.log_burst)
    return Rule(Log(options.nflog_group, encode(prefix)), (limit,))


def _hook(hook: Hook, options: RenderOptions, family: Family) -> Chain:
    out: list[Rule] = [*reject.clear_foreign(hook, options)]
    icmp = Protocol.ICMP if family is Family.V4 else Protocol.ICMPV6
    if family is Family.V6:
        for types, limit in ((_ND_TYPES, _ND_HOP_LIMIT), (_MLD_TYPES, _MLD_HOP_LIMIT)):
            out += [
                Rule(Return(), (IpProtocol(icmp), Icmpv6Type(t), HopLimit(limit))) for t in types
            ]
    # The place of the denied-flow bit (live connections): before anything that lets a flow pass.
    out.append(Rule(Return(), (CtState(("ESTABLISHED",)),)))
    out.append(Rule(Return(), (IpProtocol(icmp), CtState(("RELATED",)))))
    out += reject.pass_answers(hook, options)
    if hook is Hook.INPUT:
        out.append(Rule(Return(), (InInterface("lo"),)))
    if hook is Hook.OUTPUT:
        out.append(Rule(Return(), (AddrType(Side.SRC, "LOCAL"),)))
    if hook is Hook.FORWARD:
        # Everybody on the link receives it, isolated or not, and no map can name the receivers.
        held = Goto(names.held_chain(Direction.INGRESS))
        to = NetMatch(Side.DST, _MULTICAST[family])
        out += [Rule(held, (to, InInterface(i))) for i in options.pod_interfaces]
    if hook is not Hook.OUTPUT and family is Family.V6:
        out += [
            Rule(Goto(names.SPOOFED), (NetMatch(Side.DST, _LINK_LOCAL), InInterface(i)))
            for i in options.pod_interfaces
        ]
    out += _source(options, family, hook)
    if hook is Hook.INPUT and options.ipvs_services is not None:
        # After the source check, and only for pods: of others the field is 0 and nothing is asked.
        served = SetMatch(names.ipvs_set(family), (Side.DST, Side.DST))
        out.append(Rule(Goto(names.OK), (_in_field(options), served, IpvsTakes(family))))
    out += _tree(Direction.EGRESS, hook, options)
    if hook is not Hook.INPUT:
        # The field is 0 here: only an allowed packet comes so far.
        out.append(Rule(MapMark(names.class_map(Direction.INGRESS, family), Side.DST)))
        out += _tree(Direction.INGRESS, hook, options)
    return tuple(out)


def _source(options: RenderOptions, family: Family, hook: Hook) -> list[Rule]:
    """Look up the class of the source; on a pod interface it must have one.

    Or it is a Service's, and the packet an answer of a pod with direct server return: the pod is known by
    where it comes in, which it cannot forge, and nothing isolates it. It has no class then.
    """
    mask = options.field_mask
    out = [
        Rule(SetMark(0, mask)),
        Rule(MapMark(names.class_map(Direction.EGRESS, family), Side.SRC)),
    ]
    if hook is not Hook.OUTPUT:
        # Every local pod, isolated or not, has an entry: what has none is nobody's address.
        answers = hook is Hook.FORWARD and options.direct_links
        unknown = Jump(names.ANSWERS) if answers else Goto(names.SPOOFED)
        out += [Rule(unknown, (InInterface(i), MarkMatch(0, mask))) for i in options.pod_interfaces]
    return out


def _tree(direction: Direction, hook: Hook, options: RenderOptions) -> Chain:
    """Go through the tree with the class that was found; behind it the field is 0."""
    enter = Rule(Jump(names.tree_chain(direction)), (_in_field(options),))
    return (enter, *reject.leave(hook, options))


def _in_field(options: RenderOptions) -> MarkMatch:
    return MarkMatch(0, options.field_mask, negate=True)


# -- what IPVS serves ---------------------------------------------------------------------------


def ipvs_spec(family: Family) -> SetSpec:
    """The set of what IPVS serves."""
    return SetSpec(names.ipvs_set(family), SetKind.HASH_IP_PORT, family)


def ipvs_members(options: RenderOptions, family: Family) -> Members:
    """Its members in one family."""
    served = options.ipvs_services or ()
    return {s: None for s in served if family_of(s.address) is family}


# -- direct server return -----------------------------------------------------------------------


def _answers(options: RenderOptions, family: Family) -> Chain:
    """Come back only with an answer of a pod that has direct server return, from where that pod is."""
    ports = SetMatch(names.answers_set(family), (Side.SRC, Side.SRC), negate=True)
    out = [Rule(Goto(names.SPOOFED), (ports,))]
    for address, interface, port in options.direct_links:
        if family_of(address) is family:
            place = InPort(interface) if port else InInterface(interface)
            out.append(Rule(Return(), (NetMatch(Side.SRC, host_prefix(address)), place)))
    return (*out, Rule(Goto(names.SPOOFED)))


def answer_sets(options: RenderOptions, family: Family) -> list[tuple[SetSpec, Members]]:
    """The set of what pods answer from with a Service's address; none where no pod does."""
    if not options.direct_links:
        return []
    spec = SetSpec(names.answers_set(family), SetKind.HASH_IP_PORT, family)
    return [(spec, {p: None for p in options.direct_ports if family_of(p.address) is family})]
