"""Keeps the room's rules, and notices when somebody else may have changed them.

nf_tables counts everybody's transactions: a new number says that a look is due. On a node where others write
all the time looks that find nothing come ever more rarely. For legacy tables, and for sets, nobody counts.
"""

from __future__ import annotations

from collections.abc import Callable

from netpol.aio.clock import Clock
from netpol.kernel.nft_generation import generation
from routes.rules import RoutesRules, RuleDrivers, keep_rules

#: A look means to read four tables, a process each.
LOOK_S, LOOK_MAX_S = 0.5, 30.0


class RulesKeeper:
    """The rules that should be, and when they were seen last. Blocking where it says so."""

    def __init__(
        self,
        drivers: RuleDrivers,
        clock: Clock,
        *,
        count: Callable[[], int | None] = generation,
    ) -> None:
        """Args: count: the number of transactions so far, None where nobody counts."""
        self.drivers, self._clock, self._count = drivers, clock, count
        self._kept: RoutesRules | None = None
        self._seen: int | None = None
        self._pause_s, self._again_s = LOOK_S, 0.0

    def keep(self, want: RoutesRules, *, everything: bool) -> None:
        """Have rules in force; blocking.

        Args:
            want: all of them.
            everything: look also where nothing new is wanted.

        Raises:
            KernelError: the kernel refuses something.
        """
        if want == self._kept and not everything and not self.due():
            return
        drifted, self._kept = want == self._kept, None
        done = keep_rules(self.drivers, want)
        self._kept, self._seen = want, self._count()
        nothing = drifted and not done
        self._pause_s = min(self._pause_s * 2, LOOK_MAX_S) if nothing else LOOK_S
        self._again_s = self._clock.monotonic() + self._pause_s

    def due(self) -> bool:
        """Whether somebody may have changed them since they were seen."""
        if self._kept is None or self._clock.monotonic() < self._again_s:
            return False
        return self._count() != self._seen

    def close(self) -> None:
        """Let go; rules stay."""
        self.drivers.sets.close()
