"""The life of a real server, from its first packet to its last, as a table; and who drains now.

    absent    not in the kernel
    active    in the plan, with its weight
    draining  left the plan, weight 0: its connections go on, new ones do not come

A real server of TCP that leaves the plan drains until it has no connection left or its grace period ends;
what comes back meanwhile has its weight again. UDP and SCTP have nothing worth waiting for: a client that
keeps its port would stay at a dead pod for as long as it sends, so that real servers of these go at once,
and conntrack's entries with them. So do those whose scheduler refuses the clients of a server without weight
(`dh`). When the virtual server itself goes, because its Service, its port or its address does, all of it goes
at once: nobody is there to serve what was established. The same happens to what clients of this node have
with external addresses when a Service's policy stops being Local.

A real server without weight that is found in the kernel at start drains from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from netpol.model.ids import Protocol
from netpol.model.ipvs import RealServer, RealState, ServerId, ServerState


class Life(Enum):
    """Where a real server is in its life."""

    ABSENT = auto()
    ACTIVE = auto()
    DRAINING = auto()


class Event(Enum):
    """What happens to a real server."""

    PLANNED = auto()  # the plan names it
    LEFT = auto()  # the plan does not name it (any more), and it may drain
    DROPPED = auto()  # the same, and nothing of it is worth waiting for
    IDLE = auto()  # it has no connection
    OVERDUE = auto()  # its grace period is over
    VANISHED = auto()  # the kernel does not have it


class Deed(Enum):
    """What is done in the kernel."""

    NOTHING = auto()
    ADD = auto()
    SET = auto()  # the plan's weight, where another one is set
    ZERO = auto()  # weight 0
    DELETE = auto()


TRANSITIONS: Mapping[tuple[Life, Event], tuple[Life, Deed]] = {
    (Life.ABSENT, Event.PLANNED): (Life.ACTIVE, Deed.ADD),
    (Life.ABSENT, Event.LEFT): (Life.ABSENT, Deed.NOTHING),
    (Life.ABSENT, Event.DROPPED): (Life.ABSENT, Deed.NOTHING),
    (Life.ABSENT, Event.IDLE): (Life.ABSENT, Deed.NOTHING),
    (Life.ABSENT, Event.OVERDUE): (Life.ABSENT, Deed.NOTHING),
    (Life.ABSENT, Event.VANISHED): (Life.ABSENT, Deed.NOTHING),
    (Life.ACTIVE, Event.PLANNED): (Life.ACTIVE, Deed.SET),
    (Life.ACTIVE, Event.LEFT): (Life.DRAINING, Deed.ZERO),
    (Life.ACTIVE, Event.DROPPED): (Life.ABSENT, Deed.DELETE),
    (Life.ACTIVE, Event.IDLE): (Life.ACTIVE, Deed.NOTHING),
    (Life.ACTIVE, Event.OVERDUE): (Life.ACTIVE, Deed.NOTHING),
    (Life.ACTIVE, Event.VANISHED): (Life.ACTIVE, Deed.ADD),
    (Life.DRAINING, Event.PLANNED): (Life.ACTIVE, Deed.SET),
    (Life.DRAINING, Event.LEFT): (Life.DRAINING, Deed.ZERO),
    (Life.DRAINING, Event.DROPPED): (Life.ABSENT, Deed.DELETE),
    (Life.DRAINING, Event.IDLE): (Life.ABSENT, Deed.DELETE),
    (Life.DRAINING, Event.OVERDUE): (Life.ABSENT, Deed.DELETE),
    (Life.DRAINING, Event.VANISHED): (Life.ABSENT, Deed.NOTHING),
}

#: A scheduler that picks by a hash and has no fallback for servers without weight.
_NO_FALLBACK = frozenset({"dh"})


def leaves_by(protocol: Protocol, scheduler: str) -> Event:
    """How a real server of such a virtual server leaves the plan."""
    at_once = protocol in (Protocol.UDP, Protocol.SCTP) or scheduler in _NO_FALLBACK
    return Event.DROPPED if at_once else Event.LEFT


class Gone(NamedTuple):
    """Draining servers that are to be deleted, and those that do not drain any more by themselves."""

    delete: tuple[tuple[ServerId, RealServer], ...]
    over: tuple[tuple[ServerId, RealServer], ...]


@dataclass(slots=True)
class Drains:
    """Who drains, and since when.

    Attributes:
        grace_s: how long one drains at most.
    """

    grace_s: float
    _since: dict[ServerId, dict[RealServer, float]]

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._since = {}

    def __len__(self) -> int:
        return sum(len(reals) for reals in self._since.values())

    @property
    def ids(self) -> tuple[ServerId, ...]:
        """The virtual servers that have a draining real server."""
        return tuple(self._since)

    def of(self, server: ServerId) -> Mapping[RealServer, float]:
        """Those of one virtual server, and since when."""
        return self._since.get(server, {})

    def begin(self, server: ServerId, real: RealServer, *, now_s: float) -> None:
        """One drains from now; one that does already keeps its time."""
        self._since.setdefault(server, {}).setdefault(real, now_s)

    def end(self, server: ServerId, real: RealServer) -> None:
        """One does not drain any more, for whatever reason."""
        reals = self._since.get(server)
        if reals is not None:
            reals.pop(real, None)
            if not reals:
                del self._since[server]

    def forget(self, server: ServerId) -> None:
        """The virtual server went, with all that drained."""
        self._since.pop(server, None)

    def keep(self, servers: Iterable[ServerId]) -> None:
        """Forget all virtual servers but these."""
        for server in self._since.keys() - set(servers):
            del self._since[server]

    def look(self, states: Mapping[ServerId, ServerState], *, now_s: float) -> Gone:
        """Who is done, as the kernel counts connections now."""
        delete: list[tuple[ServerId, RealServer]] = []
        over: list[tuple[ServerId, RealServer]] = []
        for server, reals in self._since.items():
            found = states.get(server)
            for real, since_s in reals.items():
                state = None if found is None else found.reals.get(real)
                event = self._event(state, since_s, now_s)
                if event is None:
                    continue
                _, deed = TRANSITIONS[Life.DRAINING, event]
                (delete if deed is Deed.DELETE else over).append((server, real))
        return Gone(tuple(delete), tuple(over))

    def _event(self, state: RealState | None, since_s: float, now_s: float) -> Event | None:
        if state is None:
            return Event.VANISHED
        if state.config.weight:
            return Event.PLANNED  # by whom does not matter: it takes connections
        # Persistence templates are no connections: the kernel drops one that leads to weight 0
        # when its client comes again (expire_quiescent_template).
        if not state.active and not state.inactive:
            return Event.IDLE
        return Event.OVERDUE if now_s - since_s >= self.grace_s else None
