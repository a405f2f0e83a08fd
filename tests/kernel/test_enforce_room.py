"""The policy room on a kernel that others write too: what it repairs, leaves out and never touches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from netpol.kernel.drivers import Variant
from netpol.model.ids import Direction, ObjectKey
from netpol.model.net import Family, host_prefix, parse_address
from netpol.policy.graph import sets_of
from netpol.render import names
from netpol.render.options import UNKNOWN
from tests import builders as make
from tests.kernel.roomhost import Host, pod, policy, until
from tests.prop import churn

pytestmark = pytest.mark.kernel


WORLD = (
    pod("web", 2, role="web"),
    pod("db", 3, role="db"),
    pod("free", 4),
    policy("web", "web", make.pods(role="db")),
    policy("db", "db", make.pods(role="web"), make.block("192.0.2.0/24", "192.0.2.4/30")),
)


@pytest.fixture(params=list(Variant))
def host(request: pytest.FixtureRequest, space: str) -> Host:
    host = Host(space, request.param)
    host.foreigners()
    return host


def _set_of(host: Host, prefix: str) -> str:
    listed = host.run("ipset", "list", "-n").split()
    return next(
        n for n in listed if n.startswith(prefix) and "add " + n in host.run("ipset", "save")
    )


def _flush_chain(host: Host) -> None:
    host.iptables("-t", "mangle", "-F", "KNP-FORWARD")


def _delete_jump(host: Host) -> None:
    host.iptables("-t", "mangle", "-D", "FORWARD", "-j", "KNP-FORWARD")


def _insert_before(host: Host) -> None:
    host.iptables("-t", "mangle", "-I", "FORWARD", "1", "-j", "KNOT")
    host.iptables("-t", "mangle", "-I", "INPUT", "1", "-j", "KNOT", family=Family.V6)


def _append_rule(host: Host) -> None:
    host.iptables("-t", "mangle", "-I", "KNP-FORWARD", "1", "-j", "ACCEPT")


def _second_jump(host: Host) -> None:
    host.iptables("-t", "mangle", "-A", "FORWARD", "-j", "KNP-FORWARD")


def _flush_mangle(host: Host) -> None:
    """What a careless `iptables -F` does; the foreign rules go with ours, so they are put back."""
    saved = host.run(host.tool(Family.V4, "-save"), "-t", "mangle")
    own = [r for r in saved.splitlines() if "KNP-" not in r]
    host.iptables("-t", "mangle", "-F")
    host.iptables("-t", "mangle", "-X")
    host.run(host.tool(Family.V4, "-restore"), stdin="\n".join(own) + "\n")


def _delete_members(host: Host) -> None:
    for name in host.run("ipset", "list", "-n").split():
        if name.startswith("KNP-"):
            host.run("ipset", "flush", name)


def _add_members(host: Host) -> None:
    host.run("ipset", "add", _set_of(host, "KNP-A4-"), "203.0.113.9")
    host.run("ipset", "add", "KNP-IMAP4", "10.0.1.9", "skbmark", "0x00200000/0xfff00000")


def _change_class(host: Host) -> None:
    host.run("ipset", "-!", "add", "KNP-IMAP4", "10.0.1.2", "skbmark", "0x0/0xfff00000")


def _foreign_chain_in_our_name(host: Host) -> None:
    host.iptables("-t", "mangle", "-N", "KNP-STRANGER")


def _foreign_set_in_our_name(host: Host) -> None:
    host.run("ipset", "create", "KNP-A4-stranger", "hash:ip")


async def test_a_flush_in_a_quiet_time_is_noticed_soon(space: str) -> None:
    """By the kernel's count of transactions, where the next look is half a minute away."""
    host = Host(space, Variant.NFT)
    host.foreigners()
    host.tell(*WORLD)
    async with host.room() as room:
        assert await until(lambda: room.ready)
        right = host.state()
        await asyncio.sleep(1.0)
        room._upkeep.pause_s = 30.0
        assert await until(lambda: room._upkeep.pause_s == 30.0 and not room.runner.pending)
        await asyncio.sleep(1.0)
        assert not room.status.drifts
        await asyncio.to_thread(_flush_mangle, host)
        assert await until(lambda: host.state() == right, 4.0), room.status


