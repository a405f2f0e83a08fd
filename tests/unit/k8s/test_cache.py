"""The store: what is delivered, and that nothing goes back."""

import pytest
from structlog.testing import capture_logs

from netpol.k8s.cache import MAX_GRAVES, Change, Store, version_number
from netpol.k8s.decode import Decoded
from netpol.model.ids import ObjectKey
from netpol.model.objects import Namespace


def ns(name, rv, *, uid="", labels=()):
    value = Namespace(name=name, uid=uid or f"u-{name}", labels=labels)
    return Decoded(ObjectKey("", name), str(rv), value)


def key(name):
    return ObjectKey("", name)


@pytest.fixture
def store():
    made = Store("namespaces")
    made.log = []
    made.subscribe(made.log.append)
    return made


def test_an_add_a_change_and_a_delete_are_delivered(store):
    one, two = ns("a", 1), ns("a", 2, labels=(("x", "y"),))
    assert store.put(one)
    assert store.put(two)
    assert store.remove(key("a"), uid="u-a", resource_version="3")
    assert store.log == [
        Change(key("a"), None, one.value),
        Change(key("a"), one.value, two.value),
        Change(key("a"), two.value, None),
    ]
    assert (store.generation, len(store)) == (3, 0)


def test_an_equal_object_is_not_delivered(store):
    store.put(ns("a", 1))
    assert not store.put(ns("a", 2))
    assert not store.put(ns("a", 2))
    assert store.generation == 1
    assert not store.put(ns("a", 1, labels=(("old", ""),))), "the version of an equal object counts"


def test_an_older_version_never_replaces_a_newer_one(store):
    store.put(ns("a", 9, labels=(("v", "9"),)))
    assert not store.put(ns("a", 8, labels=(("v", "8"),)))
    assert store.get(key("a")).labels == (("v", "9"),)
    assert store.stale == 1


def test_versions_compare_as_numbers_not_as_text(store):
    store.put(ns("a", 9))
    assert store.put(ns("a", 10, labels=(("v", "10"),)))


def test_without_numbers_the_later_delivery_counts(store):
    store.put(ns("a", "x9"))
    assert store.put(ns("a", "x8", labels=(("v", "8"),)))
    assert store.put(ns("a", "", labels=(("v", "none"),)))
    assert store.put(ns("a", 1, labels=(("v", "1"),)))


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("", 0), ("1a", 0), ("²", 0), ("-1", 0), ("9" * 20, 0)]
)
def test_what_counts_as_a_version_number(text, number):
    assert version_number(text) == number


def test_another_uid_is_delivered_as_delete_and_add(store):
    old, new = ns("a", 1, uid="one"), ns("a", 5, uid="two")
    store.put(old)
    store.put(new)
    assert store.log[1:] == [Change(key("a"), old.value, None), Change(key("a"), None, new.value)]


def test_a_late_deletion_of_the_predecessor_does_not_touch_the_successor(store):
    store.put(ns("a", 1, uid="one"))
    store.put(ns("a", 5, uid="two"))
    assert not store.remove(key("a"), uid="one", resource_version="4")
    assert store.get(key("a")).uid == "two"
    assert store.remove(key("a"), uid="two", resource_version="6")


def test_late_news_do_not_raise_the_dead(store):
    store.put(ns("a", 1))
    store.remove(key("a"), uid="u-a", resource_version="5")
    assert not store.put(ns("a", 3))
    assert store.put(ns("a", 6, uid="new"))


def test_late_news_from_before_a_list_do_not_raise_the_dead(store):
    store.put(ns("a", 3))
    listing = store.listing()
    listing.put(ns("b", 7))
    assert listing.finish("9") == 1
    assert not store.put(ns("a", 8))
    assert store.put(ns("c", 10))


def test_a_list_replaces_what_is_there_and_tells_only_the_differences(store):
    for n in "abc":
        store.put(ns(n, 1))
    store.log.clear()
    assert not store.synced
    listing = store.listing()
    listing.put(ns("a", 1))
    listing.put(ns("b", 2, labels=(("n", "w"),)))
    listing.keep(key("unreadable"))
    listing.finish("5")
    assert store.synced
    assert [(c.key.name, c.after is None) for c in store.log] == [("b", False), ("c", True)]


def test_a_list_knows_better_than_a_remembered_deletion(store):
    store.put(ns("a", 1))
    store.remove(key("a"), resource_version="5")
    listing = store.listing()
    assert listing.put(ns("a", 4)), "another selection, or an API server that was restored"


def test_a_list_given_up_half_way_loses_nothing(store):
    for n in "abc":
        store.put(ns(n, 1))
    store.listing().put(ns("a", 2, labels=(("x", "y"),)))
    assert sorted(k.name for k in store.objects) == ["a", "b", "c"]


def test_the_memory_of_deletions_is_bounded(store):
    for i in range(MAX_GRAVES + 50):
        store.remove(key(f"n{i}"), resource_version=str(i + 1))
    assert len(store._graves) == MAX_GRAVES


def test_a_history_that_begins_anew_is_accepted_after_forgetting(store):
    store.put(ns("a", 900))
    assert store.horizon == 900
    store.forget_history()
    assert store.put(ns("a", 3, labels=(("x", "y"),)))
    assert store.horizon == 3


def test_a_subscriber_that_fails_stops_neither_the_others_nor_the_store(store):
    def broken(change):
        raise RuntimeError("mine")

    late = []
    store.subscribe(broken)
    store.subscribe(late.append)
    with capture_logs() as logs:
        store.put(ns("a", 1))
    assert len(late) == len(store.log) == 1
    assert store.subscriber_errors == 1
    assert logs[0]["key"] == "a"


def test_a_subscription_can_replay_and_can_end(store):
    store.put(ns("a", 1))
    seen = []
    end = store.subscribe(seen.append, replay=True)
    assert [c.key.name for c in seen] == ["a"]
    end()
    end()
    store.put(ns("b", 2))
    assert len(seen) == 1


async def test_clearing_delivers_deletions_and_starts_anew(store):
    store.listing().finish("7")
    await store.wait_synced()
    store.put(ns("a", 8))
    store.clear()
    assert store.log[-1].after is None
    assert not store.synced
    assert store.put(ns("a", 1))
    assert key("a") in store
    assert [o.name for o in store] == ["a"]
