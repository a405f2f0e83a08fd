"""What the real kernel refuses without saying whose it is, and an ip6tables that does not work."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from netpol.enforce.kernel_state import dump_kernel
from netpol.enforce.worker import PolicyRoom
from netpol.kernel.drivers import TableDriver, TableDump, TableError, TableTransaction, Variant
from netpol.kernel.iptc_tables import IptcTables
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import ChainName, Direction, ObjectKey
from netpol.model.net import FAMILIES, Family, host_prefix, parse_address
from netpol.model.ruleset import Jump, Rule
from netpol.policy.graph import Graph
from netpol.render import names
from netpol.render.options import UNKNOWN
from netpol.render.static import TABLE
from tests import builders as make
from tests.kernel.roomhost import Host, pod, policy, until
from tests.prop import churn

pytestmark = pytest.mark.kernel

POLICIES = 20
#: A start with searches, on a busy machine.
SEARCH_S = 30.0


class LoopTables:
    """A driver that makes some chains lead back to the root, which only the kernel finds out.

    Legacy then says "line N failed" of COMMIT (python-iptables: of none), nft of the line that enters.
    """

    def __init__(self, inner: TableDriver) -> None:
        self._inner = inner
        self.variant = inner.variant
        self.poisoned: set[ChainName] = set()
        self.errors: list[TableError] = []

    def apply(self, tx: TableTransaction) -> None:
        loop = Rule(Jump(names.tree_chain(Direction.INGRESS)))
        chains = {
            name: (*rules, loop) if name in self.poisoned and rules else rules
            for name, rules in tx.replace.items()
        }
        try:
            self._inner.apply(replace(tx, replace=chains))
        except TableError as e:
            self.errors.append(e)
            raise

    def dump(self, table: str, family: Family) -> TableDump:
        return self._inner.dump(table, family)

    def fingerprint(self, table: str, family: Family) -> str:
        return self._inner.fingerprint(table, family)

    def counters(self, table: str, family: Family) -> dict[ChainName, tuple[tuple[int, int], ...]]:
        return self._inner.counters(table, family)


@pytest.fixture(params=["nft", "legacy", "iptc"])
def tables(request: pytest.FixtureRequest, space: str) -> Iterator[LoopTables]:
    with ExitStack() as stack:
        variant = Variant.NFT if request.param == "nft" else Variant.LEGACY
        inner: TableDriver = RestoreTables(variant, netns=space)
        if request.param == "iptc":
            restore = RestoreTables(variant, netns=space)
            # Even the first transaction in process.
            driver = in_netns(space, lambda: IptcTables(restore, in_process_rules_max=2000))
            stack.callback(driver.close)
            inner = driver
        yield LoopTables(inner)


def _names() -> list[str]:
    return [f"p{number:02}" for number in range(POLICIES)]


def _crowd(*peers: make.Json) -> list[churn.Event]:
    return [policy(name, name, *peers) for name in _names()]


def _pods() -> list[churn.Event]:
    return [pod(name, number + 2, role=name) for number, name in enumerate(_names())]


def _chain(graph: Graph, name: str) -> ChainName:
    identity = next(i for i in graph.active_policies if i.key == ObjectKey("a", name))
    return names.policy_chain(identity, Direction.INGRESS)


def _refused(room: PolicyRoom) -> list[str]:
    return sorted(k.name for k in room.dataplane.refusals.reasons())


def _classes(host: Host, family: Family) -> dict[str, int]:
    """The number of each pod in the map of what comes in; 0 without an entry."""
    members = host.maps()[names.class_map(Direction.INGRESS, family)]
    text = "10.0.1.{}" if family is Family.V4 else "fd00:0:1::{}"
    shift = churn.options_of(churn.WIDE).shift
    return {
        name: (members.get(host_prefix(parse_address(text.format(number + 2)))) or 0) >> shift
        for number, name in enumerate(_names())
    }


@pytest.mark.parametrize("guilty", [["p11"], ["p00", "p19"]])
async def test_a_start_isolates_who_is_refused_without_a_name(
    space: str, tables: LoopTables, guilty: list[str]
) -> None:
    host = Host(space, tables.variant, tables=tables)
    host.tell(*_pods(), *_crowd(make.pods(role="friend")))
    host.graph.flush(together=True)
    tables.poisoned = {_chain(host.graph, name) for name in guilty}
    async with host.room() as room:
        assert await until(lambda: room.in_sync, SEARCH_S), room.status
        assert _refused(room) == guilty
        for family in FAMILIES:
            held = sorted(n for n, number in _classes(host, family).items() if number == UNKNOWN)
            assert held == guilty
            chains = tables.dump(TABLE, family).chains
            for name in _names():
                assert bool(chains.get(_chain(host.graph, name))) == (name not in guilty)
        assert tables.errors
        assert not [e for e in tables.errors if "KNP-PI-" in e.what], (
            "the kernel named it after all"
        )


async def test_a_change_isolates_who_is_refused_and_follows_the_cure(
    space: str, tables: LoopTables
) -> None:
    host = Host(space, tables.variant, tables=tables)
    host.tell(*_pods(), *_crowd(make.pods(role="friend")))
    async with host.room() as room:
        assert await until(lambda: room.in_sync, SEARCH_S), room.status
        before = host.state()
        classes = _classes(host, Family.V4)
        guilty = ["p05", "p06"]
        tables.poisoned = {_chain(host.graph, name) for name in guilty}
        host.tell(*_crowd(make.pods(role="other")))
        room.changed()
        assert await until(lambda: room.in_sync, SEARCH_S), room.status
        assert _refused(room) == guilty
        assert _classes(host, Family.V4) == classes
        for family in FAMILIES:
            had, has = before[1][family][0], tables.dump(TABLE, family).chains
            kept = [n for n in _names() if had[c := _chain(host.graph, n)] == has[c]]
            assert kept == guilty, "what had rules keeps them"
        tables.poisoned.clear()
        host.tell(*(policy(name, name, make.pods(role="third")) for name in guilty))
        room.changed()
        assert await until(lambda: room.in_sync and not room.dataplane.refusals), room.status
        assert _drift(host, room) == ""


def _drift(host: Host, room: PolicyRoom) -> str:
    sets = in_netns(host.space, lambda: NetlinkSets(mark_mask=host.field_mask))
    try:
        return room.dataplane.drift(dump_kernel(sets, host.tables))
    finally:
        sets.close()


# -- one family that does not work ----------------------------------------------------------------

#: Stands before a tool in PATH; refuses while the file exists.
_SHIM = """#!/bin/sh
if [ -e {flag} ]; then echo "ip6tables: Address family not supported by protocol" >&2; exit 3; fi
exec {tool} "$@"
"""


def _where(tool: str) -> str:
    found = shutil.which(tool)
    assert found is not None, tool
    return found


class Tools:
    """The programs of ip6tables, which a test breaks and repairs."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.folder, self._variant = folder, variant
        folder.mkdir()

    def shim(self, what: str) -> None:
        """Put something in the place of the tool that saves, or restores."""
        name = f"ip6tables-{self._variant}-{what}"
        made, flag = self.folder / name, self.folder / f"{what}-broken"
        made.write_text(_SHIM.format(flag=flag, tool=_where(name)))
        made.chmod(0o755)

    def damage(self, what: str) -> None:
        (self.folder / f"{what}-broken").touch()

    def repair(self) -> None:
        for flag in self.folder.glob("*-broken"):
            flag.unlink()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Tools:
    tools = Tools(tmp_path / "bin", request.getfixturevalue("variant"))
    tools.shim("save")
    tools.shim("restore")
    monkeypatch.setenv("PATH", f"{tools.folder}:{os.environ['PATH']}")
    return tools


