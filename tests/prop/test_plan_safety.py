"""Nothing forbidden passes and nothing allowed is lost at any point of a change, or when killed there.

A plan is cut into the smallest steps that the kernel takes: one member of a set, or one transaction of a
table. After each, packets of all pairs walk what the fakes hold, as text.

What must hold is said about addresses, since that is what a packet has: a flow that is denied in every
order in which the API could have told the news is denied in every state on the way; likewise allowed. The
one exception is written down in `Watch.moving`.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel
from netpol.enforce.plan import MAPS, Plan, Step, address_of, family_of_step
from netpol.k8s.decode import NETWORK_POLICY, decode
from netpol.kernel.drivers import AddMembers, DeleteMembers, SetTransaction
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.model.flow import Flow, Party, PartyKind, Verdict
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import FAMILIES, Family, Prefix, family_of, format_address, parse_address
from netpol.model.objects import Endpoint, Namespace
from netpol.model.ruleset import Ruleset
from netpol.policy.compile import compile_policy
from netpol.policy.evaluate import evaluate
from netpol.policy.graph import Graph
from netpol.policy.world import World
from netpol.render.node import Desired, classes_in_use, graph_of, render_graph
from netpol.render.options import RenderOptions
from tests import builders as make
from tests.prop import churn
from tests.walker.cluster import Cluster, Text, text_of

#: NETPOL_SEEDS=1000 for a long night.
SEEDS = int(os.environ.get("NETPOL_SEEDS", "12"))
OUTSIDE = tuple(parse_address(a) for a in ("198.51.100.7", "2001:db8::7"))
PORTS = ((Protocol.TCP, 80), (Protocol.UDP, 53))

Quad = tuple[bytes, bytes, Protocol, int]


class Kernel:
    """The kernel of one node, in memory."""

    def __init__(self) -> None:
        self.sets = FakeSets()
        self.tables = FakeTables(sets=self.sets)

    def copy(self) -> Kernel:
        twin = Kernel()
        twin.sets.state = copy.deepcopy(self.sets.state)
        twin.tables.state = copy.deepcopy(self.tables.state)
        return twin

    def steps(self, plan: Plan) -> Iterator[str]:
        """Apply a plan in the smallest steps; yields what each was."""
        for step in smallest(plan):
            yield self.step(step)

    def step(self, step: Step) -> str:
        """Apply one step; says what it was."""
        if isinstance(step, SetTransaction):
            self.sets.apply(step)
            return str(step.ops[0])
        self.tables.apply(step)
        return f"table {step.family}: {sorted(step.replace)} -{list(step.delete)}"

    def run(self, plan: Plan) -> None:
        for _ in self.steps(plan):
            pass

    def text(self, field_mask: int) -> Text:
        """What a walker reads."""
        sets = {n: (s.spec, s.members) for n, s in self.sets.state.items()}
        tables: dict[str, dict[Family, Ruleset]] = {"mangle": {}, "filter": {}}
        for name, rulesets in tables.items():
            for family in FAMILIES:
                table = self.tables.table(name, family)
                hooks = {h: rules[0] for h, rules in table.hooks.items() if rules}
                rulesets[family] = Ruleset({n: tuple(c) for n, c in table.chains.items()}, hooks)  # type: ignore[arg-type]
        return text_of(Desired(sets, tables["mangle"], tables["filter"]), field_mask=field_mask)  # type: ignore[arg-type]


def smallest(plan: Plan, down: Family | None = None) -> Iterator[Step]:
    """The smallest steps of a plan; of a family that is down, only what is done nevertheless."""
    for number, step in enumerate(plan.steps):
        if family_of_step(step) is down and number >= plan.leaving:
            continue
        if isinstance(step, SetTransaction):
            yield from _steps(step.ops)
        else:
            yield step
    if down is not None:
        yield from _steps(plan.behind.get(down, ()))


def _steps(ops: Iterable[object]) -> Iterator[Step]:
    for op in ops:
        yield from (SetTransaction((part,)) for part in _parts(op))  # type: ignore[arg-type]


def interleaved(plan: Plan, dice: random.Random) -> Iterator[Step]:
    """The smallest steps of a plan in another order of the two families, each in its own."""
    waiting = {f: [s for s in smallest(plan) if family_of_step(s) is f] for f in FAMILIES}
    while any(waiting.values()):
        family = dice.choice([f for f, left in waiting.items() if left])
        yield waiting[family].pop(0)


def _parts(op: object) -> Iterator[object]:
    if isinstance(op, AddMembers):
        for member, mark in op.members.items():
            yield AddMembers(op.spec, {member: mark})
    elif isinstance(op, DeleteMembers):
        for member in op.members:
            yield DeleteMembers(op.spec, [member])
    else:
        yield op


class Judge:
    """Says what this node must do with flows between addresses in one world."""

    def __init__(self, world: World, *, hold: bool) -> None:
        self.world, self._hold = world, hold
        self._shape = Cluster(world, {})

    def passes(self, quad: Quad) -> bool:
        """Whether the node must let a flow pass, as far as it is this node's to say."""
        flow = self.flow(quad)
        for party in (flow.src, flow.dst):
            inside = self._shape.place(party) == ("pod", churn.NODE)
            # Of a source that nobody has, the source check thinks the same.
            if party.kind is PartyKind.EXTERNAL and inside and (self._hold or party is flow.src):
                return False
        trace = evaluate(self.world, flow)
        return not (
            (flow.src.node == churn.NODE and trace.egress.verdict is Verdict.DENY)
            or (flow.dst.node == churn.NODE and trace.ingress.verdict is Verdict.DENY)
        )

    def flow(self, quad: Quad) -> Flow:
        src, dst, protocol, port = quad
        return Flow(self.world.party(src), self.world.party(dst), protocol, port)