@pytest.mark.parametrize(
    "harm",
    [
        _flush_chain,
        _delete_jump,
        _insert_before,
        _append_rule,
        _second_jump,
        _flush_mangle,
        _delete_members,
        _add_members,
        _change_class,
        _foreign_chain_in_our_name,
        _foreign_set_in_our_name,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
async def test_what_others_do_to_ours_is_undone(host: Host, harm: Callable[[Host], None]) -> None:
    host.tell(*WORLD)
    async with host.room() as room:
        assert await until(lambda: room.ready)
        right = host.state()
        await asyncio.to_thread(harm, host)
        assert host.state() != right
        foreign = host.foreign()
        assert await until(lambda: host.state() == right), room.status
        assert room.status.drifts >= 1
        assert room.status.drift
        assert room.ready
        assert host.foreign() == foreign


async def test_foreign_rules_and_sets_stay_byte_for_byte(host: Host) -> None:
    """From the first apply over changes and restarts to the last pod's end."""
    before = host.foreign()
    dice = churn.Dice(5, pods=8, addresses=10)
    objects = churn.Objects()
    host.tell(*dice.fill(3))
    for _ in range(3):
        async with host.room() as room:
            assert await until(lambda room=room: room.in_sync)
            assert host.foreign() == before
            for _ in range(5):
                event = dice.event(objects)
                event.happen(objects)
                host.tell(event)
                room.changed()
                assert await until(lambda room=room: room.in_sync), room.status
            assert host.foreign() == before
        assert host.foreign() == before


async def test_a_restart_keeps_the_rules_and_writes_only_the_difference(host: Host) -> None:
    host.tell(*WORLD)
    async with host.room() as room:
        assert await until(lambda: room.ready)
    right = host.state()
    async with host.room() as room:
        assert await until(lambda: room.ready)
        assert room.status.applies == 0
        assert host.state() == right
    host.tell(pod("more", 5, role="web"))
    async with host.room() as room:
        assert await until(lambda: room.ready)
        assert (room.status.applies, room.status.table_transactions) == (1, 0)


async def test_garbage_goes_after_a_while(host: Host) -> None:
    host.tell(*WORLD)
    async with host.room() as room:
        assert await until(lambda: room.ready)
        full = host.run("ipset", "list", "-n").split()
        host.tell(
            churn.Event("policies", ObjectKey("a", "web"), None),
            churn.Event("policies", ObjectKey("a", "db"), None),
        )
        room.changed()
        assert await until(lambda: room.in_sync)

        def clean() -> bool:
            listed = set(host.run("ipset", "list", "-n").split())
            mangle = host.run(host.tool(Family.V4, "-save"), "-t", "mangle")
            kept = {"KNP-IMAP4", "KNP-IMAP6", "KNP-EMAP4", "KNP-EMAP6"}
            ours = {n for n in listed if n.startswith("KNP-")}
            return ours == kept and "KNP-PI-" not in mangle and "KNP-CI-" not in mangle

        assert not clean()
        assert await until(clean, 8.0), room.status
        assert len(full) > 4
        assert room.status.failures == 0, room.status.error


async def test_a_changed_block_leaves_no_set_behind(host: Host) -> None:
    """Sets of prefixes are named by their contents: each edit of a policy makes a new one."""
    host.tell(*WORLD)
    async with host.room() as room:
        assert await until(lambda: room.ready)
        for hole in ("192.0.2.8/30", "192.0.2.16/30", "192.0.2.32/30"):
            host.tell(policy("db", "db", make.block("192.0.2.0/24", hole)))
            room.changed()
            assert await until(lambda: room.in_sync)

        def one() -> bool:
            listed = host.run("ipset", "list", "-n").split()
            return sum(n.startswith("KNP-N4-") for n in listed) == 1

        assert await until(one, 8.0)


@pytest.mark.parametrize("kind", ["bitmap:port range 0-99", "hash:net", "hash:ip timeout 9"])
async def test_a_refused_policy_stays_alone(host: Host, kind: str) -> None:
    """A foreign set of another type has the name that a policy needs: all others are up to date."""
    squatted = names.member_set(
        next(iter(_peers_of(policy("x", "web", make.pods(role="squat"))))), Family.V4
    )
    host.tell(*WORLD)
    async with host.room() as room:
        assert await until(lambda: room.ready)
        right = host.state()
        host.run("ipset", "create", squatted, *kind.split())
        # It selects a pod that has rules already, then one that has none.
        host.tell(policy("bad", "db", make.pods(role="squat")))
        room.changed()
        assert await until(lambda: room.in_sync and bool(room.dataplane.refusals)), room.status
        host.tell(pod("new", 7, role="db"), pod("web2", 8, role="web"))
        room.changed()
        assert await until(lambda: room.in_sync)
        assert list(room.dataplane.refusals.reasons()) == [ObjectKey("a", "bad")]
        sets_before, sets_now = right[0], host.maps()
        old = host_prefix(parse_address("10.0.1.3"))
        kept = names.class_map(Direction.INGRESS, Family.V4)
        assert sets_now[kept][old] == sets_before[kept][1][old], "the pod keeps its last rules"
        fresh = sets_now[kept][host_prefix(parse_address("10.0.1.7"))]
        assert fresh == churn.options_of(host.field_mask).mark(UNKNOWN), "one without rules is held"
        web = sets_now[kept][host_prefix(parse_address("10.0.1.2"))]
        assert sets_now[kept][host_prefix(parse_address("10.0.1.8"))] == web
        assert not await until(lambda: room.status.drifts > 0, 1.0), room.status.drift
        # Another policy still changes in the meantime.
        host.tell(policy("web", "web", make.pods(role="other")))
        room.changed()
        assert await until(lambda: room.in_sync)
        assert names.member_set(
            next(iter(_peers_of(policy("x", "web", make.pods(role="other"))))), Family.V4
        ) in host.run("ipset", "list", "-n")
        # The cure: the policy changes to what can be applied.
        host.tell(policy("bad", "db", make.pods(role="web")))
        room.changed()
        assert await until(lambda: room.in_sync and not room.dataplane.refusals)
        final = host.maps()[kept]
        assert final[old] == final[host_prefix(parse_address("10.0.1.7"))]
        assert final[old] != sets_before[kept][1][old]
        assert kind.split(maxsplit=1)[0] in host.run("ipset", "list", squatted)


@pytest.mark.parametrize("kind", ["bitmap:port range 0-99", "hash:net"])
async def test_a_foreign_set_in_the_place_of_a_class_map_is_said(host: Host, kind: str) -> None:
    """Nothing works without it; once it is gone, everything does."""
    host.run("ipset", "create", "KNP-IMAP4", *kind.split())
    host.tell(*WORLD)
    async with host.room() as room:
        assert await until(lambda: bool(room.status.error))
        assert "KNP-IMAP4" in room.status.error
        assert not room.ready
        host.run("ipset", "destroy", "KNP-IMAP4")
        assert await until(lambda: room.ready, 10.0), room.status
        assert room.status.error == ""


def _peers_of(event: churn.Event) -> list[object]:
    return list(sets_of(event.value))
