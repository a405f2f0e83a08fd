"""The whole configuration of BIRD 2 (2.0.12 and later) out of a `RoutePlan`: pure, the same text always.

Every value is typed before it gets here; names of protocols are made of a safe alphabet; texts cannot end
their string. Tables:

    master4/6      what the kernel gets: routes learnt by BGP; and ours, which nobody may override
    mesh_igp4/6    how nodes are reached: the shared subnet, or the tunnel. Never in the kernel
    ext_igp4/6     how routers outside are reached: the subnet, and what the kernel routes by itself

A node that no table resolves is unreachable, and stays so: pod traffic never takes another way.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from netpol.model.net import FAMILIES, Family, Prefix, family_of, format_address, host_prefix
from routes.options import Encapsulation, ExternalPeer, ImportPolicy, OverlayMode
from routes.plan import NodePeer, RoutePlan, tunnel_link_local

#: Kernel routes of ours have this metric: a CNI plugin's own (0) goes before them.
METRIC = 32
#: The links of the overlay.
VXLAN_LINK, IPIP_LINK = "knp-vxlan0", "knp-ipip0"
#: BIRD takes names of 64 characters; filters of a protocol are named out_NAME_6.
_NAME_MAX = 64 - len("out__6")
#: Routes of one destination over several external routers.
_MULTIPATH_MAX = 16
#: The shortest prefixes that are routed between networks.
_SHORT = {Family.V4: 8, Family.V6: 16}
_LOG_BYTES = 5_000_000
#: RFC 8326
_GRACEFUL_SHUTDOWN = "(65535,0)"
_UNSAFE = re.compile(r"[^a-z0-9]+")


def render(plan: RoutePlan) -> str:
    """The configuration as text."""
    parts = [
        *_globals(plan),
        *_filters(plan),
        *_tables(plan),
        *_mesh(plan),
        *_externals(plan),
    ]
    return "\n".join(parts) + "\n"


def protocol_name(kind: str, name: str) -> str:
    """A name for a protocol that BIRD takes, and that no two things share."""
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    safe = _UNSAFE.sub("_", name.lower()).strip("_")
    return f"{kind}_{safe[: _NAME_MAX - len(kind) - 10]}_{mark}".replace("__", "_")


def peer_name(peer: ExternalPeer) -> str:
    """The protocol of an external peer."""
    return protocol_name("peer", f"{format_address(peer.address)} {peer.port}")


def node_name(node: str) -> str:
    """The protocol of a node of the mesh."""
    return protocol_name("node", node)


# -- what is always there -----------------------------------------------------------------------


def _globals(plan: RoutePlan) -> Iterator[str]:
    options = plan.options
    yield "# made by netpol; changes are overwritten"
    log = f"{options.run_dir}/bird.log"
    classes = "info, warning, error, fatal, bug, auth, remote"
    yield f'log "{log}" {_LOG_BYTES} "{log}.1" {{ {classes} }};'
    for what in ("protocol", "base", "route", "log"):
        yield f"timeformat {what} iso long ms;"
    yield f"router id {format_address(plan.router_id)};"
    yield "graceful restart wait 15;"
    yield "watchdog warning 2 s;"
    for table in ("mesh_igp", "ext_igp"):
        for family in FAMILIES:
            yield f"ipv{family.value} table {table}{family.value};"
    yield "protocol device d_device { scan time 10; }"
    if any(p.bfd for p in plan.external):
        timing = "{a}interval 300 ms; {b}multiplier 3;"
        single = "min rx interval 300 ms; min tx interval 300 ms; multiplier 3;"
        many = timing.format(a="", b="")
        yield f'protocol bfd b_bfd {{ interface "*" {{ {single} }}; multihop {{ {many} }}; }}'


def _tables(plan: RoutePlan) -> Iterator[str]:
    options = plan.options
    interface = options.interface
    both = "ipv4 {{ table {t}4; }}; ipv6 {{ table {t}6; }};"
    if options.overlay is not OverlayMode.ALWAYS:
        # Where everything is tunnelled, a node without its tunnel must not be reached plainly.
        yield f'protocol direct d_mesh {{ {both.format(t="mesh_igp")} interface "{interface}"; }}'
    yield f'protocol direct d_ext {{ {both.format(t="ext_igp")} interface "{interface}"; }}'
    for family in FAMILIES:
        n = family.value
        # Preference 200 against the 100 of BGP: nobody takes them, whoever announces them.
        yield from _static(f"own_pods{n}", family, _of(plan.own_pods, family))
        yield from _static(f"own_vips{n}", family, _of(plan.vips, family))
        yield f"protocol static overlay{n} {{ ipv{n} {{ table mesh_igp{n}; }};"
        yield from _overlay(plan, family)
        yield "}"
        # Without its tunnel a node must not be found through a wider subnet of the link.
        closed = [host_prefix(t.address) for t in plan.tunnels if family_of(t.address) is family]
        if closed:
            yield f"protocol static closed{n} {{ ipv{n} {{ table mesh_igp{n}; preference 1; }};"
            yield from (f"  route {node} unreachable;" for node in dict.fromkeys(closed))
            yield "}"
        yield (
            f"protocol kernel k_kernel{n} {{ kernel table 254; metric {METRIC}; persist; "
            "graceful restart; scan time 10; learn; netlink rx buffer 4194304; "
            f"merge paths yes limit {_MULTIPATH_MAX};"
        )
        yield f'  ipv{n} {{ import where ifname = "{interface}"; export filter to_kernel{n}; }};'
        yield "}"
        yield (
            f"protocol pipe p_ext{n} {{ table master{n}; peer table ext_igp{n}; import none; "
            "export where source = RTS_INHERIT; }"
        )


def _static(name: str, family: Family, blocks: Iterable[Prefix]) -> Iterator[str]:
    yield f"protocol static {name} {{ ipv{family.value};"
    yield from (f"  route {block} blackhole;" for block in blocks)
    yield "}"


def _overlay(plan: RoutePlan, family: Family) -> Iterator[str]:
    encapsulation = plan.options.encapsulation
    for tunnel in plan.tunnels:
        if family_of(tunnel.address) is not family:
            continue
        address = format_address(tunnel.address)
        if family is Family.V4:
            link = VXLAN_LINK if encapsulation is Encapsulation.VXLAN else IPIP_LINK
            yield f"  route {address}/32 via {address}%'{link}' onlink;"
        elif encapsulation is Encapsulation.VXLAN:
            # The kernel refuses an on-link next hop that another link has a route to; a link-local has none.
            gateway = format_address(tunnel_link_local(tunnel.mac))
            yield f"  route {address}/128 via {gateway}%'{VXLAN_LINK}';"
        else:
            yield f'  route {address}/128 via "{tunnel6_link(tunnel.address)}";'


def tunnel6_link(address: bytes) -> str:
    """The link to one node for IPv6 in IPIP mode: such a tunnel cannot have many ends.

    Named after the address, of which the kernel takes only one tunnel, whichever Nodes have it.
    """
    mark = base64.b32encode(hashlib.sha256(address).digest()[:5]).decode().lower()
    return f"knp-t6-{mark}"


# -- filters ------------------------------------------------------------------------------------


def _filters(plan: RoutePlan) -> Iterator[str]:
    for family in FAMILIES:
        n = family.value
        yield f"filter to_kernel{n} {{"
        yield "  if source != RTS_BGP then reject;"
        own = _of((*plan.own_pods, *plan.guarded, *plan.vips), family)
        own = sorted(set(own))
        if own:
            yield f"  if net ~ {_set(own, '+')} then reject;"
        yield "  accept;"
        yield "}"
        yield f"function from_outside{n}(bool default_too)"
        yield "{"
        yield f"  if net = {_anything(family)} then return default_too;"
        # Two halves of everything are the default route too; nobody is allocated such blocks.
        short = f"[ {_anything(family)}{{1,{_SHORT[family] - 1}}} ]"
        yield f"  if net ~ {short} && !default_too then return false;"
        protected = _of(plan.protected, family)
        # Neither what lies in such a block nor what it lies in.
        yield f"  if net ~ {_set(protected, '+')} then return false;"
        yield f"  if net ~ {_set(protected, '-')} then return false;"
        yield "  return true;"
        yield "}"
        yield f"filter mesh_out{n} {{"
        if plan.options.drain:
            yield f"  bgp_community.add({_GRACEFUL_SHUTDOWN});"
        yield f'  if proto = "own_pods{n}" then accept;'
        if any(p.client for p in plan.peers):
            pods = _of(plan.pods, family)
            if pods:
                yield f"  if source = RTS_BGP && net ~ {_set(pods)} then accept;"
        yield "  reject;"
        yield "}"


def _set(blocks: Iterable[Prefix], suffix: str = "") -> str:
    """A prefix set; BIRD's `+` adds what lies in a block, its `-` what the block lies in."""
    return "[ " + ", ".join(f"{b}{suffix}" for b in blocks) + " ]"