@pytest.fixture(params=list(Variant))
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


class Pods:
    """Real pods of a node: namespaces behind it, with an address of each family."""

    def __init__(self, space: str, numbers: dict[str, int]) -> None:
        self._node, self._numbers = space, numbers
        self._spaces = {name: f"{space}-{name}" for name in numbers}

    def __enter__(self) -> Self:
        settings = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]
        settings += [f"net.ipv4.conf.{which}.rp_filter=0" for which in ("all", "default")]
        settings += [f"net.ipv6.conf.{which}.accept_dad=0" for which in ("all", "default")]
        _sh("ip", "netns", "exec", self._node, "sysctl", "-qw", *settings)
        _batch(self._node, ["link set lo up"])
        for name, number in self._numbers.items():
            space, mac = self._spaces[name], f"02:00:00:00:01:{number:02x}"
            gateway, peer = "02:00:00:00:00:01", f"peer name eth0 address {mac} netns {space}"
            _sh("ip", "netns", "add", space)
            _batch(
                self._node,
                [
                    f"link add v{number} address {gateway} type veth {peer}",
                    f"link set v{number} up",
                    f"neigh replace 10.0.1.{number} lladdr {mac} dev v{number} nud permanent",
                    f"neigh replace fd00:0:1::{number} lladdr {mac} dev v{number} nud permanent",
                    f"route add 10.0.1.{number}/32 dev v{number}",
                    f"route add fd00:0:1::{number}/128 dev v{number}",
                ],
            )
            _batch(
                space,
                [
                    "link set lo up",
                    "link set eth0 up",
                    f"addr add 10.0.1.{number}/32 dev eth0",
                    f"addr add fd00:0:1::{number}/128 dev eth0 nodad",
                    f"neigh replace 169.254.1.1 lladdr {gateway} dev eth0 nud permanent",
                    f"neigh replace fe80::1:1 lladdr {gateway} dev eth0 nud permanent",
                    "route add default via 169.254.1.1 dev eth0 onlink",
                    "route add ::/0 via fe80::1:1 dev eth0 onlink",
                ],
            )
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)

    def reaches(self, src: str, dst: str, family: Family) -> bool:
        """Whether an echo request is answered."""
        number = self._numbers[dst]
        address = f"10.0.1.{number}" if family is Family.V4 else f"fd00:0:1::{number}"
        command = ["ping", "-c", "1", "-W", "0.4", "-n", address]
        done = in_netns(
            self._spaces[src], lambda: subprocess.run(command, capture_output=True, check=False)
        )
        return done.returncode == 0


