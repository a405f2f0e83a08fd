"""The proxy's rules in the real tables of both variants, beside policy's; packets are the guest's matter.

`-m ipvs` needs xt_ipvs, which comes with IPVS: the machine's kernel may have none. The rules with it are
tried in a test of their own, which says so; all others are loaded without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

import pytest

from netpol.enforce.dataplane import Dataplane
from netpol.enforce.kernel_state import dump_kernel, execute
from netpol.kernel.drivers import (
    CreateSet,
    SetTransaction,
    TableDriver,
    TableError,
    TableTransaction,
)
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.model.ids import POLICY, SERVICES, ChainName
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import Chain, Hook, IpvsSends, Ruleset
from netpol.render.node import graph_of
from netpol.render.options import RenderOptions
from proxy import names
from proxy.rules import RuleOptions, rulesets
from tests import builders as make
from tests import engine
from tests.kernel.test_table_drivers import MAKERS, Maker

pytestmark = pytest.mark.kernel

WANTED = rulesets(RuleOptions(0x1FFF))


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


@pytest.fixture
def service_sets(space: str) -> Iterator[NetlinkSets]:
    sets = in_netns(space, lambda: NetlinkSets(mark_mask=0x1FFF, owner=SERVICES))
    sets.apply(SetTransaction(tuple(CreateSet(spec) for spec in names.SPECS.values())))
    yield sets
    sets.close()


def without_ipvs(want: Ruleset) -> Ruleset:
    chains: Mapping[ChainName, Chain] = {
        name: tuple(r for r in chain if not any(isinstance(m, IpvsSends) for m in r.matches))
        for name, chain in want.chains.items()
    }
    return replace(want, chains=chains)


def put(tables: TableDriver, table: str, family: Family, want: Ruleset) -> None:
    state = tables.dump(table, family).hooks
    tables.apply(TableTransaction(table, family, want.chains, (), want.hooks, state))


def test_everything_but_xt_ipvs_loads_and_reads_back(
    space: str, maker: Maker, service_sets: NetlinkSets
) -> None:
    with ExitStack() as stack:
        tables = maker(space, SERVICES, stack)
        left_out = 0
        for (table, family), whole in WANTED.items():
            want = without_ipvs(whole)
            left_out += sum(len(whole.chains[n]) - len(want.chains[n]) for n in want.chains)
            put(tables, table, family, want)
            dump = tables.dump(table, family)
            assert dict(dump.chains) == dict(want.chains)
            assert {h: s.jumps for h, s in dump.hooks.items()} == {
                hook: ((1, chain),) for hook, chain in want.hooks.items()
            }
        assert left_out == len(FAMILIES), "one rule of each family's nat has -m ipvs"
        references = {name: d.references for name, d in service_sets.dump().items()}
        assert all(references.values()), f"a set that no rule asks: {references}"


def test_rules_with_xt_ipvs_load_where_the_kernel_has_it(
    space: str, maker: Maker, service_sets: NetlinkSets
) -> None:
    assert service_sets.headers()
    with ExitStack() as stack:
        tables = maker(space, SERVICES, stack)
        for family in FAMILIES:
            want = WANTED["nat", family]
            try:
                put(tables, "nat", family, want)
            except TableError as e:
                without = without_ipvs(want)
                put(tables, "nat", family, without)  # so it was that one rule
                pytest.skip(f"no xt_ipvs in this kernel, see tests/uml: {e}")
            assert dict(tables.dump("nat", family).chains) == dict(want.chains)


def test_beside_policy_each_has_its_place(
    space: str, maker: Maker, sets: NetlinkSets, service_sets: NetlinkSets
) -> None:
    with ExitStack() as stack:
        policy, services = maker(space, POLICY, stack), maker(space, SERVICES, stack)
        for (table, family), want in WANTED.items():
            put(services, table, family, without_ipvs(want))
        world = engine.build(
            make.world(
                make.node("n1", "172.18.0.2", cidrs=("10.244.1.0/24",)),
                make.namespace("a"),
                make.pod("a/p", ip="10.244.1.9"),
                make.policy("a/shut", make.selector(), types=["Ingress", "Egress"]),
            )
        )
        dataplane = Dataplane(graph_of(world, "n1"), RenderOptions(ipvs_services=()))
        execute(dataplane.reconcile(dump_kernel(sets, policy)), sets, policy)
        assert not dataplane.drift(dump_kernel(sets, policy))
        for family in FAMILIES:
            first = policy.dump("mangle", family).hooks[Hook.OUTPUT]
            second = services.dump("mangle", family).hooks[Hook.OUTPUT]
            assert [at for at, _ in first.jumps] == [1]
            assert [at for at, _ in second.jumps] == [second.place] == [2]
        # Policy's clean slate takes nothing of the services', nor its sets.
        assert not [n for n in sets.headers() if SERVICES.owns(n)]
        assert set(service_sets.headers()) == set(names.SPECS)
        before = policy.fingerprint("mangle", Family.V4)
        shorter = {ChainName("KNP-SVC-OWN"): ()}
        services.apply(TableTransaction("mangle", Family.V4, shorter))
        assert policy.fingerprint("mangle", Family.V4) == before
