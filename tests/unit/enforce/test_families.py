"""Each family gets on by itself: what fails of one is said, and the other is up to date and stays so."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from netpol.enforce.kernel_state import dump_kernel
from netpol.kernel.drivers import SetError, TableError, TableTransaction
from netpol.kernel.testing import FakeSet
from netpol.lib.errors import InputError, KernelMissingError
from netpol.model.ids import Direction, ObjectKey, SetName
from netpol.model.net import FAMILIES, Family, host_prefix, parse_address
from netpol.model.ruleset import Drop, Rule, SetKind, SetSpec
from netpol.render import names
from netpol.render.options import FIRST_CLASS, NONE, UNKNOWN
from netpol.render.static import TABLE
from tests import builders as make
from tests.prop import churn
from tests.unit.enforce.rooms import Scene, until

OTHER = {Family.V4: Family.V6, Family.V6: Family.V4}


def _refuses(scene: Scene, family: Family) -> Callable[[], None]:
    def refuse(tx: TableTransaction) -> Exception | None:
        refused = TableError("refused", retryable=False, got="Invalid argument")
        return refused if tx.family is family else None

    scene.tables.refuses = refuse

    def repair() -> None:
        scene.tables.refuses = lambda _: None

    return repair


def _locked(scene: Scene, family: Family) -> Callable[[], None]:
    repair = _refuses(scene, family)
    locked = TableError("locked", retryable=True)
    scene.tables.refuses = lambda tx: locked if tx.family is family else None
    return repair


def _unreadable(scene: Scene, family: Family) -> Callable[[], None]:
    scene.tables.unreadable[family] = KernelMissingError("running the save tool")
    return scene.tables.unreadable.clear


def _no_tools(scene: Scene, family: Family) -> Callable[[], None]:
    mend = _unreadable(scene, family)
    missing = KernelMissingError("running the restore tool")
    scene.tables.refuses = lambda tx: missing if tx.family is family else None

    def repair() -> None:
        mend()
        scene.tables.refuses = lambda _: None

    return repair


def _squatted_map(scene: Scene, family: Family) -> Callable[[], None]:
    """Somebody's set has the name of a class map, and cannot be read as one."""
    name = names.class_map(Direction.INGRESS, family)
    ours = scene.sets.state.pop(name, None)
    scene.sets.state[name] = FakeSet(SetSpec(name, SetKind.HASH_IP, family), 65536)

    def repair() -> None:
        scene.sets.state.pop(name)
        if ours is not None:
            scene.sets.state[name] = ours

    return repair


HARMS = pytest.mark.parametrize(
    "harm",
    [_refuses, _locked, _unreadable, _no_tools, _squatted_map],
    ids=lambda f: f.__name__.strip("_"),
)
BROKEN = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    scene.pod("web", 2, role="web")
    scene.pod("db", 3, role="db")
    scene.policy("web", make.pods(role="db"))
    scene.policy("db", make.pods(role="web"))
    return scene


def clean(scene: Scene, family: Family) -> bool:
    """Whether a family is what the graph says, members and all."""
    room = scene.room
    left_out = {OTHER[family]: RuntimeError()}
    return room.dataplane.drift(dump_kernel(scene.sets, scene.tables, skip=left_out)) == ""


@BROKEN
@HARMS
async def test_from_the_start(scene: Scene, family: Family, harm) -> None:
    repair = harm(scene, family)
    async with scene.running() as room:
        assert await until(lambda: room.status.applied_generation == room.generation)
        assert await until(lambda: bool(room.status.error))
        assert room.status.error.startswith(f"IPv{family}: ")
        assert room.status.down == (family,)
        assert not room.ready
        assert room.dataplane.refusals.reasons() == {}
        whole = OTHER[family]
        assert scene.has("web", whole)
        assert (scene.number(2, whole) or 0) >= FIRST_CLASS
        assert (scene.number(2, family) or UNKNOWN) == UNKNOWN, "nothing opens"
        repair()
        assert await until(lambda: room.in_sync), room.status
        assert clean(scene, family)
        assert clean(scene, whole)
        assert scene.number(2, family) == scene.number(2, whole)
        assert room.status.down == ()


