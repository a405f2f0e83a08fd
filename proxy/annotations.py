"""What the annotations of a Service ask of the proxy. Pure.

`netpol.io/service.NAME` counts before `kube-router.io/service.NAME`, so that both may stand there while a
cluster moves. A value that cannot be followed is named and has no effect. docs/services.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from netpol.model.ids import ObjectKey
from netpol.model.ipvs import SCHED_FLAG_1, SCHED_FLAG_2, SCHED_FLAG_3
from netpol.model.labels import Labels
from netpol.model.net import parse_address
from proxy.rows import Reason, Refused

#: In order of precedence.
PREFIXES = ("netpol.io/service.", "kube-router.io/service.")

#: On an EndpointSlice: the weight of its endpoints.
SLICE_WEIGHT = "netpol.io/weight"

#: Schedulers of IPVS that do without settings of their own, and what each becomes with weights.
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh")
_WEIGHTED = {"rr": "wrr", "lc": "wlc"}

#: Flag names to bits and the schedulers that have them, None for any (linux/ip_vs.h).
_FLAGS: dict[str, tuple[int, str | None]] = {
    "flag-1": (SCHED_FLAG_1, None),
    "flag-2": (SCHED_FLAG_2, None),
    "flag-3": (SCHED_FLAG_3, None),
    "sh-fallback": (SCHED_FLAG_1, "sh"),
    "sh-port": (SCHED_FLAG_2, "sh"),
    "mh-fallback": (SCHED_FLAG_1, "mh"),
    "mh-port": (SCHED_FLAG_2, "mh"),
}

WEIGHT_MIN, WEIGHT_MAX = 1, 65535

#: Longest part of a foreign value that a message repeats.
_SHOWN_MAX = 60


class Weights(NamedTuple):
    """Weights by the address, the pod's name and the node of an endpoint; the first found counts."""

    by_address: tuple[tuple[bytes, int], ...] = ()
    by_pod: tuple[tuple[str, int], ...] = ()
    by_node: tuple[tuple[str, int], ...] = ()

    def of(self, address: bytes, pod: ObjectKey | None, node: str) -> int | None:
        """The weight of an endpoint, None where nothing is said of it."""
        found = dict(self.by_address).get(address)
        if found is None and pod is not None:
            found = dict(self.by_pod).get(pod.name)
        return dict(self.by_node).get(node) if found is None else found


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a Service asks for.

    Attributes:
        scheduler: by annotation, else the default.
        scheduler_named: whether it is by annotation; then weights do not change it.
        local: both traffic policies count as Local.
        tunnel: direct server return.
        skip_balancer_addresses: load balancers' addresses are not served.
        weights: None where none are given.
    """

    scheduler: str = "rr"
    scheduler_named: bool = False
    flags: int = 0
    local: bool = False
    tunnel: bool = False
    skip_balancer_addresses: bool = False
    weights: Weights | None = None
    refused: tuple[Refused, ...] = field(default=())

    def scheduler_for(self, *, weighted: bool) -> str:
        """The scheduler: one that heeds weights, where there are some and no other one is named."""
        if weighted and not self.scheduler_named:
            return _WEIGHTED.get(self.scheduler, self.scheduler)
        return self.scheduler


@lru_cache(maxsize=1024)
def read(annotations: Labels, default_scheduler: str) -> Wishes:
    """Read the annotations of a Service."""
    return _Reader(annotations).wishes(default_scheduler)


def wants_tunnel(annotations: Labels) -> bool:
    """Whether a Service asks for direct server return."""
    return read(annotations, SCHEDULERS[0]).tunnel


def slice_weight(annotations: Labels) -> int | None:
    """The weight of an EndpointSlice's endpoints; None where none is given or it cannot be read."""
    text = dict(annotations).get(SLICE_WEIGHT)
    return _weight(text) if text is not None else None