def _of(blocks: Iterable[Prefix], family: Family) -> list[Prefix]:
    return [b for b in blocks if b.family is family]


def _anything(family: Family) -> str:
    return "0.0.0.0/0" if family is Family.V4 else "::/0"


# -- nodes --------------------------------------------------------------------------------------


def _mesh(plan: RoutePlan) -> Iterator[str]:
    if not plan.addresses:
        return
    options = plan.options
    # Where nothing is tunnelled, nodes are reached by whatever way the kernel knows.
    table = "ext_igp" if options.overlay is OverlayMode.NEVER else "mesh_igp"
    yield "template bgp t_mesh {"
    yield f"  multihop; bfd off; hold time {options.hold_s};{_keepalive(options.keepalive_s)}"
    yield f"  {_graceful(plan, enabled=options.graceful_restart)}"
    # The nodes that are there knock again and again, so that one that comes need not knock first.
    yield "  connect delay time 1; connect retry time 2; error wait time 2,30;"
    for family in FAMILIES:
        # A reflector passes on who is to be sent to, also into another AS.
        yield from _channel(
            plan,
            family,
            imports="none",
            exports=f"filter mesh_out{family.value}",
            igp=table,
            more="next hop keep;",
        )
    yield "}"
    local = {f: format_address(a) for f, a in plan.addresses.items()}
    six = plan.addresses.get(Family.V6)
    shared = _Shared(
        plan.asn,
        options.listen_port,
        plan.cluster_id,
        plan.bound,
        tuple(plan.addresses),
        table,
        format_address(six) if six is not None else "",
    )
    for peer in plan.peers:
        yield _node(peer, local[family_of(peer.address)], shared)