@BROKEN
@HARMS
async def test_changes_of_all_kinds_while_it_lasts(scene: Scene, family: Family, harm) -> None:
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        whole = OTHER[family]
        kept = scene.number(2, family)
        repair = harm(scene, family)
        took_s = []
        # A table transaction for each; of the broken family the first is tried, and then left alone.
        for number in range(4, 10):
            began_s = asyncio.get_running_loop().time()
            scene.policy(f"p{number}", make.pods(role="web"))
            scene.tell()
            await asyncio.sleep(0)
            scene.pod(f"p{number}", number, role=f"p{number}")
            scene.policy("web", make.pods(role=f"p{number}"))
            scene.tell()
            generation = room.generation
            assert await until(lambda g=generation: room.status.applied_generation == g)
            took_s.append(asyncio.get_running_loop().time() - began_s)
            assert scene.has("web", whole)
            assert scene.has(f"p{number}", whole)
            assert (scene.number(number, whole) or 0) >= FIRST_CLASS
            # What cannot be read is found by a look.
            assert await until(lambda: room.status.down == (family,))
        assert statistics.median(took_s) < 0.2, "a change of what works waits for what does not"
        assert clean(scene, whole)
        assert room.status.error.startswith(f"IPv{family}: ")
        if harm is not _squatted_map:
            assert scene.number(2, family) == kept, "a pod keeps its last rules"
        for number in range(5, 10):
            assert scene.number(number, family) in {None, UNKNOWN}, "a new one is held"
        # Pod churn alone, and a pod that leaves.
        scene.pod("web2", 20, role="web")
        scene.graph.remove_pod(ObjectKey("a", "db"))
        scene.tell()
        generation = room.generation
        assert await until(lambda: room.status.applied_generation == generation)
        assert scene.number(20, whole) == scene.number(2, whole)
        assert scene.number(3, whole) is None
        repair()
        assert await until(lambda: room.in_sync), room.status
        assert clean(scene, family)
        assert clean(scene, whole)
        assert scene.number(20, family) == scene.number(20, whole)


async def test_an_address_that_leaves_does_not_hand_on_its_class(scene: Scene) -> None:
    """Though its family is down: the next pod with the address is held there."""
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        free = 30
        scene.pod("free", free)
        scene.tell()
        assert await until(lambda: room.in_sync), room.status
        assert scene.number(free, Family.V6) == NONE
        repair = _refuses(scene, Family.V6)
        scene.policy("web", make.pods(role="x"))
        scene.tell()
        assert await until(lambda: room.status.down == (Family.V6,))
        # In one go, and one after the other.
        scene.graph.remove_pod(ObjectKey("a", "free"))
        scene.pod("taken", free, role="db")
        scene.graph.remove_pod(ObjectKey("a", "web"))
        scene.tell()
        generation = room.generation
        assert await until(lambda: room.status.applied_generation == generation)
        assert scene.number(free, Family.V6) == UNKNOWN
        assert scene.number(2, Family.V6) is None
        assert scene.number(free, Family.V4) == scene.number(3, Family.V4)
        scene.pod("late", 2, role="db")
        scene.tell()
        generation = room.generation
        assert await until(lambda: room.status.applied_generation == generation)
        assert scene.number(2, Family.V6) == UNKNOWN
        assert scene.number(2, Family.V4) == scene.number(3, Family.V4)
        repair()
        assert await until(lambda: room.in_sync), room.status
        assert scene.number(free, Family.V6) == scene.number(2, Family.V6)


async def test_drift_of_the_family_that_works_is_repaired(scene: Scene) -> None:
    _no_tools(scene, Family.V6)
    async with scene.running() as room:
        assert await until(lambda: room.status.down == (Family.V6,))
        scene.tables.table(TABLE, Family.V4).chains[names.OK] = [Rule(Drop())]
        assert await until(lambda: room.status.drifts > 0), room.status
        assert await until(lambda: clean(scene, Family.V4)), room.status
        assert "KNP-OK" in room.status.drift


async def test_a_broken_family_is_tried_with_growing_pauses(scene: Scene) -> None:
    _refuses(scene, Family.V6)
    async with scene.running() as room:
        assert await until(lambda: room.status.down == (Family.V6,))
        scene.tables.tried.clear()
        await asyncio.sleep(2.0)
        tried = [tx for tx in scene.tables.tried if tx.family is Family.V6]
        # After 0.5 and 1.5 s: the transaction, and one that changes nothing.
        assert 2 <= len(tried) <= 6
        assert not [tx for tx in scene.tables.tried if tx.family is Family.V4]
        # Changes do not hasten it.
        scene.tables.tried.clear()
        for _ in range(20):
            scene.pod("more", 40, role="web")
            scene.tell()
            scene.graph.remove_pod(ObjectKey("a", "more"))
            scene.tell()
            await asyncio.sleep(0.01)
        assert len(scene.tables.tried) <= 2


