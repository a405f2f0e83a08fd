"""What python-iptables' traps would break, and that the driver does by itself what it says it does."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netpol.kernel import netns
from netpol.kernel.drivers import (
    CreateSet,
    ForeignRule,
    SetTransaction,
    TableError,
    TableTransaction,
    Variant,
)
from netpol.kernel.iptc_tables import IptcTables
from netpol.kernel.netns import in_netns
from netpol.kernel.rule_text import canonical
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables, legacy_tables
from netpol.model.ids import ChainName
from netpol.model.net import FAMILIES, Family
from netpol.model.ruleset import Chain, Drop, Hook, Log, Return, Rule
from tests.kernel import forms
from tests.kernel.forms import CHAIN_A, CHAIN_B

pytestmark = pytest.mark.kernel


@pytest.fixture
def restore(space: str) -> RestoreTables:
    return RestoreTables(Variant.LEGACY, netns=space)


@pytest.fixture
def tables(space: str, restore: RestoreTables) -> Iterator[IptcTables]:
    driver = in_netns(space, lambda: IptcTables(restore, lock_wait_s=1, in_process_rules_max=1000))
    yield driver
    driver.close()


def put(family: Family = Family.V4, **chains: Chain) -> TableTransaction:
    named = {ChainName(name.replace("_", "-")): rules for name, rules in chains.items()}
    return TableTransaction("mangle", family, named)


def shell(space: str, *args: str) -> str:
    done = in_netns(
        space, lambda: subprocess.run(args, capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
def test_every_form_is_built_and_read_in_process(
    sets: NetlinkSets, tables: IptcTables, restore: RestoreTables, family: Family
) -> None:
    sets.apply(SetTransaction(tuple(CreateSet(spec) for spec in forms.set_specs(family))))
    rules = forms.rules(family)
    tables.apply(put(family, KNP_A=rules, KNP_B=()))
    assert tables.dump("mangle", family).chains[CHAIN_A] == tuple(map(canonical, rules))
    assert tables.delegated == 0
    assert restore.dump("mangle", family) == tables.dump("mangle", family)
    by_iptc = restore.save_text("mangle", family)
    restore.apply(put(family, KNP_A=rules))

    def of_rules(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("-A")]

    assert of_rules(restore.save_text("mangle", family)) == of_rules(by_iptc)
    # And what the tool wrote, which differs in bytes that say nothing.
    assert tables.dump("mangle", family).chains[CHAIN_A] == tuple(map(canonical, rules))
    assert tables.delegated == 0


def test_only_the_table_in_use_comes_into_being(space: str, tables: IptcTables) -> None:
    tables.dump("mangle", Family.V4)
    tables.counters("mangle", Family.V4)
    assert in_netns(space, lambda: legacy_tables(Family.V4)) == set()
    tables.apply(put(KNP_A=(Rule(Return()),)))
    assert in_netns(space, lambda: legacy_tables(Family.V4)) == {"mangle"}
    assert in_netns(space, lambda: legacy_tables(Family.V6)) == set()


def test_many_log_prefixes_do_not_hurt_the_process(tables: IptcTables) -> None:
    rules = tuple(Rule(Log(n, f"KNP|D|I|{n:055}")) for n in range(400))
    for _ in range(3):
        tables.apply(put(KNP_A=rules))
    assert tables.dump("mangle", Family.V4).chains[CHAIN_A] == rules
    assert tables.delegated == 0


def test_descriptor_1_is_never_redirected(
    tables: IptcTables, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            written += os.write(1, b"x")
            time.sleep(0.0002)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            tables.apply(put(KNP_A=(Rule(Log(1, "p"), (), "c"),) * 5))
            tables.dump("mangle", Family.V4)
    finally:
        stop.set()
        writer.join()
    assert capfd.readouterr().out == "x" * written


def test_foreign_rules_read_as_by_restore(
    space: str, tables: IptcTables, restore: RestoreTables
) -> None:
    tables.apply(put(KNP_A=(Rule(Drop()),)))
    for args in (
        ("-A", "KNP-A", "-p", "tcp", "--sport", "5", "-j", "ACCEPT"),
        ("-A", "KNP-A", "-m", "length", "--length", "9"),
        ("-A", "KNP-A", "-o", "eth0", "-j", "RETURN"),
        ("-A", "FORWARD", "-i", "eth0", "-j", "KNP-A"),
        ("-A", "FORWARD", "-j", "KNP-A"),
    ):
        shell(space, "iptables-legacy", "-w", "-t", "mangle", *args)
    dump = tables.dump("mangle", Family.V4)
    assert dump == restore.dump("mangle", Family.V4)
    assert [type(rule) for rule in dump.chains[CHAIN_A]] == [Rule] + 3 * [ForeignRule]
    assert dump.hooks[Hook.FORWARD].jumps == ((2, CHAIN_A),)
    assert tables.delegated == 1


def test_a_word_that_reads_as_a_negation_is_left_to_restore(tables: IptcTables) -> None:
    rules = (Rule(Drop(), (), "!"), Rule(Log(1, "!")))
    tables.apply(put(KNP_A=rules))
    assert tables.delegated == 1
    assert tables.dump("mangle", Family.V4).chains[CHAIN_A] == rules


@pytest.mark.parametrize("which", ["iptc", "restore"])
def test_a_held_lock_is_an_error_to_try_again(
    space: str, tables: IptcTables, tmp_path: Path, which: str
) -> None:
    driver = (
        tables if which == "iptc" else RestoreTables(Variant.LEGACY, netns=space, lock_wait_s=1)
    )
    with (tmp_path / "xtables.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TableError) as caught:
            driver.apply(put(KNP_A=()))
    assert caught.value.retryable
    driver.apply(put(KNP_A=()))


def test_other_writers_lose_nothing(space: str, tables: IptcTables, restore: RestoreTables) -> None:
    tables.apply(put(KNP_A=()))
    shell(space, "iptables-legacy", "-w", "-t", "mangle", "-N", "THEIRS")

    def foreign() -> None:
        for n in range(30):
            port = str(1000 + n)
            shell(
                space,
                *["iptables-legacy", "-w", "-t", "mangle", "-A", "THEIRS", "-p", "tcp", "--dport"],
                port,
            )

    writer = threading.Thread(target=foreign)
    writer.start()
    for n in range(60):
        tables.apply(put(KNP_A=(Rule(Drop()),) * (n % 3)))
    writer.join()
    assert restore.save_text("mangle", Family.V4).count("-A THEIRS") == 30


def test_counters_live_on_where_a_chain_is_not_replaced(
    space: str, tables: IptcTables, restore: RestoreTables
) -> None:
    tables.apply(
        TableTransaction(
            "mangle",
            Family.V4,
            {CHAIN_A: (Rule(Return()),), CHAIN_B: ()},
            hooks={Hook.OUTPUT: CHAIN_A},
        )
    )
    shell(space, "ping", "-c", "2", "-i", "0.002", "127.0.0.1")
    seen = tables.counters("mangle", Family.V4)
    assert seen[CHAIN_A][0][0] == 4  # requests and answers leave by OUTPUT
    tables.apply(put(KNP_B=(Rule(Drop()),)))
    assert tables.counters("mangle", Family.V4) == {**seen, CHAIN_B: ((0, 0),)}
    assert restore.counters("mangle", Family.V4) == tables.counters("mangle", Family.V4)


def test_two_drivers_of_one_process_keep_to_their_namespaces(
    space: str, tables: IptcTables, restore: RestoreTables
) -> None:
    second = f"{space}-b"
    netns.create(second)
    try:
        other = in_netns(second, lambda: IptcTables(RestoreTables(Variant.LEGACY, netns=second)))
        tables.apply(put(KNP_A=(Rule(Drop()),)))
        other.apply(put(KNP_B=(Rule(Return()),)))
        assert tables.dump("mangle", Family.V4).chains == {CHAIN_A: (Rule(Drop()),)}
        assert other.dump("mangle", Family.V4).chains == {CHAIN_B: (Rule(Return()),)}
        assert restore.dump("mangle", Family.V4) == tables.dump("mangle", Family.V4)
        other.close()
    finally:
        netns.delete(second)


def test_bulk_loads_go_through_restore(space: str, restore: RestoreTables) -> None:
    tables = in_netns(space, lambda: IptcTables(restore, in_process_rules_max=5))
    tables.apply(put(KNP_A=(Rule(Drop()),) * 5))
    assert tables.delegated == 0
    tables.apply(put(KNP_A=(Rule(Drop()),) * 5, KNP_B=(Rule(Drop()),)))
    assert tables.delegated == 1
    assert len(tables.dump("mangle", Family.V4).chains) == 2
    tables.close()
