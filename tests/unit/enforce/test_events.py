from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Mapping
from typing import Any

from netpol.enforce.events import complaints
from netpol.k8s.errors import ApiError
from netpol.k8s.events import Complaint, EventTeller, Subject, event_of
from netpol.model.ids import ObjectKey
from netpol.model.policy import Problem

KEY = ObjectKey("shop", "db")
NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


class Server:
    """Takes Events; refuses as told."""

    def __init__(self) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.status = 0

    async def post(self, path: str, body: Mapping[str, Any], **query: object) -> bytes:
        assert path == "/api/v1/namespaces/shop/events"
        if self.status:
            raise ApiError("refused", status=self.status)
        self.bodies.append(body)
        return b"{}"


def complaint(message: str, *, name: str = "db") -> Complaint:
    key = ObjectKey("shop", name)
    return Complaint(Subject("networking.k8s.io/v1", "NetworkPolicy", key, "u"), "Invalid", message)


def test_an_invalid_policy_has_one_event_for_all_nodes_a_refused_one_for_each() -> None:
    told = complaints(
        {KEY: (Problem("spec.ingress[0]", "bad"),)},
        {KEY: "set full"},
        uid_of=lambda _: "u",
        node="n1",
    )
    invalid, refused = told

    names = [
        event_of(c, n, NOW)["metadata"]["name"] for c in (invalid, refused) for n in ("n1", "n2")
    ]

    assert names[0] == names[1]
    assert names[2] != names[3]
    assert "spec.ingress[0]: bad" in invalid.message
    assert "set full" in refused.message


def test_messages_and_names_stay_within_the_limits_of_the_api() -> None:
    event = event_of(complaint("x" * 5000, name="n" * 253), "n1", NOW)

    assert len(event["message"]) == 1024
    assert len(event["metadata"]["name"]) <= 253


async def test_each_complaint_is_told_once_also_when_another_node_was_first() -> None:
    server, found = Server(), [complaint("a")]
    teller = EventTeller(server, node="n1", find=lambda: iter(found))
    task = asyncio.create_task(teller.run())
    teller.look()
    await asyncio.sleep(0.01)
    server.status = 409
    found.append(complaint("b"))
    teller.look()
    await asyncio.sleep(0.01)
    server.status = 0
    teller.look()
    await asyncio.sleep(0.01)
    task.cancel()

    assert [b["message"] for b in server.bodies] == ["a"]
    assert teller.failures == 0
