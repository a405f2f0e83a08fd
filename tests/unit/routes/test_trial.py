"""What stays, what is gone back to, and when a change is tried again."""

from __future__ import annotations

import dataclasses

from netpol.lib.errors import NoAnswerError
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import Node
from routes.options import ExternalPeer, OverlayMode, RouteOptions
from routes.plan import plan
from routes.trial import AGAIN_S, TRIAL_S, Ground, Step, Trials, risk


def ground(*, asn: int = 64512, address: str = "10.0.1.1", overlay: str = "never") -> Ground:
    node = Node(
        name="n1",
        addresses=(parse_address(address),),
        pod_cidrs=(parse_prefix("10.1.1.0/24"),),
    )
    options = RouteOptions(asn=asn, overlay=OverlayMode(overlay))
    return Ground(node, options, risk(plan([node], "n1", options)))


async def yes() -> bool:
    return True


async def no() -> bool:
    return False


async def no_answer() -> bool:
    raise NoAnswerError("BIRD")


def step(trials: Trials, of: Ground, *, now_s: float = 0.0, way_back: bool = True) -> Step:
    return trials.choose(of, now_s=now_s, way_back=way_back)


def on_proven_ground() -> Trials:
    trials = Trials()
    assert step(trials, ground()) is Step.GO  # the first of all
    trials.stands(ground())
    return trials


async def test_a_risky_change_that_proves_itself_is_the_new_ground() -> None:
    for change in (ground(asn=1), ground(address="10.0.1.9"), ground(overlay="always")):
        trials = on_proven_ground()
        assert step(trials, change) is Step.TRY
        trials.begin(change, no, now_s=0)
        assert step(trials, change) is Step.GO  # what else changes meanwhile goes on
        assert await trials.judge(1) is None
        trials.begin(change, yes, now_s=1)
        assert trials.running
        good = Trials()
        good.stands(ground())
        good.begin(change, yes, now_s=0)
        assert await good.judge(1) is True
        assert not good.running
        assert good.proven == change
        assert step(good, change) is Step.GO


async def test_one_that_does_not_is_gone_back_from_and_held_off_for_a_while() -> None:
    trials, change = on_proven_ground(), ground(asn=1)
    trials.begin(change, no_answer, now_s=0)
    assert await trials.judge(TRIAL_S - 1) is None
    assert await trials.judge(TRIAL_S) is False
    assert trials.reverts == 1
    assert trials.proven == ground()
    assert step(trials, change, now_s=TRIAL_S + 1) is Step.HOLD
    assert step(trials, ground(asn=2), now_s=TRIAL_S + 1) is Step.TRY
    assert step(trials, change, now_s=TRIAL_S + AGAIN_S) is Step.TRY
    assert step(trials, ground(), now_s=TRIAL_S + 1) is Step.GO


async def test_a_second_change_on_trial_is_measured_by_what_worked_before_the_first() -> None:
    trials, first, second = on_proven_ground(), ground(asn=1), ground(asn=2)
    trials.begin(first, no, now_s=0)
    assert step(trials, second) is Step.TRY
    trials.begin(second, yes, now_s=5)
    assert await trials.judge(6) is None
    assert await trials.judge(5 + TRIAL_S) is False
    assert trials.proven == ground()


async def test_taking_a_change_back_by_hand_ends_its_trial() -> None:
    trials = on_proven_ground()
    trials.begin(ground(asn=1), no, now_s=0)
    assert step(trials, ground()) is Step.GO
    trials.stands(ground())
    assert not trials.running
    assert await trials.judge(1000) is None


async def test_one_that_bird_refuses_leaves_the_trial_before_it() -> None:
    trials = on_proven_ground()
    trials.begin(ground(asn=1), yes, now_s=0)
    trials.begin(ground(asn=2), yes, now_s=1)
    trials.refused()
    assert await trials.judge(2) is True
    assert trials.proven == ground(asn=1)


def test_a_password_alone_is_not_tried() -> None:
    """The router changes its own at another moment."""

    def with_password(text: str) -> Ground:
        peer = ExternalPeer(address=parse_address("10.0.1.254"), asn=65000, password=text)
        base = ground()
        options = dataclasses.replace(base.options, peers=(peer,))
        return Ground(base.node, options, risk(plan([base.node], "n1", options)))

    trials = Trials()
    trials.stands(with_password("one"))
    assert step(trials, with_password("two")) is Step.GO
    assert step(trials, ground()) is Step.TRY


def test_an_address_that_has_left_the_machine_is_nothing_to_go_back_to() -> None:
    assert step(on_proven_ground(), ground(address="10.0.1.9"), way_back=False) is Step.GO


def test_the_present_facts_on_proven_ground() -> None:
    now = dataclasses.replace(ground(asn=1), options=RouteOptions(asn=1, drain=True))
    node, options = ground().under(now.node, now.options)
    assert (options.asn, options.drain) == (64512, True)
    assert node.pod_cidrs == now.node.pod_cidrs
