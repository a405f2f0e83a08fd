"""The proxy's hand in the kernel: brings what is there to what is wanted, and knows what became of it.

Owns what was learned of the kernel (whose servers are, what drains, what was refused), not what is wanted
(`proxy.desired`) and not the order (`proxy.steps`). Blocking and not thread-safe: called where all work
with the kernel runs. An exception leaves the kernel somewhere on the way, which is safe, and unknown; the
next call must then be `reconcile`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from netpol.aio.clock import Clock
from netpol.kernel.converge import table_change
from netpol.kernel.drivers import (
    FlowDriver,
    FlowMatch,
    IpvsDriver,
    SetDriver,
    SetTransaction,
    TableDriver,
    VipDriver,
)
from netpol.kernel.ipvs import Forward
from netpol.kernel.ipvs import RealServer as ServedReal
from netpol.model.ids import SetName
from netpol.model.ipvs import (
    AddServer,
    DeleteReal,
    ForwardMethod,
    IpvsOp,
    RealConfig,
    ServerId,
    ServerState,
)
from netpol.model.net import Family
from netpol.model.ruleset import AddressPort, Member
from proxy.desired import Change, Desired
from proxy.drain import Drains, Gone
from proxy.ledger import Word
from proxy.ledger_file import LedgerFile
from proxy.lower import KernelPart, Server
from proxy.marks import MarkKey
from proxy.status import Live
from proxy.steps import Have, have_of, id_of, open_up, release, restrict
from proxy.troubles import Troubles, port_of
from proxy.work import Static, Work, members_wanted, plan_sets

#: What IPVS serves otherwise, as who reads its table knows it; None is a service that is gone.
ServedChange = Mapping[AddressPort, frozenset[ServedReal] | None]


@dataclass(frozen=True, slots=True)
class Drivers:
    """What the proxy changes in the kernel.

    Attributes:
        sets, tables: those that see what is the proxy's alone.
        eyes: another one of `ipvs`, so that nobody waits while everything is read; may be the same.
    """

    ipvs: IpvsDriver
    vips: VipDriver
    sets: SetDriver
    tables: TableDriver
    flows: FlowDriver
    eyes: IpvsDriver


class Applier:
    """Does what is planned, and remembers what it must know of the kernel.

    Args:
        grace_s: how long a backend drains at most.

    Attributes:
        troubles: what was refused.
        foreign: somebody else's servers, at the last look at everything.
    """

    def __init__(
        self, drivers: Drivers, ledger: LedgerFile, *, grace_s: float, clock: Clock
    ) -> None:
        self._drivers, self._ledger, self._clock = drivers, ledger, clock
        self.drains = Drains(grace_s)
        self.troubles = Troubles()
        self.foreign: tuple[ServerId, ...] = ()
        self.ops = 0
        self._link: set[bytes] = set()
        self._flows: list[FlowMatch] = []
        self._sources: Mapping[Family, bytes] = {}

    # -- entry points -----------------------------------------------------------------------

    def load(self) -> tuple[Mapping[MarkKey, int], list[int]]:
        """Read what a former agent left word of: who had which mark; and which are somebody else's."""
        self._ledger.load()
        ours = self._ledger.ledger.ours
        others = [i.fwmark for i in self._drivers.ipvs.dump() if i.fwmark and i not in ours]
        return self._ledger.ledger.marks, others

    def reconcile(self, desired: Desired, static: Static) -> str:
        """Look at everything and change what differs; says what differed, or ""."""
        self._sources = static.sources
        states = self._drivers.ipvs.dump()
        self._link = set(self._drivers.vips.dump() or ())
        misrouted = self._drivers.vips.misrouted(static.sources) if self._link else frozenset()
        work = Work()
        self.troubles = Troubles()
        self._plan_servers(work, desired, states)
        self._plan_leftovers(work, desired, states)
        plan_sets(work, members_wanted(desired, static), self._drivers.sets.dump())
        for (table, family), want in static.rulesets.items():
            have = self._drivers.tables.dump(table, family)
            tx = table_change(have, want, table=table, family=family)
            work.tables += [tx] if tx is not None else []
        work.vips_add = [v for v in desired.vips if v not in self._link or v in misrouted]
        work.vips_remove = [v for v in self._link if not desired.vips.claimed(v)]
        self.drains.keep(states)
        words = work.words()
        self._execute(work)
        return words

    def change(self, change: Change, desired: Desired) -> None:
        """Do what some Services want otherwise, which `desired` has taken over."""
        asked = [
            id_
            for id_, (before, _) in change.servers.items()
            if before is None or id_ in self.troubles.servers
        ]
        states = self._drivers.ipvs.read(asked) if asked else {}
        work = Work(vips_add=change.vips_add, vips_remove=change.vips_remove)
        work.add = {name: dict(members) for name, members in change.add.items()}
        work.delete = {name: list(members) for name, members in change.delete.items()}
        unknown = set(asked)
        for id_, (before, after) in change.servers.items():
            if id_ in unknown:
                self._plan_read(work, id_, states.get(id_), after)
                self._reopen(work, id_, desired)
            else:
                work.servers.plan(id_, self._have(before), after)
                self._fact(work, after)
        self._execute(work)

    def retry(self, desired: Desired) -> None:
        """Read back what was refused, and try it again."""
        ids = list(self.troubles.servers)
        states = self._drivers.ipvs.read(ids)
        work = Work()
        for id_ in ids:
            self._plan_read(work, id_, states.get(id_), desired.servers.get(id_))
            self._reopen(work, id_, desired)
        for vip in self.troubles.vips:
            (work.vips_add if desired.vips.claimed(vip) else work.vips_remove).append(vip)
        self._execute(work)

    def drained(self) -> Gone:
        """Who drained and is idle, or overdue."""
        states = self._drivers.ipvs.read(self.drains.ids)
        return self.drains.look(states, now_s=self._clock.monotonic())

    def end(self, gone: Gone) -> None:
        """Delete who drained."""
        refused = self._apply([DeleteReal(id_, real) for id_, real in gone.delete])
        for id_, real in (*gone.delete, *gone.over):
            if id_ not in refused:
                self.drains.end(id_, real)

    @property
    def ledger_fault(self) -> str:
        """Why a former agent's ledger is not believed, or ""."""
        return self._ledger.fault

    def served(self, ids: Iterable[ServerId], desired: Desired) -> ServedChange | None:
        """What IPVS serves by some servers, after they were changed; None where that is not known."""
        out: dict[AddressPort, frozenset[ServedReal] | None] = {}
        for id_ in ids:
            if id_ in self.troubles.servers:
                return None
            if id_.protocol is None:
                continue
            have = self._have(desired.servers.get(id_))
            service = AddressPort(id_.address, id_.protocol, id_.port)
            out[service] = have and frozenset(
                ServedReal(real.address, Forward[config.forward.name])
                for real, config in have.reals.items()
            )
        return out

    def live(self, part: KernelPart, errors: tuple[str, ...]) -> Live:
        """A Service as the kernel has it now."""
        wanted = tuple(server.virtual.id for server in part.servers)
        states = self._drivers.ipvs.read(wanted)
        now_s = self._clock.monotonic()
        draining = {
            id_: {real: now_s - since_s for real, since_s in reals.items()}
            for id_ in wanted
            if (reals := self.drains.of(id_))
        }
        return Live(wanted, states, draining, errors)

    def close(self) -> None:
        """Release sockets and the ledger's file; the kernel stays as it is."""
        self._ledger.close()
        for driver in (
            self._drivers.ipvs,
            self._drivers.vips,
            self._drivers.sets,
            self._drivers.flows,
        ):
            driver.close()

    # -- planning ---------------------------------------------------------------------------

    def is_ours(self, id_: ServerId) -> bool:
        """Whether a server that the kernel has is ours."""
        return self._ledger.ledger.owns(id_, self._link)

    def _have(self, before: Server | None) -> Have | None:
        """What the kernel has of a server that is in no trouble."""
        if before is None:
            return None
        id_ = before.virtual.id
        reals = before.reals
        forward = ForwardMethod.TUNNEL if before.tunnel else ForwardMethod.NAT
        reals.update(dict.fromkeys(self.drains.of(id_), RealConfig(0, forward)))
        return Have(before.virtual, reals)

    def _fact(self, work: Work, server: Server | None) -> None:
        if server is not None and server.virtual.id not in self._ledger.ledger.ours:
            work.facts.append((Word.OURS, server.virtual.id, server.mark))

    def _plan_read(
        self, work: Work, id_: ServerId, state: ServerState | None, want: Server | None
    ) -> None:
        """Plan for a server that was just read; somebody else's is trouble if it is wanted."""
        self.troubles.forget(id_)
        if state is not None and not self.is_ours(id_):
            if want is not None:
                self._conflict(work, id_)
            return
        if state is None:
            self.drains.forget(id_)
            if want is None:
                work.facts.append((Word.GONE, id_, None))
        # Nothing is believed of drains but what the kernel shows: a run may have ended in between.
        for real in () if want is None else self.drains.of(id_).keys() & want.reals.keys():
            self.drains.end(id_, real)
        have = None if state is None else have_of(state)
        work.servers.plan(id_, have, want)
        self._fact(work, want)

    def _conflict(self, work: Work, id_: ServerId) -> None:
        self.troubles.conflict(id_)
        work.facts.append((Word.FOREIGN, id_, None))

    def _reopen(self, work: Work, id_: ServerId, desired: Desired) -> None:
        """The port of a server that is about to stand again."""
        if id_.protocol is not None and desired.entries.claimed(place := port_of(id_)):
            name, member = place
            work.add.setdefault(name, {})[member] = None

    def _plan_servers(
        self, work: Work, desired: Desired, states: Mapping[ServerId, ServerState]
    ) -> None:
        for id_, want in desired.servers.items():
            self._plan_read(work, id_, states.get(id_), want)

    def _plan_leftovers(
        self, work: Work, desired: Desired, states: Mapping[ServerId, ServerState]
    ) -> None:
        """Servers that nobody wants: ours go; and what the ledger says of servers that are not there."""
        foreign: list[ServerId] = []
        for id_, state in states.items():
            if not self.is_ours(id_):
                foreign.append(id_)
                # Written down, so that it stays somebody else's when its address enters our link.
                work.facts.append((Word.FOREIGN, id_, None))
            elif not desired.servers.claimed(id_):
                work.servers.plan(id_, have_of(state), None)
        ledger = self._ledger.ledger
        work.facts += [
            (Word.GONE, id_, None)
            for id_ in (*ledger.ours, *ledger.foreign)
            if id_ not in states and not desired.servers.claimed(id_)
        ]
        self.foreign = tuple(foreign)

    # -- doing ------------------------------------------------------------------------------

    def _execute(self, work: Work) -> None:
        """Do it, in the order of `proxy.steps`, with the ledger before everything."""
        known = self._ledger.ledger.ours
        fresh = {id_ for word, id_, _ in work.facts if word is Word.OURS and id_ not in known}
        self._ledger.say(work.facts)
        if work.create:
            self._drivers.sets.apply(SetTransaction(tuple(work.create)))
        self._change_sets(restrict(work.add, work.delete))
        for tx in work.tables:
            self._drivers.tables.apply(tx)
        self._change_vips(remove=work.vips_remove)
        self._change_servers(work, fresh)
        self._change_sets(open_up(self._without_absent(work), work.delete))
        gone = self._apply(work.servers.end)
        self._change_vips(add=work.vips_add)
        self._change_sets(release(work.delete))
        if work.destroy:
            self._drivers.sets.apply(SetTransaction(tuple(work.destroy)))
        for op in work.servers.end:
            self.drains.forget(op.id)
        self._flows += work.servers.flows
        if self._flows:
            self._drivers.flows.end(self._flows)
            self._flows = []
        self._ledger.say([(Word.GONE, op.id, None) for op in work.servers.end if op.id not in gone])

    def _change_sets(self, tx: SetTransaction) -> None:
        if tx.ops:
            self._drivers.sets.apply(tx)

    def _change_vips(self, *, add: Sequence[bytes] = (), remove: Sequence[bytes] = ()) -> None:
        if not add and not remove:
            return
        refused = dict(self._drivers.vips.apply(add=add, remove=remove, sources=self._sources))
        for vip in (*add, *remove):
            self.troubles.vips.pop(vip, None)
        for vip, code in refused.items():
            verb = "adding" if vip in add else "removing"
            self.troubles.vips[vip] = f"{verb} it: {os.strerror(code)}"
        self._link.update(v for v in add if v not in refused)
        self._link.difference_update(v for v in remove if v not in refused)

    def _change_servers(self, work: Work, fresh: set[ServerId]) -> None:
        ops = work.servers
        refused = self._apply(ops.servers, fresh)
        rest = [op for op in (*ops.add, *ops.set, *ops.delete) if id_of(op) not in refused]
        self._apply(rest)
        now_s = self._clock.monotonic()
        for id_, real in ops.settle:
            self.drains.end(id_, real)
        for id_, real in ops.drain:
            self.drains.begin(id_, real, now_s=now_s)

    def _without_absent(self, work: Work) -> dict[SetName, dict[Member, int | None]]:
        """What may be opened: no port without a server, since it would be the node's own."""
        absent = self.troubles.shut
        if not absent:
            return work.add
        add = {name: dict(members) for name, members in work.add.items()}
        shut: dict[SetName, list[Member]] = {}
        for name, member in absent:
            add.get(name, {}).pop(member, None)
            shut.setdefault(name, []).append(member)
        self._change_sets(restrict({}, shut))
        return add

    def _apply(self, ops: Sequence[IpvsOp], fresh: Iterable[ServerId] = ()) -> set[ServerId]:
        """Apply; returns the servers of which something was refused."""
        if not ops:
            return set()
        self.ops += len(ops)
        refused: set[ServerId] = set()
        for failure in self._drivers.ipvs.apply(ops):
            id_ = id_of(failure.op)
            if isinstance(failure.op, AddServer) and failure.code == errno.EEXIST and id_ in fresh:
                # It came into being after it was looked for.
                self.troubles.conflict(id_)
                self._ledger.say([(Word.FOREIGN, id_, None)])
                refused.add(id_)
            elif self.troubles.refused(failure):
                refused.add(id_)
        return refused