def quads(objects: list[churn.Objects]) -> list[Quad]:
    """Every flow that has an address of this node's pods at one end."""
    pods = {a: p.node for o in objects for p in o.pods.values() if p.policed for a in p.addresses}
    out = []
    for src, dst in itertools.product([*pods, *OUTSIDE], repeat=2):
        if family_of(src) is not family_of(dst) or src == dst:
            continue
        if churn.NODE in (pods.get(src), pods.get(dst)):
            out += [(src, dst, *port) for port in PORTS]
    return out


def orders(start: churn.Objects, events: list[churn.Event]) -> list[churn.Objects]:
    """All worlds that lie between: every subset of the events has happened."""
    out = []
    for chosen in itertools.product((False, True), repeat=len(events)):
        objects = start.copy()
        for event, happened in zip(events, chosen, strict=True):
            if happened:
                event.happen(objects)
        out.append(objects)
    return out


@dataclass(slots=True)
class Watch:
    """Walks all flows that must not change, after every step.

    Attributes:
        moving: addresses that change their own class, or their pod, or cross (see `moving`): new
            connections to and from them may be lost in between, which is the price of never letting a
            forbidden one pass.
        lost: how many of those were.
    """

    world: World
    field_mask: int
    denied: list[Quad]
    allowed: list[Quad]
    moving: set[bytes]
    lost: Counter[str] = field(default_factory=Counter)

    @classmethod
    def between(cls, worlds: list[churn.Objects], options: RenderOptions) -> Watch:
        judges = [Judge(o.world(), hold=bool(options.hold_ranges)) for o in worlds]
        denied, allowed = [], []
        for quad in quads(worlds):
            verdicts = {j.passes(quad) for j in judges}
            if verdicts == {False}:
                denied.append(quad)
            elif verdicts == {True}:
                allowed.append(quad)
        return cls(judges[-1].world, options.field_mask, denied, allowed, set())

    def of(self, family: Family) -> Watch:
        """What must hold in one family."""
        denied = [q for q in self.denied if family_of(q[0]) is family]
        allowed = [q for q in self.allowed if family_of(q[0]) is family]
        return replace(self, denied=denied, allowed=allowed, moving=set(), lost=Counter())

    def look(self, kernel: Kernel, at: str) -> None:
        texts = {churn.NODE: kernel.text(self.field_mask)}
        cluster = Cluster(self.world, texts, field_mask=self.field_mask)
        for quad in self.denied:
            assert not self._passes(cluster, quad), f"{_text(quad)} passes after {at}"
        for quad in self.allowed:
            if self._passes(cluster, quad):
                continue
            assert self.moving & set(quad[:2]), f"{_text(quad)} is lost after {at}"
            self.lost[_text(quad)] += 1

    def _passes(self, cluster: Cluster, quad: Quad) -> bool:
        src, dst, protocol, port = quad
        flow = Flow(_party(src), _party(dst), protocol, port)
        return cluster.walk_at(churn.NODE, flow).passed


