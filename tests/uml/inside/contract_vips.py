"""What every VipDriver does, as checks of a namespace without its link; NODE4 and NODE6 are the node's."""

from __future__ import annotations

import errno
from collections.abc import Callable

from netpol.kernel.drivers import VipDriver
from netpol.model.net import Family, parse_address

Check = Callable[[VipDriver], None]

NODE4, NODE6 = parse_address("172.18.0.2"), parse_address("fd00:172:18::2")
SECOND4, SECOND6 = parse_address("172.18.0.3"), parse_address("fd00:172:18::3")
STRANGE4, STRANGE6 = parse_address("192.0.2.1"), parse_address("2001:db8::1")
SOURCES = {Family.V4: NODE4, Family.V6: NODE6}
V4, V6 = parse_address("10.96.0.1"), parse_address("fd00:10:96::1")
#: More than one batch holds, of both families.
MANY = [prefix + bytes([n // 250, n % 250 + 2]) for prefix in (V4[:2], V6[:14]) for n in range(150)]


def check_no_link(vips: VipDriver) -> None:
    assert vips.dump() is None
    assert vips.misrouted(SOURCES) == frozenset()
    assert vips.apply(add=[], remove=[V4, V6]) == ()
    assert vips.dump() is None
    vips.remove_link()


def check_come_and_go(vips: VipDriver) -> None:
    assert vips.apply(add=MANY, remove=[], sources=SOURCES) == ()
    assert vips.dump() == frozenset(MANY)
    assert vips.misrouted(SOURCES) == frozenset()
    gone, left = MANY[::3], [a for n, a in enumerate(MANY) if n % 3]
    assert vips.apply(add=[V4, V6], remove=gone, sources=SOURCES) == ()
    assert vips.dump() == frozenset((*left, V4, V6))
    assert vips.misrouted(SOURCES) == frozenset()
    assert vips.apply(add=[], remove=[*left, V4, V6]) == ()
    assert vips.dump() == frozenset()


def check_twice(vips: VipDriver) -> None:
    """What is there is no error to add, what is not there none to remove."""
    for _ in range(2):
        assert vips.apply(add=[V4, V6], remove=[], sources=SOURCES) == ()
        assert vips.dump() == {V4, V6}
        assert vips.misrouted(SOURCES) == frozenset()
    for _ in range(2):
        assert vips.apply(add=[], remove=[V4, V6]) == ()
        assert vips.dump() == frozenset()


def check_without_a_source(vips: VipDriver) -> None:
    assert vips.apply(add=[V4, V6], remove=[]) == ()
    assert vips.dump() == {V4, V6}
    assert vips.misrouted({}) == frozenset()
    assert vips.misrouted({Family.V4: NODE4}) == {V4}
    assert vips.misrouted(SOURCES) == {V4, V6}
    assert vips.apply(add=[V4, V6], remove=[], sources=SOURCES) == ()
    assert vips.misrouted(SOURCES) == frozenset()
    assert vips.apply(add=[], remove=[V4, V6]) == ()
    assert vips.dump() == frozenset()


def check_another_source(vips: VipDriver) -> None:
    other = {Family.V4: SECOND4, Family.V6: SECOND6}
    vips.apply(add=[V4, V6], remove=[], sources=SOURCES)
    assert vips.misrouted(other) == {V4, V6}
    assert vips.apply(add=[V4, V6], remove=[], sources=other) == ()
    assert vips.misrouted(other) == frozenset()
    assert vips.misrouted(SOURCES) == {V4, V6}


def check_a_source_that_is_not_the_nodes(vips: VipDriver) -> None:
    """The address is there all the same, with the kernel's route."""
    strange = {Family.V4: STRANGE4, Family.V6: STRANGE6}
    refused = vips.apply(add=[V4, V6], remove=[], sources=strange)
    assert refused == ((V4, errno.EINVAL), (V6, errno.EINVAL))
    assert vips.dump() == {V4, V6}
    assert vips.misrouted(SOURCES) == {V4, V6}


def check_the_link_goes(vips: VipDriver) -> None:
    vips.apply(add=[V4, V6], remove=[], sources=SOURCES)
    vips.remove_link()
    assert vips.dump() is None
    assert vips.apply(add=[V6], remove=[], sources=SOURCES) == ()
    assert vips.dump() == {V6}


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