def _sh(*args: str, stdin: str = "") -> None:
    done = subprocess.run(args, input=stdin, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{args}: {done.stderr}\n{stdin}"


def _batch(space: str, lines: list[str]) -> None:
    _sh("ip", "-n", space, "-b", "-", stdin="\n".join(lines) + "\n")


WORLD = (
    pod("web", 2, role="web"),
    pod("db", 3, role="db"),
    pod("free", 4, role="free"),
    policy("web", "web", make.pods(role="db")),
)
NUMBERS = {"web": 2, "db": 3, "free": 4}


@pytest.mark.parametrize("broken", [["save"], ["restore"], ["save", "restore"]], ids="+".join)
async def test_policy_of_ipv4_is_in_force_without_a_working_ip6tables(
    space: str, variant: Variant, tools: Tools, broken: list[str]
) -> None:
    """From the start, by changes within moments, and both families once it works again."""
    for what in broken:
        tools.damage(what)
    host = Host(space, variant)
    host.tell(*WORLD)
    with Pods(space, NUMBERS) as pods:
        assert pods.reaches("free", "web", Family.V4)
        assert pods.reaches("free", "web", Family.V6)
        async with host.room() as room:
            assert await until(lambda: room.status.down == (Family.V6,)), room.status
            assert room.status.error.startswith("IPv6: ")
            assert not room.ready
            assert _refused(room) == []
            assert pods.reaches("db", "web", Family.V4)
            assert not pods.reaches("free", "web", Family.V4)
            took_s = []
            for peer, other in (("free", "db"), ("db", "free")) * 4:
                room.status.latency_s = None
                host.tell(policy("web", "web", make.pods(role=peer)))
                room.changed()
                assert await until(lambda: room.status.latency_s is not None), room.status
                took_s.append(room.status.latency_s or 0.0)
                assert pods.reaches(peer, "web", Family.V4)
                assert not pods.reaches(other, "web", Family.V4)
            assert statistics.median(took_s) < 0.2, "a change of what works waits for what does not"
            assert not room.ready
            tools.repair()
            assert await until(lambda: room.in_sync, 20.0), room.status
            assert room.status.down == ()
            assert pods.reaches("db", "web", Family.V6)
            assert not pods.reaches("free", "web", Family.V6)
            assert _drift(host, room) == ""


async def test_an_ip6tables_that_breaks_later_keeps_its_last_rules(
    space: str, variant: Variant, tools: Tools
) -> None:
    host = Host(space, variant)
    host.tell(*WORLD)
    with Pods(space, NUMBERS) as pods:
        async with host.room() as room:
            assert await until(lambda: room.in_sync), room.status
            tools.damage("restore")
            tools.damage("save")
            host.tell(policy("web", "web", make.pods(role="free")))
            room.changed()
            assert await until(lambda: room.status.down == (Family.V6,)), room.status
            assert pods.reaches("free", "web", Family.V4)
            assert not pods.reaches("db", "web", Family.V4)
            assert pods.reaches("db", "web", Family.V6), "its last rules"
            assert not pods.reaches("free", "web", Family.V6)
            # What is done to the family that works is undone meanwhile.
            host.iptables("-t", "mangle", "-F", "KNP-FORWARD")
            assert await until(lambda: not pods.reaches("db", "web", Family.V4)), room.status
            tools.repair()
            assert await until(lambda: room.in_sync, 20.0), room.status
            assert pods.reaches("free", "web", Family.V6)
            assert not pods.reaches("db", "web", Family.V6)


async def test_a_program_that_is_not_there(
    space: str, variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image of the agent has no ip6tables at all."""
    folder = tmp_path / "only4"
    folder.mkdir()
    for name in (f"iptables-{variant}-save", f"iptables-{variant}-restore", "ipset", "ip", "ping"):
        (folder / name).symlink_to(_where(name))
    host = Host(space, variant)
    host.tell(*WORLD)
    before = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(folder))
    host.tables = RestoreTables(variant, netns=space)
    monkeypatch.setenv("PATH", before)
    async with host.room() as room:
        assert await until(lambda: room.status.down == (Family.V6,)), room.status
        assert f"ip6tables-{variant}" in room.status.error
        entry = host_prefix(parse_address("10.0.1.2"))
        mark = host.maps()[names.class_map(Direction.INGRESS, Family.V4)][entry]
        assert (mark or 0) > churn.options_of(churn.WIDE).mark(UNKNOWN)
        assert _chain(host.graph, "web") in host.tables.dump(TABLE, Family.V4).chains
