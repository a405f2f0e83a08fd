"""Misbehaviour on demand, for tests of clients that must survive it.

Owns the knobs; the places that turn them stand in `http.py` and `watch.py`. A knob is a plain attribute
that takes effect on the next request or event, counts down where it says so, and is counted in `hits`
when it did something, so that a test can assert that its fault was exercised.
"""

from collections import Counter, deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Faults:
    """The knobs of one server.

    Attributes:
        latency_s: Seconds that every answer is late.
        fail_requests: That many next requests are answered with `fail_status`.
        fail_status: The HTTP status of failed requests.
        fail_probability: A share of requests, 0 to 1, that is answered with `fail_status`.
        fail_paths: Only requests whose path and query contain this text fail; empty is all.
        watch_http_410: That many next watches are answered with HTTP status 410.
        watch_gone: That many next watches begin with an ERROR event of code 410 and end.
        watch_empty: That many next watches end at once without an event.
        watch_cut_after: Watches are cut after that many lines, in the middle of the next one; None is
            never. Counts down `watch_cuts`.
        watch_cuts: How many watches are cut; negative is all.
        watch_duplicate: Send every event of a watch twice.
        watch_garbage: Lines that the next watch sends, raw, each before one event.
        watch_silent: Watches send no events while this is true, and keep their connection.
        no_watch_list: Answer sendInitialEvents with 422 as servers before WatchList do.
        no_host_network_field: Answer the field spec.hostNetwork with 400 as old servers do.
        no_bookmarks: Send none but the one that ends the initial events.
        accepted_tokens: Bearer tokens that are accepted, None for all that are known. Change it to
            rotate tokens.
        hits: How often each knob did something, by its name.
    """

    latency_s: float = 0.0
    fail_requests: int = 0
    fail_status: int = 500
    fail_probability: float = 0.0
    fail_paths: str = ""
    watch_http_410: int = 0
    watch_gone: int = 0
    watch_empty: int = 0
    watch_cut_after: int | None = None
    watch_cuts: int = -1
    watch_duplicate: bool = False
    watch_garbage: deque[bytes] = field(default_factory=deque)
    watch_silent: bool = False
    no_watch_list: bool = False
    no_host_network_field: bool = False
    no_bookmarks: bool = False
    accepted_tokens: set[str] | None = None
    hits: Counter[str] = field(default_factory=Counter)

    def take(self, knob: str) -> bool:
        """Count a countdown knob down; tell whether it was above zero."""
        left = getattr(self, knob)
        if left <= 0:
            return False
        setattr(self, knob, left - 1)
        self.hits[knob] += 1
        return True

    def cut_at(self) -> int | None:
        """Return after how many lines the watch that starts now is cut; it counts as a cut."""
        if self.watch_cut_after is None or self.watch_cuts == 0:
            return None
        if self.watch_cuts > 0:
            self.watch_cuts -= 1
        return self.watch_cut_after

    def clear(self) -> None:
        """Turn every knob back; `hits` stay."""
        fresh = Faults()
        for name in self.__slots__:
            if name != "hits":
                setattr(self, name, getattr(fresh, name))