async def test_a_refused_policy_beside_a_broken_family(scene: Scene) -> None:
    """Both at once: each is said, and what is left is up to date."""
    scene.graph.flush(together=True)
    bad = scene.chain("db")

    def refuse(tx: TableTransaction) -> Exception | None:
        if tx.family is Family.V6 or bad in tx.replace:
            return TableError("refused", retryable=False, got="Invalid argument")
        return None

    scene.tables.refuses = refuse
    async with scene.running() as room:
        assert await until(lambda: bool(room.status.down)), room.status
        assert list(room.dataplane.refusals.reasons()) == [ObjectKey("a", "db")]
        assert scene.has("web", Family.V4)
        assert scene.number(3, Family.V4) == UNKNOWN
        scene.policy("web", make.pods(role="z"))
        scene.tell()
        assert await until(lambda: scene.has("web", Family.V4), 0.4)


async def test_both_families_broken_and_back_one_by_one(scene: Scene) -> None:
    error = TableError("refused", retryable=False, got="Invalid argument")
    broken = set(FAMILIES)
    scene.tables.refuses = lambda tx: error if tx.family in broken else None
    async with scene.running() as room:
        assert await until(lambda: "IPv4" in room.status.error and "IPv6" in room.status.error)
        assert room.status.applied_at_s is None
        broken.remove(Family.V4)
        assert await until(lambda: room.status.down == (Family.V6,)), room.status
        assert clean(scene, Family.V4)
        broken.clear()
        assert await until(lambda: room.in_sync), room.status


async def test_the_hold_of_a_fresh_node_is_written_for_the_family_that_works(scene: Scene) -> None:
    _no_tools(scene, Family.V6)
    assert await scene.room.hold()
    chains = scene.tables.table(TABLE, Family.V4).chains
    assert names.hook_chain(next(iter(scene.tables.table(TABLE, Family.V4).hooks))) in chains
    held = scene.sets.state[names.class_map(Direction.INGRESS, Family.V4)].members
    assert held[churn.NODES[0].pod_cidrs[0]] == scene.options.mark(UNKNOWN)
    scene.room.close()


async def test_the_mark_field_of_a_family_is_compared_once_it_can_be_read(scene: Scene) -> None:
    async with scene.running() as room:
        assert await until(lambda: room.in_sync)
    repair = _unreadable(scene, Family.V6)
    scene.options = churn.options_of(churn.NARROW)
    async with scene.running() as room:
        with pytest.raises(InputError, match="mark field"):
            await room.check_mask()
    # The other family was cleaned up, this one could not be.
    for found in (scene.tables.state, scene.sets.state):
        for key in [k for k in found if "4" in str(k) and "6" not in str(k)]:
            del found[key]
    scene.tables.state.pop((TABLE, Family.V4), None)
    async with scene.running() as room:
        await room.check_mask()
        assert await until(lambda: room.status.down == (Family.V6,)), room.status
        before = dict(scene.tables.table(TABLE, Family.V6).chains)
        repair()
        assert await until(lambda: "mark field" in room.status.error), room.status
        assert scene.tables.table(TABLE, Family.V6).chains == before


async def test_families_that_disagree_about_a_number_do_not_mix_classes(scene: Scene) -> None:
    """One could not be read when the other gave a number away."""
    async with scene.running() as room:
        assert await until(lambda: room.in_sync)
    old = scene.number(2, Family.V6)
    repair = _unreadable(scene, Family.V6)
    # All of IPv4 is lost, and others come first in order of name.
    scene.tables.state.pop((TABLE, Family.V4))
    scene.graph.remove_pod(ObjectKey("a", "web"))
    scene.graph.remove_pod(ObjectKey("a", "db"))
    for number in range(4, 9):
        scene.pod(f"q{number}", number, role=f"q{number}")
        scene.policy(f"q{number}", make.pods(role="web"))
    async with scene.running() as room:
        assert await until(lambda: room.status.down == (Family.V6,))
        scene.pod("web", 2, role="web")
        scene.tell()
        assert await until(lambda: (scene.number(2, Family.V4) or 0) >= FIRST_CLASS)
        assert old in {scene.number(n, Family.V4) for n in range(4, 9)}
        repair()
        assert await until(lambda: room.in_sync), room.status
        assert clean(scene, Family.V4)
        assert clean(scene, Family.V6)
        numbers = [scene.number(n, f) for n in (2, *range(4, 9)) for f in FAMILIES]
        assert old not in numbers
        assert len(set(numbers)) == 6
        assert scene.number(2, Family.V4) == scene.number(2, Family.V6)


