"""Framing and events of a watch."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netpol.k8s import stream
from netpol.k8s.decode import POD
from netpol.k8s.errors import ApiError
from netpol.k8s.stream import (
    EventDecoder,
    GarbageError,
    LineSplitter,
    Marker,
    Put,
    Removed,
    Unknown,
    Unreadable,
)
from netpol.model.ids import ObjectKey
from tests.unit.k8s.badserver import bookmark, line, pod

EVENTS = EventDecoder(POD)


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=8),
    st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"")),
    st.data(),
)
def test_lines_are_the_same_wherever_the_chunks_are_cut(lines, rest, data):
    body = b"".join(one + b"\n" for one in lines) + rest
    cuts = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=6)))
    splitter, got = LineSplitter(), []
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        got += splitter.feed(body[start:end])
    assert got == [one for one in lines if one and not one.isspace()]
    assert splitter.pending == len(rest)


def test_a_line_that_never_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(stream, "LINE_MAX_BYTES", 100)
    splitter = LineSplitter()
    splitter.feed(b"x" * 60)
    with pytest.raises(GarbageError):
        splitter.feed(b"x" * 60)


def test_events_of_objects():
    event = EVENTS.decode(line("ADDED", pod("p0", ip="10.0.0.1")))
    assert isinstance(event, Put)
    assert event.item.key == ObjectKey("a", "p0")
    obj = pod("p0")
    obj["metadata"]["resourceVersion"] = "9"
    assert EVENTS.decode(line("DELETED", obj)) == Removed(ObjectKey("a", "p0"), "uid-p0", "9")


def test_bookmarks():
    assert EVENTS.decode(bookmark(12)) == Marker("12", False)
    assert EVENTS.decode(bookmark(12, end=True)) == Marker("12", True)
    assert EVENTS.decode(line("BOOKMARK", {})) == Marker("", False)
    assert EVENTS.decode(line("BOOKMARK", {"metadata": None})) == Marker("", False)


@pytest.mark.parametrize("status", ["Failure", None])
def test_an_error_event_carries_its_status(status):
    obj = {"kind": "Status", "status": status, "code": 410, "reason": "Expired", "message": "old"}
    with pytest.raises(ApiError, match="HTTP 410 Expired: old") as caught:
        EVENTS.decode(line("ERROR", obj))
    assert caught.value.expired


def test_an_error_event_without_a_status_is_an_error_too():
    with pytest.raises(ApiError) as caught:
        EVENTS.decode(line("ERROR", {"status": "Failure", "code": "x"}))
    assert caught.value.status == 500


def test_an_object_that_cannot_be_read_is_an_event_with_its_identity():
    obj = pod("p0")
    obj["metadata"] |= {"labels": 5, "resourceVersion": "9"}
    event = EVENTS.decode(line("MODIFIED", obj))
    assert isinstance(event, Unreadable)
    assert event[:3] == (ObjectKey("a", "p0"), "uid-p0", "9")
    assert event.error.path == "metadata.labels"
    assert EVENTS.decode(line("DELETED", obj)) == Removed(ObjectKey("a", "p0"), "uid-p0", "9")


@pytest.mark.parametrize("kind", ["ADDED", "MODIFIED", "DELETED"])
def test_another_kind_is_never_taken_for_ours(kind):
    event = EVENTS.decode(line(kind, {**pod("p0"), "kind": "Gizmo"}))
    assert isinstance(event, Unreadable)
    assert event.error.path == "kind"


def test_a_type_of_the_future():
    assert EVENTS.decode(line("REVISED", pod("p0"))) == Unknown("REVISED")


def test_null_where_it_must_not_be_reads_as_not_set():
    event = EVENTS.decode(line("ADDED", {**pod("p0"), "spec": {"containers": [None]}}))
    assert isinstance(event, Put)


@settings(deadline=None)
@given(
    st.binary(max_size=60)
    | st.fixed_dictionaries(
        {
            "type": st.sampled_from(["ADDED", "DELETED", "BOOKMARK", "ERROR", "X"]) | st.none(),
            "object": st.none()
            | st.integers()
            | st.text(max_size=3)
            | st.dictionaries(
                st.sampled_from(["metadata", "spec", "status", "code", "kind"]),
                st.none() | st.integers() | st.text(max_size=3) | st.lists(st.none(), max_size=2),
            ),
        }
    ).map(lambda d: json.dumps(d).encode())
)
def test_no_line_makes_anything_but_an_event_or_an_api_error(raw):
    try:
        event = EVENTS.decode(raw)
    except ApiError:
        return
    assert isinstance(event, (Put, Removed, Marker, Unreadable, Unknown))
