"""Classes: the chain that judges one, the tree that finds it, the maps that name it.

A class number travels in the mark field. The tree takes two bits at a time from the top of the bits in use
(fewer misses on the way beat fewer levels: measured); every leaf compares the whole field, so a number
beyond the tree cannot be mistaken for another. What no leaf takes ends in the chain of held pods, which
drops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from netpol.model.ids import ChainName, Direction, SetName
from netpol.model.net import Family, family_of, host_prefix
from netpol.model.ruleset import (
    Chain,
    Goto,
    Jump,
    MarkMatch,
    Members,
    Return,
    Rule,
    SameAddress,
    SetKind,
    SetMatch,
    SetSpec,
    Side,
)
from netpol.policy.graph import ClassKey, LocalPod
from netpol.render import names, reject
from netpol.render.logprefix import DropReason, LogPrefix
from netpol.render.options import FIRST_CLASS, NONE, OPEN, OVERFLOW, UNKNOWN, RenderOptions
from netpol.render.policies import comment_of
from netpol.render.static import deny, log

#: RFC 919 section 7: every host of the link, and no other.
_LIMITED_BROADCAST = b"\xff\xff\xff\xff"
_DIGIT_BITS = 2


def class_rules(key: ClassKey, options: RenderOptions, family: Family) -> Chain:
    """The chain of a class: each policy, and the end that denies."""
    out: list[Rule] = []
    allowed = Rule(Return(), (MarkMatch(0, options.field_mask),))
    for policy in key.policies:
        chain = names.policy_chain(policy, key.direction)
        out += [Rule(Jump(chain), (), comment_of(policy.key)), allowed]
    # A pod that reaches itself through a Service (the backend was chosen before this hook).
    out.append(Rule(Goto(names.OK), (SameAddress(family),)))
    prefix = LogPrefix(DropReason.DENIED, key.direction, names.class_id(key))
    if options.rejects:
        out += [log(prefix, options), reject.mark_denied(options)]
    else:
        out += deny(prefix, options)
    return tuple(out)


def tree_chains(
    direction: Direction,
    numbers: Mapping[ClassKey, int],
    overflow: Iterable[ClassKey],
    *,
    options: RenderOptions,
    family: Family,
    extra: Mapping[int, ChainName] | None = None,
) -> dict[ChainName, Chain]:
    """The dispatch tree of a direction, and the chain of overflow classes.

    `extra` are leaves beside those of `numbers`, for classes that are on their way out.
    """
    leaves: dict[int, ChainName] = {
        **(extra or {}),
        OPEN: names.OK,
        OVERFLOW: names.overflow_chain(direction),
    }
    for key, number in numbers.items():
        if key.direction is direction:
            leaves[number] = names.class_chain(key)
    held = Rule(Goto(names.held_chain(direction)))
    over = [
        Rule(
            Goto(names.class_chain(key)),
            (SetMatch(names.overflow_set(key, family), (_side(direction),)),),
        )
        for key in sorted(overflow)
        if key.direction is direction
    ]
    out: dict[ChainName, Chain] = {names.overflow_chain(direction): (*over, held)}
    digits = max(1, -(-max(leaves).bit_length() // _DIGIT_BITS))
    _node(out, leaves, "", digits, direction=direction, options=options, held=held)
    return out


def _side(direction: Direction) -> Side:
    return Side.DST if direction is Direction.INGRESS else Side.SRC


def _node(
    out: dict[ChainName, Chain],
    leaves: Mapping[int, ChainName],
    path: str,
    digits: int,
    *,
    direction: Direction,
    options: RenderOptions,
    held: Rule,
) -> None:
    """Write the tree node for numbers whose leading digits (base 4) are `path`."""
    rules: list[Rule] = []
    if digits == 1:
        for number, chain in sorted(leaves.items()):
            match = MarkMatch(options.mark(number), options.field_mask)
            rules.append(Rule(Goto(chain), (match,)))
    else:
        low = _DIGIT_BITS * (digits - 1)
        groups: dict[int, dict[int, ChainName]] = {}
        for number, chain in leaves.items():
            groups.setdefault(number >> low, {})[number] = chain
        # All bits of the field from here up: a narrower field has fewer in its top digit.
        mask = options.field_mask & (options.field_mask << low)
        for group, below in sorted(groups.items()):
            child = f"{path}{group % (1 << _DIGIT_BITS):x}"
            match = MarkMatch(options.mark(group << low), mask)
            rules.append(Rule(Goto(names.tree_chain(direction, child)), (match,)))
            _node(out, below, child, digits - 1, direction=direction, options=options, held=held)
    out[names.tree_chain(direction, path)] = (*rules, held)


# -- maps and the sets of local pods ------------------------------------------------------------


def map_spec(direction: Direction, family: Family) -> SetSpec:
    """The class map of a direction."""
    return SetSpec(names.class_map(direction, family), SetKind.HASH_NET, family, marks=True)


def overflow_spec(key: ClassKey, family: Family) -> SetSpec:
    """The address set of an overflow class."""
    return SetSpec(names.overflow_set(key, family), SetKind.HASH_IP, family)


def map_number(pod: LocalPod, direction: Direction, numbers: Mapping[ClassKey, int]) -> int:
    """The number that stands for a local pod in a class map.

    A pod without a class is OPEN as a source, so that the source check knows it, and NONE as a
    destination, where nothing needs to know it.
    """
    key = pod.class_of(direction)
    if key is None:
        return OPEN if direction is Direction.EGRESS else NONE
    return numbers.get(key, OVERFLOW)


def fixed_map_members(direction: Direction, options: RenderOptions, family: Family) -> Members:
    """The entries that no pod makes: held ranges, the node's own addresses inside them, broadcast.

    As a source an own address needs no entry: OUTPUT lets it pass by address, and on a pod interface
    it is forged.
    """
    out: dict[object, int | None] = {
        r: options.mark(UNKNOWN) for r in options.hold_ranges if r.family is family
    }
    if direction is Direction.INGRESS:
        if family is Family.V4 and options.pod_interfaces:
            out[host_prefix(_LIMITED_BROADCAST)] = options.mark(UNKNOWN)
        for address in options.own_addresses:
            if family_of(address) is family:
                out[host_prefix(address)] = options.mark(NONE)
    return out  # type: ignore[return-value]  # keys are Prefix


def pod_set_members(
    pod: LocalPod,
    numbers: Mapping[ClassKey, int],
    options: RenderOptions,
    family: Family,
) -> dict[SetName, tuple[SetSpec, Members]]:
    """Everything that a local pod has in the sets of one family."""
    out: dict[SetName, tuple[SetSpec, Members]] = {}
    own = [a for a in pod.addresses if family_of(a) is family]
    if not own:
        return out
    for direction in Direction:
        number = map_number(pod, direction, numbers)
        spec = map_spec(direction, family)
        out[spec.name] = spec, {host_prefix(a): options.mark(number) for a in own}
        key = pod.class_of(direction)
        if key is not None and number == OVERFLOW:
            spec = overflow_spec(key, family)
            out[spec.name] = spec, dict.fromkeys(own)
    return out


def number_capacity(options: RenderOptions) -> int:
    """How many classes of a direction can have a number."""
    return (1 << options.width) - FIRST_CLASS
