"""Who of several processes may act: leader election by a Lease (coordination.k8s.io/v1).

The rules are client-go's: an expiry is judged by the own clock from the moment at which a record was first
seen, never by the times written in it; updates carry the resourceVersion that was read, so that of two
contenders one fails; a leader that cannot renew stops before others can take over.

Followers ask seldom, since every node of a cluster may be one.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import structlog

from netpol.aio.clock import Clock, SystemClock
from netpol.k8s.errors import ApiError
from netpol.k8s.wire import WireStruct

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Times of an election; each must be well below the one before.

    Attributes:
        duration_s: how long others wait for a leader that is not heard of.
        renew_within_s: a leader that did not renew for so long stops.
        renew_every_s: how often a leader renews, and tries again after a failure.
        follow_every_s: how often, at most, others look (up to twice as long, by chance).
    """

    duration_s: int = 15
    renew_within_s: float = 10.0
    renew_every_s: float = 2.0
    follow_every_s: float = 10.0


class LeaseApi(Protocol):
    """What is asked of the API client."""

    async def get(self, path: str, **query: object) -> bytes:
        """Read an object."""
        ...

    async def post(self, path: str, body: dict[str, Any], **query: object) -> bytes:
        """Create an object."""
        ...

    async def put(self, path: str, body: dict[str, Any], **query: object) -> bytes:
        """Replace an object."""
        ...


class _Spec(WireStruct):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class _Meta(WireStruct):
    resource_version: str | None = None


class _Lease(WireStruct):
    metadata: _Meta | None = None
    spec: _Spec | None = None


_decoder = msgspec.json.Decoder(_Lease)


class Elector:
    """One contender.

    Args:
        identity: unique among all contenders, also among those that run one after the other.
        changed: told when leadership was won (True) and when it ended (False).
    """

    def __init__(
        self,
        api: LeaseApi,
        *,
        namespace: str,
        name: str,
        identity: str,
        times: LeaseTimes | None = None,
        changed: Callable[[bool], None] = lambda _leading: None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._api, self._namespace, self._name = api, namespace, name
        self.identity, self._changed = identity, changed
        self._times = times or LeaseTimes()
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - spreads requests
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._seen: _Lease | None = None
        self._seen_at_s = 0.0
        self._until_s = float("-inf")
        self._told = False
        self.last_error = ""

    @property
    def leading(self) -> bool:
        """Whether this process may act now."""
        return self.left_s > 0

    @property
    def left_s(self) -> float:
        """How long this process may act without a further renewal; not above 0 if it may not."""
        return self._until_s - self._clock.monotonic()

    @property
    def holder(self) -> str:
        """Who leads as far as is known, or ""."""
        spec = self._seen.spec if self._seen else None
        return (spec.holder_identity or "") if spec else ""

    async def run_forever(self) -> None:
        """Contend until cancelled; then give the Lease back."""
        try:
            while True:
                await self._try()
                self._tell()
                pause_s = self._times.renew_every_s
                if not self.leading:
                    pause_s = self._times.follow_every_s * self._rng.uniform(1, 2)
                elif self.last_error:
                    pause_s = min(pause_s, self.left_s)
                await self._clock.sleep(pause_s)
                self._tell()
        finally:
            if self.leading:
                await self._release()

    def _tell(self) -> None:
        if self.leading != self._told:
            self._told = self.leading
            _log.info("leader election", lease=self._name, leading=self._told, holder=self.holder)
            self._changed(self._told)

    async def _try(self) -> None:
        # What others see of us dates from before the request was sent.
        sent_s = self._clock.monotonic()
        limit_s = self.left_s if self.leading else self._times.renew_within_s
        try:
            async with asyncio.timeout(limit_s):
                won = await self._acquire_or_renew()
        except (ApiError, TimeoutError, msgspec.MsgspecError) as e:
            self.last_error = str(e) or "no answer in time"
            _log.debug("lease not had", lease=self._name, error=self.last_error)
            return
        self.last_error = ""
        self._until_s = sent_s + self._times.renew_within_s if won else float("-inf")

    async def _acquire_or_renew(self) -> bool:
        if self.leading and self._seen is not None:
            # Nobody else may have written: the version that we wrote last tells.
            try:
                return await self._write(self._seen)
            except ApiError as e:
                # Somebody wrote, or deleted it: then another one may be made, and lead, at any moment.
                if e.status not in (404, 409):
                    raise
        try:
            found = _decoder.decode(await self._api.get(f"{self._path}/{self._name}"))
        except ApiError as e:
            if e.status != 404:
                raise
            return await self._create()
        if found != self._seen:
            self._seen, self._seen_at_s = found, self._clock.monotonic()
        spec = found.spec or _Spec()
        lasts_s = spec.lease_duration_seconds or self._times.duration_s
        free = not spec.holder_identity or self._clock.monotonic() >= self._seen_at_s + lasts_s
        if spec.holder_identity != self.identity and not free:
            return False
        return await self._write(found)

    async def _create(self) -> bool:
        body = self._body(_Lease())
        try:
            self._note(await self._api.post(self._path, body))
        except ApiError as e:
            if e.status == 409:
                return False  # somebody else was faster
            raise
        return True

    async def _write(self, old: _Lease) -> bool:
        self._note(await self._api.put(f"{self._path}/{self._name}", self._body(old)))
        return True

    def _note(self, raw: bytes) -> None:
        self._seen, self._seen_at_s = _decoder.decode(raw), self._clock.monotonic()

    def _body(self, old: _Lease, *, holder: str | None = None) -> dict[str, Any]:
        now = dt.datetime.fromtimestamp(self._clock.wall(), dt.UTC)
        stamp = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # metav1.MicroTime
        spec, version = old.spec or _Spec(), old.metadata and old.metadata.resource_version
        holder = self.identity if holder is None else holder
        mine = spec.holder_identity == self.identity
        changes = spec.lease_transitions or 0
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "namespace": self._namespace,
                "name": self._name,
                **({"resourceVersion": version} if version else {}),
            },
            "spec": {
                "holderIdentity": holder,
                # A Lease that is given back expires at once (client-go writes 1).
                "leaseDurationSeconds": self._times.duration_s if holder else 1,
                "acquireTime": (spec.acquire_time or stamp) if mine and holder else stamp,
                "renewTime": stamp,
                "leaseTransitions": changes if mine or not version else changes + 1,
            },
        }

    async def _release(self) -> None:
        """Let others begin at once. Nothing is written by this process any more when this starts."""
        limit_s, self._until_s = self.left_s, float("-inf")
        self._tell()
        if self._seen is None:
            return
        try:
            async with asyncio.timeout(min(limit_s, self._times.renew_every_s)):
                body = self._body(self._seen, holder="")
                self._note(await self._api.put(f"{self._path}/{self._name}", body))
        except (ApiError, TimeoutError) as e:
            _log.debug("lease not given back", lease=self._name, error=str(e))