class _Shared(NamedTuple):
    """What all sessions with nodes have in common."""

    asn: int
    port: int
    cluster_id: bytes | None
    bound: bool
    families: tuple[Family, ...]
    igp: str
    six: str


# Of a thousand sessions one changes at a time.
@lru_cache(maxsize=16384)
def _node(peer: NodePeer, local: str, shared: _Shared) -> str:
    out = [
        f"protocol bgp {node_name(peer.node)} from t_mesh {{",
        f'  description "node {_text(peer.node)}";',
        f"  local {local} port {shared.port} as {shared.asn};",
        f"  neighbor {format_address(peer.address)} port {shared.port} as {peer.asn};",
    ]
    if peer.client:
        out.append("  rr client;")
    if shared.cluster_id is not None and peer.asn == shared.asn:
        out.append(f"  rr cluster id {format_address(shared.cluster_id)};")
    if shared.bound:
        out.append("  strict bind yes;")
    for family in FAMILIES:
        accept = _of(peer.accept, family)
        imports = f"import where net ~ {_set(accept)};" if accept else "import none;"
        if family is Family.V4 and peer.six:
            out += _four_by_six(imports, shared)
        elif accept and family in shared.families:
            out.append(f"  ipv{family.value} {{ {imports} }};")
    return "\n".join([*out, "}"])


def _four_by_six(imports: str, shared: _Shared) -> Iterator[str]:
    """IPv4 with next hops of IPv6 (RFC 8950): the kernel sends to those by IPv6's neighbours."""
    yield "  ipv4 {"
    yield f"    igp table {shared.igp}4; igp table {shared.igp}6; gateway recursive;"
    yield f"    extended next hop yes; next hop address {shared.six}; next hop keep;"
    yield f"    {imports}"
    yield "    export filter mesh_out4;"
    yield "  };"


def _local(plan: RoutePlan, family: Family) -> str:
    own = plan.addresses.get(family)
    bound = [a for a in plan.local_addresses if family_of(a) is family]
    if own is not None and (own in bound or not bound):
        return format_address(own)
    return format_address(bound[0])


def _channel(
    plan: RoutePlan, family: Family, *, imports: str, exports: str, igp: str, more: str = ""
) -> Iterator[str]:
    address = plan.addresses.get(family)
    if address is None:
        return
    n = family.value
    yield f"  ipv{n} {{"
    yield f"    igp table {igp}{n}; gateway recursive; next hop address {format_address(address)};"
    yield f"    import {imports};"
    yield f"    export {exports};"
    if more:
        yield f"    {more}"
    yield "  };"


def _graceful(plan: RoutePlan, *, enabled: bool) -> str:
    if not enabled:
        return "graceful restart aware;"
    return f"graceful restart yes; graceful restart time {plan.options.restart_s};"


def _keepalive(seconds: int) -> str:
    return f" keepalive time {seconds};" if seconds else ""


# -- routers outside ----------------------------------------------------------------------------


def _externals(plan: RoutePlan) -> Iterator[str]:
    if not plan.addresses:
        return
    for peer in plan.external:
        yield from _external(plan, peer)


