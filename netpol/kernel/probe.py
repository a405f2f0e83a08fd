"""What this machine's kernel lacks of what netpol needs, found out before anything is written.

Lists of loaded modules prove nothing (extensions load on demand, or are built in), so everything is tried
for real: in a network namespace of its own, which has no traffic and is gone afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

from netpol.kernel.drivers import (
    AddMembers,
    CreateSet,
    DestroySet,
    SetError,
    SetTransaction,
    TableDriver,
    TableError,
    TableTransaction,
    Variant,
)
from netpol.kernel.netns import in_new_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.lib.errors import KernelMissingError
from netpol.model.ids import ChainName, Protocol, SetName
from netpol.model.net import FAMILIES, Family, Prefix
from netpol.model.ruleset import (
    AddrType,
    CtState,
    Drop,
    DstPorts,
    Hook,
    HopLimit,
    Icmpv6Type,
    IpProtocol,
    Limit,
    Log,
    MapMark,
    MarkMatch,
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

_CHAIN = ChainName("KNP-PROBE")
_MARK_MASK = 0xFFF00000

Features = Iterator[tuple[str, Rule]]


def missing_features(variant: Variant, *, rejects: bool = False) -> dict[Family, list[str]]:
    """Say in words what each family lacks, one phrase each; those that lack nothing are left out.

    Args:
        variant: whose tables.
        rejects: whether denied packets are to be answered.

    Raises:
        NoAnswerError: not root.
    """

    def probe() -> dict[Family, list[str]]:
        try:
            sets = NetlinkSets(mark_mask=_MARK_MASK)
        except KernelMissingError as e:
            return {family: [f"ipset in the kernel ({e})"] for family in FAMILIES}
        try:
            return {f: _missing(f, sets, RestoreTables(variant), rejects=rejects) for f in FAMILIES}
        finally:
            sets.close()

    return {family: missing for family, missing in in_new_netns(probe).items() if missing}


def _missing(family: Family, sets: NetlinkSets, tables: TableDriver, *, rejects: bool) -> list[str]:
    missing = list(_missing_sets(sets, family)) or list(_missing_rules(tables, family))
    return missing or (list(_missing_answers(tables, family)) if rejects else [])


def _specs(family: Family) -> dict[str, SetSpec]:
    return {
        f"ipset type hash:ip for IPv{family}": SetSpec(
            SetName(f"KNP-ip{family}"), SetKind.HASH_IP, family
        ),
        f"ipset type hash:ip,port for IPv{family}": SetSpec(
            SetName(f"KNP-port{family}"), SetKind.HASH_IP_PORT, family
        ),
        f"ipset type hash:net with skbinfo for IPv{family}": SetSpec(
            SetName(f"KNP-map{family}"), SetKind.HASH_NET, family, marks=True
        ),
    }


def _missing_sets(sets: NetlinkSets, family: Family) -> Iterator[str]:
    for words, spec in _specs(family).items():
        member = Prefix(bytes(family.bits // 8), 1)
        marked = (AddMembers(spec, {member: 1 << 20}),) if spec.marks else ()
        try:
            sets.apply(SetTransaction((CreateSet(spec), *marked)))
        except (SetError, KernelMissingError) as e:
            yield f"{words} ({e.what})"
            sets.apply(SetTransaction((DestroySet(spec.name),)))


def _features(family: Family) -> Features:
    """A rule for each extension that rendered rules use."""
    addresses, _, marks = (spec.name for spec in _specs(family).values())
    yield "match comment (xt_comment)", Rule(Return(), (), "probe")
    yield "match conntrack (xt_conntrack)", Rule(Return(), (CtState(("ESTABLISHED",)),))
    yield "match set (xt_set)", Rule(Return(), (SetMatch(addresses, (Side.SRC,)),))
    yield "target SET --map-mark (xt_set)", Rule(MapMark(marks, Side.SRC))
    yield "match mark (xt_mark)", Rule(Return(), (MarkMatch(0, _MARK_MASK),))
    yield "target MARK (xt_mark)", Rule(SetMark(0, _MARK_MASK))
    yield "match addrtype (xt_addrtype)", Rule(Return(), (AddrType(Side.SRC, "LOCAL"),))
    yield "match bpf (xt_bpf)", Rule(Return(), (SameAddress(family),))
    yield "match limit (xt_limit)", Rule(Return(), (Limit(1, 1),))
    yield "target NFLOG (xt_NFLOG)", Rule(Log(1, "probe"))
    for protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP):
        one = (IpProtocol(protocol), DstPorts(protocol, (PortSpan(1, 2),)))
        yield f"match {protocol.lower()}", Rule(Drop(), one)
    many = (IpProtocol(Protocol.TCP), DstPorts(Protocol.TCP, (PortSpan(1, 1), PortSpan(3, 4))))
    yield "match multiport (xt_multiport)", Rule(Drop(), many)
    if family is Family.V6:
        neighbour = (IpProtocol(Protocol.ICMPV6), Icmpv6Type(135), HopLimit(255))
        yield "matches icmp6 and hl (xt_hl)", Rule(Return(), neighbour)


def _missing_rules(tables: TableDriver, family: Family) -> Iterator[str]:
    """Try all rules at once, and one by one only where that fails."""
    features = list(_features(family))
    if _refusal(tables, family, tuple(rule for _, rule in features)) is None:
        return
    table = _refusal(tables, family, (Rule(Return()),))
    if table is not None:
        yield f"table mangle for IPv{family} in variant {tables.variant} ({table})"
        return
    for words, rule in features:
        said = _refusal(tables, family, (rule,))
        if said is not None:
            yield f"{words} for IPv{family} ({said})"


def _missing_answers(tables: TableDriver, family: Family) -> Iterator[str]:
    """What filter needs in order to answer."""
    tcp = IpProtocol(Protocol.TCP)
    error = "icmp-admin-prohibited" if family is Family.V4 else "icmp6-adm-prohibited"
    features = {
        "table filter": Rule(Return()),
        "target REJECT (ipt_REJECT, ip6t_REJECT)": Rule(Reject(error)),
        "resets by target REJECT": Rule(Reject("tcp-reset"), (tcp,)),
        "flags of match tcp": Rule(Drop(), (tcp, TcpFlags(("SYN",), ("SYN",)))),
    }
    for words, rule in features.items():
        said = _refusal(tables, family, (rule,), table="filter")
        if said is not None:
            yield f"{words} for IPv{family} in variant {tables.variant} ({said})"


def _refusal(
    tables: TableDriver, family: Family, rules: tuple[Rule, ...], *, table: str = "mangle"
) -> str | None:
    hooks = {Hook.FORWARD: _CHAIN}
    try:
        state = tables.dump(table, family).hooks
        tx = TableTransaction(table, family, {_CHAIN: rules}, hooks=hooks, hook_state=state)
        tables.apply(tx)
    except (TableError, KernelMissingError) as e:
        return e.got or e.what
    return None
