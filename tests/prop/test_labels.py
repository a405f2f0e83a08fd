"""Selectors: the canonical form has the meaning of what was written, and equal demands are equal values."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from netpol.k8s.decode import NETWORK_POLICY, decode
from netpol.model.labels import Operator, Requirement, Selector, labels, selector
from netpol.model.net import Family
from netpol.model.policy import PodPeer
from netpol.policy.compile import compile_policy
from netpol.render.names import member_set
from tests import builders as make
from tests.oracle.oracle import peer_selector_matches, selector_terms
from tests.prop import worlds

requirements = st.builds(
    Requirement,
    worlds.one(worlds.KEYS),
    worlds.one((Operator.IN, Operator.NOT_IN)),
    st.lists(worlds.one(("1", "2", "3")), min_size=1, max_size=3).map(tuple),
) | st.builds(
    Requirement, worlds.one(worlds.KEYS), worlds.one((Operator.EXISTS, Operator.DOES_NOT_EXIST))
)
some = st.lists(requirements, max_size=4)


def peer_of(written: dict[str, Any]) -> object:
    """The compiled peer of a podSelector."""
    made = make.policy("a/p", ingress=[make.ingress({"podSelector": written})])
    compiled = compile_policy(decode(NETWORK_POLICY, made).value)
    (rule,) = compiled.ingress
    assert rule.peers is not None
    return rule.peers[0]


@given(some, worlds.labels)
def test_canonical_form_keeps_the_meaning(terms: list[Requirement], have: dict[str, str]):
    assert selector(terms).matches(have) == all(t.matches(have) for t in terms)


@given(some, st.randoms())
def test_order_and_repetition_do_not_count(terms: list[Requirement], random: Any):
    shuffled = terms + terms[:1]
    random.shuffle(shuffled)
    shuffled = [t._replace(values=(*t.values[::-1], *t.values[:1])) for t in shuffled]
    assert selector(shuffled) == selector(terms)
    assert hash(selector(shuffled)) == hash(selector(terms))
    names = {member_set(PodPeer("a", selector(t)), Family.V4) for t in (terms, shuffled)}
    assert len(names) == 1


@given(some, worlds.labels)
def test_failing_names_a_term_that_fails(terms: list[Requirement], have: dict[str, str]):
    chosen = selector(terms)
    failing = chosen.failing(have)
    assert (failing is None) == chosen.matches(have)
    assert failing is None or not failing.matches(have)


@given(worlds.selectors(), worlds.labels)
def test_compiled_selector_is_what_was_written(written: dict[str, Any], have: dict[str, str]):
    peer = peer_of(written)
    broken = any(not isinstance(t, bool) for t in selector_terms(written, have))
    assert isinstance(peer, PodPeer) != broken
    if isinstance(peer, PodPeer):
        assert peer.pods.matches(have) == peer_selector_matches(written, have)


@given(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=4))
def test_labels_are_sorted_and_whole(source: dict[str, str]):
    made = labels(source)
    assert dict(made) == source
    assert list(made) == sorted(made)


@given(some, some)
def test_different_selectors_have_different_sets(one: list[Requirement], other: list[Requirement]):
    a, b = selector(one), selector(other)
    same = {member_set(PodPeer("a", s), Family.V4) for s in (a, b)}
    assert (len(same) == 1) == (a == b)


def test_nothing_demanded_is_everybody():
    assert Selector().matches({})
    assert str(Selector()) == "everything"
