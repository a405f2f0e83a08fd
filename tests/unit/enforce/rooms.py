"""A policy room on tables in memory that refuse what a test says, and a small world for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from netpol.aio.clock import SystemClock
from netpol.enforce.worker import PolicyRoom
from netpol.k8s.decode import NETWORK_POLICY, decode
from netpol.kernel.drivers import TableDump, TableError, TableTransaction
from netpol.kernel.rule_text import canonical
from netpol.kernel.testing import FakeSets, FakeTables
from netpol.model.ids import ChainName, Direction, ObjectKey, SetName
from netpol.model.net import Family, host_prefix, parse_address
from netpol.model.objects import Endpoint, Namespace
from netpol.policy.compile import compile_policy
from netpol.policy.graph import Graph, PolicyId
from netpol.render import names
from netpol.render.options import RenderOptions
from netpol.render.policies import policy_rules
from netpol.render.static import TABLE
from tests import builders as make
from tests.prop import churn

#: Long enough for a retry after the first pause on a busy machine.
SOON_S = 8.0


class StubbornTables(FakeTables):
    """Tables that also refuse what a test says.

    Attributes:
        refuses: why a transaction is refused, or None.
        unreadable: why a family's table cannot be read.
        tried: transactions that arrived.
    """

    def __init__(self, sets: FakeSets) -> None:
        super().__init__(sets=sets)
        self.refuses: Callable[[TableTransaction], Exception | None] = lambda _: None
        self.unreadable: dict[Family, Exception] = {}
        self.tried: list[TableTransaction] = []

    def apply(self, tx: TableTransaction) -> None:
        self.tried.append(tx)
        error = self.refuses(tx)
        if error is not None:
            raise error
        super().apply(tx)

    def dump(self, table: str, family: Family) -> TableDump:
        self._read(family)
        return super().dump(table, family)

    def fingerprint(self, table: str, family: Family) -> str:
        self._read(family)
        return super().fingerprint(table, family)

    def _read(self, family: Family) -> None:
        if family in self.unreadable:
            raise self.unreadable[family]


def nameless(*chains: ChainName) -> Callable[[TableTransaction], Exception | None]:
    """Refuse whatever writes one of some chains, and say as little as the kernel does at COMMIT."""

    def refuses(tx: TableTransaction) -> Exception | None:
        if any(tx.replace.get(chain) for chain in chains):
            return TableError("refused", retryable=False, got="Invalid argument")
        return None

    return refuses


class SkippingClock(SystemClock):
    """The machine's clock, which a test can put forward; sleeps take their time."""

    skipped_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.skipped_s


class Scene:
    """A node in memory: its graph, its kernel and its room."""

    def __init__(self) -> None:
        self.graph = Graph(churn.NODE)
        self.graph.upsert_namespace(Namespace(name="a"))
        self.sets = FakeSets()
        self.tables = StubbornTables(self.sets)
        self.options = churn.options_of(churn.WIDE)
        #: Gives a room its options anew.
        self.renew: Callable[[], RenderOptions] | None = None
        self.clock = SkippingClock()
        self.room = self._new_room()

    def _new_room(self) -> PolicyRoom:
        return PolicyRoom(
            self.graph,
            sets=self.sets,
            tables=self.tables,
            options=self.options,
            clock=self.clock,
            before_reconcile=self.renew,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[PolicyRoom]:
        """A room that has started; another agent each time."""
        room = self.room = self._new_room()
        task = asyncio.create_task(room.run_forever())
        room.start()
        try:
            yield room
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            room.close()

    # -- the cluster ------------------------------------------------------------------------

    def pod(self, name: str, last: int, **labels: str) -> None:
        self.graph.upsert_pod(
            Endpoint(
                key=ObjectKey("a", name),
                uid=name,
                labels=tuple(sorted(labels.items())),
                node=churn.NODE,
                addresses=(parse_address(f"10.0.1.{last}"), parse_address(f"fd00:0:1::{last}")),
            )
        )

    def policy(self, name: str, *peers: make.Json, role: str = "") -> None:
        """Only `peers` may reach the pods of a role (by default the policy's name)."""
        text = make.policy(
            f"a/{name}", make.selector(role=role or name), ingress=[make.ingress(*peers)]
        )
        self.graph.upsert_policy(compile_policy(decode(NETWORK_POLICY, text).value))

    def tell(self) -> None:
        """What was changed in the graph is news."""
        self.room.changed()

    async def told(self) -> bool:
        """Tell, and wait until that was applied as far as it could be; whether it was."""
        self.tell()
        generation = self.room.generation
        return await until(lambda: self.room.status.applied_generation >= generation)

    def sets_with(self, address: str) -> list[SetName]:
        """The sets of addresses that one is in."""
        wanted = parse_address(address)
        return [n for n, found in self.sets.state.items() if wanted in found.members]

    # -- the kernel -------------------------------------------------------------------------

    def identity(self, policy: str) -> PolicyId:
        """A policy as it is now."""
        key = ObjectKey("a", policy)
        return next(i for i in self.graph.active_policies if i.key == key)

    def chain(self, policy: str) -> ChainName:
        """The chain of a policy as it is now."""
        return names.policy_chain(self.identity(policy), Direction.INGRESS)

    def has(self, policy: str, family: Family) -> bool:
        """Whether the kernel has the rules of a policy as they are now."""
        identity = self.identity(policy)
        want = policy_rules(self.graph.active_policies[identity], Direction.INGRESS, family)
        chain = names.policy_chain(identity, Direction.INGRESS)
        have = self.tables.table(TABLE, family).chains.get(chain)
        return have is not None and tuple(have) == tuple(map(canonical, want))

    def number(self, last: int, family: Family) -> int | None:
        """The class number of the pod with an address, as a destination; None without an entry."""
        text = f"10.0.1.{last}" if family is Family.V4 else f"fd00:0:1::{last}"
        found = self.sets.state.get(names.class_map(Direction.INGRESS, family))
        mark = found.members.get(host_prefix(parse_address(text))) if found else None
        return None if mark is None else mark >> self.options.shift


async def until(what: Callable[[], bool], timeout_s: float = SOON_S) -> bool:
    """Wait for something; whether it came."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while loop.time() < deadline:
        if what():
            return True
        await asyncio.sleep(0.005)
    return False
