"""Changes that may cut a node off are on trial first: what stays, what is gone back to, and when.

A risky change replaces the ground that a plan stands on: the node's own addresses and annotations, the
overlay, the routers outside. While it is on trial, and after it was undone, everything else goes on: plans
are made of the present facts on the new ground, or again on the proven one. Owns no BIRD and plans nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum

import msgspec

from netpol.lib.errors import NetpolError, NoAnswerError
from netpol.model.objects import Node
from routes.options import RouteOptions
from routes.plan import RoutePlan

#: BIRD itself undoes what nobody confirms after this: the agent may be what was cut off.
UNDO_S = 30
#: The agent undoes it before, since it knows what has changed besides.
TRIAL_S = 25.0
#: A change that broke what worked is not tried again before this, unless it is another one.
AGAIN_S = 600.0

Healthy = Callable[[], Awaitable[bool]]


def risk(plan: RoutePlan) -> object:
    """What all sessions or all routes of a plan depend on.

    Not passwords: a new one is the router's at another moment than ours, and going back to the old one
    would keep both from meeting.
    """
    return (
        plan.asn,
        plan.router_id,
        dict(plan.addresses),
        plan.local_addresses,
        plan.options.overlay,
        plan.options.encapsulation,
        tuple(replace(p, password="") for p in plan.external),
    )


class Step(Enum):
    """What to do with a plan."""

    GO = "apply it"
    TRY = "apply it on trial"
    HOLD = "plan on the proven ground instead"


@dataclass(frozen=True, slots=True)
class Ground:
    """What a plan stands on."""

    node: Node
    options: RouteOptions
    risk: object

    def under(self, node: Node, options: RouteOptions) -> tuple[Node, RouteOptions]:
        """The present facts on this ground."""
        mine = self.options
        return (
            msgspec.structs.replace(
                node, addresses=self.node.addresses, annotations=self.node.annotations
            ),
            replace(
                options,
                asn=mine.asn,
                overlay=mine.overlay,
                encapsulation=mine.encapsulation,
                peers=mine.peers,
            ),
        )


@dataclass(frozen=True, slots=True)
class _Trial:
    ground: Ground
    healthy: Healthy
    until_s: float


class Trials:
    """The ground that is proven, the one that is on trial, the one that was undone last."""

    def __init__(self) -> None:
        self.proven: Ground | None = None
        self._trial: _Trial | None = None
        self._former: _Trial | None = None
        self._undone: tuple[object, float] | None = None
        self.reverts = 0

    @property
    def running(self) -> bool:
        """Whether something is on trial."""
        return self._trial is not None

    def choose(self, ground: Ground, *, now_s: float, way_back: bool) -> Step:
        """What to do with a plan on this ground.

        Args:
            ground: of the plan that the present facts give.
            now_s: by the monotonic clock.
            way_back: whether the proven ground is still there to go back to.
        """
        if self.proven is None or ground.risk == self.proven.risk or not way_back:
            return Step.GO
        if self._trial is not None and ground.risk == self._trial.ground.risk:
            return Step.GO
        if self._undone is not None and ground.risk == self._undone[0] and now_s < self._undone[1]:
            return Step.HOLD
        return Step.TRY

    def begin(self, ground: Ground, healthy: Healthy, *, now_s: float) -> None:
        """A risky change comes into force. From a second one, too, the way back is to what was proven.

        Before BIRD is told, since its answer may be lost: what works is measured before, and once.
        """
        self._former = self._trial
        if self._trial is not None:
            healthy = self._trial.healthy
        self._trial = _Trial(ground, healthy, now_s + TRIAL_S)

    def refused(self) -> None:
        """What was to be tried is not in force: what was before goes on."""
        self._trial = self._former

    def stands(self, ground: Ground) -> None:
        """A plan on this ground was applied for good, or is safe on the one that is on trial."""
        trial = self._trial
        if trial is not None and ground.risk == trial.ground.risk:
            self._trial = replace(trial, ground=ground)
            return
        self._trial, self.proven = None, ground

    async def judge(self, now_s: float) -> bool | None:
        """Whether what is on trial has proven itself; None while that is open, or where nothing is."""
        trial = self._trial
        if trial is None:
            return None
        if now_s >= trial.until_s:
            self._trial, self._undone = None, (trial.ground.risk, now_s + AGAIN_S)
            self.reverts += 1
            return False
        try:
            good = await trial.healthy()
        except NetpolError:
            return None
        if not good:
            return None
        self._trial, self._undone, self.proven = None, None, trial.ground
        return True


def undone() -> NoAnswerError:
    """What is told while a change is not followed."""
    return NoAnswerError(
        "a change of routes",
        needed="sessions and routes that worked before to go on",
        got="they did not: it was undone",
    )
