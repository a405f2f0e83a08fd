"""Events on policies that are not in force as written: what `kubectl describe networkpolicy` shows.

Two reasons. `Refused` is this node's: the kernel does not take the policy. `Invalid` is the object's, the
same on every node; its Event has one name for all of them, so that the first node's stands and the others'
are told that it exists.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import structlog

from netpol.k8s.errors import ApiError
from netpol.lib.naming import digest
from netpol.model.ids import ObjectKey
from netpol.model.policy import Problem

_log = structlog.get_logger(__name__)

#: Longest message of an Event (core/v1 validation: 1,024 bytes).
MESSAGE_MAX = 1024
#: Told events that are remembered; beyond, the oldest may be told again, which changes nothing.
TOLD_MAX = 4096
RETRY_S = 30.0


class Poster(Protocol):
    """What is asked of the API client."""

    async def post(self, path: str, body: Mapping[str, Any], **query: object) -> bytes:
        """Create an object."""
        ...


class Complaint(NamedTuple):
    """Something to tell about a policy."""

    key: ObjectKey
    uid: str
    reason: str
    message: str


def complaints(
    problems: Mapping[ObjectKey, tuple[Problem, ...]],
    refused: Mapping[ObjectKey, str],
    *,
    uid_of: Callable[[ObjectKey], str],
    node: str,
) -> Iterator[Complaint]:
    """Everything that there is to tell now."""
    for key, faults in sorted(problems.items()):
        text = "; ".join(f"{p.field}: {p.message}" for p in faults)
        yield Complaint(key, uid_of(key), "Invalid", f"not in force as written: {text}")
    for key, why in sorted(refused.items()):
        text = f"not in force on node {node}, the rules before it stay: {why}"
        yield Complaint(key, uid_of(key), "Refused", text)


def event_of(complaint: Complaint, node: str, now: dt.datetime) -> dict[str, Any]:
    """The Event object (core/v1) of a complaint."""
    where = node if complaint.reason == "Refused" else ""
    tail = digest(complaint.uid, complaint.reason, complaint.message, where, chars=16)
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    key = complaint.key
    return {
        "apiVersion": "v1",
        "kind": "Event",
        # Names of Events are DNS subdomains of at most 253 characters.
        "metadata": {"namespace": key.namespace, "name": f"{key.name[:230]}.{tail}"},
        "involvedObject": {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "namespace": key.namespace,
            "name": key.name,
            "uid": complaint.uid,
        },
        "type": "Warning",
        "reason": complaint.reason,
        "message": complaint.message[:MESSAGE_MAX],
        "source": {"component": "netpol-agent", "host": node},
        "reportingComponent": "netpol-agent",
        "reportingInstance": node,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }


class EventTeller:
    """Posts each complaint once."""

    def __init__(self, api: Poster, *, node: str, find: Callable[[], Iterator[Complaint]]) -> None:
        self._api, self._node, self._find = api, node, find
        self._told: dict[Complaint, None] = {}
        self._wake = asyncio.Event()
        self.failures = 0

    def look(self) -> None:
        """There may be something new to tell. Cheap."""
        self._wake.set()

    async def run(self) -> None:
        """Tell until cancelled. The API server's troubles delay events and nothing else."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._tell()
            except ApiError as e:
                self.failures += 1
                _log.warning("event not posted", error=str(e))
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _tell(self) -> None:
        for complaint in list(self._find()):
            if complaint in self._told:
                continue
            body = event_of(complaint, self._node, dt.datetime.now(dt.UTC))
            try:
                await self._api.post(f"/api/v1/namespaces/{complaint.key.namespace}/events", body)
            except ApiError as e:
                # 409: another node told it. 403, 404, 422: telling it again would not help.
                if e.status not in (403, 404, 409, 422):
                    raise
                if e.status != 409:
                    _log.warning("event refused", error=str(e))
            self._told[complaint] = None
            if len(self._told) > TOLD_MAX:
                del self._told[next(iter(self._told))]
