"""Which address a LoadBalancer Service gets: cases in words, and the laws that hold for all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netpol.model.ids import ObjectKey
from netpol.model.net import Family, format_address, parse_address
from netpol.model.pools import parse_range
from proxy.allocator import Claim, Grant, settle

V4, V6 = Family.V4, Family.V6
POOLS = [parse_range("192.0.2.10-192.0.2.13"), parse_range("2001:db8::10-2001:db8::13")]
BOTH = (V4, V6)


def key(name: str) -> ObjectKey:
    return ObjectKey("shop", name)


def claim(
    name: str,
    *,
    created: str = "",
    families: tuple[Family, ...] = (V4,),
    requested: tuple[str, ...] = (),
    held: tuple[str, ...] = (),
) -> Claim:
    return Claim(
        key(name),
        created=created,
        families=families,
        requested=tuple(map(parse_address, requested)),
        held=tuple(map(parse_address, held)),
    )


def given_to(*claims: Claim, reserved: dict[str, str] | None = None) -> dict[str, list[str]]:
    grants = run(*claims, reserved=reserved)
    return {k.name: [format_address(a) for a in g.addresses] for k, g in grants.items()}


def run(*claims: Claim, reserved: dict[str, str] | None = None) -> dict[ObjectKey, Grant]:
    taken = {parse_address(a): [key(n)] for a, n in (reserved or {}).items()}
    return settle(claims, pools=POOLS, reserved=taken)


def reasons(*claims: Claim, reserved: dict[str, str] | None = None) -> dict[str, list[str]]:
    grants = run(*claims, reserved=reserved)
    return {k.name: [f.reason for f in g.faults] for k, g in grants.items() if g.faults}


def test_the_lowest_free_addresses_go_to_the_oldest_first_in_the_order_of_families() -> None:
    assert given_to(
        claim("b", created="2026-01-01T00:00:00Z", families=(V6, V4)),
        claim("a", created="2026-01-02T00:00:00Z"),
    ) == {"b": ["2001:db8::10", "192.0.2.10"], "a": ["192.0.2.11"]}


def test_what_is_held_stays_before_anything_is_given() -> None:
    claims = (claim("new", created="2020"), claim("old", created="2021", held=("192.0.2.10",)))

    assert given_to(*claims) == {"new": ["192.0.2.11"], "old": ["192.0.2.10"]}


def test_of_two_that_hold_one_address_the_younger_gets_another() -> None:
    claims = (
        claim("young", created="2022", held=("192.0.2.12",)),
        claim("old", created="2021", held=("192.0.2.12",)),
    )

    assert given_to(*claims) == {"old": ["192.0.2.12"], "young": ["192.0.2.10"]}


def test_a_held_address_outside_the_pools_is_not_taken_away() -> None:
    assert given_to(claim("a", held=("198.51.100.1",))) == {"a": ["198.51.100.1"]}


def test_an_external_ip_of_another_service_takes_nothing_away_but_is_not_given() -> None:
    claims = (claim("a", held=("192.0.2.10",)), claim("b"))

    found = given_to(*claims, reserved={"192.0.2.10": "thief", "192.0.2.11": "other"})

    assert found == {"a": ["192.0.2.10"], "b": ["192.0.2.12"]}


def test_a_request_is_honoured_also_by_one_that_has_another_address() -> None:
    assert given_to(
        claim("a", created="2020"),
        claim("b", created="2021", requested=("192.0.2.10",), held=("192.0.2.13",)),
    ) == {"a": ["192.0.2.11"], "b": ["192.0.2.10"]}


def test_of_a_family_without_a_request_any_address_is_given() -> None:
    found = given_to(claim("a", families=BOTH, requested=("2001:db8::12",)))

    assert found == {"a": ["192.0.2.10", "2001:db8::12"]}


def test_a_request_that_cannot_be_met_gets_nothing_else_and_says_why() -> None:
    claims = (
        claim("a", requested=("192.0.2.10",), created="1"),
        claim("b", requested=("192.0.2.10",), created="2"),
        claim("c", requested=("198.51.100.7",)),
        claim("d", requested=("2001:db8::10",)),
        claim("e", requested=("192.0.2.11",)),
        Claim(key("f"), unreadable=("x",)),
    )
    taken = {"192.0.2.11": "other"}

    assert given_to(*claims, reserved=taken) == {
        "a": ["192.0.2.10"],
        "b": [],
        "c": [],
        "d": ["192.0.2.12"],
        "e": [],
        "f": [],
    }
    assert reasons(*claims, reserved=taken) == {
        "b": ["AddressTaken"],
        "c": ["AddressOutsidePools"],
        "d": ["InvalidAddress"],
        "e": ["AddressTaken"],
        "f": ["InvalidAddress"],
    }


def test_a_request_that_cannot_be_met_leaves_what_was_held() -> None:
    claims = (
        claim("a", requested=("192.0.2.10",), held=("192.0.2.12",), created="2"),
        claim("b", held=("192.0.2.10",), created="3"),
    )

    assert given_to(*claims) == {"a": ["192.0.2.12"], "b": ["192.0.2.10"]}
    assert reasons(*claims) == {"a": ["AddressTaken"]}


def test_an_exhausted_pool_is_told_to_the_youngest() -> None:
    claims = [claim(f"s{n}", created=str(n)) for n in range(5)]

    assert reasons(*claims) == {"s4": ["PoolExhausted"]}


def test_a_family_without_a_pool_is_no_fault_of_a_service_that_has_another() -> None:
    pools = POOLS[:1]
    grants = settle(
        [claim("dual", families=BOTH), claim("six", families=(V6,))], pools=pools, reserved={}
    )

    assert not grants[key("dual")].faults
    assert [f.reason for f in grants[key("six")].faults] == ["PoolExhausted"]


def test_a_machine_keeps_its_address_also_in_a_pool() -> None:
    machines = [parse_address("192.0.2.10"), parse_address("192.0.2.12")]
    claims = [claim("a"), claim("b", requested=("192.0.2.12",)), claim("c", held=("192.0.2.12",))]

    grants = settle(claims, pools=POOLS, reserved={}, machines=machines)

    assert [format_address(a) for a in grants[key("a")].addresses] == ["192.0.2.11"]
    assert grants[key("b")].addresses == ()
    assert grants[key("b")].faults[0].message.startswith("192.0.2.12 is a node's")
    # What was given before is not taken away; that it is not served is told by who serves.
    assert [format_address(a) for a in grants[key("c")].addresses] == ["192.0.2.12"]


def test_a_range_of_any_size_is_not_counted_through() -> None:
    pool = parse_range("2001:db8::/64")
    claims = [claim(f"s{n:03}", families=(V6,)) for n in range(200)]

    grants = settle(claims, pools=[pool], reserved={})

    assert len({g.addresses for g in grants.values()}) == 200
    assert pool.size == 1 << 64


# -- laws ---------------------------------------------------------------------------------------

ADDRESSES = st.sampled_from(
    [parse_address(f"192.0.2.{n}") for n in range(9, 15)]
    + [parse_address(f"2001:db8::{n:x}") for n in range(15, 21)]
)
CLAIMS = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.builds(
        Claim,
        key=st.just(key("")),
        created=st.sampled_from(["1", "2"]),
        families=st.sampled_from([(V4,), (V6,), (V4, V6), (V6, V4)]),
        requested=st.lists(ADDRESSES, max_size=2).map(tuple),
        held=st.lists(ADDRESSES, max_size=2, unique=True).map(tuple),
    ),
).map(
    lambda found: [
        Claim(
            key(name),
            created=c.created,
            families=c.families,
            requested=c.requested,
            held=c.held,
        )
        for name, c in found.items()
    ]
)
RESERVED = st.dictionaries(ADDRESSES, st.sampled_from("xyz").map(lambda n: [key(n)]))


@given(CLAIMS, RESERVED)
def test_no_address_is_given_twice_and_none_is_invented(
    claims: list[Claim], reserved: dict[bytes, list[ObjectKey]]
) -> None:
    grants = settle(claims, pools=POOLS, reserved=reserved)

    everything = [a for g in grants.values() for a in g.addresses]
    assert len(everything) == len(set(everything))
    for c in claims:
        for address in grants[c.key].addresses:
            new = address not in c.held
            assert not (new and address in reserved)
            assert not new or any(p.contains(address) for p in POOLS)


@given(CLAIMS, RESERVED)
def test_the_answer_depends_on_no_order_and_stays_once_it_is_written(
    claims: list[Claim], reserved: dict[bytes, list[ObjectKey]]
) -> None:
    first = settle(claims, pools=POOLS, reserved=reserved)
    assert settle(reversed(claims), pools=POOLS, reserved=reserved) == first
    written = [
        Claim(
            c.key,
            created=c.created,
            families=c.families,
            requested=c.requested,
            held=first[c.key].addresses,
        )
        for c in claims
    ]

    second = settle(written, pools=POOLS, reserved=reserved)

    # Only a request may move an address later: one that somebody held at first and gave up meanwhile.
    for c in written:
        if not c.requested:
            assert set(first[c.key].addresses) <= set(second[c.key].addresses)


@given(CLAIMS)
def test_who_holds_alone_and_asks_for_nothing_keeps(claims: list[Claim]) -> None:
    grants = settle(claims, pools=POOLS, reserved={})

    for c in claims:
        others = {a for o in claims if o.key != c.key for a in o.held}
        for address in set(c.held) - others:
            if not c.requested and len(address) in {4 if f is V4 else 16 for f in c.families}:
                assert address in grants[c.key].addresses