def _external(plan: RoutePlan, peer: ExternalPeer) -> Iterator[str]:
    name = peer_name(peer)
    families = [f for f in FAMILIES if f in plan.addresses]
    for family in families:
        yield from _external_filters(plan, peer, name, family)
    yield f"protocol bgp {name} {{"
    yield f'  description "peer {format_address(peer.address)}";'
    source = (
        format_address(peer.local_address)
        if peer.local_address is not None
        else _local(plan, family_of(peer.address))
    )
    yield f"  local {source} port {plan.options.listen_port} as {plan.asn};"
    yield f"  neighbor {format_address(peer.address)} port {peer.port} as {peer.asn};"
    if peer.password:
        yield f'  password "{peer.password}";'
    if peer.multihop:
        yield f"  multihop {peer.multihop};"
    elif peer.asn == plan.asn:
        yield "  multihop;"  # inside an AS routers need not be neighbours
    if peer.ttl_security:
        yield "  direct;"
        yield "  ttl security yes;"
    # Where the tunnelled part of the cluster is not concerned, dead routers should be noticed at once.
    yield f"  bfd {'yes' if peer.bfd else 'off'};"
    yield f"  hold time {peer.hold_s};{_keepalive(peer.keepalive_s)}"
    yield f"  {_graceful(plan, enabled=peer.graceful_restart)}"
    yield "  connect delay time 1; connect retry time 5; error wait time 2,30;"
    if plan.bound:
        yield "  strict bind yes;"
    igp = (
        "mesh_igp"
        if peer.reflector and plan.options.overlay is not OverlayMode.NEVER
        else "ext_igp"
    )
    for family in families:
        n = family.value
        imports = f"filter in_{name}_{n}" if _learns(plan, peer) else "none"
        limit = peer.imports.limit if peer.imports.enabled else 0
        if limit and peer.reflector:
            limit += len(plan.pods)  # the cluster's own are not to be crowded out
        more = f"import limit {limit} action block;" if limit else ""
        yield from _channel(
            plan, family, imports=imports, exports=f"filter out_{name}_{n}", igp=igp, more=more
        )
    yield "}"


def _learns(plan: RoutePlan, peer: ExternalPeer) -> bool:
    return peer.imports.enabled or (peer.reflector and bool(plan.pods))


def _external_filters(
    plan: RoutePlan, peer: ExternalPeer, name: str, family: Family
) -> Iterator[str]:
    n = family.value
    if _learns(plan, peer):
        yield f"filter in_{name}_{n} {{"
        if peer.reflector:
            yield from _reflected(plan, family)
        yield from _import_rules(peer.imports, peer.local_pref, family)
        yield "  reject;"
        yield "}"
    yield f"filter out_{name}_{n} {{"
    mine = [f'proto = "own_vips{n}"']
    if plan.options.advertise_pod_cidr or peer.reflector:
        mine.append(f'proto = "own_pods{n}"')
    yield f"  if !({' || '.join(mine)}) then reject;"
    only = _of(peer.export, family)
    if peer.export:
        yield f"  if !(net ~ {_set(only, '+')}) then reject;" if only else "  reject;"
    for c in dict.fromkeys((*plan.announcement.communities, *peer.communities)):
        if c.local is None:
            yield f"  bgp_community.add(({c.admin},{c.value}));"
        else:
            yield f"  bgp_large_community.add(({c.admin},{c.value},{c.local}));"
    if plan.options.drain:
        yield f"  bgp_community.add({_GRACEFUL_SHUTDOWN});"
    if peer.med is not None:
        yield f"  bgp_med = {peer.med};"
    prepend = peer.prepend or plan.announcement.prepend
    if prepend is not None:
        yield from (f"  bgp_path.prepend({prepend[0]});" for _ in range(prepend[1]))
    yield "  accept;"
    yield "}"


def _reflected(plan: RoutePlan, family: Family) -> Iterator[str]:
    """Each node's podCIDRs, with that node as the next hop: a client cannot have another's reflected."""
    owners = [(a, p) for a, p in plan.owners if family_of(a) is family]
    if not owners:
        return
    yield "  case bgp_next_hop {"
    yield from (f"    {format_address(a)} : if net ~ {_set(p)} then accept;" for a, p in owners)
    yield "  }"


def _import_rules(policy: ImportPolicy, local_pref: int | None, family: Family) -> Iterator[str]:
    n = family.value
    if not policy.enabled:
        return
    default = "true" if policy.default_route else "false"
    yield f"  if !from_outside{n}({default}) then reject;"
    reject = _of(policy.reject, family)
    if reject:
        yield f"  if net ~ {_set(reject, '+')} then reject;"
    only = _of(policy.only, family)
    if policy.only:
        yield f"  if !(net ~ {_set(only, '+')}) then reject;" if only else "  reject;"
    if local_pref is not None:
        yield f"  bgp_local_pref = {local_pref};"
    yield "  accept;"


def _text(text: str) -> str:
    """A text for between quotes, which BIRD cannot escape."""
    return "".join(c if c.isprintable() and c != '"' else "?" for c in text)
