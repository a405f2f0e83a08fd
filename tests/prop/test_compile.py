"""Compiling: it never raises, says what it closed, and keeps "any" and "nothing" apart."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from netpol.k8s.decode import NETWORK_POLICY, decode
from netpol.k8s.errors import DecodeError
from netpol.model.ids import Direction
from netpol.model.policy import CompiledPolicy, InvalidPeer
from netpol.policy.compile import compile_policy
from tests.oracle.oracle import isolates, subject_broken
from tests.prop import worlds

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 70000)
    | worlds.one(("", "x", "10.0.0.0/8", "::/0")),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(worlds.one(("podSelector", "ipBlock", "cidr", "port")), inner, max_size=2)
    ),
    max_leaves=4,
)


def compiled(manifest: dict[str, Any]) -> CompiledPolicy:
    return compile_policy(decode(NETWORK_POLICY, manifest).value)


def paths(thing: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a manifest's spec."""
    out = [at] if at else []
    if isinstance(thing, dict):
        for key, value in thing.items():
            out += paths(value, (*at, key))
    elif isinstance(thing, list):
        for index, value in enumerate(thing):
            out += paths(value, (*at, index))
    return out


def put(thing: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one place replaced."""
    if not path:
        return value
    copy = dict(thing) if isinstance(thing, dict) else list(thing)
    copy[path[0]] = put(thing[path[0]], path[1:], value)
    return copy


@given(worlds.policies())
def test_directions_and_any(manifest: dict[str, Any]):
    policy = compiled(manifest)
    for direction, kind in ((Direction.INGRESS, "ingress"), (Direction.EGRESS, "egress")):
        wanted = isolates(manifest, kind.capitalize())
        assert (direction in policy.isolates) == wanted
        written = manifest["spec"].get(kind) or []
        if not wanted or subject_broken(manifest):
            assert policy.rules(direction) == ()
            continue
        assert len(policy.rules(direction)) == len(written)
        for rule, source in zip(policy.rules(direction), written, strict=True):
            peers = source.get("from" if kind == "ingress" else "to")
            assert (rule.peers is None) == (not peers)
            assert (rule.ports is None) == (not source.get("ports"))
            assert rule.peers is None or len(rule.peers) == len(peers or ())


@given(worlds.policies())
def test_what_is_closed_is_reported(manifest: dict[str, Any]):
    policy = compiled(manifest)
    closed = subject_broken(manifest) or any(
        isinstance(peer, InvalidPeer)
        for direction in Direction
        for rule in policy.rules(direction)
        for peer in rule.peers or ()
    )
    assert policy.problems or not closed
    for problem in policy.problems:
        assert problem.field.startswith("spec.")
        assert problem.message


@given(worlds.policies(), st.data())
def test_one_junk_value_anywhere(manifest: dict[str, Any], data: st.DataObject):
    """The wall either refuses the structure, or it compiles."""
    place = data.draw(worlds.one(paths(manifest["spec"])))
    broken = {**manifest, "spec": put(manifest["spec"], place, data.draw(JUNK))}
    try:
        value = decode(NETWORK_POLICY, broken).value
    except DecodeError:
        return
    assert compile_policy(value).key.name == manifest["metadata"]["name"]


@given(worlds.policies())
def test_compiling_is_a_function(manifest: dict[str, Any]):
    assert compiled(manifest) == compiled(manifest)