class _Reader:
    """Reads one Service's annotations and notes what is wrong with them."""

    def __init__(self, annotations: Labels) -> None:
        self._have = dict(annotations)
        self._refused: list[Refused] = []

    def wishes(self, default_scheduler: str) -> Wishes:
        """All of them."""
        scheduler = self._scheduler()
        flags = self._flags(scheduler or default_scheduler)
        local = self._switch("local")
        tunnel = self._tunnel()
        skip = self._switch("skiplbips")
        # A pod that reaches itself through its Service works always: these two change nothing.
        self._switch("hairpin")
        self._switch("hairpin.externalips")
        return Wishes(
            scheduler=scheduler or default_scheduler,
            scheduler_named=bool(scheduler),
            flags=flags,
            local=local,
            tunnel=tunnel,
            skip_balancer_addresses=skip,
            weights=self._weights(),
            refused=tuple(self._refused),
        )

    def _get(self, name: str) -> tuple[str, str] | None:
        """The annotation that counts: its full name, and its value without blanks around it."""
        for prefix in PREFIXES:
            value = self._have.get(prefix + name)
            if value is not None:
                return prefix + name, value.strip()
        return None

    def _refuse(self, name: str, needed: str, got: str, instead: str) -> None:
        shown = repr(got if len(got) <= _SHOWN_MAX else f"{got[:_SHOWN_MAX]}...")
        text = f"annotation {name}: needed {needed}, got {shown}; {instead}"
        self._refused.append(Refused(Reason.ANNOTATION_INVALID, text))

    def _scheduler(self) -> str:
        found = self._get("scheduler")
        if found is None:
            return ""
        name, value = found
        if value in SCHEDULERS:
            return value
        self._refuse(name, f"one of {' '.join(SCHEDULERS)}", value, "the default is used")
        return ""

    def _flags(self, scheduler: str) -> int:
        found = self._get("schedflags")
        flags = 0
        if found is None:
            return flags
        name, value = found
        for word in (w.strip() for w in value.split(",")):
            if not word:
                continue
            bit, only = _FLAGS.get(word, (0, None))
            if not bit:
                self._refuse(name, f"some of {', '.join(_FLAGS)}", word, "it is left out")
            elif only not in (None, scheduler):
                self._refuse(name, f"flags of {scheduler}", word, "it is left out")
            else:
                flags |= bit
        return flags

    def _switch(self, name: str) -> bool:
        """kube-router takes some of these by being there, others by "true"."""
        found = self._get(name)
        if found is None:
            return False
        full, value = found
        if value.lower() in ("", "true", "false"):
            return value.lower() != "false"
        self._refuse(full, "true or false", value, "it has no effect")
        return False

    def _tunnel(self) -> bool:
        found = self._get("dsr")
        if found is None:
            return False
        name, value = found
        if value.lower() == "tunnel":
            return True
        self._refuse(name, "tunnel", value, "packets return by this node")
        return False

    def _weights(self) -> Weights | None:
        found = self._get("weights")
        if found is None:
            return None
        name, value = found
        addresses: dict[bytes, int] = {}
        pods: dict[str, int] = {}
        nodes: dict[str, int] = {}
        for word in (w.strip() for w in value.split(",")):
            if not word:
                continue
            target, _, number = (part.strip() for part in word.rpartition("="))
            weight = _weight(number)
            kind, slash, who = target.partition("/")
            if weight is not None and slash and who and kind in ("pod", "node"):
                (pods if kind == "pod" else nodes)[who] = weight
                continue
            address = _address(target)
            if weight is not None and address is not None:
                addresses[address] = weight
                continue
            needed = f"node/NAME=N, pod/NAME=N or ADDRESS=N, N in {WEIGHT_MIN}..{WEIGHT_MAX}"
            self._refuse(name, needed, word, "it has no effect")
        return Weights(tuple(addresses.items()), tuple(pods.items()), tuple(nodes.items()))


def _weight(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        return None
    return int(text) if WEIGHT_MIN <= int(text) <= WEIGHT_MAX else None


def _address(text: str) -> bytes | None:
    try:
        return parse_address(text)
    except ValueError:
        return None
