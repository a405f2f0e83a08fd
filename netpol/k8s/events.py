"""Events on objects that are not in force as written: what `kubectl describe` shows.

Owns the Event object, its name and that each is posted once; what there is to tell is the rooms'. What is
wrong with an object itself is the same on every node: such an Event has one name for all of them, so that
the first node's stands and the others' are told that it exists.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import structlog

from netpol.k8s.errors import ApiError
from netpol.lib.naming import digest
from netpol.model.ids import ObjectKey

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


class Subject(NamedTuple):
    """The object that an Event is about."""

    api_version: str
    kind: str
    key: ObjectKey
    uid: str


class Complaint(NamedTuple):
    """Something to tell about an object; `of_node` if it is so on this node, not everywhere."""

    about: Subject
    reason: str
    message: str
    of_node: bool = True


def event_of(complaint: Complaint, node: str, now: dt.datetime) -> dict[str, Any]:
    """The Event object (core/v1) of a complaint."""
    about, where = complaint.about, node if complaint.of_node else ""
    tail = digest(about.uid, complaint.reason, complaint.message, where, chars=16)
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        # Names of Events are DNS subdomains of at most 253 characters.
        "metadata": {"namespace": about.key.namespace, "name": f"{about.key.name[:230]}.{tail}"},
        "involvedObject": {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "namespace": about.key.namespace,
            "name": about.key.name,
            "uid": about.uid,
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
    """Posts each complaint once.

    Args:
        find: everything that there is to tell now.
    """

    def __init__(self, api: Poster, *, node: str, find: Callable[[], Iterable[Complaint]]) -> None:
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
            namespace = complaint.about.key.namespace
            try:
                await self._api.post(f"/api/v1/namespaces/{namespace}/events", body)
            except ApiError as e:
                # 409: another node told it. 403, 404, 422: telling it again would not help.
                if e.status not in (403, 404, 409, 422):
                    raise
                if e.status != 409:
                    _log.warning("event refused", error=str(e))
            self._told[complaint] = None
            if len(self._told) > TOLD_MAX:
                del self._told[next(iter(self._told))]
