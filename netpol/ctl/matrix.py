"""`netpol-ctl matrix`: who reaches whom, for every pair of pods and every port asked for.

Pairs that policy cannot tell apart are judged once: a pod counts as the policies that isolate it, the
selectors and ipBlocks that match it, and its ports.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from netpol.ctl.ends import address_part
from netpol.ctl.output import emit, plural, remark
from netpol.ctl.ports import Ports, Span, declared, parse_port, spans_on
from netpol.ctl.source import Cluster, cluster
from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.flow import Flow, Party, PartyKind, Verdict
from netpol.model.ids import Direction
from netpol.model.net import Family, Prefix, family_of, format_address, parse_address
from netpol.model.objects import Endpoint
from netpol.model.policy import BlockPeer, PodPeer
from netpol.policy.evaluate import verdict
from netpol.policy.match import pod_matches
from netpol.policy.world import World

#: Most cells: the text of one takes about 40 bytes.
CELLS_MAX = 10_000_000

Cells = dict[str, dict[str, str]]


class Member(NamedTuple):
    """A row and column: a pod, or an address from outside."""

    name: str
    pod: Endpoint | None
    address: bytes | None = None

    def family(self) -> Family:
        """The family it is judged in as a destination, unless one is forced."""
        if self.pod is not None:
            return family_of(self.pod.addresses[0])
        return family_of(self.address or b"")


def run(args: argparse.Namespace) -> int:
    """Print the matrix; 0 whatever the verdicts are."""
    asked = [parse_port(p) for p in args.ports]
    externals = [_external(t) for t in args.external]
    where = cluster(args)
    pods = members(where, namespace=args.namespace_given)
    spans = choose_spans([m.pod for m in pods if m.pod is not None], asked)
    everyone = [*pods, *externals]
    if len(everyone) ** 2 * sum(s.last - s.first + 1 for s in spans) > CELLS_MAX:
        raise InputError(
            f"{len(everyone)} x {len(everyone)} x {len(spans)} ports is too large a matrix",
            needed="-n NS, or fewer --port",
        )
    family = Family(args.ip_family) if args.ip_family else None
    verdicts, unreachable = judge(where, everyone, spans, family=family)
    for name in unreachable:
        remark(f"pod {name} has no address in a family that is judged: such cells are deny")
    document = {"pods": [m.name for m in pods], "verdicts": verdicts}
    if externals:
        document["external"] = [m.name for m in externals]
    emit(document, text([m.name for m in everyone], verdicts), form=args.output)
    return 0


def members(where: Cluster, *, namespace: str | None) -> list[Member]:
    """The pods of the matrix, by name; those without an address are left out and named."""
    out = []
    for key, pod in sorted(where.world.pods.items()):
        if namespace is not None and key.namespace != namespace:
            continue
        if pod.live and pod.addresses:
            out.append(Member(str(key), pod))
        else:
            remark(f"pod {key} is left out: {'no address yet' if pod.live else pod.phase}")
    return out


def choose_spans(pods: Sequence[Endpoint], asked: Sequence[Ports]) -> list[Span]:
    """The single ports of the matrix, in the order asked for.

    Raises:
        InputError: nothing asked and nothing declared.
        NoAnswerError: a name that no pod gives to a port.
    """
    found: dict[Span, None] = {}
    if not asked:
        found.update((s, None) for s in sorted({s for p in pods for s in declared(p)}))
        if pods and not found:
            raise InputError("no pod declares a containerPort", needed="--port NUMBER/PROTO")
    for port in asked:
        if not port.name:
            protocol = spans_on(port, None)[0].protocol
            found.update((Span(protocol, n, n), None) for n in range(port.first, port.last + 1))
            continue
        named = sorted({s for p in pods for s in spans_on(port, p)})
        if not named:
            raise NoAnswerError(f"no pod declares a port named {port.text}")
        found.update((s, None) for s in named)
    return list(found)


def _external(text: str) -> Member:
    try:
        address = parse_address(text)
    except ValueError as e:
        raise InputError("--external", needed="an address", got=str(e)) from None
    return Member(format_address(address), None, address)


# -- judging ------------------------------------------------------------------------------------


class _Judge:
    """Verdicts of pairs, each kind of pair once."""

    def __init__(self, where: Cluster, everyone: Sequence[Member]) -> None:
        self._world = where.world
        self._where = where
        self._blocks, self._peers = _peers(where.world)
        self._node_matters = any(
            self._world.party(a).kind is PartyKind.NODE
            for m in everyone
            for a in ((m.address,) if m.address else m.pod.addresses if m.pod else ())
            if m.pod is None or m.pod.host_network
        )
        self._classes: dict[object, int] = {}
        self._ends: dict[tuple[str, Family], tuple[Party, int] | None] = {}
        self._seen: dict[tuple[int, int, Span], str] = {}

    def end(self, m: Member, family: Family) -> tuple[Party, int] | None:
        """A member in a family and its kind; None where it has no such address."""
        at = (m.name, family)
        if at not in self._ends:
            party: Party | None = None
            if m.pod is not None:
                party = self._world.pod_party(m.pod, family)
            elif m.address is not None and family_of(m.address) is family:
                party = address_part(self._where, m.address).party
            self._ends[at] = (party, self._kind(party)) if party is not None else None
        return self._ends[at]

    def _kind(self, party: Party) -> int:
        bits = tuple(i for i, b in enumerate(self._blocks) if b.contains(party.address))
        pod = party.endpoint
        who: object = (party.kind, party.node)
        if pod is not None:
            who = (
                *(tuple(p.key for p in self._world.isolating(pod, d)) for d in Direction),
                tuple(i for i, p in enumerate(self._peers) if pod_matches(p, pod, self._world)),
                pod.ports,
                party.node if self._node_matters else "",
            )
        return self._classes.setdefault((who, bits), len(self._classes))

    def verdict(self, src: tuple[Party, int], dst: tuple[Party, int], span: Span) -> str:
        """The verdict of a pair that is not one pod."""
        at = (src[1], dst[1], span)
        found = self._seen.get(at)
        if found is None:
            flow = Flow(src[0], dst[0], span.protocol, span.first)
            if src[0].endpoint is not None and src[0].endpoint is dst[0].endpoint:
                return Verdict.ALLOW.value
            found = self._seen[at] = verdict(self._world, flow).value
        return found


def judge(
    where: Cluster, everyone: Sequence[Member], spans: Iterable[Span], *, family: Family | None
) -> tuple[dict[str, Cells], list[str]]:
    """All verdicts by port, source and destination, and who lacks an address for some of them."""
    judging = _Judge(where, everyone)
    unreachable: dict[str, None] = {}
    # The ends do not depend on the port.
    pairs: list[tuple[Member, Member, tuple[Party, int] | None, tuple[Party, int] | None]] = []
    for src in everyone:
        for dst in everyone:
            chosen = family or (src.family() if src.pod is None else dst.family())
            a, b = judging.end(src, chosen), judging.end(dst, chosen)
            if src is not dst:
                ends = ((src, a), (dst, b))
                unreachable.update((m.name, None) for m, e in ends if e is None and m.pod)
            pairs.append((src, dst, a, b))
    out: dict[str, Cells] = {}
    for span in spans:
        cells: Cells = {m.name: {} for m in everyone}
        for src, dst, a, b in pairs:
            if src is dst:
                found = Verdict.ALLOW.value
            elif a is None or b is None:
                found = Verdict.DENY.value
            else:
                found = judging.verdict(a, b, span)
            cells[src.name][dst.name] = found
        out[str(span)] = cells
    return out, list(unreachable)


def _peers(world: World) -> tuple[list[Prefix], list[PodPeer]]:
    """The distinct prefixes and selectors that rules name as peers."""
    blocks: set[Prefix] = set()
    selectors: set[PodPeer] = set()
    for policy in world.policies.values():
        for rule in (*policy.ingress, *policy.egress):
            for peer in rule.peers or ():
                if isinstance(peer, BlockPeer):
                    blocks.update(peer.prefixes)
                elif isinstance(peer, PodPeer):
                    selectors.add(peer)
    return sorted(blocks), list(selectors)


# -- text ---------------------------------------------------------------------------------------


def text(names: Sequence[str], verdicts: dict[str, Cells]) -> str:
    """A table for each port: + allow, - deny; columns carry the numbers of the rows."""
    if not names:
        return "no pods"
    blocks = []
    width = max(map(len, names))
    digits = len(str(len(names)))
    for port, cells in verdicts.items():
        pairs = [(a, b) for a in names for b in names if a != b]
        allowed = sum(cells[a][b] == "allow" for a, b in pairs)
        head = f"{port}: {allowed} of {plural(len(pairs), 'connection')} allowed"
        lines = [f"{head} (+ allow, - deny; row: from, column: to)"]
        columns = " ".join(str(i).rjust(digits) for i in range(1, len(names) + 1))
        lines.append(f"{'':{digits + 1 + width}}  {columns}")
        for i, a in enumerate(names, 1):
            row = " ".join(("+" if cells[a][b] == "allow" else "-").rjust(digits) for b in names)
            lines.append(f"{i:>{digits}} {a:<{width}}  {row}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
