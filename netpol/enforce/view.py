"""The caches as a `World`, made when somebody asks: for the audit log and for explanations on the node.

A world of a large cluster takes tens of milliseconds to build, so one serves all questions of a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from netpol.aio.clock import Clock
from netpol.model.flow import Flow, Party, PartyKind, Trace
from netpol.model.objects import Endpoint, Namespace, Node
from netpol.model.policy import CompiledPolicy
from netpol.policy.evaluate import evaluate
from netpol.policy.world import World

#: While the caches change all the time, building worlds takes at most this part of the time: a line about
#: a drop right behind a policy's change must name that policy, on any but the largest cluster at once.
BUILD_SHARE = 0.05


class WorldView:
    """Builds worlds from what the caches hold.

    Args:
        namespaces: all that the agent knows; likewise the others.
        generation: grows with every change of them.
        unknown: told the addresses that nobody known has.
    """

    def __init__(
        self,
        *,
        namespaces: Callable[[], Iterable[Namespace]],
        pods: Callable[[], Iterable[Endpoint]],
        policies: Callable[[], Iterable[CompiledPolicy]],
        nodes: Callable[[], Iterable[Node]],
        generation: Callable[[], int],
        clock: Clock,
        unknown: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        self._namespaces, self._pods, self._policies = namespaces, pods, policies
        self._nodes, self._generation, self._clock = nodes, generation, clock
        self._unknown = unknown
        self._world = World.build()
        self._made_of = -1
        self._next_at_s = 0.0

    def world(self) -> World:
        """The world of this moment, or one that is as old as `BUILD_SHARE` asks for."""
        generation = self._generation()
        now_s = self._clock.monotonic()
        stale = generation != self._made_of and now_s >= self._next_at_s
        if stale or self._made_of < 0:
            self._world = World.build(
                namespaces=self._namespaces(),
                pods=self._pods(),
                policies=self._policies(),
                nodes=self._nodes(),
            )
            done_s = self._clock.monotonic()
            self._made_of, self._next_at_s = generation, done_s + (done_s - now_s) / BUILD_SHARE
        return self._world

    def expire(self) -> None:
        """Build anew with the next question, however young the world is."""
        self._next_at_s = float("-inf")

    def party(self, address: bytes) -> Party:
        """Who is behind an address."""
        party = self.world().party(address)
        if party.kind is PartyKind.EXTERNAL:
            self._unknown(address)
        return party

    def judge(self, flow: Flow) -> Trace:
        """Judge a flow with reasons."""
        return evaluate(self.world(), flow)

    def generation(self) -> int:
        """Which generation the answers come from."""
        self.world()
        return self._made_of
