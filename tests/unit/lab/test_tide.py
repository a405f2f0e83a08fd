"""How far a watch must have come: the last change that its selection is told about, and no more."""

from __future__ import annotations

import pytest

from netpol.k8s import informers
from netpol.k8s.watching import Selection
from netpol.lab.remotestore import RemoteStore
from netpol.lab.tide import Tide

LOCAL = str(informers.pods_on("node1"))
EVERYWHERE = str(informers.pods_everywhere())


def fields(**given: str) -> dict[str, str]:
    """The selectable fields of a running pod on node1."""
    named = {name.replace("_", "."): value for name, value in given.items()}
    return {
        "metadata.name": "a",
        "metadata.namespace": "x",
        "spec.nodeName": "node1",
        "spec.hostNetwork": "false",
        "status.phase": "Running",
    } | named


@pytest.fixture
def tide() -> Tide:
    store = object.__new__(RemoteStore)  # nothing is asked of it here
    return Tide(store)


def needed(tide: Tide, selection: str, *, kind: str = "Pod", end: int = 1000) -> int:
    return tide.needed(kind, selection, {kind: end})


def test_nothing_happened_nothing_is_needed(tide: Tide) -> None:
    assert needed(tide, "all") == 0


def test_a_watch_of_all_needs_the_last_change(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "b", 7, fields(spec_nodeName="node2"))

    assert needed(tide, "all") == 7


def test_a_change_elsewhere_is_not_needed(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "b", 7, fields(spec_nodeName="node2"))

    assert needed(tide, LOCAL) == 5
    assert needed(tide, str(Selection(fields=("metadata.name=a",)))) == 7


def test_a_deletion_is_needed_where_the_object_was_selected(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "a", 9, None)

    assert needed(tide, LOCAL) == 9
    assert needed(tide, str(informers.pods_on("node2"))) == 0


def test_leaving_a_selection_is_needed_and_what_follows_is_not(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "a", 6, fields(status_phase="Succeeded"))
    tide.note("Pod", "a", 8, fields(status_phase="Succeeded"))

    assert needed(tide, EVERYWHERE) == 6
    assert needed(tide, LOCAL) == 8


def test_terms_that_an_agent_asks_for_without_saying_so_count(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "h", 6, fields(spec_hostNetwork="true"))

    assert needed(tide, EVERYWHERE) == 5


def test_a_namespaces_watch_needs_what_happens_there(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "b", 6, fields(metadata_namespace="y"))

    assert needed(tide, str(Selection(namespace="x"))) == 5


def test_what_comes_after_the_question_is_not_needed(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "a", 9, fields())

    assert needed(tide, "all", end=8) == 5


def test_the_same_version_again_is_no_change(tide: Tide) -> None:
    tide.note("Pod", "a", 5, fields())
    tide.note("Pod", "a", 5, None)

    assert needed(tide, "all") == 5