async def test_a_set_error_of_one_family_is_that_familys(scene: Scene) -> None:
    """A full map is no policy's fault."""
    full = names.class_map(Direction.EGRESS, Family.V6)
    apply = scene.sets.apply

    def refuse(tx) -> None:
        if any(getattr(op, "spec", None) and op.spec.name == full for op in tx.ops):
            raise SetError(f"set {full} is full", name=SetName(full), code=4352)
        apply(tx)

    scene.sets.apply = refuse  # type: ignore[method-assign]
    async with scene.running() as room:
        assert await until(lambda: room.status.down == (Family.V6,)), room.status
        assert "is full" in room.status.error
        assert clean(scene, Family.V4)
        entry = host_prefix(parse_address("10.0.1.2"))
        assert entry in scene.sets.state[names.class_map(Direction.EGRESS, Family.V4)].members


async def test_an_address_that_leaves_does_not_hand_on_what_it_was_allowed(scene: Scene) -> None:
    """As a peer of others: it leaves the sets of a family that is down, too."""
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        repair = _refuses(scene, Family.V6)
        scene.policy("web", make.pods(role="db"), make.pods(role="x"))
        scene.tell()
        assert await until(lambda: room.status.down == (Family.V6,))
        assert scene.sets_with("fd00:0:1::3")
        scene.graph.remove_pod(ObjectKey("a", "db"))
        assert await scene.told()
        assert scene.sets_with("fd00:0:1::3") == []
        scene.pod("stranger", 3, role="stranger")
        assert await scene.told()
        assert scene.sets_with("fd00:0:1::3") == []
        repair()
        assert await until(lambda: room.in_sync), room.status
        assert clean(scene, Family.V6)


async def test_a_member_that_is_too_much_goes_though_the_table_is_refused_just_now(
    scene: Scene,
) -> None:
    """The very plan that fails: it would be the first step behind the table's."""
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        _refuses(scene, Family.V6)
        scene.policy("db", make.pods(role="web"), make.pods(role="x"))
        scene.graph.remove_pod(ObjectKey("a", "web"))
        scene.pod("stranger", 2, role="stranger")
        room.resync()
        assert await until(lambda: room.status.down == (Family.V6,))
        assert await scene.told()
        assert scene.sets_with("fd00:0:1::2") == []


async def test_without_a_hold_an_isolated_pod_is_held_where_its_family_is_down(
    scene: Scene,
) -> None:
    scene.options = replace(scene.options, hold_ranges=())
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        repair = _refuses(scene, Family.V6)
        scene.policy("web", make.pods(role="x"))
        scene.tell()
        assert await until(lambda: room.status.down == (Family.V6,))
        kept = scene.number(2, Family.V6)
        scene.pod("late", 9, role="web")
        scene.pod("free", 10)
        assert await scene.told()
        assert scene.number(9, Family.V6) == UNKNOWN
        assert scene.number(10, Family.V6) is None
        assert scene.number(2, Family.V6) == kept
        repair()
        assert await until(lambda: room.in_sync), room.status
        assert scene.number(9, Family.V6) == kept


@BROKEN
@HARMS
async def test_an_entry_of_nobody_knows_whom_is_not_believed(
    scene: Scene, family: Family, harm
) -> None:
    """Another agent finds a family down, and in its map the entry of an open pod that is no more."""
    scene.pod("open", 30)
    async with scene.running() as room:
        assert await until(lambda: room.in_sync), room.status
        kept = scene.number(2, family)
    scene.graph.remove_pod(ObjectKey("a", "open"))
    scene.pod("shut", 30, role="web")
    scene.policy("web", make.pods(role="x"))
    harm(scene, family)
    async with scene.running() as room:
        assert await until(lambda: room.status.down == (family,))
        assert scene.number(30, family) in {None, UNKNOWN}
        if harm is not _squatted_map:
            assert scene.number(2, family) == kept, "an entry that is right stays"
        assert scene.number(30, OTHER[family]) == scene.number(2, OTHER[family])
