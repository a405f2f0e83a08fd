"""The fingerprint of a table changes with its rules, and with nothing else."""

import subprocess

import pytest

from netpol.kernel.drivers import TableTransaction, Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.nft_generation import generation
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import ChainName
from netpol.model.net import Family
from netpol.model.ruleset import Drop, Hook, Return, Rule

pytestmark = pytest.mark.kernel

CHAIN = ChainName("KNP-T")


def run(space, *args):
    subprocess.run(["ip", "netns", "exec", space, *args], check=True, capture_output=True)


@pytest.mark.parametrize("variant", list(Variant))
def test_a_fingerprint_follows_the_rules_and_not_the_counters(space, variant):
    tables = RestoreTables(variant, netns=space)

    def now():
        return tables.fingerprint("mangle", Family.V4)

    def write(rule, **hooks):
        tables.apply(TableTransaction("mangle", Family.V4, replace={CHAIN: (rule,)}, **hooks))

    empty = now()
    write(Rule(Return()), hooks={Hook.OUTPUT: CHAIN})
    first = now()
    assert first != empty
    run(space, "ping", "-c", "1", "-W", "1", "127.0.0.1")
    assert now() == first
    write(Rule(Drop()))
    assert now() != first
    write(Rule(Return()))
    assert now() == first
    run(space, f"iptables-{variant}", "-t", "mangle", "-F", "KNP-T")
    assert now() not in (first, empty)


def test_another_programs_change_elsewhere_costs_a_look_but_is_no_change(space):
    tables = RestoreTables(Variant.NFT, netns=space)
    before = tables.fingerprint("mangle", Family.V4)
    number = in_netns(space, generation)
    run(space, "iptables-nft", "-A", "INPUT", "-j", "ACCEPT")
    assert in_netns(space, generation) != number
    assert tables.fingerprint("mangle", Family.V4) == before