def _party(address: bytes) -> Party:
    """Where an address lives by its range alone, whoever has it now."""
    for node in churn.NODES:
        if any(r.contains(address) for r in node.pod_cidrs):
            return Party(PartyKind.POD, address, "", node=node.name)
    return Party(PartyKind.EXTERNAL, address, "")


def _text(quad: Quad) -> str:
    src, dst, protocol, port = quad
    return f"{format_address(src)} -> {format_address(dst)} {port}/{protocol}"


def moving(plan: Plan) -> set[bytes]:
    """Addresses whose entry in a class map changes or goes, or that leave a set before they enter another.

    The latter only where two pods change at once in a way that `moves.crosses` tells.
    """
    out: set[bytes] = set()
    left: set[bytes] = set()
    for step in plan.steps:
        for op in step.ops if isinstance(step, SetTransaction) else ():
            if not isinstance(op, AddMembers | DeleteMembers):
                continue
            if op.spec.name in MAPS:
                out |= {m.address for m in op.members if isinstance(m, Prefix)}
                continue
            speaks_of = {a for m in op.members if (a := address_of(op.spec, m)) is not None}
            if isinstance(op, DeleteMembers):
                left |= speaks_of
            else:
                out |= speaks_of & left
    return out


@dataclass(slots=True)
class Node:
    """A node with an agent, in sync with a world."""

    objects: churn.Objects
    options: RenderOptions
    graph: Graph = field(default_factory=lambda: Graph(churn.NODE))
    kernel: Kernel = field(default_factory=Kernel)
    dataplane: Dataplane = field(init=False)

    def __post_init__(self) -> None:
        self.know(self.objects)
        self.restart()

    def know(self, objects: churn.Objects) -> None:
        """A new process: its caches hold these objects and nothing else."""
        self.graph = Graph(churn.NODE)
        for store, kind in (
            (objects.namespaces, "namespaces"),
            (objects.pods, "pods"),
            (objects.policies, "policies"),
        ):
            for key, value in store.items():
                churn.Event(kind, key, value).tell(self.graph)

    def restart(self) -> Plan:
        """A new agent; applies what it plans."""
        plan = self.reconcile()
        self.kernel.run(plan)
        return plan

    def reconcile(self) -> Plan:
        self.dataplane = Dataplane(self.graph, self.options)
        self.graph.flush(together=True)
        return self.dataplane.reconcile(dump_kernel(self.kernel.sets, self.kernel.tables))

    def plans(self) -> Iterator[Plan]:
        """What the room would execute, one after the other."""
        while True:
            delta = self.graph.flush()
            if delta.empty and not self.graph.pending:
                return
            yield self.dataplane.change(delta)

    def after(self, *, down: Family, fault: Exception, restart: bool) -> Iterator[Plan]:
        """What the room would execute; after a restart, one that cannot read a family."""
        if not restart:
            yield from self.plans()
            return
        self.dataplane = Dataplane(self.graph, self.options)
        self.graph.flush(together=True)
        dump = dump_kernel(self.kernel.sets, self.kernel.tables, skip={down: fault})
        yield self.dataplane.reconcile(dump)

    def revive(self) -> Plan:
        """What the same agent executes when all can be read again."""
        self.graph.flush(together=True)
        return self.dataplane.reconcile(dump_kernel(self.kernel.sets, self.kernel.tables))

    def check(self, objects: churn.Objects) -> None:
        """Equal to scratch, numbers aside."""
        fresh = graph_of(objects.world(), churn.NODE)
        numbers = self.dataplane.numbers.used
        used = {k: numbers[k] for k in classes_in_use(fresh) if k in numbers}
        want = render_graph(fresh, self.options, used)
        have = self.kernel.sets.dump()
        for name, (_, members) in want.sets.items():
            assert have[name].members == members, name
        for family in FAMILIES:
            chains = self.kernel.tables.dump("mangle", family).chains
            for name, chain in want.rulesets[family].chains.items():
                if not name.startswith(("KNP-TREE", "KNP-OVER")):
                    assert chains[name] == chain, name


