"""Plans of Services: the choice of endpoints against a slow twin, and the Tracker against planning anew.

The twin is written from what the policies mean, one endpoint and one client at a time, and shares nothing
with the engine but the values that go in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import Prefix, parse_address, parse_prefix
from netpol.model.objects import (
    ZONE_LABEL,
    EndpointSlice,
    Ingress,
    Node,
    Service,
    ServicePort,
    SliceEndpoint,
)
from proxy.addresses import special
from proxy.changes import API_SERVICE, Tracker
from proxy.plan import ProxyOptions, plan_service
from proxy.rows import Action, Kind, Reason, Refused, ServicePlan, ServiceRow

HERE, ZONE = "here", "z1"
KEY = ObjectKey("ns", "web")

# -- the choice of endpoints --------------------------------------------------------------------

hints = st.lists(st.sampled_from(("z1", "z2")), max_size=2, unique=True).map(tuple)
nodes_hinted = st.lists(st.sampled_from((HERE, "there")), max_size=2, unique=True).map(tuple)
ends = st.builds(
    SliceEndpoint,
    addresses=st.integers(1, 5).map(lambda n: (bytes((10, 1, 0, n)),)),
    node=st.sampled_from(("", HERE, "there")),
    pod=st.none(),
    ready=st.booleans(),
    serving=st.booleans(),
    terminating=st.booleans(),
    for_zones=st.one_of(st.just(()), hints, st.just(("z1",)), st.just(("z2",))),
    for_nodes=st.one_of(st.just(()), nodes_hinted, st.just((HERE,))),
)
end_lists = st.lists(ends, max_size=6, unique_by=lambda e: e.addresses)


def twin(found: list[SliceEndpoint], zone: str, *, local: bool) -> tuple[set[bytes], str]:
    """Who takes a new connection of a client under a policy, and what it meets else."""

    def may(e: SliceEndpoint) -> bool:
        """Whether the endpoint could serve anybody, anywhere."""
        return e.ready or (e.serving and e.terminating)

    all_ready = [e for e in found if e.ready]
    if local:
        reachable = [e for e in found if e.node == HERE]
    elif (
        all_ready
        and all(e.for_nodes for e in all_ready)
        and any(HERE in e.for_nodes for e in all_ready)
    ):
        reachable = [e for e in found if not e.ready or HERE in e.for_nodes]
    elif (
        all_ready
        and all(e.for_zones for e in all_ready)
        and any(zone in e.for_zones for e in all_ready)
    ):
        reachable = [e for e in found if not e.ready or zone in e.for_zones]
    else:
        reachable = list(found)
    chosen = {e.addresses[0] for e in reachable if e.ready}
    chosen = chosen or {e.addresses[0] for e in reachable if may(e)}
    if chosen:
        return chosen, "forward"
    return set(), "drop" if any(map(may, found)) else "reject"


@given(
    found=end_lists,
    cut=st.integers(0, 6),
    zone=st.sampled_from(("", "z1", "z2")),
    internal=st.booleans(),
    external=st.booleans(),
    protocol=st.sampled_from((Protocol.TCP, Protocol.UDP)),
)
@settings(max_examples=400, deadline=None)
def test_every_client_meets_what_the_policies_mean(  # noqa: PLR0917 - Hypothesis fills them by name
    found, cut, zone, internal, external, protocol
):
    service = Service(
        key=KEY,
        type="NodePort",
        cluster_ips=(bytes((10, 96, 0, 1)),),
        ports=(ServicePort("", protocol, 80, 8080, 30080),),
        internal_local=internal,
        external_local=external,
    )
    slices = [_slice(n, part, protocol) for n, part in enumerate((found[:cut], found[cut:]))]
    node = Node(
        name=HERE, addresses=(bytes((192, 0, 2, 1)),), labels=((ZONE_LABEL, zone),) if zone else ()
    )
    plan = plan_service(service, slices, node, ProxyOptions())
    rows = {row.kind: row for row in plan.rows}
    assert set(rows) == {Kind.CLUSTER_IP, Kind.NODE_PORT}
    _agrees(rows[Kind.CLUSTER_IP], twin(found, zone, local=internal))
    _agrees(rows[Kind.NODE_PORT], twin(found, zone, local=external))
    # Pods and the node use the outside address as if its policy were Cluster, the ClusterIP as it is.
    inside, _ = twin(found, zone, local=False)
    assert _live(rows[Kind.NODE_PORT].local_client_backends) == inside
    assert rows[Kind.CLUSTER_IP].local_client_backends == rows[Kind.CLUSTER_IP].backends
    _unused_is_complete(plan, found, rows)


def _agrees(row: ServiceRow, wanted: tuple[set[bytes], str]) -> None:
    chosen, action = wanted
    assert _live(row.backends) == chosen
    assert row.action == action
    drains = {b.address for b in row.backends if not b.weight}
    assert not drains & chosen
    assert not drains or (row.action is Action.FORWARD and row.protocol is Protocol.TCP)


def _live(backends: Any) -> set[bytes]:
    return {b.address for b in backends if b.weight}


def _unused_is_complete(
    plan: ServicePlan, found: list[SliceEndpoint], rows: dict[Kind, ServiceRow]
) -> None:
    """Every endpoint that some client does not reach is named with a reason, and no other one."""
    missing = {
        e.addresses[0]
        for e in found
        for backends in (rows[Kind.CLUSTER_IP].backends, rows[Kind.NODE_PORT].backends)
        if e.addresses[0] not in _live(backends)
    }
    named = {u.address for u in plan.unused}
    assert named <= {e.addresses[0] for e in found}
    never = {
        e.addresses[0]
        for e in found
        if not any(
            e.addresses[0] in _live(b)
            for row in rows.values()
            for b in (row.backends, row.local_client_backends)
        )
    }
    assert never <= named <= missing
    assert all(u.why for u in plan.unused)


def _slice(number: int, part: list[SliceEndpoint], protocol: Protocol) -> EndpointSlice:
    return EndpointSlice(
        key=ObjectKey("ns", f"web-{number}"),
        service=KEY,
        address_type="IPv4",
        ports=(("", protocol, 8080),),
        endpoints=tuple(part),
    )


# -- the Tracker --------------------------------------------------------------------------------

#: Few addresses and ports, so that Services get in each other's way.
SHARED = tuple(map(parse_address, ("203.0.113.1", "203.0.113.2", "192.0.2.1", "192.0.2.2")))
CLUSTER_IPS = tuple(map(parse_address, ("10.96.0.1", "10.96.0.2", "203.0.113.1")))
NAMES = tuple(ObjectKey(ns, name) for ns in ("a", "b") for name in ("x", "y"))
ALL = (*NAMES, API_SERVICE)

services = st.builds(
    Service,
    key=st.sampled_from(NAMES),
    uid=st.sampled_from(("u1", "u2")),
    type=st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer")),
    cluster_ips=st.sampled_from(CLUSTER_IPS).map(lambda a: (a,)),
    ports=st.lists(
        st.builds(
            ServicePort,
            name=st.sampled_from(("", "p")),
            protocol=st.just(Protocol.TCP),
            port=st.sampled_from((80, 81)),
            target=st.just(8080),
            node_port=st.sampled_from((0, 30080)),
        ),
        min_size=1,
        max_size=2,
        unique_by=lambda p: p.name,
    ).map(tuple),
    external_ips=st.lists(st.sampled_from(SHARED), max_size=2, unique=True).map(tuple),
    ingress=st.lists(st.sampled_from(SHARED).map(Ingress), max_size=1).map(tuple),
    external_local=st.booleans(),
    headless=st.sampled_from((False,) * 7 + (True,)),
    created=st.sampled_from(("", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")),
)
slices = st.builds(
    EndpointSlice,
    key=st.builds(ObjectKey, st.sampled_from(("a", "b", "default")), st.sampled_from("st")),
    service=st.sampled_from(ALL),
    ports=st.just((("", Protocol.TCP, 8080),)),
    endpoints=st.lists(
        st.builds(
            SliceEndpoint,
            addresses=st.sampled_from((*SHARED[:2], b"\x0a\x01\x00\x01")).map(lambda a: (a,)),
            node=st.sampled_from((HERE, "there")),
            pod=st.none(),
            ready=st.booleans(),
            serving=st.just(True),
            terminating=st.just(False),
            for_zones=st.sampled_from(((), ("z1",), ("z2",))),
        ),
        max_size=2,
    ).map(tuple),
)
nodes = st.builds(
    Node,
    name=st.sampled_from((HERE, "there")),
    labels=st.sampled_from(((), ((ZONE_LABEL, "z1"),), ((ZONE_LABEL, "z2"),))),
    addresses=st.lists(st.sampled_from(SHARED), max_size=2, unique=True).map(tuple),
    pod_cidrs=st.sampled_from(((), (parse_prefix("203.0.113.0/31"),))),
)
options = st.builds(
    ProxyOptions,
    scheduler=st.sampled_from(("rr", "lc")),
    external_cidrs=st.sampled_from(((), (parse_prefix("203.0.113.0/24"),))),
    gateways=st.sampled_from(((), (SHARED[1],))),
    pod_ranges=st.sampled_from(((), (parse_prefix("203.0.113.0/31"),))),
    nodeport_cidrs=st.sampled_from(((), (parse_prefix("198.51.100.0/24"),))),
)
_STEPS = {
    "service": services,
    "no service": services,
    "slice": slices,
    "no slice": slices,
    "node": nodes,
    "no node": nodes,
    "options": options,
    "flush": st.none(),
}
#: Services come often, and are looked at often; options change seldom.
_OFTEN = (*_STEPS, *("service",) * 8, *("flush",) * 6, "no service", "slice", "slice", "node")


@st.composite
def histories(draw: Any) -> list[tuple[str, Any]]:
    """What happens to a world of a few Services that want the same addresses."""
    first = [("node", Node(name=HERE, addresses=SHARED[2:3], labels=((ZONE_LABEL, "z1"),)))]
    whats = draw(st.lists(st.sampled_from(_OFTEN), min_size=5, max_size=40))
    return first + [(what, draw(_STEPS[what])) for what in whats]


class Told:
    """What a Tracker was told, and what it said."""

    def __init__(self) -> None:
        self.options = ProxyOptions()
        self.tracker = Tracker(HERE, self.options)
        self.held: dict[str, dict[Any, Any]] = {"service": {}, "slice": {}, "node": {}}
        self.heard: dict[ObjectKey, ServicePlan] = {}

    def tell(self, what: str, value: Any) -> None:
        if what == "flush":
            self.flush()
            return
        if what == "options":
            self.options = value
            self.tracker.set_options(value)
            return
        kind = what.removeprefix("no ")
        key = value.name if kind == "node" else value.key
        held = self.held[kind]
        before = held.get(key)
        after = value if what == kind else None
        if (kind, key, after) != ("node", HERE, None):  # which stays as it was known last
            held.pop(key, None)
        if after is not None:
            held[key] = after
        {"service": self.tracker.service, "slice": self.tracker.slice, "node": self.tracker.node}[
            kind
        ](before, after)

    def flush(self) -> None:
        for key, plan in self.tracker.flush().items():
            assert plan != self.heard.get(key), "said again"
            if plan is None:
                del self.heard[key]
            else:
                self.heard[key] = plan
        assert not self.tracker.pending
        assert self.heard == self.tracker.plans


def anew(told: Told) -> dict[ObjectKey, ServicePlan]:
    """All plans from nothing, by passes over everything."""
    all_services = list(told.held["service"].values())
    all_slices = list(told.held["slice"].values())
    node = told.held["node"].get(HERE, Node(name=HERE))
    plans = {}
    for service in all_services:
        mine = [s for s in all_slices if s.service == service.key]
        plan = plan_service(
            service, mine, node, told.options, refusal=lambda a: refusal(told, a), explain=False
        )
        if plan.rows or plan.refused or plan.health_port:
            plans[service.key] = plan
    by_age = sorted(all_services, key=lambda s: (s.created or "9", s.key))
    owners: dict[Any, ObjectKey] = {}
    for service in by_age:
        for row in plans[service.key].rows if service.key in plans else ():
            owners.setdefault(row.key, service.key)
    return {key: settled(plan, owners) for key, plan in plans.items()}


def settled(plan: ServicePlan, owners: dict[Any, ObjectKey]) -> ServicePlan:
    lost = [row for row in plan.rows if owners[row.key] != plan.service]
    refused = plan.refused
    for row in lost:
        what = {Kind.NODE_PORT: "NodePort", Kind.CLUSTER_IP: "ClusterIP"}.get(row.kind, "address")
        address = ".".join(map(str, row.address))
        text = (
            f"{what} {address}:{row.port}/TCP is not served: it is Service "
            f"{owners[row.key]}'s, the older one"
        )
        refused += (Refused(Reason.ADDRESS_IN_USE, text),)
    rows = tuple(row for row in plan.rows if row not in lost)
    return replace(plan, rows=rows, refused=refused)


def refusal(told: Told, address: bytes) -> str | None:
    """By looking at everything."""
    words = special(address)
    if words is not None:
        return words
    exact: list[str] = []
    wide: list[str] = []
    for node in told.held["node"].values():
        if address in node.addresses:
            exact.append(f"an address of node {node.name}")
        wide += [
            f"the pod range of node {node.name}" for b in node.pod_cidrs if b.contains(address)
        ]
    servers = [s for s in told.held["slice"].values() if s.service == API_SERVICE]
    if any(address in e.addresses for s in servers for e in s.endpoints):
        exact.append("the API server's address")
    wide += ["a pod range" for b in told.options.pod_ranges if b.contains(address)]
    if address in told.options.gateways:
        exact.append("a gateway's address")
    if exact:
        return f"it is {min(exact)}"
    if wide:
        return f"it lies in {min(wide)}"
    takers = [s.key for s in told.held["service"].values() if address in s.cluster_ips]
    return f"it is the ClusterIP of {min(takers)}" if takers else None


@given(history=histories())
@settings(max_examples=300, deadline=None)
def test_following_events_ends_where_planning_anew_does(history):
    told = Told()
    for what, value in history:
        told.tell(what, value)
    told.flush()
    assert told.heard == anew(told)
    for key in told.held["service"]:
        explained = told.tracker.explained(key)
        assert explained is not None
        heard = told.heard.get(key)
        if heard is None:
            assert explained.rows == explained.refused == ()
        else:
            assert replace(explained, unused=()) == heard


@given(history=histories())
@settings(max_examples=100, deadline=None)
def test_no_two_services_have_the_same_row(history):
    told = Told()
    for what, value in history:
        told.tell(what, value)
    told.flush()
    keys = [row.key for plan in told.heard.values() for row in plan.rows]
    assert len(keys) == len(set(keys))


# -- keys ---------------------------------------------------------------------------------------

odd = st.text(st.sampled_from("a./:-"), min_size=1, max_size=4)


@given(one=st.tuples(odd, odd, odd), other=st.tuples(odd, odd, odd))
@settings(max_examples=300, deadline=None)
def test_names_with_odd_characters_do_not_collide(one, other):
    """Two Services and ports that read alike when joined ("a:b" + "c", "a" + "b:c") stay two."""
    tracker = Tracker(HERE)
    made = {}
    for number, (ns, name, port) in enumerate(dict.fromkeys((one, other))):
        key = ObjectKey(ns, name)
        made[key, port] = number
        ports = [ServicePort(p, Protocol.TCP, 80 + n, 1) for (k, p), n in made.items() if k == key]
        piece = EndpointSlice(
            key=ObjectKey(ns, f"{name}-{port}"),
            service=key,
            ports=((port, Protocol.TCP, 1000 + number),),
            endpoints=(SliceEndpoint((b"\x0a\x01\x00\x01",), HERE, None, True, True, False),),
        )
        service = Service(
            key=key, cluster_ips=(bytes((10, 96, 0, number + 1)),), ports=tuple(ports)
        )
        tracker.service(None, service)
        tracker.slice(None, piece)
    plans = tracker.flush()
    found = {
        (key, row.port_name): [b.port for b in row.backends]
        for key, plan in plans.items()
        if plan is not None
        for row in plan.rows
    }
    assert found == {who: [1000 + number] for who, number in made.items()}


def test_a_prefix_of_the_whole_family_is_found():
    tracker = Tracker(HERE, ProxyOptions(pod_ranges=(Prefix(bytes(4), 0),)))
    service = Service(
        key=KEY,
        cluster_ips=(b"\x0a\x60\x00\x01",),
        external_ips=(SHARED[0],),
        ports=(ServicePort("", Protocol.TCP, 80, 80),),
    )
    tracker.service(None, service)
    plan = tracker.flush()[KEY]
    assert plan is not None
    assert [r.kind for r in plan.rows] == [Kind.CLUSTER_IP]
    assert "it lies in a pod range" in plan.refused[0].message
