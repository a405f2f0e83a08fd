"""When the kernel is looked at between applies, and when garbage goes. Owns times, no work.

Both wait for quiet: after a write looks come soon and then less and less often, and what comes back before
its garbage was collected costs nothing. But a large cluster is never quiet, so that both have a time after
which they come all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

#: After a write the kernel is read back at growing intervals, since whoever undoes us does it soon.
FIRST_CHECK_S = 0.05
LAST_CHECK_S = 30.0
#: Between them a glance tells whether anybody wrote tables. Where others always do, and what they write
#: is none of ours, glances come as rarely as they must.
GLANCE_S = 1.0
#: Somebody who undoes every repair is answered no faster than this.
FIGHT_S = 1.0
#: Quiet time before looks go into the members of sets; those before see tables only.
MEMBERS_AFTER_S = 0.4
#: Quiet time before garbage goes: what comes back within it costs nothing.
GARBAGE_AFTER_S = 2.0
#: Without that quiet it goes after this.
GARBAGE_AT_MOST_S = 30.0
#: Garbage that the kernel does not let go, since others refer to it, is left alone for this long.
GARBAGE_REST_S = 60.0
#: Where looks are always overtaken by events, everything is compared in an apply after this.
COMPARE_AT_MOST_S = 60.0


@dataclass(slots=True)
class Upkeep:
    """Times are of one monotonic clock.

    Attributes:
        pause_s: until the next look.
        glance_s: until the next glance.
    """

    pause_s: float = FIRST_CHECK_S
    glance_s: float = GLANCE_S
    _first_s: float = FIRST_CHECK_S
    _compared_at_s: float | None = None
    _garbage_since_s: float | None = None
    _garbage_rests_until_s: float = 0.0

    def wrote(self) -> None:
        """Something was written: the next look is soon."""
        self.pause_s = self._first_s

    def looked(self) -> None:
        """The next look is later."""
        self.pause_s = min(self.pause_s * 2, LAST_CHECK_S)

    def glanced(self, *, due: bool) -> None:
        """Somebody wrote tables, or nobody did."""
        self.glance_s *= 2 if due else 0.5
        self.glance_s = min(max(self.glance_s, GLANCE_S), LAST_CHECK_S)

    def drifted(self) -> None:
        """A look found that somebody wrote what is ours."""
        self.glance_s = GLANCE_S
        self._first_s = min(self._first_s * 2, FIGHT_S)

    def right(self) -> None:
        """A look found all as it must be: after some time of that nobody fights any more."""
        if self.pause_s > FIGHT_S:
            self._first_s = FIRST_CHECK_S

    @property
    def members(self) -> bool:
        """Whether a look goes into the members of sets."""
        return self.pause_s >= MEMBERS_AFTER_S

    def compared(self, now_s: float) -> None:
        """Everything was compared with the kernel, members too."""
        self._compared_at_s = now_s

    def must_compare(self, now_s: float) -> bool:
        """Whether no look came through for too long."""
        since_s = self._compared_at_s
        return since_s is not None and now_s - since_s >= COMPARE_AT_MOST_S

    def must_collect(self, now_s: float, *, there_is: bool) -> bool:
        """Whether garbage goes now; asked often, since it takes the time from when there is some."""
        if not there_is:
            self._garbage_since_s = None
            return False
        if self._garbage_since_s is None:
            self._garbage_since_s = now_s
        if now_s < self._garbage_rests_until_s:
            return False
        quiet = self.pause_s >= GARBAGE_AFTER_S / 2
        return quiet or now_s - self._garbage_since_s >= GARBAGE_AT_MOST_S

    def kept_garbage(self, now_s: float) -> None:
        """The kernel did not let it go."""
        self._garbage_rests_until_s = now_s + GARBAGE_REST_S