def node_at(dice: churn.Dice, field_mask: int) -> Node:
    objects = churn.Objects()
    for event in dice.fill(3):
        event.happen(objects)
    return Node(objects, churn.options_of(field_mask))


def news(dice: churn.Dice, objects: churn.Objects, count: int) -> list[churn.Event]:
    after = objects.copy()
    out = []
    for _ in range(count):
        out.append(dice.event(after))
        out[-1].happen(after)
    return out


def seen(worlds: list[churn.Objects], done: list[str], events: list[churn.Event]) -> str:
    return f"{done[-1]}\nevents {events}\nbefore {worlds[0]}\nsteps\n" + "\n".join(done)


def step_by_step(node: Node, events: list[churn.Event]) -> Counter[str]:
    """Apply events and walk the flows after every step; returns what moving addresses lost."""
    worlds = orders(node.objects, events)
    watch = Watch.between(worlds, node.options)
    watch.look(node.kernel, "the start")
    for event in events:
        event.tell(node.graph)
    done: list[str] = []
    for plan in node.plans():
        watch.moving = moving(plan)
        for step in node.kernel.steps(plan):
            done.append(step)
            watch.look(node.kernel, seen(worlds, done, events))
    node.check(worlds[-1])
    watch.moving = set()
    for step in node.kernel.steps(node.dataplane.collect()):
        watch.look(node.kernel, f"garbage: {step}")
    node.check(worlds[-1])
    return watch.lost


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_state_on_the_way_is_wrong(seed: int, count: int, field_mask: int) -> None:
    dice = churn.Dice(seed * 10 + count)
    node = node_at(dice, field_mask)
    step_by_step(node, news(dice, node.objects, count))


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_anywhere_it_recovers_without_a_wrong_state(seed: int, field_mask: int) -> None:
    dice = churn.Dice(7000 + seed)
    node = node_at(dice, field_mask)
    count = dice.random.randrange(1, 4)
    events = news(dice, node.objects, count)
    worlds = orders(node.objects, events)
    for event in events:
        event.tell(node.graph)
    prefixes = [node.kernel.copy()]
    way: set[bytes] = set()
    for plan in node.plans():
        way |= moving(plan)
        prefixes.extend(node.kernel.copy() for _ in node.kernel.steps(plan))
    watch = Watch.between(worlds, node.options)
    for number in dice.random.sample(range(len(prefixes)), min(4, len(prefixes))):
        # The next agent may find that all of it was taken back meanwhile, or any part.
        final = dice.random.choice(worlds)
        node.know(final)
        node.kernel = prefixes[number].copy()
        plan = node.reconcile()
        watch.moving = moving(plan) | way
        done = [f"killed after step {number}"]
        for step in node.kernel.steps(plan):
            done.append(step)
            watch.look(node.kernel, seen(worlds, done, events))
        node.check(final)
        watch.moving = set()
        watch.look(node.kernel, "the end")


# -- the hard cases, one by one -------------------------------------------------------------------


def pod(name: str, last: int, *, created: int = 0, **labels: str) -> churn.Event:
    made = Endpoint(
        key=ObjectKey("a", name),
        uid=name,
        labels=tuple(sorted(labels.items())),
        node=churn.NODE,
        addresses=(parse_address(f"10.0.1.{last}"), parse_address(f"fd00:0:1::{last}")),
        created=f"2026-01-01T00:00:{created:02d}Z",
    )
    return churn.Event("pods", made.key, made)


def policy(name: str, subject: make.Json, types: str, **rules: list[make.Json]) -> churn.Event:
    made = compile_policy(
        decode(
            NETWORK_POLICY, make.policy(f"a/{name}", subject, types=types.split(), **rules)
        ).value
    )
    return churn.Event("policies", made.key, made)


def space(team: str) -> churn.Event:
    return churn.Event("namespaces", "a", Namespace(name="a", labels=(("team", team),)))


def gone(event: churn.Event) -> churn.Event:
    return churn.Event(event.kind, event.key, None)


def role(name: str) -> make.Json:
    return make.selector(role=name)


#: Whoever is new may not speak, and is the only one that q would hear.
MUTE = policy("mute", role("new"), "Egress")
HEARD = [make.ingress(make.pods(role="new"))]
HEARS = policy("hears", role("q"), "Ingress", ingress=HEARD)
Q = pod("q", 5, role="q")
P = pod("p", 6, role="p")
#: p may call pods of namespaces x, q hears those of namespaces y.
CALLS_X = policy("calls", role("p"), "Egress", egress=[make.egress(make.namespaces(team="x"))])
HEARS_Y = policy("heard", role("q"), "Ingress", ingress=[make.ingress(make.namespaces(team="y"))])
#: All crossed pods hear everybody and may not speak; y hears nobody by another policy.
CROSS = policy("cross", make.selector(cross="1"), "Ingress Egress", ingress=[make.ingress()])
CLOSED = policy("closed", role("y"), "Ingress")
X, Y = pod("x", 2, role="x", cross="1"), pod("y", 3, role="y", cross="1")
OLD, NEW = pod("p", 4, role="old"), pod("p", 4, role="new")
OTHER = pod("other", 4, created=9, role="new")

CASES = {
    "a pod changes what it may say and who hears it": (
        [MUTE, HEARS, OLD, Q],
        [NEW],
    ),
    "and back": ([MUTE, HEARS, NEW, Q], [OLD]),
    "a pod's address goes to another": (
        [MUTE, HEARS, OLD, Q],
        [OTHER, gone(OLD)],
    ),
    "an address that nobody may reach goes to another": (
        [policy("shut", {}, "Ingress"), OLD, Q],
        [OTHER],
    ),
    "a namespace changes who hears its pods and whom they may call": (
        [space("x"), CALLS_X, HEARS_Y, P, Q],
        [space("y")],
    ),
    "and its other way round": ([space("y"), CALLS_X, HEARS_Y, P, Q], [space("x")]),
    "another pod claims an address": ([MUTE, HEARS, OLD, Q], [OTHER]),
    "an address falls back to who had it": (
        [MUTE, HEARS, NEW, pod("o", 4, created=9, role="old"), Q],
        [pod("o", 6, created=9, role="old")],
    ),
    "a policy that denied one direction and allowed the other goes": (
        [CROSS, CLOSED, X, Y],
        [gone(CROSS)],
    ),
    "or comes": ([CLOSED, X, Y], [CROSS]),
    "a policy is renamed": (
        [CROSS, X, Y],
        [
            gone(CROSS),
            policy("c2", make.selector(cross="1"), "Ingress Egress", ingress=[make.ingress()]),
        ],
    ),
    "a policy selects others": (
        [CROSS, CLOSED, X, Y],
        [policy("cross", role("x"), "Ingress Egress", ingress=[make.ingress()])],
    ),
}


@pytest.mark.parametrize("field_mask", [churn.WIDE, churn.NARROW], ids=hex)
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_hard_case(case: str, hold: bool, field_mask: int) -> None:
    """In any order of iteration: the same changes under many names."""
    before, events = CASES[case]
    objects = churn.Objects()
    for event in before:
        event.happen(objects)
    options = churn.options_of(field_mask)
    if not hold:
        options = replace(options, hold_ranges=())
    node = Node(objects, options)
    step_by_step(node, events)


@pytest.mark.parametrize(
    "events",
    [
        [pod("p", 4, role="new", tier="1")],
        [policy("more", {}, "Egress", egress=[make.egress()])],
        [gone(HEARS), policy("renamed", role("q"), "Ingress", ingress=HEARD)],
        [
            policy(
                "hears", make.selector(make.term("role", "In", "q", "r")), "Ingress", ingress=HEARD
            )
        ],
    ],
    ids=["another label", "one more policy", "renamed", "another selector"],
)
def test_what_takes_nothing_loses_nothing(events: list[churn.Event]) -> None:
    """Not even for the pods whose class changes by it."""
    objects = churn.Objects()
    for event in (HEARS, policy("tier", make.selector(tier="1"), "Egress", egress=[{}]), NEW, Q):
        event.happen(objects)
    lost = step_by_step(Node(objects, churn.options_of(churn.WIDE)), events)
    assert not lost
